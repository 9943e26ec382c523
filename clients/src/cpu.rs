//! `guest cpu` and `guest pin`: what a guest's vCPUs do, where they run, and what share of the host they have.

use anyhow::Result;
use sepal_schema::{
    cpu_capnp::cpu_controller,
    error::{Error, Outcome, read_completion},
    transport::Handle,
};
use serde::Serialize;

use crate::{
    args::{Cpu, CpuOptions, PinOptions, PinVcpus, Pinned},
    calls,
    figures::state_name,
    manager::Manager,
    place::Place,
    show,
    specs::show_cpus,
    status, table,
};

/// What the host's scheduler gives a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Scheduler {
    /// 0 for the host's default.
    weight: u32,
    /// 0 for no limit.
    percent: u32,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Vcpu {
    index: u8,
    state: &'static str,
    cpu_time_ns: u64,
    wait_time_ns: u64,
    /// 0: it has none.
    host_thread: u32,
    host_cpu: u16,
    cpus: Vec<u16>,
}

#[derive(Debug, Serialize)]
struct Shown {
    vcpus: Vec<Vcpu>,
    scheduler: Scheduler,
}

async fn controller(manager: &Manager, name: &str) -> Result<cpu_controller::Client> {
    let guest = calls::lookup(&manager.client, name).await?;
    let response = guest.cpu_controller_request().send().promise.await?;
    Ok(response.get()?.outcome()?.get_controller()?)
}

/// `guest cpu`.
pub(crate) async fn cpu(handle: &Handle, place: &Place, args: &Cpu) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    share(&controller(&manager, &args.name).await?, &args.options).await
}

/// `guest pin`.
pub(crate) async fn pin(handle: &Handle, place: &Place, args: &PinVcpus) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    pin_vcpus(&controller(&manager, &args.name).await?, &args.options).await
}

/// Shows the vCPUs, or changes their share.
pub(crate) async fn share(controller: &cpu_controller::Client, options: &CpuOptions) -> Result<u8> {
    if options.weight.is_none() && options.limit.is_none() {
        let shown = Shown {
            vcpus: list(controller).await?,
            scheduler: scheduler(controller).await?,
        };
        if options.json {
            show::print_json(&shown)?;
        } else {
            show::print(text(&shown).as_bytes())?;
        }
        return Ok(status::SUCCESS);
    }
    let mut request = controller.set_scheduler_request();
    let mut to = request.get().init_scheduler();
    // What is not named stays.
    let (weight, percent) = match (options.weight, options.limit) {
        (Some(weight), Some(percent)) => (weight, percent),
        (weight, percent) => {
            let before = scheduler(controller).await?;
            (weight.unwrap_or(before.weight), percent.unwrap_or(before.percent))
        }
    };
    to.set_weight(weight);
    to.set_percent(percent);
    read_completion(request.send().promise.await?.get()?)?;
    Ok(status::SUCCESS)
}

/// Pins vCPUs, or shows where they run.
pub(crate) async fn pin_vcpus(controller: &cpu_controller::Client, options: &PinOptions) -> Result<u8> {
    if options.pins.is_empty() {
        let rows = list(controller)
            .await?
            .into_iter()
            .map(|vcpu| [vcpu.index.to_string(), places(&vcpu)]);
        show::print(table::table(&["VCPU", "RUNS ON"], rows).as_bytes())?;
        return Ok(status::SUCCESS);
    }
    for Pinned { vcpu, cpus } in &options.pins {
        let vcpus = match vcpu {
            Some(vcpu) => vec![*vcpu],
            None => list(controller).await?.iter().map(|vcpu| vcpu.index).collect(),
        };
        for vcpu in vcpus {
            let mut request = controller.pin_request();
            request.get().set_vcpu(vcpu);
            request.get().set_cpus(&cpus[..])?;
            read_completion(request.send().promise.await?.get()?)?;
        }
    }
    Ok(status::SUCCESS)
}

async fn list(controller: &cpu_controller::Client) -> Result<Vec<Vcpu>> {
    use cpu_controller::list_result::Which;
    let response = controller.list_request().send().promise.await?;
    let vcpus = match response.get()?.which()? {
        Which::Vcpus(vcpus) => vcpus?,
        Which::Error(error) => return Err(Error::read(error?)?.into()),
    };
    let read = |vcpu: cpu_controller::vcpu::Reader<'_>| {
        Ok(Vcpu {
            index: vcpu.get_index(),
            // A state that came with a later version.
            state: vcpu.get_state().map_or("unknown", state_name),
            cpu_time_ns: vcpu.get_cpu_time_ns(),
            wait_time_ns: vcpu.get_wait_time_ns(),
            host_thread: vcpu.get_host_thread(),
            host_cpu: vcpu.get_host_cpu(),
            cpus: vcpu.get_cpus()?.iter().collect(),
        })
    };
    vcpus.iter().map(read).collect()
}

async fn scheduler(controller: &cpu_controller::Client) -> Result<Scheduler> {
    use cpu_controller::scheduler_result::Which;
    let response = controller.scheduler_request().send().promise.await?;
    match response.get()?.which()? {
        Which::Scheduler(scheduler) => {
            let scheduler = scheduler?;
            Ok(Scheduler {
                weight: scheduler.get_weight(),
                percent: scheduler.get_percent(),
            })
        }
        Which::Error(error) => Err(Error::read(error?)?.into()),
    }
}

/// Where a vCPU may run.
fn places(vcpu: &Vcpu) -> String {
    table::or_dash(&show_cpus(&vcpu.cpus))
}

fn text(shown: &Shown) -> String {
    let rows = shown.vcpus.iter().map(|vcpu| {
        let there = vcpu.host_thread != 0;
        let number = |value: u64| if there { value.to_string() } else { "-".to_owned() };
        [
            vcpu.index.to_string(),
            vcpu.state.to_owned(),
            table::duration(vcpu.cpu_time_ns),
            table::duration(vcpu.wait_time_ns),
            number(vcpu.host_thread.into()),
            number(vcpu.host_cpu.into()),
            places(vcpu),
        ]
    });
    let headings = ["VCPU", "STATE", "CPU TIME", "WAITED", "THREAD", "ON", "MAY RUN ON"];
    let Scheduler { weight, percent } = shown.scheduler;
    let weight = match weight {
        0 => "100 (the host's default)".to_owned(),
        weight => weight.to_string(),
    };
    let limit = match percent {
        0 => "none".to_owned(),
        percent => format!("{percent} % of a processor"),
    };
    let mut text = table::table(&headings, rows);
    text.push_str(&format!("weight {weight}, limit {limit}\n"));
    text
}

#[cfg(test)]
mod tests {
    use sepal_schema::guest_capnp::VcpuState;

    use super::*;

    #[test]
    fn vcpus_are_readable() {
        let vcpu = |index, state, host_thread| Vcpu {
            index,
            state: state_name(state),
            cpu_time_ns: 3_200_000_000,
            wait_time_ns: 0,
            host_thread,
            host_cpu: 5,
            cpus: if host_thread == 0 { vec![] } else { vec![4, 5, 6, 9] },
        };
        let shown = Shown {
            vcpus: vec![vcpu(0, VcpuState::Running, 4711), vcpu(1, VcpuState::Stopped, 0)],
            scheduler: Scheduler {
                weight: 0,
                percent: 150,
            },
        };
        let expected = "\
VCPU  STATE    CPU TIME  WAITED  THREAD  ON  MAY RUN ON
0     running  3.2s      0.0s    4711    5   4-6,9
1     stopped  3.2s      0.0s    -       -   -
weight 100 (the host's default), limit 150 % of a processor
";
        assert_eq!(text(&shown), expected);
    }
}

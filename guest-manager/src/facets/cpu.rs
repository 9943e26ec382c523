//! The vCPUs of a guest, and what the host's scheduler gives them.

use std::rc::Rc;

use sepal_schema::{
    cpu_capnp::cpu_controller,
    error::{Error, write_completion},
    facet::Right,
};

use super::Reply;
use crate::{
    access::{
        facet::facets,
        holder::{Deed, Holder},
    },
    cpu::{self, Share},
};

const LIST: Deed = Deed::new("CpuController.list", &[Right::Observe]);
const PIN: Deed = Deed::new("CpuController.pin", &[Right::Cpu]);
const SCHEDULER: Deed = Deed::new("CpuController.scheduler", &[Right::Observe]);
const SET_SCHEDULER: Deed = Deed::new("CpuController.setScheduler", &[Right::Cpu]);

/// See `cpu.capnp`.
pub(crate) struct CpuServer(pub(crate) Holder);

facets!(CpuServer { 0 });

impl cpu_controller::Server for CpuServer {
    async fn list(self: Rc<Self>, _: cpu_controller::ListParams, mut results: cpu_controller::ListResults) -> Reply {
        match self.0.perform(LIST, "", cpu::list(&self.0.guest)).await {
            Ok(vcpus) => {
                // 64 at most.
                let mut list = results.get().init_vcpus(vcpus.len() as u32);
                for (i, vcpu) in (0..).zip(vcpus) {
                    let mut to = list.reborrow().get(i);
                    to.set_index(vcpu.index);
                    to.set_state(vcpu.state);
                    let Some(seen) = vcpu.seen else { continue };
                    to.set_cpu_time_ns(seen.cpu_time_ns);
                    to.set_wait_time_ns(seen.wait_time_ns);
                    to.set_host_thread(seen.id);
                    to.set_host_cpu(seen.last_cpu);
                    to.set_cpus(&seen.cpus[..])?;
                }
            }
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn pin(self: Rc<Self>, params: cpu_controller::PinParams, mut results: cpu_controller::PinResults) -> Reply {
        let (vcpu, cpus) = {
            let params = params.get()?;
            let cpus: Vec<u16> = params.get_cpus()?.iter().collect();
            (params.get_vcpu(), cpus)
        };
        let detail = match &cpus[..] {
            [] => format!("vcpu{vcpu} to all processors"),
            cpus => format!("vcpu{vcpu} to {}", cpu::ranges(&cpus[..cpus.len().min(32)])),
        };
        let outcome = self.0.perform(PIN, detail, cpu::pin(&self.0.guest, vcpu, cpus)).await;
        write_completion(&outcome, results.get());
        Ok(())
    }

    async fn scheduler(
        self: Rc<Self>,
        _: cpu_controller::SchedulerParams,
        mut results: cpu_controller::SchedulerResults,
    ) -> Reply {
        let share = async {
            self.0.guest.check_live()?;
            Ok::<_, Error>(self.0.guest.cpus.share())
        };
        match self.0.perform(SCHEDULER, "", share).await {
            Ok(share) => {
                let mut to = results.get().init_scheduler();
                to.set_weight(share.weight);
                to.set_percent(share.percent);
            }
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn set_scheduler(
        self: Rc<Self>,
        params: cpu_controller::SetSchedulerParams,
        mut results: cpu_controller::SetSchedulerResults,
    ) -> Reply {
        let share = {
            let share = params.get()?.get_scheduler()?;
            Share {
                weight: share.get_weight(),
                percent: share.get_percent(),
            }
        };
        let Share { weight, percent } = share;
        let detail = format!("weight {weight}, {percent} %");
        let outcome = self
            .0
            .perform(SET_SCHEDULER, detail, cpu::set_share(&self.0.guest, share))
            .await;
        write_completion(&outcome, results.get());
        Ok(())
    }
}

//! Observer and Statistics: what can be known of a guest without disturbing it. Nothing here waits for a vCPU or a device: counters are read as they
//! stand.

use capnp::capability::Rc as ServerRc;
use sepal_schema::guest_capnp::{self, observer, statistics, stats};

use super::{facets, guest::GuestServer, vm::Vm};
use crate::machine::{ExitReason, MachineStats, VcpuState};

type Reply = Result<(), capnp::Error>;

impl observer::Server for GuestServer {
    async fn info(self: ServerRc<Self>, _: observer::InfoParams, mut results: observer::InfoResults) -> Reply {
        self.state.info().write(results.get().init_info());
        Ok(())
    }

    async fn wait(self: ServerRc<Self>, _: observer::WaitParams, mut results: observer::WaitResults) -> Reply {
        let report = self.state.wait().await;
        report
            .ok_or_else(|| capnp::Error::disconnected("the component is ending".into()))?
            .write(results.get().init_report());
        Ok(())
    }

    async fn stats(self: ServerRc<Self>, _: observer::StatsParams, mut results: observer::StatsResults) -> Reply {
        self.write_stats(results.get());
        Ok(())
    }
}

impl statistics::Server for GuestServer {
    async fn get(self: ServerRc<Self>, _: statistics::GetParams, mut results: statistics::GetResults) -> Reply {
        self.write_stats(results.get());
        Ok(())
    }
}

impl GuestServer {
    fn write_stats(&self, to: statistics::stats_result::Builder<'_>) {
        let ask = |vm: &mut dyn Vm| Ok((vm.stats(), vm.devices()));
        match self.with_running(ask) {
            Ok((stats, devices)) => {
                let mut to = to.init_stats();
                write_stats(&stats, to.reborrow());
                let plugged = devices.memory.as_ref().map_or(0, |memory| memory.sizes().plugged);
                let configured = self.state.memory_bytes();
                to.reborrow()
                    .init_memory()
                    .set_guest(configured.saturating_add(plugged));
                facets::write_stats(&devices, to.init_devices());
                if let Some(balloon) = &devices.balloon {
                    self.state.memory_news().ask(&balloon.handle, stats.cpu_time_ns());
                }
            }
            Err(error) => error.write(to.init_error()),
        }
    }
}

fn write_stats(stats: &MachineStats, mut to: stats::Builder<'_>) {
    to.set_serial_dropped(stats.serial_dropped);
    // A guest has 64 vCPUs at most.
    let mut list = to.init_vcpus(stats.vcpus.len() as u32);
    for (i, vcpu) in stats.vcpus.iter().enumerate() {
        let mut to = list.reborrow().get(i as u32);
        let (io, mmio, assists) = (
            vcpu.exits_for(ExitReason::Pio),
            vcpu.exits_for(ExitReason::Mmio),
            vcpu.exits_for(ExitReason::Assist),
        );
        to.set_index(i as u8);
        to.set_cpu_time_ns(vcpu.cpu_time_ns);
        to.set_state(match vcpu.state {
            VcpuState::Stopped => guest_capnp::VcpuState::Stopped,
            VcpuState::Running => guest_capnp::VcpuState::Running,
            VcpuState::Paused => guest_capnp::VcpuState::Paused,
        });
        to.set_exits(vcpu.total());
        to.set_io_exits(io);
        to.set_mmio_exits(mmio);
        to.set_assists(assists);
        to.set_other_exits(
            vcpu.total()
                .saturating_sub(io)
                .saturating_sub(mmio)
                .saturating_sub(assists),
        );
        // There are 13 reasons.
        let reasons: Vec<_> = vcpu.reasons().collect();
        let mut list = to.init_reasons(reasons.len() as u32);
        for (i, (reason, count)) in (0..).zip(reasons) {
            let mut to = list.reborrow().get(i);
            to.set_reason(reason.name());
            to.set_count(count);
        }
    }
}

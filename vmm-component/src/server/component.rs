//! The component's bootstrap capability: decodes requests, asks the controller in the order in which they arrive, and answers.

use std::rc::Rc;

use capnp::capability::Rc as ServerRc;
use sepal_schema::{
    config::{GuestConfig, device::WatchdogAction},
    error::{Error, write_completion},
    info::{GuestDescriptor, write_layers},
    lifecycle_capnp::{component, guest_lifecycle},
    transport::{FdTable, guard},
};

use super::{
    controller::{Attached, Controller, Creation},
    devices::{Requests, descriptor},
    guest,
    host_setup::{self, Host},
    state::Nature,
    successors::Visit,
    vm::VmSpec,
};
use crate::machine::unassisted_cmdline;

/// Names of the devices that every machine has.
const DEVICES: [&str; 4] = ["serial", "rtc", "i8042", "power-button"];

/// Serves `Component` to one manager. Dropping it (the connection has closed, or the last holder has let go) is that manager's leaving.
pub(super) struct ComponentServer {
    controller: Rc<Controller>,
    fds: FdTable,
    visit: Visit,
}

impl ComponentServer {
    /// A server for one connection, whose descriptors arrive by `fds`.
    pub(super) fn client(controller: Rc<Controller>, fds: FdTable, visit: Visit) -> component::Client {
        guard::new_client(Self { controller, fds, visit })
    }

    fn decode(&self, params: &guest_lifecycle::CreateParams) -> Result<Creation, Error> {
        let params = params.get()?;
        // Both first: whichever is refused, the descriptors of the other must not stay behind.
        let config = GuestConfig::decode(params.get_config()?, &self.fds);
        let host = Host::read(params.get_host()?, &self.fds);
        let (mut config, host) = (config?, host?);
        if config.protected_vm {
            let message = "the guest's memory cannot be hidden from the host (field protectedVm)";
            return Err(Error::not_supported("protectedVm", message));
        }
        let kernel = descriptor("kernel", std::mem::take(&mut config.kernel))?.ok_or_else(|| {
            Error::bad_config(
                "kernel",
                "a component has no kernel of its own; the guest manager supplies one",
            )
        })?;
        let initrd = descriptor("initrd", std::mem::take(&mut config.initrd))?;
        let devices = Requests::of(&mut config, host.consoles)?;
        let cmdline = config.full_cmdline();
        let descriptor = GuestDescriptor {
            cpus: config.cpus(),
            memory_mib: config.memory_mib().into(),
            kernel: "fd".into(),
            cmdline: match host.unassisted {
                // The machine adds words of its own there; if they do not fit, create says so.
                true => unassisted_cmdline(&cmdline).unwrap_or_else(|_| cmdline.clone()),
                false => cmdline.clone(),
            },
            devices: DEVICES.into_iter().chain(devices.names()).map(String::from).collect(),
        };
        Ok(Creation {
            spec: VmSpec {
                cpus: config.cpus(),
                memory_mib: config.memory_mib(),
                huge_pages: config.huge_pages,
                custom_memory: config.custom_memory,
                cmdline,
                kernel,
                initrd,
                unassisted: host.unassisted,
                cpuid: host.cpuid,
                serial: host.serial,
                devices,
            },
            nature: Nature {
                descriptor,
                watchdog: match config.watchdog {
                    Some(WatchdogAction::Reset) => "reset",
                    Some(WatchdogAction::Stop) => "stop",
                    Some(WatchdogAction::None) | None => "none",
                },
                durable: host.successors.is_some(),
            },
            host: host.lent,
            successors: host.successors,
        })
    }
}

impl Drop for ComponentServer {
    fn drop(&mut self) {
        self.controller.left(self.visit);
    }
}

// The controller is asked before the returned future is first polled, so that requests which arrive in one round trip keep their order.
impl guest_lifecycle::Server for ComponentServer {
    fn create(
        self: ServerRc<Self>,
        params: guest_lifecycle::CreateParams,
        mut results: guest_lifecycle::CreateResults,
    ) -> impl Future<Output = Result<(), capnp::Error>> + 'static {
        let outcome = self.controller.create(self.decode(&params));
        async move {
            write_completion(&outcome.await, results.get());
            Ok(())
        }
    }

    fn bind(
        self: ServerRc<Self>,
        _: guest_lifecycle::BindParams,
        mut results: guest_lifecycle::BindResults,
    ) -> impl Future<Output = Result<(), capnp::Error>> + 'static {
        let guest = self.controller.bind();
        let fds = self.fds.clone();
        async move {
            let state = guest
                .await
                .map_err(|error| capnp::Error::failed(format!("{}: {}", error.kind_name(), error.message)))?;
            results
                .get()
                .set_guest(guest::client(state, self.controller.clone(), fds));
            Ok(())
        }
    }

    fn run(
        self: ServerRc<Self>,
        _: guest_lifecycle::RunParams,
        mut results: guest_lifecycle::RunResults,
    ) -> impl Future<Output = Result<(), capnp::Error>> + 'static {
        let ended = self.controller.run();
        async move {
            ended.await.write(results.get());
            Ok(())
        }
    }

    fn stop(
        self: ServerRc<Self>,
        _: guest_lifecycle::StopParams,
        mut results: guest_lifecycle::StopResults,
    ) -> impl Future<Output = Result<(), capnp::Error>> + 'static {
        let outcome = self.controller.stop();
        async move {
            write_completion(&outcome.await, results.get());
            Ok(())
        }
    }
}

impl component::Server for ComponentServer {
    async fn layers(
        self: ServerRc<Self>,
        _: component::LayersParams,
        mut results: component::LayersResults,
    ) -> Result<(), capnp::Error> {
        let known = self.controller.layers();
        let layers = results.get().init_layers(known.len() as u32);
        write_layers(known, layers);
        Ok(())
    }

    async fn attach(
        self: ServerRc<Self>,
        params: component::AttachParams,
        mut results: component::AttachResults,
    ) -> Result<(), capnp::Error> {
        let lent = host_setup::lent_only(params.get()?.get_host()?, &self.fds);
        match lent.and_then(|lent| self.controller.attach(lent)) {
            Ok(Attached { guest, status, missed }) => {
                let info = guest.info();
                let mut results = results.get();
                results.set_status(status);
                results.set_paused(info.paused);
                results.set_uptime_ns(info.stop.map_or(info.uptime_ns, |report| report.uptime_ns));
                results.set_missed_events(missed);
                results.set_guest(guest::client(guest, self.controller.clone(), self.fds.clone()));
            }
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    fn ended(
        self: ServerRc<Self>,
        _: component::EndedParams,
        mut results: component::EndedResults,
    ) -> impl Future<Output = Result<(), capnp::Error>> + 'static {
        let ended = self.controller.ended();
        async move {
            ended.await.write(results.get());
            Ok(())
        }
    }
}

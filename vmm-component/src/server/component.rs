//! The component's bootstrap capability: decodes requests, asks the controller in the order in which they arrive, and answers.

use std::{os::fd::OwnedFd, rc::Rc};

use capnp::capability::Rc as ServerRc;
use sepal_schema::{
    config::{File, GuestConfig, Handles},
    error::{Error, write_completion},
    info::{GuestDescriptor, LayerInfo, write_layers},
    lifecycle_capnp::{component, guest_lifecycle, host_setup},
    transport::{FdTable, guard},
};

use super::{
    controller::{Controller, Creation},
    guest,
    vm::VmSpec,
};
use crate::machine::unassisted_cmdline;

/// Names of the devices that every machine has.
const DEVICES: [&str; 4] = ["serial", "rtc", "i8042", "power-button"];

/// Serves `Component`. Dropping it (the connection has closed, or the last holder has let go) ends everything.
pub struct ComponentServer {
    controller: Rc<Controller>,
    fds: FdTable,
    layers: Vec<LayerInfo>,
}

impl ComponentServer {
    /// A server for one connection, whose descriptors arrive by `fds`.
    pub fn client(controller: Rc<Controller>, fds: FdTable, layers: Vec<LayerInfo>) -> component::Client {
        guard::new_client(Self {
            controller,
            fds,
            layers,
        })
    }

    fn decode(&self, params: &guest_lifecycle::CreateParams) -> Result<Creation, Error> {
        let params = params.get()?;
        // Both first: whichever is refused, the descriptors of the other must not stay behind.
        let config = GuestConfig::decode(params.get_config()?, &self.fds);
        let host = self.host(params.get_host()?);
        let (mut config, host) = (config?, host?);
        let kernel = descriptor("kernel", std::mem::take(&mut config.kernel))?.ok_or_else(|| {
            Error::bad_config(
                "kernel",
                "a component has no kernel of its own; the guest manager supplies one",
            )
        })?;
        let initrd = descriptor("initrd", std::mem::take(&mut config.initrd))?;
        refuse_devices(&config)?;
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
            devices: DEVICES.map(String::from).to_vec(),
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
                serial: host.serial,
            },
            descriptor,
            events: host.events,
        })
    }

    fn host(&self, from: host_setup::Reader<'_>) -> Result<Host, Error> {
        use host_setup::serial::Which;
        let serial = match from.get_serial().which().map_err(capnp::Error::from)? {
            Which::None(()) => None,
            Which::Stream(fd) => {
                Some(Handles::take(&self.fds, fd?.get_number()).map_err(|error| error.about("host.serial"))?)
            }
        };
        let events = if from.has_events() {
            Some(from.get_events()?)
        } else {
            None
        };
        Ok(Host {
            unassisted: from.get_unassisted(),
            serial,
            events,
        })
    }
}

struct Host {
    unassisted: bool,
    serial: Option<OwnedFd>,
    events: Option<sepal_schema::guest_capnp::event_sink::Client>,
}

fn descriptor(field: &str, file: File) -> Result<Option<OwnedFd>, Error> {
    match file {
        File::None => Ok(None),
        File::Fd(fd) => Ok(Some(fd)),
        File::Bytes(_) | File::Upload(_) | File::Path(_) => Err(Error::bad_config(
            field,
            format!("a component takes the {field} as an open descriptor only"),
        )),
    }
}

/// Refuses devices that the machine cannot have yet.
fn refuse_devices(config: &GuestConfig) -> Result<(), Error> {
    let others = config.watchdog.is_some() || config.generation_id || config.panic_device;
    match config.bus_devices() > 0 || others {
        true => Err(Error::not_supported(
            "devices",
            "virtio devices, a watchdog, a generation id and a panic device are not supported by this version",
        )),
        false => Ok(()),
    }
}

impl Drop for ComponentServer {
    fn drop(&mut self) {
        self.controller.disconnected();
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
        async move {
            let state = guest
                .await
                .map_err(|error| capnp::Error::failed(format!("{}: {}", error.kind_name(), error.message)))?;
            results.get().set_guest(guest::client(state, self.controller.clone()));
            Ok(())
        }
    }

    fn run(
        self: ServerRc<Self>,
        _: guest_lifecycle::RunParams,
        mut results: guest_lifecycle::RunResults,
    ) -> impl Future<Output = Result<(), capnp::Error>> + 'static {
        let report = self.controller.run();
        async move {
            match report.await {
                Ok(report) => report.write(results.get().init_ended()),
                Err(error) => error.write(results.get().init_error()),
            }
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
        let layers = results.get().init_layers(self.layers.len() as u32);
        write_layers(&self.layers, layers);
        Ok(())
    }
}

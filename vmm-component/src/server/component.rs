//! The component's bootstrap capability: decodes requests, asks the controller in the order in which they arrive, and answers.

use std::{os::fd::OwnedFd, rc::Rc};

use capnp::capability::Rc as ServerRc;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use sepal_schema::{
    config::{
        GuestConfig, Handles,
        device::{MAX_CONSOLE_PORTS, WatchdogAction},
    },
    error::{Error, write_completion},
    file_capnp::fd_ref,
    guest_capnp::event_sink,
    info::{GuestDescriptor, LayerInfo, write_layers},
    lifecycle_capnp::{backends, component, guest_lifecycle, host_setup},
    transport::{FdTable, guard},
};

use super::{
    controller::{Controller, Creation},
    devices::{Requests, descriptor},
    guest,
    state::Lent,
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
            descriptor,
            host: Lent {
                events: host.events,
                backends: host.backends,
                fds: self.fds.clone(),
                watchdog: match config.watchdog {
                    Some(WatchdogAction::Reset) => "reset",
                    Some(WatchdogAction::Stop) => "stop",
                    Some(WatchdogAction::None) | None => "none",
                },
            },
        })
    }

    fn host(&self, from: host_setup::Reader<'_>) -> Result<Host, Error> {
        use host_setup::serial::Which;
        let ports = from.get_consoles()?;
        if ports.len() > MAX_CONSOLE_PORTS.into() {
            let message = format!(
                "host.consoles has {} entries; a console has at most {MAX_CONSOLE_PORTS} ports",
                ports.len()
            );
            return Err(Error::bad_config("host.consoles", message));
        }
        let take = |fd: fd_ref::Reader<'_>| Handles::take(&self.fds, fd.get_number());
        let consoles: Vec<_> = ports.iter().map(take).collect();
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
        let backends = match from.has_backends() {
            true => Some(from.get_backends()?),
            false => None,
        };
        let consoles = consoles.into_iter().collect::<Result<_, Error>>();
        Ok(Host {
            unassisted: from.get_unassisted(),
            cpuid: cpuid(from.get_cpuid()?)?,
            serial,
            events,
            consoles: consoles.map_err(|error| error.about("host.consoles"))?,
            backends,
        })
    }
}

/// Bytes of a `kvm_cpuid_entry2`.
const CPUID_ENTRY: usize = size_of::<kvm_cpuid_entry2>();

/// What the guest manager says that KVM offers of the processor.
fn cpuid(bytes: &[u8]) -> Result<Option<Vec<kvm_cpuid_entry2>>, Error> {
    if bytes.is_empty() {
        return Ok(None);
    }
    if !bytes.len().is_multiple_of(CPUID_ENTRY) || bytes.len() > KVM_MAX_CPUID_ENTRIES * CPUID_ENTRY {
        let message = format!("host.cpuid has {} bytes, which is no table of KVM's", bytes.len());
        return Err(Error::bad_config("host.cpuid", message));
    }
    let entry = |bytes: &[u8]| {
        let mut words = bytes
            .chunks_exact(4)
            .map(|word| u32::from_ne_bytes(word.try_into().unwrap_or_default()));
        let mut next = || words.next().unwrap_or_default();
        kvm_cpuid_entry2 {
            function: next(),
            index: next(),
            flags: next(),
            eax: next(),
            ebx: next(),
            ecx: next(),
            edx: next(),
            ..Default::default()
        }
    };
    Ok(Some(bytes.chunks_exact(CPUID_ENTRY).map(entry).collect()))
}

struct Host {
    unassisted: bool,
    cpuid: Option<Vec<kvm_cpuid_entry2>>,
    serial: Option<OwnedFd>,
    events: Option<event_sink::Client>,
    consoles: Vec<OwnedFd>,
    backends: Option<backends::Client>,
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
        let layers = results.get().init_layers(self.layers.len() as u32);
        write_layers(&self.layers, layers);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_processor_offers_is_a_table_of_kvms_or_nothing() {
        assert!(cpuid(&[]).unwrap().is_none());
        let words: Vec<u8> = (1_u32..=20).flat_map(u32::to_ne_bytes).collect();
        let table = cpuid(&words).unwrap().unwrap();
        let [first, second] = table[..] else {
            panic!("{table:?}")
        };
        assert_eq!((first.function, first.index, first.flags), (1, 2, 3));
        assert_eq!((first.eax, first.ebx, first.ecx, first.edx), (4, 5, 6, 7));
        assert_eq!(second.function, 11);
        for wrong in [
            1,
            CPUID_ENTRY - 1,
            CPUID_ENTRY + 1,
            (KVM_MAX_CPUID_ENTRIES + 1) * CPUID_ENTRY,
        ] {
            let error = cpuid(&vec![0; wrong]).unwrap_err();
            assert_eq!(error.about, "host.cpuid");
        }
    }
}

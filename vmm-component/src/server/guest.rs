//! Guest, for one generation: hands out its facets.

use std::rc::Rc;

use capnp::capability::Rc as ServerRc;
use sepal_schema::{
    error::{Error, Kind},
    facet_capnp::facet,
    guest_capnp::guest,
    transport::{FdTable, Handle, guard},
};

use super::{controller::Controller, devices::Handles, facets::ConsoleServer, state::GuestState, vm::Vm};

/// Serves [`Guest`](guest) and all its facets: they differ in what their holder may call, not in what they know.
pub(super) struct GuestServer {
    /// What is known about the guest.
    pub(super) state: Rc<GuestState>,
    /// Who drives its machine.
    pub(super) controller: Rc<Controller>,
    /// The descriptors that travel with the messages of whoever holds it.
    pub(super) fds: FdTable,
}

/// A capability for the guest.
pub(super) fn client(state: Rc<GuestState>, controller: Rc<Controller>, fds: FdTable) -> guest::Client {
    guard::new_client(GuestServer { state, controller, fds })
}

impl GuestServer {
    fn facet(&self) -> Self {
        Self {
            state: self.state.clone(),
            controller: self.controller.clone(),
            fds: self.fds.clone(),
        }
    }

    /// The guest's devices.
    ///
    /// # Errors
    /// `NOT_RUNNING`: it has ended.
    pub(super) fn devices(&self) -> Result<Handles, Error> {
        self.controller.devices(self.state.generation())
    }

    /// The control loop.
    pub(super) fn spawner(&self) -> &Handle {
        self.state.spawner()
    }

    /// Uses the machine while it runs.
    ///
    /// # Errors
    /// `NOT_RUNNING` if it does not, and whatever `act` says.
    pub(super) fn with_running<T>(&self, act: impl FnOnce(&mut dyn Vm) -> Result<T, Error>) -> Result<T, Error> {
        self.controller.with_running(self.state.generation(), act)
    }

    /// A facet for a device that has to be there.
    fn device_facet(&self, device: &str, there: impl FnOnce(&Handles) -> bool) -> Result<Self, Error> {
        match there(&self.devices()?) {
            true => Ok(self.facet()),
            false => {
                let message = format!("the guest has no {device}: its configuration left it out");
                Err(Error::new(Kind::DeviceNotPresent, message).about(device))
            }
        }
    }
}

/// Narrowing and sharing are policy, and the guest manager's.
impl facet::Server for GuestServer {}

impl guest::Server for GuestServer {
    async fn power(
        self: ServerRc<Self>,
        _: guest::PowerParams,
        mut results: guest::PowerResults,
    ) -> Result<(), capnp::Error> {
        results.get().set_power(guard::new_client(self.facet()));
        Ok(())
    }

    async fn observer(
        self: ServerRc<Self>,
        _: guest::ObserverParams,
        mut results: guest::ObserverResults,
    ) -> Result<(), capnp::Error> {
        results.get().set_observer(guard::new_client(self.facet()));
        Ok(())
    }

    async fn statistics(
        self: ServerRc<Self>,
        _: guest::StatisticsParams,
        mut results: guest::StatisticsResults,
    ) -> Result<(), capnp::Error> {
        results.get().set_statistics(guard::new_client(self.facet()));
        Ok(())
    }

    async fn debug(
        self: ServerRc<Self>,
        _: guest::DebugParams,
        mut results: guest::DebugResults,
    ) -> Result<(), capnp::Error> {
        results.get().set_debug(guard::new_client(self.facet()));
        Ok(())
    }

    async fn console(
        self: ServerRc<Self>,
        params: guest::ConsoleParams,
        mut results: guest::ConsoleResults,
    ) -> Result<(), capnp::Error> {
        // A port number that does not fit is one that is not there.
        let port = usize::try_from(params.get()?.get_port()).unwrap_or(usize::MAX);
        let has_port = |devices: &Handles| devices.console.as_ref().is_some_and(|console| port < console.ports());
        match self.device_facet("console", has_port) {
            Ok(guest) => results
                .get()
                .set_console(guard::new_client(ConsoleServer { guest, port })),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn balloon_controller(
        self: ServerRc<Self>,
        _: guest::BalloonControllerParams,
        mut results: guest::BalloonControllerResults,
    ) -> Result<(), capnp::Error> {
        match self.device_facet("balloon", |devices| devices.balloon.is_some()) {
            Ok(facet) => results.get().set_controller(guard::new_client(facet)),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn mem_controller(
        self: ServerRc<Self>,
        _: guest::MemControllerParams,
        mut results: guest::MemControllerResults,
    ) -> Result<(), capnp::Error> {
        match self.device_facet("memory device", |devices| devices.memory.is_some()) {
            Ok(facet) => results.get().set_controller(guard::new_client(facet)),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn disk_controller(
        self: ServerRc<Self>,
        _: guest::DiskControllerParams,
        mut results: guest::DiskControllerResults,
    ) -> Result<(), capnp::Error> {
        match self.device_facet("disk", |devices| !devices.disks.is_empty()) {
            Ok(facet) => results.get().set_controller(guard::new_client(facet)),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn net_controller(
        self: ServerRc<Self>,
        _: guest::NetControllerParams,
        mut results: guest::NetControllerResults,
    ) -> Result<(), capnp::Error> {
        match self.device_facet("network device", |devices| !devices.networks.is_empty()) {
            Ok(facet) => results.get().set_controller(guard::new_client(facet)),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn host_vsock_endpoint(
        self: ServerRc<Self>,
        _: guest::HostVsockEndpointParams,
        mut results: guest::HostVsockEndpointResults,
    ) -> Result<(), capnp::Error> {
        match self.device_facet("vsock device", |devices| devices.vsock.is_some()) {
            Ok(facet) => results.get().set_endpoint(guard::new_client(facet)),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }
}

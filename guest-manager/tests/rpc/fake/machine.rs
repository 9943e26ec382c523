//! The guest of a fake component: its capability, and the power and observer facets.

use std::{
    future::Future,
    rc::{Rc, Weak},
};

use futures::FutureExt;
use sepal_schema::{
    error::{Error, Kind, write_completion},
    guest_capnp::{guest, observer, power},
    info::GuestDescriptor,
    report::Reason,
    transport::guard,
};

use super::{Does, Process, Reply};
use crate::{fake_devices::Devices, vsock};

pub(super) struct Machine(pub(super) Rc<Process>);

impl Machine {
    fn devices(&self) -> Devices {
        Devices(self.0.told.clone())
    }
}

impl sepal_schema::facet_capnp::facet::Server for Machine {}

impl guest::Server for Machine {
    fn host_vsock_endpoint(
        self: Rc<Self>,
        _: guest::HostVsockEndpointParams,
        mut results: guest::HostVsockEndpointResults,
    ) -> impl Future<Output = Reply> + 'static {
        let config = self.0.config.borrow();
        if config.as_ref().is_some_and(|config| config.vsock.is_some()) {
            let endpoint = vsock::Endpoint(self.0.sockets.clone());
            results.get().set_endpoint(guard::new_client(endpoint));
        } else {
            Error::new(Kind::DeviceNotPresent, "there is none").write(results.get().init_error());
        }
        futures::future::ready(Ok(()))
    }

    async fn console(self: Rc<Self>, _: guest::ConsoleParams, mut results: guest::ConsoleResults) -> Reply {
        results.get().set_console(guard::new_client(self.devices()));
        Ok(())
    }

    async fn balloon_controller(
        self: Rc<Self>,
        _: guest::BalloonControllerParams,
        mut results: guest::BalloonControllerResults,
    ) -> Reply {
        results.get().set_controller(guard::new_client(self.devices()));
        Ok(())
    }

    async fn mem_controller(
        self: Rc<Self>,
        _: guest::MemControllerParams,
        mut results: guest::MemControllerResults,
    ) -> Reply {
        results.get().set_controller(guard::new_client(self.devices()));
        Ok(())
    }

    async fn disk_controller(
        self: Rc<Self>,
        _: guest::DiskControllerParams,
        mut results: guest::DiskControllerResults,
    ) -> Reply {
        results.get().set_controller(guard::new_client(self.devices()));
        Ok(())
    }

    async fn net_controller(
        self: Rc<Self>,
        _: guest::NetControllerParams,
        mut results: guest::NetControllerResults,
    ) -> Reply {
        results.get().set_controller(guard::new_client(self.devices()));
        Ok(())
    }

    async fn debug(self: Rc<Self>, _: guest::DebugParams, mut results: guest::DebugResults) -> Reply {
        results.get().set_debug(guard::new_client(self.devices()));
        Ok(())
    }

    fn power(
        self: Rc<Self>,
        _: guest::PowerParams,
        mut results: guest::PowerResults,
    ) -> impl Future<Output = Reply> + 'static {
        results.get().set_power(guard::new_client(Button(self.0.clone())));
        futures::future::ready(Ok(()))
    }

    fn observer(
        self: Rc<Self>,
        _: guest::ObserverParams,
        mut results: guest::ObserverResults,
    ) -> impl Future<Output = Reply> + 'static {
        results
            .get()
            .set_observer(guard::new_client(Eye(Rc::downgrade(&self.0))));
        futures::future::ready(Ok(()))
    }
}

struct Button(Rc<Process>);

impl sepal_schema::facet_capnp::facet::Server for Button {}

impl power::Server for Button {
    fn shutdown(
        self: Rc<Self>,
        _: power::ShutdownParams,
        mut results: power::ShutdownResults,
    ) -> impl Future<Output = Reply> + 'static {
        let process = &self.0;
        process.state.change(|state| state.pressed += 1);
        let outcome = match process.behaviour.get().button {
            Does::Works => {
                process.end(Reason::Shutdown);
                Ok(())
            }
            Does::Hangs => Ok(()),
            Does::Fails(kind) => Err(Error::new(kind, "there is no button")),
        };
        write_completion(&outcome, results.get());
        futures::future::ready(Ok(()))
    }

    fn pause(
        self: Rc<Self>,
        _: power::PauseParams,
        mut results: power::PauseResults,
    ) -> impl Future<Output = Reply> + 'static {
        write_completion(&Ok(()), results.get());
        futures::future::ready(Ok(()))
    }

    fn resume(
        self: Rc<Self>,
        _: power::ResumeParams,
        mut results: power::ResumeResults,
    ) -> impl Future<Output = Reply> + 'static {
        write_completion(&Ok(()), results.get());
        futures::future::ready(Ok(()))
    }

    /// Never answers.
    fn nmi(self: Rc<Self>, _: power::NmiParams, results: power::NmiResults) -> impl Future<Output = Reply> + 'static {
        futures::future::pending().map(move |()| {
            drop(results);
            Ok(())
        })
    }
}

struct Eye(Weak<Process>);

impl sepal_schema::facet_capnp::facet::Server for Eye {}

impl observer::Server for Eye {
    fn info(
        self: Rc<Self>,
        _: observer::InfoParams,
        mut results: observer::InfoResults,
    ) -> impl Future<Output = Reply> + 'static {
        let process = self.0.upgrade().unwrap();
        let cmdline = process.config.borrow().as_ref().unwrap().full_cmdline();
        let descriptor = GuestDescriptor {
            cmdline: format!("{cmdline} added"),
            devices: vec!["serial".into(), "rtc".into()],
            ..GuestDescriptor::default()
        };
        descriptor.write(results.get().init_info().init_descriptor());
        futures::future::ready(Ok(()))
    }

    fn stats(
        self: Rc<Self>,
        _: observer::StatsParams,
        mut results: observer::StatsResults,
    ) -> impl Future<Output = Reply> + 'static {
        let process = self.0.upgrade().unwrap();
        process.figures.asked.change(|asked| *asked += 1);
        async move {
            process.figures.mute.until(|mute| (!*mute).then_some(())).await;
            results
                .get()
                .init_stats()
                .set_serial_dropped(17 + process.figures.lost.get());
            Ok(())
        }
    }
}

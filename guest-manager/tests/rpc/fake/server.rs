//! What a fake component serves: the lifecycle, and what is for its manager alone.

use std::{future::Future, os::unix::net::UnixStream, rc::Rc};

use sepal_schema::{
    config::{File, GuestConfig},
    crash::write_vcpus,
    error::{Error, Kind, write_completion},
    guest_capnp::GuestStatus,
    info::{LayerInfo, LayerState, write_layers},
    lifecycle_capnp::{component, guest_lifecycle, host_setup},
    report::Reason,
    transport::{FdTable, guard},
};

use super::{Does, Machine, Process, Reply};

pub(super) struct Server {
    pub(super) process: Rc<Process>,
    pub(super) fds: FdTable,
}

async fn answer(does: Does) -> Result<(), Error> {
    match does {
        Does::Works => Ok(()),
        Does::Fails(kind) => Err(Error::new(kind, "the fake does not do it").about("fake")),
        Does::Hangs => futures::future::pending().await,
    }
}

impl Server {
    fn take_serial(&self, host: host_setup::Reader<'_>) -> UnixStream {
        match host.get_serial().which().unwrap() {
            host_setup::serial::Stream(stream) => self.fds.take(stream.unwrap().get_number()).unwrap().into(),
            host_setup::serial::None(()) => panic!("the manager gives every component a serial stream"),
        }
    }
}

impl guest_lifecycle::Server for Server {
    fn create(
        self: Rc<Self>,
        params: guest_lifecycle::CreateParams,
        mut results: guest_lifecycle::CreateResults,
    ) -> impl Future<Output = Reply> + 'static {
        let process = self.process.clone();
        {
            let params = params.get().unwrap();
            let config = GuestConfig::decode(params.get_config().unwrap(), &self.fds).unwrap();
            let file = |file: &File| matches!(file, File::Fd(_) | File::None);
            assert!(
                file(&config.kernel) && file(&config.initrd),
                "a component gets descriptors only"
            );
            let host = params.get_host().unwrap();
            *process.serial.borrow_mut() = Some(self.take_serial(host));
            let take =
                |fd: sepal_schema::file_capnp::fd_ref::Reader<'_>| self.fds.take(fd.get_number()).unwrap().into();
            *process.consoles.borrow_mut() = host.get_consoles().unwrap().iter().map(take).collect();
            *process.events.borrow_mut() = Some(host.get_events().unwrap());
            if host.get_durable() {
                let number = host.get_successors().unwrap().get_number();
                *process.successors.borrow_mut() = Some(self.fds.take(number).unwrap());
            }
            *process.config.borrow_mut() = Some(config);
        }
        async move {
            process.state.change(|state| state.cancelled = false);
            let stopped = process
                .state
                .until(|state| state.cancelled.then(|| Err(Error::new(Kind::Cancelled, "stopped"))));
            let stopped = std::pin::pin!(stopped);
            let created = std::pin::pin!(answer(process.behaviour.get().create));
            let outcome = futures::future::select(created, stopped).await.factor_first().0;
            process.state.change(|state| state.created = outcome.is_ok());
            write_completion(&outcome, results.get());
            Ok(())
        }
    }

    fn bind(
        self: Rc<Self>,
        _: guest_lifecycle::BindParams,
        mut results: guest_lifecycle::BindResults,
    ) -> impl Future<Output = Reply> + 'static {
        results
            .get()
            .set_guest(guard::new_client(Machine(self.process.clone())));
        futures::future::ready(Ok(()))
    }

    fn run(
        self: Rc<Self>,
        _: guest_lifecycle::RunParams,
        mut results: guest_lifecycle::RunResults,
    ) -> impl Future<Output = Reply> + 'static {
        let process = self.process.clone();
        async move {
            process.state.until(|state| state.created.then_some(())).await;
            if let Err(error) = answer(process.behaviour.get().run).await {
                error.write(results.get().init_error());
                return Ok(());
            }
            process.state.change(|state| state.running = true);
            if process.behaviour.get().quick {
                process.end(Reason::Shutdown);
            } else {
                process.tell(|mut event| event.set_started(())).await;
            }
            ended(&process, results.get()).await;
            Ok(())
        }
    }

    fn stop(
        self: Rc<Self>,
        _: guest_lifecycle::StopParams,
        mut results: guest_lifecycle::StopResults,
    ) -> impl Future<Output = Reply> + 'static {
        let process = self.process.clone();
        process.state.change(|state| {
            state.stops += 1;
            state.cancelled = true;
        });
        async move {
            let outcome = answer(process.behaviour.get().stop).await;
            process.finish(Err(Error::new(Kind::ControllerForcedHalt, "stopped")));
            process.state.change(|state| state.stops = 0);
            write_completion(&outcome, results.get());
            Ok(())
        }
    }
}

/// Waits for the end of the run, and tells it.
async fn ended(process: &Process, mut to: guest_lifecycle::run_result::Builder<'_>) {
    let result = process.state.until(|state| state.result.take()).await;
    let registers = process.registers.borrow();
    write_vcpus(&registers, to.reborrow().init_registers(registers.len() as u32));
    match result {
        Ok(report) => report.write(to.init_ended()),
        Err(error) => error.write(to.init_error()),
    }
}

impl component::Server for Server {
    async fn attach(self: Rc<Self>, params: component::AttachParams, mut results: component::AttachResults) -> Reply {
        let process = &self.process;
        process.behaves(|behaviour| behaviour.attach != Does::Hangs).await;
        if let Err(error) = answer(process.behaviour.get().attach).await {
            error.write(results.get().init_error());
            return Ok(());
        }
        *process.events.borrow_mut() = Some(params.get()?.get_host()?.get_events()?);
        let status = match process.is_running() {
            true => GuestStatus::Running,
            false if process.state.look(|state| state.result.is_some()) => GuestStatus::Stopped,
            false => GuestStatus::NotStarted,
        };
        process.state.change(|state| state.attached = true);
        results.get().set_status(status);
        results.get().set_guest(guard::new_client(Machine(process.clone())));
        Ok(())
    }

    async fn ended(self: Rc<Self>, _: component::EndedParams, mut results: component::EndedResults) -> Reply {
        ended(&self.process, results.get()).await;
        Ok(())
    }

    fn layers(
        self: Rc<Self>,
        _: component::LayersParams,
        mut results: component::LayersResults,
    ) -> impl Future<Output = Reply> + 'static {
        let layer = |name: &str, state| LayerInfo {
            name: name.into(),
            state,
            detail: "as the fake says".into(),
        };
        let layers = [layer("seccomp", LayerState::Holds), layer("cgroup", LayerState::Waived)];
        write_layers(&layers, results.get().init_layers(2));
        futures::future::ready(Ok(()))
    }
}

//! `Guest` and its facets, as clients hold them. Each is a capability of its own: holding one is the permission to use it.

use std::{future::Future, rc::Rc, time::Duration};

use capnp::capability::{Promise, Response};
use sepal_schema::{
    answer,
    error::{Error, Kind, read_completion, write_completion},
    error_capnp::completion,
    facet_capnp::facet,
    guest_capnp::{console, guest, observer, output, power, serial},
    report::StopReport,
    transport::guard,
};

use crate::{client::Client, facets, guest::Guest, ladder, model::bounded_error, serial::Port, subscription, vsock};

type Reply = Result<(), capnp::Error>;

fn reply(result: Reply) -> impl Future<Output = Reply> + 'static {
    futures::future::ready(result)
}

/// All of a guest.
pub struct GuestServer {
    client: Client,
    guest: Rc<Guest>,
}

impl GuestServer {
    /// Gives a client a guest.
    pub fn new_client(client: Client, guest: Rc<Guest>) -> guest::Client {
        guard::new_client(Self { client, guest })
    }
}

impl facet::Server for GuestServer {}

impl guest::Server for GuestServer {
    fn serial(
        self: Rc<Self>,
        _: guest::SerialParams,
        mut results: guest::SerialResults,
    ) -> impl Future<Output = Reply> + 'static {
        let port = PortServer {
            client: self.client.clone(),
            guest: self.guest.clone(),
            port: self.guest.port.clone(),
            console: None,
        };
        results.get().set_serial(guard::new_client::<serial::Client, _>(port));
        reply(Ok(()))
    }

    fn power(
        self: Rc<Self>,
        _: guest::PowerParams,
        mut results: guest::PowerResults,
    ) -> impl Future<Output = Reply> + 'static {
        results
            .get()
            .set_power(guard::new_client(PowerServer(self.guest.clone())));
        reply(Ok(()))
    }

    fn observer(
        self: Rc<Self>,
        _: guest::ObserverParams,
        mut results: guest::ObserverResults,
    ) -> impl Future<Output = Reply> + 'static {
        results
            .get()
            .set_observer(guard::new_client(ObserverServer(self.guest.clone())));
        reply(Ok(()))
    }

    fn console(
        self: Rc<Self>,
        params: guest::ConsoleParams,
        mut results: guest::ConsoleResults,
    ) -> impl Future<Output = Reply> + 'static {
        reply(params.get().map(|params| {
            let number = params.get_port();
            // A number that does not fit is of a port that is not there.
            let index = usize::try_from(number).unwrap_or(usize::MAX);
            let port = self.guest.consoles.get(index).map(|port| {
                guard::new_client(PortServer {
                    client: self.client.clone(),
                    guest: self.guest.clone(),
                    port: port.clone(),
                    console: Some(number),
                })
            });
            let console = port.ok_or_else(|| no_console(number, self.guest.consoles.len()));
            answer!(results, set_console, console);
        }))
    }

    async fn balloon_controller(
        self: Rc<Self>,
        _: guest::BalloonControllerParams,
        mut results: guest::BalloonControllerResults,
    ) -> Reply {
        answer!(results, set_controller, facets::balloon_controller_request(&self.guest).await);
        Ok(())
    }

    async fn mem_controller(
        self: Rc<Self>,
        _: guest::MemControllerParams,
        mut results: guest::MemControllerResults,
    ) -> Reply {
        answer!(results, set_controller, facets::mem_controller_request(&self.guest).await);
        Ok(())
    }

    async fn host_vsock_endpoint(
        self: Rc<Self>,
        _: guest::HostVsockEndpointParams,
        mut results: guest::HostVsockEndpointResults,
    ) -> Reply {
        answer!(results, set_endpoint, vsock::endpoint(&self.guest, self.client.fds.clone()).await);
        Ok(())
    }

    async fn disk_controller(
        self: Rc<Self>,
        _: guest::DiskControllerParams,
        mut results: guest::DiskControllerResults,
    ) -> Reply {
        answer!(results, set_controller, facets::disk_controller_request(&self.guest).await);
        Ok(())
    }

    async fn net_controller(
        self: Rc<Self>,
        _: guest::NetControllerParams,
        mut results: guest::NetControllerResults,
    ) -> Reply {
        answer!(results, set_controller, facets::net_controller_request(&self.guest).await);
        Ok(())
    }

    fn agent(
        self: Rc<Self>,
        _: guest::AgentParams,
        mut results: guest::AgentResults,
    ) -> impl Future<Output = Reply> + 'static {
        let agent = match self.guest.has_agent {
            true => Ok(crate::agent::new_client(self.guest.clone())),
            false => Err(facets::not_there("agent")),
        };
        answer!(results, set_agent, agent);
        reply(Ok(()))
    }
}

fn no_console(number: u32, ports: usize) -> Error {
    if ports == 0 {
        return facets::not_there("console");
    }
    let message = format!(
        "the guest's console has no port {number}: its ports are 0 to {}",
        ports - 1
    );
    Error::new(Kind::DeviceNotPresent, message).about("console")
}

/// Output alone.
struct OutputServer(Rc<Port>);

/// Output and input of the serial port, or of a port of the console.
struct PortServer {
    client: Client,
    guest: Rc<Guest>,
    port: Rc<Port>,
    /// Its number in the console.
    console: Option<u32>,
}

async fn read(port: Rc<Port>, params: output::ReadParams, mut results: output::ReadResults) -> Reply {
    let params = params.get()?;
    let most = usize::try_from(params.get_max_bytes()).unwrap_or(usize::MAX);
    let piece = port.read(params.get_position(), most, params.get_wait()).await;
    let mut to = results.get();
    to.set_position(piece.position);
    to.set_bytes(&piece.bytes);
    to.set_dropped(piece.dropped);
    to.set_ended(piece.ended);
    Ok(())
}

fn end(port: Rc<Port>, mut results: output::EndResults) -> impl Future<Output = Reply> + 'static {
    results.get().set_position(port.end());
    reply(Ok(()))
}

impl facet::Server for OutputServer {}

impl output::Server for OutputServer {
    fn read(
        self: Rc<Self>,
        params: output::ReadParams,
        results: output::ReadResults,
    ) -> impl Future<Output = Reply> + 'static {
        read(self.0.clone(), params, results)
    }

    fn end(self: Rc<Self>, _: output::EndParams, results: output::EndResults) -> impl Future<Output = Reply> + 'static {
        end(self.0.clone(), results)
    }
}

impl facet::Server for PortServer {}

impl output::Server for PortServer {
    fn read(
        self: Rc<Self>,
        params: output::ReadParams,
        results: output::ReadResults,
    ) -> impl Future<Output = Reply> + 'static {
        read(self.port.clone(), params, results)
    }

    fn end(self: Rc<Self>, _: output::EndParams, results: output::EndResults) -> impl Future<Output = Reply> + 'static {
        end(self.port.clone(), results)
    }
}

impl serial::Server for PortServer {
    fn write(self: Rc<Self>, params: serial::WriteParams) -> impl Future<Output = Reply> + 'static {
        let port = self.port.clone();
        async move {
            let written = port.write(params.get()?.get_bytes()?).await;
            written.map_err(|error| capnp::Error::failed(error.message))
        }
    }

    fn open(
        self: Rc<Self>,
        params: serial::OpenParams,
        mut results: serial::OpenResults,
    ) -> impl Future<Output = Reply> + 'static {
        let mut open = || {
            let position = params.get()?.get_position();
            let stream = self.port.open(&self.guest.manager.handle, position)?;
            let number = sepal_schema::config::Handles::send(&self.client.fds, stream)?;
            results.get().init_fd().set_number(number);
            Ok::<_, Error>(())
        };
        if let Err(error) = open() {
            error.write(results.get().init_error());
        }
        reply(Ok(()))
    }
}

impl console::Server for PortServer {
    async fn resize(self: Rc<Self>, params: console::ResizeParams, mut results: console::ResizeResults) -> Reply {
        let (columns, rows) = {
            let params = params.get()?;
            (params.get_columns(), params.get_rows())
        };
        let outcome = match self.console {
            Some(port) => facets::resize(&self.guest, port, columns, rows).await,
            None => Err(facets::not_there("console")),
        };
        write_completion(&outcome, results.get());
        Ok(())
    }
}

type Answer = Promise<Response<completion::Owned>, capnp::Error>;

/// Everything that changes whether the guest runs.
struct PowerServer(Rc<Guest>);

impl PowerServer {
    /// Passes a question on to the component.
    async fn forward(guest: &Guest, ask: impl FnOnce(&power::Client) -> Answer) -> Result<(), Error> {
        // Held until the answer is there: dropping what a question is sent to takes it back.
        let power = guest.power()?;
        let answer = guest.answer(ask(&power)).await?;
        read_completion(answer.get()?).map_err(bounded_error)
    }
}

fn write_stopped(outcome: Result<StopReport, Error>, to: power::stop_result::Builder<'_>) {
    match outcome {
        Ok(report) => report.write(to.init_report()),
        Err(error) => error.write(to.init_error()),
    }
}

impl facet::Server for PowerServer {}

impl power::Server for PowerServer {
    async fn shutdown(self: Rc<Self>, _: power::ShutdownParams, mut results: power::ShutdownResults) -> Reply {
        let outcome = ladder::press(&self.0).await;
        write_completion(&outcome, results.get());
        Ok(())
    }

    async fn stop(self: Rc<Self>, params: power::StopParams, mut results: power::StopResults) -> Reply {
        let (timeout, force) = {
            let params = params.get()?;
            (params.get_timeout_ms(), params.get_force())
        };
        let timeout = match timeout {
            0 => self.0.manager.settings.default_deadline,
            ms => Duration::from_millis(ms),
        };
        write_stopped(ladder::stop(&self.0, timeout, force).await, results.get());
        Ok(())
    }

    async fn kill(self: Rc<Self>, _: power::KillParams, mut results: power::KillResults) -> Reply {
        write_stopped(ladder::kill(&self.0, "it was stopped by force").await, results.get());
        Ok(())
    }

    async fn pause(self: Rc<Self>, _: power::PauseParams, mut results: power::PauseResults) -> Reply {
        let outcome = Self::forward(&self.0, |power| power.pause_request().send().promise).await;
        if outcome.is_ok() {
            self.0.set_paused(true);
        }
        write_completion(&outcome, results.get());
        Ok(())
    }

    async fn resume(self: Rc<Self>, _: power::ResumeParams, mut results: power::ResumeResults) -> Reply {
        let outcome = Self::forward(&self.0, |power| power.resume_request().send().promise).await;
        if outcome.is_ok() {
            self.0.set_paused(false);
        }
        write_completion(&outcome, results.get());
        Ok(())
    }

    async fn reset(self: Rc<Self>, _: power::ResetParams, mut results: power::ResetResults) -> Reply {
        let outcome = Self::forward(&self.0, |power| power.reset_request().send().promise).await;
        write_completion(&outcome, results.get());
        Ok(())
    }

    async fn nmi(self: Rc<Self>, _: power::NmiParams, mut results: power::NmiResults) -> Reply {
        let outcome = Self::forward(&self.0, |power| power.nmi_request().send().promise).await;
        write_completion(&outcome, results.get());
        Ok(())
    }
}

/// Read-only.
struct ObserverServer(Rc<Guest>);

impl facet::Server for ObserverServer {}

impl observer::Server for ObserverServer {
    fn info(
        self: Rc<Self>,
        _: observer::InfoParams,
        mut results: observer::InfoResults,
    ) -> impl Future<Output = Reply> + 'static {
        self.0.info().write(results.get().init_info());
        reply(Ok(()))
    }

    async fn wait(self: Rc<Self>, _: observer::WaitParams, mut results: observer::WaitResults) -> Reply {
        self.0.ended().await.write(results.get().init_report());
        Ok(())
    }

    fn output(
        self: Rc<Self>,
        _: observer::OutputParams,
        mut results: observer::OutputResults,
    ) -> impl Future<Output = Reply> + 'static {
        results
            .get()
            .set_output(guard::new_client(OutputServer(self.0.port.clone())));
        reply(Ok(()))
    }

    fn subscribe(
        self: Rc<Self>,
        params: observer::SubscribeParams,
        mut results: observer::SubscribeResults,
    ) -> impl Future<Output = Reply> + 'static {
        let sink = params.get().and_then(|params| params.get_sink());
        reply(sink.map(|sink| {
            let cursor = self
                .0
                .manager
                .registry(|registry, _| registry.log().cursor_of(self.0.id));
            results
                .get()
                .set_subscription(subscription::new_client(&self.0.manager, cursor, sink));
        }))
    }

    async fn stats(self: Rc<Self>, _: observer::StatsParams, mut results: observer::StatsResults) -> Reply {
        let ask = async {
            let observer = self.0.remote()?.observer_request().send().pipeline.get_observer();
            self.0.answer(observer.stats_request().send().promise).await
        };
        match ask.await {
            Ok(answer) => results.set(answer.get()?)?,
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }
}

//! Every method of every facet, with what it needs, and how to call it.

use capnp::capability::{FromClientHook, Promise, RemotePromise, Response};
use futures::{FutureExt, future::LocalBoxFuture};
use sepal_schema::{
    agent_capnp::agent,
    cpu_capnp::cpu_controller,
    debug_capnp::debug,
    device_capnp::{balloon_controller, disk_controller, mem_controller, net_controller},
    error::{Error, Kind, Outcome, kind_name, read_completion},
    error_capnp::completion,
    facet::Right,
    facet_capnp::facet,
    guest_capnp::{console, guest, observer, output, power, serial, statistics},
    transport::guard,
    vsock_capnp::host_vsock_endpoint,
};

use super::Nothing;
use crate::vsock::{Sink, Taker};

/// What a capability can be for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Guest,
    Serial,
    Console,
    Output,
    Power,
    Balloon,
    Memory,
    Disks,
    Networks,
    Vsock,
    Agent,
    Observer,
    Statistics,
    Debug,
    Cpus,
}

pub(crate) const PARTS: [Part; 15] = [
    Part::Guest,
    Part::Serial,
    Part::Console,
    Part::Output,
    Part::Power,
    Part::Balloon,
    Part::Memory,
    Part::Disks,
    Part::Networks,
    Part::Vsock,
    Part::Agent,
    Part::Observer,
    Part::Statistics,
    Part::Debug,
    Part::Cpus,
];

impl Part {
    /// The interfaces that it has.
    pub(crate) fn interfaces(self) -> &'static [&'static str] {
        match self {
            Self::Guest => &["Facet", "Guest"],
            Self::Serial => &["Facet", "Output", "Serial"],
            Self::Console => &["Facet", "Output", "Serial", "Console"],
            Self::Output => &["Facet", "Output"],
            Self::Power => &["Facet", "Power"],
            Self::Balloon => &["Facet", "BalloonController"],
            Self::Memory => &["Facet", "MemController"],
            Self::Disks => &["Facet", "DiskController"],
            Self::Networks => &["Facet", "NetController"],
            Self::Vsock => &["Facet", "HostVsockEndpoint"],
            Self::Agent => &["Facet", "Agent"],
            Self::Observer => &["Facet", "Observer"],
            Self::Statistics => &["Facet", "Statistics"],
            Self::Debug => &["Facet", "Debug"],
            Self::Cpus => &["Facet", "CpuController"],
        }
    }

    /// Takes it out of a guest.
    pub(crate) fn of(self, guest: &guest::Client) -> facet::Client {
        match self {
            Self::Guest => cast(guest.clone()),
            Self::Serial => cast(guest.serial_request().send().pipeline.get_serial()),
            Self::Console => cast(guest.console_request().send().pipeline.get_console()),
            Self::Output => {
                let observer = guest.observer_request().send().pipeline.get_observer();
                cast(observer.output_request().send().pipeline.get_output())
            }
            Self::Power => cast(guest.power_request().send().pipeline.get_power()),
            Self::Balloon => cast(guest.balloon_controller_request().send().pipeline.get_controller()),
            Self::Memory => cast(guest.mem_controller_request().send().pipeline.get_controller()),
            Self::Disks => cast(guest.disk_controller_request().send().pipeline.get_controller()),
            Self::Networks => cast(guest.net_controller_request().send().pipeline.get_controller()),
            Self::Vsock => cast(guest.host_vsock_endpoint_request().send().pipeline.get_endpoint()),
            Self::Agent => cast(guest.agent_request().send().pipeline.get_agent()),
            Self::Observer => cast(guest.observer_request().send().pipeline.get_observer()),
            Self::Statistics => cast(guest.statistics_request().send().pipeline.get_statistics()),
            Self::Debug => cast(guest.debug_request().send().pipeline.get_debug()),
            Self::Cpus => cast(guest.cpu_controller_request().send().pipeline.get_controller()),
        }
    }
}

/// The same capability, as another interface that it has.
pub(crate) fn cast<A: FromClientHook, B: FromClientHook>(client: A) -> B {
    B::new(client.into_client_hook())
}

/// What an exception says, as the error that it stands for.
pub(crate) fn said(exception: &capnp::Error) -> Error {
    let words = exception.extra.trim_start_matches("remote exception: ");
    let kinds = (0..64u16).map_while(|kind| Kind::try_from(kind).ok());
    for kind in kinds {
        if let Some(message) = words
            .strip_prefix(kind_name(kind))
            .and_then(|rest| rest.strip_prefix(": "))
        {
            return Error::new(kind, message);
        }
    }
    Error::new(Kind::InternalError, words)
}

/// What comes of a call.
pub(crate) type Came = LocalBoxFuture<'static, Result<(), Error>>;

/// How a call ends where all is well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ends {
    /// At once, and the guest goes on.
    Soon,
    /// Not before something else happens.
    Never,
    /// With the guest.
    WithGuest,
}

/// A method of a facet.
pub(crate) struct Method {
    /// Interface and method, as in the schema.
    pub(crate) name: &'static str,
    /// The right that it needs.
    pub(crate) needs: Option<Right>,
    pub(crate) ends: Ends,
    pub(crate) call: fn(facet::Client) -> Came,
}

impl Method {
    /// The interface that it is of.
    pub(crate) fn interface(&self) -> &'static str {
        self.name.split('.').next().unwrap()
    }
}

async fn complete(sent: RemotePromise<completion::Owned>) -> Result<(), Error> {
    let answer = sent.promise.await.map_err(|error| said(&error))?;
    read_completion(answer.get().unwrap())
}

async fn plain<T: capnp::traits::Owned + capnp::traits::Pipelined>(
    promise: Promise<Response<T>, capnp::Error>,
) -> Result<(), Error> {
    promise.await.map(drop).map_err(|error| said(&error))
}

/// Of a call that answers with a union of something and an error.
macro_rules! union {
    ($sent:expr, $result:path) => {{
        use $result as result;
        match $sent.promise.await {
            Err(error) => Err(said(&error)),
            Ok(answer) => match answer.get().unwrap().which().unwrap() {
                result::Error(error) => Err(Error::read(error.unwrap()).unwrap()),
                _ => Ok(()),
            },
        }
    }};
}

/// Of a call that answers with a capability beside an error.
macro_rules! beside {
    ($sent:expr) => {
        match $sent.promise.await {
            Err(error) => Err(said(&error)),
            Ok(answer) => answer.get().unwrap().outcome().map(drop),
        }
    };
}

/// Of a call that answers with something and an error that is null if it worked.
macro_rules! or_null {
    ($sent:expr) => {
        match $sent.promise.await {
            Err(error) => Err(said(&error)),
            Ok(answer) => match answer.get().unwrap() {
                answer if answer.has_error() => Err(Error::read(answer.get_error().unwrap()).unwrap()),
                _ => Ok(()),
            },
        }
    };
}

macro_rules! methods {
    ($($name:literal $needs:ident $ends:ident |$client:ident: $interface:path| $call:expr;)*) => {
        &[$(Method {
            name: $name,
            needs: need!($needs),
            ends: Ends::$ends,
            call: |client| {
                let $client: $interface = cast(client);
                async move { $call }.boxed_local()
            },
        }),*]
    };
}

macro_rules! need {
    (Nothing) => {
        None
    };
    ($right:ident) => {
        Some(Right::$right)
    };
}

/// Every method. Those that end the guest come last.
pub(crate) const METHODS: &[Method] = methods! {
    "Facet.narrow" Nothing Soon |c: facet::Client| beside!(c.narrow_request().send());
    "Facet.share" Share Soon |c: facet::Client| beside!(c.share_request().send());
    "Facet.describe" Nothing Soon |c: facet::Client| union!(c.describe_request().send(), facet::describe_result);

    "Guest.serial" Nothing Soon |c: guest::Client| plain(c.serial_request().send().promise).await;
    "Guest.power" Nothing Soon |c: guest::Client| plain(c.power_request().send().promise).await;
    "Guest.observer" Nothing Soon |c: guest::Client| plain(c.observer_request().send().promise).await;
    "Guest.console" Nothing Soon |c: guest::Client| beside!(c.console_request().send());
    "Guest.balloonController" Nothing Soon |c: guest::Client| beside!(c.balloon_controller_request().send());
    "Guest.memController" Nothing Soon |c: guest::Client| beside!(c.mem_controller_request().send());
    "Guest.hostVsockEndpoint" Nothing Soon |c: guest::Client| beside!(c.host_vsock_endpoint_request().send());
    "Guest.diskController" Nothing Soon |c: guest::Client| beside!(c.disk_controller_request().send());
    "Guest.netController" Nothing Soon |c: guest::Client| beside!(c.net_controller_request().send());
    "Guest.agent" Nothing Soon |c: guest::Client| beside!(c.agent_request().send());
    "Guest.statistics" Nothing Soon |c: guest::Client| plain(c.statistics_request().send().promise).await;
    "Guest.debug" Nothing Soon |c: guest::Client| plain(c.debug_request().send().promise).await;
    "Guest.cpuController" Nothing Soon |c: guest::Client| beside!(c.cpu_controller_request().send());
    "Guest.shares" Share Soon |c: guest::Client| union!(c.shares_request().send(), guest::shares_result);
    // One that there is not: the shares of the test stay.
    "Guest.revokeShare" Share Soon |c: guest::Client| {
        let mut call = c.revoke_share_request();
        call.get().set_id(u64::MAX);
        match complete(call.send()).await {
            Err(error) if error.kind == Kind::NotFound => Ok(()),
            outcome => outcome,
        }
    };

    "Output.read" Output Soon |c: output::Client| {
        let mut call = c.read_request();
        call.get().set_wait(false);
        or_null!(call.send())
    };
    "Output.end" Output Soon |c: output::Client| or_null!(c.end_request().send());
    "Serial.write" Input Soon |c: serial::Client| {
        // As no stream: the answer is that of this call.
        let mut call = c.write_request();
        call.get().set_bytes(b"x");
        call.hook.send().promise.await.map(drop).map_err(|error| said(&error))
    };
    // Either of the two rights will do, which has a test of its own.
    "Serial.open" Nothing Soon |c: serial::Client| union!(c.open_request().send(), serial::open_result);
    "Console.resize" Input Soon |c: console::Client| complete(c.resize_request().send()).await;

    "Observer.info" Observe Soon |c: observer::Client| union!(c.info_request().send(), observer::info_result);
    "Observer.wait" Observe Never |c: observer::Client| union!(c.wait_request().send(), observer::wait_result);
    "Observer.output" Observe Soon |c: observer::Client| plain(c.output_request().send().promise).await;
    "Observer.subscribe" Observe Soon |c: observer::Client| {
        let mut call = c.subscribe_request();
        call.get().set_sink(guard::new_client(Nothing));
        union!(call.send(), observer::subscribe_result)
    };
    "Observer.stats" Observe Soon |c: observer::Client| union!(c.stats_request().send(), statistics::stats_result);
    "Observer.crashes" Observe Soon |c: observer::Client| union!(c.crashes_request().send(), observer::crashes_result);
    "Observer.configuration" Observe Soon |c: observer::Client| beside!(c.configuration_request().send());
    "Statistics.get" Observe Soon |c: statistics::Client| union!(c.get_request().send(), statistics::stats_result);
    "Debug.registers" Debug Soon |c: debug::Client| union!(c.registers_request().send(), debug::registers_result);
    "Debug.readPhysical" Debug Soon |c: debug::Client| union!(c.read_physical_request().send(), debug::memory_result);
    "Debug.readVirtual" Debug Soon |c: debug::Client| union!(c.read_virtual_request().send(), debug::memory_result);
    "Debug.translate" Debug Soon |c: debug::Client| union!(c.translate_request().send(), debug::translate_result);
    "Debug.stack" Debug Soon |c: debug::Client| union!(c.stack_request().send(), debug::stack_result);

    "CpuController.list" Observe Soon |c: cpu_controller::Client| {
        union!(c.list_request().send(), cpu_controller::list_result)
    };
    "CpuController.pin" Cpu Soon |c: cpu_controller::Client| complete(c.pin_request().send()).await;
    "CpuController.scheduler" Observe Soon |c: cpu_controller::Client| {
        union!(c.scheduler_request().send(), cpu_controller::scheduler_result)
    };
    "CpuController.setScheduler" Cpu Soon |c: cpu_controller::Client| {
        complete(c.set_scheduler_request().send()).await
    };

    "BalloonController.getBalloonSize" Observe Soon |c: balloon_controller::Client| {
        union!(c.get_balloon_size_request().send(), balloon_controller::size_result)
    };
    "BalloonController.requestBalloonSize" Balloon Soon |c: balloon_controller::Client| {
        complete(c.request_balloon_size_request().send()).await
    };
    "BalloonController.getMemStats" Observe Soon |c: balloon_controller::Client| {
        union!(c.get_mem_stats_request().send(), balloon_controller::stats_result)
    };
    "MemController.getMemSize" Observe Soon |c: mem_controller::Client| {
        union!(c.get_mem_size_request().send(), mem_controller::size_result)
    };
    "MemController.requestSize" Memory Soon |c: mem_controller::Client| complete(c.request_size_request().send()).await;
    "DiskController.list" Observe Soon |c: disk_controller::Client| {
        union!(c.list_request().send(), disk_controller::list_result)
    };
    "DiskController.resize" Disk Soon |c: disk_controller::Client| complete(c.resize_request().send()).await;
    "NetController.list" Observe Soon |c: net_controller::Client| {
        union!(c.list_request().send(), net_controller::list_result)
    };
    "NetController.setLink" Network Soon |c: net_controller::Client| complete(c.set_link_request().send()).await;

    "HostVsockEndpoint.listen" Listen Soon |c: host_vsock_endpoint::Client| {
        let mut call = c.listen_request();
        call.get().set_port(52);
        call.get().set_acceptor(guard::new_client(Taker::default()));
        beside!(call.send())
    };
    "HostVsockEndpoint.connect" Connect Soon |c: host_vsock_endpoint::Client| {
        let mut call = c.connect_request();
        call.get().set_port(22);
        union!(call.send(), host_vsock_endpoint::stream_result)
    };
    "HostVsockEndpoint.connectStream" Connect Soon |c: host_vsock_endpoint::Client| {
        let mut call = c.connect_stream_request();
        call.get().set_port(22);
        call.get().set_from_guest(guard::new_client(Sink::default()));
        beside!(call.send())
    };
    "HostVsockEndpoint.address" Nothing Soon |c: host_vsock_endpoint::Client| or_null!(c.address_request().send());

    "Agent.ready" Agent Soon |c: agent::Client| union!(c.ready_request().send(), agent::ready_result);
    "Agent.putFile" Agent Soon |c: agent::Client| {
        let mut call = c.put_file_request();
        call.get().set_path("/nonexistent/file");
        fails_in_guest(beside!(call.send()))
    };
    "Agent.getFile" Agent Soon |c: agent::Client| {
        let mut call = c.get_file_request();
        call.get().set_path("/nonexistent/file");
        call.get().set_sink(guard::new_client(Sink::default()));
        fails_in_guest(union!(call.send(), agent::size_result))
    };
    "Agent.exec" Agent Soon |c: agent::Client| {
        let mut call = c.exec_request();
        call.get().init_command().init_arguments(1).set(0, "true");
        beside!(call.send())
    };

    "Power.pause" Pause Soon |c: power::Client| complete(c.pause_request().send()).await;
    "Power.resume" Pause Soon |c: power::Client| complete(c.resume_request().send()).await;
    "Power.nmi" Nmi Never |c: power::Client| complete(c.nmi_request().send()).await;
    "Power.reset" Reset WithGuest |c: power::Client| complete(c.reset_request().send()).await;
    "Power.shutdown" Shutdown WithGuest |c: power::Client| complete(c.shutdown_request().send()).await;
    "Power.stop" Shutdown WithGuest |c: power::Client| union!(c.stop_request().send(), power::stop_result);
    "Power.kill" Kill WithGuest |c: power::Client| union!(c.kill_request().send(), power::stop_result);
};

/// It came as far as the guest, which has no such file.
fn fails_in_guest(outcome: Result<(), Error>) -> Result<(), Error> {
    match outcome {
        Err(error) if error.message.starts_with("in the guest: ") => Ok(()),
        outcome => outcome,
    }
}

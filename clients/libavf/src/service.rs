//! The service: the guest manager's process, and a thread with the event loop of the connection to it.
//!
//! ```text
//!   program's threads --requests--> service's thread --Cap'n Proto--> guest manager (child process)
//!                     <--answers---  one task a machine
//! ```
//!
//! However the connection ends, the thread ends with it, and all machines are lost.

use std::{cell::Cell, io, net::Shutdown, os::unix::net::UnixStream, thread::JoinHandle, time::Duration};

use futures::{
    FutureExt, StreamExt,
    channel::mpsc::{UnboundedReceiver, UnboundedSender, unbounded},
    future::{Either, LocalBoxFuture, select},
    stream::FuturesUnordered,
};
use sepal_schema::{
    error::{Error, Kind, Outcome, read_completion},
    lifecycle_capnp::guest_lifecycle,
    manager_capnp::guest_manager,
    transport::{Connection, Handle, Limits, Reactor, connect},
};

use crate::{
    answer::{Answer, answer},
    config::{Incomplete, RawConfig, longest_name},
    early::{self, EarlyError},
    log,
    machine::Machine,
    name::Names,
    process::Process,
    streams::Ends,
    threads,
    vm::{Driven, Vm},
};

/// Machines of one service: each that runs has two calls in flight, of which a connection may have 1024 (`Limits::calls`).
const MOST_MACHINES: usize = 256;
/// How long a manager may take to answer for the first time.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// Why there is no service.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoService {
    #[error("starting the guest manager: {0}")]
    Spawn(#[from] io::Error),
    #[error("the guest manager does not answer")]
    Connect,
}

impl NoService {
    /// The number of the error.
    pub(crate) fn errno(&self) -> i32 {
        match self {
            Self::Spawn(error) => error.raw_os_error().unwrap_or(libc::EIO),
            Self::Connect => libc::ECONNREFUSED,
        }
    }
}

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
enum NoMachine {
    #[error("{0}")]
    Incomplete(#[from] Incomplete),
    #[error("{0}")]
    Early(#[from] EarlyError),
    #[error("{words}", words = log::words(.0))]
    Refused(#[from] Error),
    #[error("{0}")]
    Broken(#[from] capnp::Error),
    #[error("the service has {MOST_MACHINES} virtual machines; no more are possible")]
    TooMany,
    #[error("its service has ended")]
    Lost,
}

/// What the program asks of the thread.
enum Request {
    /// A machine of this configuration, whose name the program gave it.
    Machine {
        name: String,
        config: Box<RawConfig>,
        driven: Driven,
        answer: Answer<Result<(), NoMachine>>,
    },
    End,
}

/// What is behind a handle `AVirtualizationService`.
pub struct Service {
    early: bool,
    requests: UnboundedSender<Request>,
    thread: JoinHandle<()>,
    process: Process,
}

impl Service {
    /// Starts a manager, and connects to it.
    ///
    /// # Errors
    /// It cannot be started, or does not answer.
    pub(crate) fn new(early: bool) -> Result<Self, NoService> {
        log::look_for_standard_error();
        let (ours, theirs) = UnixStream::pair()?;
        let (requests, receiver) = unbounded();
        let (begun, has_begun) = answer();
        let (answer, answered) = answer();
        let thread = threads::spawn("avf-service", move || {
            // By this thread, with which the manager ends.
            let process = Process::start(theirs.into());
            let started = process.is_ok();
            begun.give(process);
            if started {
                serve(ours, receiver, answer);
            }
        })?;
        let process = match has_begun.take() {
            Some(Ok(process)) => process,
            failed => {
                // A panic was told where it happened.
                let _ = thread.join();
                return Err(failed
                    .and_then(Result::err)
                    .map_or(NoService::Connect, NoService::Spawn));
            }
        };
        let service = Self {
            early,
            requests,
            thread,
            process,
        };
        match answered.take() {
            Some(()) => Ok(service),
            None => {
                service.process.kill();
                service.destroy();
                Err(NoService::Connect)
            }
        }
    }

    /// Makes a machine. What keeps it from being one is told in words.
    pub(crate) fn machine(&self, config: RawConfig, ends: Ends) -> Option<Vm> {
        let called = config.name.clone().unwrap_or_default();
        let (vm, driven) = Vm::new(called, ends);
        match self.make(config, driven) {
            Ok(()) => Some(vm),
            Err(error) => {
                vm.say(&format!("not created: {error}"));
                None
            }
        }
    }

    fn make(&self, mut config: RawConfig, driven: Driven) -> Result<(), NoMachine> {
        let name = config.complete()?;
        if self.early {
            config.cid = early::cid(&name)?;
        }
        let (answer, answered) = answer();
        let request = Request::Machine {
            name,
            config: Box::new(config),
            driven,
            answer,
        };
        self.requests.unbounded_send(request).map_err(|_| NoMachine::Lost)?;
        answered.take().ok_or(NoMachine::Lost)?
    }

    /// Ends the manager, and with it all machines.
    pub(crate) fn destroy(self) {
        // It has ended already if it does not take the request.
        let _ = self.requests.unbounded_send(Request::End);
        // A panic was told where it happened.
        let _ = self.thread.join();
        self.process.end();
    }
}

/// The thread: tells `answer` that the manager has answered, and goes on until the program or the manager has had enough.
fn serve(socket: UnixStream, requests: UnboundedReceiver<Request>, answer: Answer<()>) {
    let served = Reactor::single_threaded().and_then(|mut reactor| {
        let handle = reactor.handle();
        reactor.run_until(async {
            let ours = socket.try_clone()?;
            let (manager, connection): (guest_manager::Client, _) = connect(&handle, socket, Limits::default())?;
            let version = manager.version_request().send().promise;
            if let Ok(Ok(_)) = handle.timeout(ANSWER_WITHIN, version).await {
                answer.give(());
                let serving = Serving {
                    handle,
                    manager,
                    connection,
                    socket: ours,
                    names: Names::new(longest_name()),
                };
                serving.serve(requests).await;
            }
            Ok(())
        })?
    });
    if let Err(error) = served {
        log::say(&format!("the service has ended: {error}"));
    }
}

/// The machines at work.
struct Serving {
    handle: Handle,
    manager: guest_manager::Client,
    connection: Connection,
    /// The connection's end of ours.
    socket: UnixStream,
    names: Names,
}

impl Serving {
    /// Serves until the program or the manager has had enough, and then until all machines have noticed.
    async fn serve(&self, mut requests: UnboundedReceiver<Request>) {
        let mut machines: FuturesUnordered<LocalBoxFuture<'_, ()>> = FuturesUnordered::new();
        let mut ended = Box::pin(self.connection.ended().map(drop));
        loop {
            // Polled with the others, but no event by itself.
            let working = async {
                while machines.next().await.is_some() {}
                std::future::pending::<()>().await;
            };
            let request = match select(requests.next(), select(&mut ended, Box::pin(working))).await {
                Either::Left((request, _)) => request.unwrap_or(Request::End),
                Either::Right(_) => break,
            };
            match request {
                Request::Machine {
                    name,
                    config,
                    driven,
                    answer,
                } => machines.push(self.machine(name, *config, driven, answer).boxed_local()),
                Request::End => break,
            }
        }
        self.connection.disconnect();
        self.connection.ended().await;
        // Whoever else has a copy of it, in a process that the program made by fork: the manager ends now. It may have ended before.
        let _ = self.socket.shutdown(Shutdown::Both);
        // Nothing more is taken on; what was asked before is answered by being dropped.
        drop(requests);
        while machines.next().await.is_some() {}
    }

    /// A machine from its creation to its destruction.
    async fn machine(&self, name: String, config: RawConfig, driven: Driven, answer: Answer<Result<(), NoMachine>>) {
        let made = self.make(&name, config).await;
        match made {
            Ok(machine) => {
                answer.give(Ok(()));
                machine.drive(driven, self.connection.ended().map(drop)).await;
            }
            Err(error) => {
                drop(driven);
                answer.give(Err(error));
            }
        }
    }

    /// Has the manager look at a configuration, and takes a name for it.
    async fn make(&self, called: &str, config: RawConfig) -> Result<Machine, NoMachine> {
        let fds = self.connection.fds();
        if self.names.count() >= MOST_MACHINES {
            return Err(NoMachine::TooMany);
        }
        let mut name = self.names.take(called);
        let mut request = self.manager.check_request();
        config.write(name.as_str(), request.get().init_config(), &fds)?;
        let response = request.send().promise.await?;
        read_completion(response.get()?)?;
        // Names that were let go of a moment ago may not be free yet, and are kept until there is another.
        let mut busy = Vec::new();
        let lifecycle = loop {
            match self.new_guest(name.as_str()).await {
                Ok(lifecycle) => break lifecycle,
                Err(NoMachine::Refused(error)) if error.kind == Kind::AlreadyRunning => {}
                Err(error) => return Err(error),
            }
            let next = self.names.take(called);
            busy.push(std::mem::replace(&mut name, next));
        };
        Ok(Machine {
            handle: self.handle.clone(),
            fds,
            lifecycle,
            config,
            name,
            stopped: Cell::new(false),
        })
    }

    async fn new_guest(&self, name: &str) -> Result<guest_lifecycle::Client, NoMachine> {
        let mut request = self.manager.new_guest_request();
        request.get().set_name(name);
        let response = request.send().promise.await?;
        Ok(response.get()?.outcome()?.get_lifecycle()?)
    }
}

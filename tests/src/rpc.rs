//! A client of the protocol that makes one call after the other, each with a deadline.

use std::{future::Future, os::unix::net::UnixStream, path::Path};

use futures::FutureExt;
use sepal_schema::{
    config::GuestConfig,
    error::{Error, Outcome, read_completion},
    guest_capnp::{guest, observer, output, power},
    info::GuestInfo,
    lifecycle_capnp::guest_lifecycle,
    manager_capnp::guest_manager,
    report::StopReport,
    transport::{Connection, Limits, Reactor, connect},
};

use crate::PATIENCE;

/// A guest that was launched; it is stopped when the lease is dropped.
pub struct Launched {
    /// The guest.
    pub guest: guest::Client,
    /// What keeps it.
    pub lease: guest_manager::lease::Client,
    /// The name that it got.
    pub name: String,
}

/// A connection to a manager, and the loop that it lives on.
pub struct Rpc {
    reactor: Reactor,
    /// The manager.
    pub manager: guest_manager::Client,
    /// The connection.
    pub connection: Connection,
}

/// How a `run` ended.
pub type RunOutcome = Result<StopReport, Error>;

impl Rpc {
    /// Connects to the manager that listens at `path`.
    ///
    /// # Panics
    /// If nobody listens.
    pub fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self::over(socket, Limits::default())
    }

    /// Talks over this socket, within these limits.
    ///
    /// # Panics
    /// If the socket is no good.
    pub fn over(socket: UnixStream, limits: Limits) -> Self {
        let reactor = Reactor::new().unwrap();
        let (manager, connection) = connect(&reactor.handle(), socket, limits).unwrap();
        Self {
            reactor,
            manager,
            connection,
        }
    }

    /// Runs the loop until the future is there.
    ///
    /// # Panics
    /// After [`PATIENCE`], naming `what`.
    #[track_caller]
    pub fn wait<F: Future>(&mut self, what: &str, future: F) -> F::Output {
        let handle = self.reactor.handle();
        let outcome = self.reactor.run_until(handle.timeout(PATIENCE, future)).unwrap();
        outcome.unwrap_or_else(|_| panic!("{what}: not within {PATIENCE:?}"))
    }

    /// Runs the loop until the future is there or everything that can be done without waiting is done; none in the second case.
    pub fn poll<F: Future>(&mut self, future: F) -> Option<F::Output> {
        self.reactor.run_until(async { future.now_or_never() }).unwrap()
    }

    /// Takes a name.
    ///
    /// # Errors
    /// What the manager answered.
    ///
    /// # Panics
    /// If the connection breaks or the answer is late; so do all others.
    #[track_caller]
    pub fn new_guest(&mut self, name: &str) -> Result<guest_lifecycle::Client, Error> {
        let mut request = self.manager.new_guest_request();
        request.get().set_name(name);
        let response = self.wait("newGuest", request.send().promise).unwrap();
        Ok(response.get().unwrap().outcome()?.get_lifecycle().unwrap())
    }

    /// Sends a create, and returns what will be its answer.
    ///
    /// # Errors
    /// The configuration cannot be sent.
    pub fn send_create(
        &self,
        lifecycle: &guest_lifecycle::Client,
        config: GuestConfig,
    ) -> Result<impl Future<Output = Result<(), Error>> + use<>, Error> {
        let mut request = lifecycle.create_request();
        config.encode(request.get().init_config(), &self.connection.fds())?;
        let promise = request.send().promise;
        Ok(async move { read_completion(broken(promise.await)?.get().map_err(broken_with)?) })
    }

    /// Creates a guest.
    ///
    /// # Errors
    /// What the manager answered.
    #[track_caller]
    pub fn create(&mut self, lifecycle: &guest_lifecycle::Client, config: GuestConfig) -> Result<(), Error> {
        let answer = self.send_create(lifecycle, config)?;
        self.wait("create", answer)
    }

    /// The guest that was created.
    pub fn bind(&self, lifecycle: &guest_lifecycle::Client) -> guest::Client {
        lifecycle.bind_request().send().pipeline.get_guest()
    }

    /// Sends a run, and returns what will be its answer.
    pub fn send_run(&self, lifecycle: &guest_lifecycle::Client) -> impl Future<Output = RunOutcome> + use<> {
        use guest_lifecycle::run_result::Which;
        let promise = lifecycle.run_request().send().promise;
        async move {
            let response = broken(promise.await)?;
            match response.get().map_err(broken_with)?.which().unwrap() {
                Which::Ended(report) => Ok(StopReport::read(report.unwrap()).unwrap()),
                Which::Error(error) => Err(Error::read(error.unwrap()).unwrap()),
            }
        }
    }

    /// Stops what the lifecycle has.
    ///
    /// # Errors
    /// What the manager answered.
    #[track_caller]
    pub fn stop(&mut self, lifecycle: &guest_lifecycle::Client) -> Result<(), Error> {
        let promise = lifecycle.stop_request().send().promise;
        let response = broken(self.wait("stop", promise))?;
        read_completion(response.get().unwrap())
    }

    /// Launches a guest.
    ///
    /// # Errors
    /// What the manager answered.
    #[track_caller]
    pub fn launch(&mut self, config: GuestConfig, detach: bool) -> Result<Launched, Error> {
        let mut request = self.manager.launch_request();
        config.encode(request.get().init_config(), &self.connection.fds())?;
        request.get().set_detach(detach);
        let response = broken(self.wait("launch", request.send().promise))?;
        let launched = response.get().unwrap().outcome()?;
        Ok(Launched {
            guest: launched.get_guest().unwrap(),
            lease: launched.get_lease().unwrap(),
            name: launched.get_name().unwrap().to_string().unwrap(),
        })
    }

    /// A guest by its name.
    ///
    /// # Errors
    /// What the manager answered.
    #[track_caller]
    pub fn lookup(&mut self, name: &str) -> Result<guest::Client, Error> {
        let mut request = self.manager.lookup_request();
        request.get().set_name(name);
        let response = broken(self.wait("lookup", request.send().promise))?;
        Ok(response.get().unwrap().outcome()?.get_guest().unwrap())
    }

    /// All guests.
    #[track_caller]
    pub fn list(&mut self) -> Vec<GuestInfo> {
        let response = self.wait("list", self.manager.list_request().send().promise).unwrap();
        let guests = response.get().unwrap().get_guests().unwrap();
        guests.iter().map(|info| GuestInfo::read(info).unwrap()).collect()
    }

    /// What there is to know about a guest.
    #[track_caller]
    pub fn info(&mut self, guest: &guest::Client) -> GuestInfo {
        let response = self
            .wait("info", observer(guest).info_request().send().promise)
            .unwrap();
        GuestInfo::read_result(response.get().unwrap()).unwrap()
    }

    /// Reads a guest's serial output from its beginning until `text` is in it, or it ends. Returns all of it.
    #[track_caller]
    pub fn read_until(&mut self, guest: &guest::Client, text: &str) -> String {
        self.read_on(guest, &mut 0, text)
    }

    /// Reads a guest's serial output from `position` until `text` is in it, or it ends. Returns what it read; `position` is after it.
    #[track_caller]
    pub fn read_on(&mut self, guest: &guest::Client, position: &mut u64, text: &str) -> String {
        let output: output::Client = observer(guest).output_request().send().pipeline.get_output();
        let mut all = Vec::new();
        loop {
            let mut request = output.read_request();
            request.get().set_position(*position);
            let response = self.wait("reading the output", request.send().promise).unwrap();
            let piece = response.get().unwrap();
            let bytes = piece.get_bytes().unwrap();
            all.extend_from_slice(bytes);
            *position = piece.get_position() + bytes.len() as u64;
            let so_far = String::from_utf8_lossy(&all).into_owned();
            if so_far.contains(text) || piece.get_ended() {
                return so_far;
            }
        }
    }

    /// Pauses a guest, or lets it go on.
    ///
    /// # Errors
    /// What the manager answered.
    #[track_caller]
    pub fn set_paused(&mut self, guest: &guest::Client, paused: bool) -> Result<(), Error> {
        let power = power(guest);
        if paused {
            let response = broken(self.wait("pause", power.pause_request().send().promise))?;
            read_completion(response.get().unwrap())
        } else {
            let response = broken(self.wait("resume", power.resume_request().send().promise))?;
            read_completion(response.get().unwrap())
        }
    }
}

/// The read-only facet of a guest.
pub fn observer(guest: &guest::Client) -> observer::Client {
    guest.observer_request().send().pipeline.get_observer()
}

/// The facet of a guest that stops it.
pub fn power(guest: &guest::Client) -> power::Client {
    guest.power_request().send().pipeline.get_power()
}

/// A broken connection or capability as an error; the kind is not what such a test looks at.
fn broken<T>(outcome: Result<T, capnp::Error>) -> Result<T, Error> {
    outcome.map_err(broken_with)
}

fn broken_with(error: capnp::Error) -> Error {
    Error::new(sepal_schema::error::Kind::InternalError, format!("broken: {error}"))
}

//! A manager, a client, and short ways to say what a client does.

use std::{os::unix::net::UnixStream, rc::Rc, time::Duration};

use sepal_guest_manager::{
    client::{Client, Who},
    manager::{Manager, Settings},
    manager_server::ManagerServer,
    pool::Pool,
    roles::Role,
};
use sepal_schema::{
    config::GuestConfig,
    error::{Error, Outcome, read_completion},
    guest_capnp::{guest, observer, power},
    info::{GuestInfo, GuestStatus},
    lifecycle_capnp::guest_lifecycle::{self, run_result},
    manager_capnp::guest_manager::{self, lease},
    report::StopReport,
    transport::{Connection, FdTable, Handle, Limits, Reactor, connect, serve_with},
};

use crate::fake::{Fake, Starter};

/// A test that has not ended by then hangs.
pub(crate) const HUNG: Duration = Duration::from_secs(60);

pub(crate) struct World {
    pub(crate) handle: Handle,
    pub(crate) manager: Rc<Manager>,
    pub(crate) fake: Rc<Fake>,
}

/// A client's connection.
pub(crate) struct Caller {
    pub(crate) manager: guest_manager::Client,
    pub(crate) connection: Connection,
}

/// What launch gives.
pub(crate) struct Launched {
    pub(crate) name: String,
    pub(crate) guest: guest::Client,
    pub(crate) lease: lease::Client,
}

impl Launched {
    /// What a launch, a start or a lease that was redeemed was answered.
    pub(crate) fn read(answer: guest_manager::launch_result::Reader<'_>) -> Result<Self, Error> {
        let launched = answer.outcome()?;
        Ok(Self {
            name: launched.get_name()?.to_string().unwrap(),
            guest: launched.get_guest()?,
            lease: launched.get_lease()?,
        })
    }
}

/// Runs a test on a manager with these settings.
pub(crate) fn with(settings: Settings, test: impl AsyncFnOnce(World)) {
    let mut reactor = Reactor::new().unwrap();
    let handle = reactor.handle();
    let fake = Fake::new(&handle);
    let manager = Manager::new(handle.clone(), settings, Box::new(Starter(fake.clone()))).unwrap();
    let world = World {
        handle: handle.clone(),
        manager,
        fake,
    };
    let done = reactor.run_until(handle.timeout(HUNG, test(world))).unwrap();
    done.expect("the test hangs");
}

/// Runs a test on a manager that keeps so many components waiting.
pub(crate) fn with_pool(size: usize, test: impl AsyncFnOnce(World, Pool)) {
    let mut reactor = Reactor::new().unwrap();
    let handle = reactor.handle();
    let fake = Fake::new(&handle);
    let pool = Pool::new(&handle, Rc::new(Starter(fake.clone())), size);
    let manager = Manager::new(handle.clone(), Settings::default(), Box::new(pool.clone())).unwrap();
    let world = World {
        handle: handle.clone(),
        manager,
        fake,
    };
    let done = reactor.run_until(handle.timeout(HUNG, test(world, pool))).unwrap();
    done.expect("the test hangs");
}

/// Runs a test on an ordinary manager.
pub(crate) fn run(test: impl AsyncFnOnce(World)) {
    with(Settings::default(), test);
}

/// Settings with little patience, for components that do not answer.
pub(crate) fn impatient() -> Settings {
    Settings {
        force_after: Duration::from_millis(100),
        ..Settings::default()
    }
}

impl World {
    /// A client with the role admin, or operate.
    pub(crate) fn caller_as(&self, trusted: bool) -> Caller {
        let role = if trusted { Role::Admin } else { Role::Operate };
        let who = Who {
            uid: 1000,
            gid: 100,
            pid: None,
            share: None,
        };
        self.caller_with(|fds| Client::new(fds, who, role))
    }

    /// A client of one's own making.
    pub(crate) fn caller_with(&self, client: impl FnOnce(FdTable) -> Client) -> Caller {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let serve = |fds| ManagerServer::new_client(self.manager.clone(), client(fds)).client;
        serve_with(&self.handle, theirs, Limits::default(), serve)
            .unwrap()
            .detach();
        let (manager, connection) = connect(&self.handle, ours, Limits::default()).unwrap();
        Caller { manager, connection }
    }

    pub(crate) fn caller(&self) -> Caller {
        self.caller_as(true)
    }
}

/// A configuration with nothing but a name.
pub(crate) fn named(name: &str) -> GuestConfig {
    GuestConfig {
        name: name.into(),
        ..GuestConfig::default()
    }
}

impl Caller {
    pub(crate) async fn launch_config(&self, config: GuestConfig, detach: bool) -> Result<Launched, Error> {
        let mut request = self.manager.launch_request();
        request.get().set_detach(detach);
        config.encode(request.get().init_config(), &self.connection.fds())?;
        Launched::read(request.send().promise.await?.get()?)
    }

    pub(crate) async fn check(&self, config: GuestConfig) -> Result<(), Error> {
        let mut request = self.manager.check_request();
        config.encode(request.get().init_config(), &self.connection.fds())?;
        read_completion(request.send().promise.await?.get()?)
    }

    pub(crate) async fn launch(&self, name: &str) -> Result<Launched, Error> {
        self.launch_config(named(name), false).await
    }

    pub(crate) async fn lookup(&self, name: &str) -> Result<guest::Client, Error> {
        let mut request = self.manager.lookup_request();
        request.get().set_name(name);
        let answer = request.send().promise.await?;
        Ok(answer.get()?.outcome()?.get_guest()?)
    }

    pub(crate) async fn list(&self) -> Vec<GuestInfo> {
        let answer = self.manager.list_request().send().promise.await.unwrap();
        let guests = answer.get().unwrap().get_guests().unwrap();
        guests.iter().map(|info| GuestInfo::read(info).unwrap()).collect()
    }

    pub(crate) async fn new_guest(&self, name: &str) -> Result<guest_lifecycle::Client, Error> {
        let mut request = self.manager.new_guest_request();
        request.get().set_name(name);
        let answer = request.send().promise.await?;
        Ok(answer.get()?.outcome()?.get_lifecycle()?)
    }

    pub(crate) async fn force_shutdown(&self, name: &str) -> Result<(), Error> {
        let mut request = self.manager.force_shutdown_request();
        request.get().set_name(name);
        read_completion(request.send().promise.await?.get()?)
    }

    pub(crate) async fn remove(&self, name: &str) -> Result<(), Error> {
        let mut request = self.manager.remove_request();
        request.get().set_name(name);
        read_completion(request.send().promise.await?.get()?)
    }

    pub(crate) async fn create(&self, lifecycle: &guest_lifecycle::Client, config: GuestConfig) -> Result<(), Error> {
        let mut request = lifecycle.create_request();
        config.encode(request.get().init_config(), &self.connection.fds())?;
        read_completion(request.send().promise.await?.get()?)
    }
}

pub(crate) async fn run_lifecycle(lifecycle: &guest_lifecycle::Client) -> Result<StopReport, Error> {
    let answer = lifecycle.run_request().send().promise.await?;
    match answer.get()?.which().unwrap() {
        run_result::Ended(report) => Ok(StopReport::read(report?)?),
        run_result::Error(error) => Err(Error::read(error?)?),
    }
}

pub(crate) fn power(guest: &guest::Client) -> power::Client {
    guest.power_request().send().pipeline.get_power()
}

pub(crate) fn observer(guest: &guest::Client) -> observer::Client {
    guest.observer_request().send().pipeline.get_observer()
}

fn stop_result(answer: power::stop_result::Reader<'_>) -> Result<StopReport, Error> {
    match answer.which().unwrap() {
        power::stop_result::Report(report) => Ok(StopReport::read(report?)?),
        power::stop_result::Error(error) => Err(Error::read(error?)?),
    }
}

pub(crate) async fn kill(guest: &guest::Client) -> Result<StopReport, Error> {
    stop_result(power(guest).kill_request().send().promise.await?.get()?)
}

pub(crate) async fn stop(guest: &guest::Client, timeout_ms: u64, force: bool) -> Result<StopReport, Error> {
    let mut request = power(guest).stop_request();
    request.get().set_timeout_ms(timeout_ms);
    request.get().set_force(force);
    stop_result(request.send().promise.await?.get()?)
}

pub(crate) async fn wait(guest: &guest::Client) -> StopReport {
    let answer = observer(guest).wait_request().send().promise.await.unwrap();
    StopReport::read_result(answer.get().unwrap()).unwrap()
}

pub(crate) async fn info(guest: &guest::Client) -> GuestInfo {
    let answer = observer(guest).info_request().send().promise.await.unwrap();
    GuestInfo::read_result(answer.get().unwrap()).unwrap()
}

pub(crate) async fn status(guest: &guest::Client) -> GuestStatus {
    info(guest).await.status
}

/// Reads what the serial port printed from `position` on; with `wait`, until there is something.
pub(crate) async fn read(guest: &guest::Client, position: u64, wait: bool) -> (Vec<u8>, bool) {
    let serial = guest.serial_request().send().pipeline.get_serial();
    let mut request = serial.client.clone().cast_to_output().read_request();
    request.get().set_position(position);
    request.get().set_wait(wait);
    let answer = request.send().promise.await.unwrap();
    let answer = answer.get().unwrap();
    (answer.get_bytes().unwrap().to_vec(), answer.get_ended())
}

/// Serial ports are outputs, too.
pub(crate) trait AsOutput {
    fn cast_to_output(self) -> sepal_schema::guest_capnp::output::Client;
}

impl AsOutput for capnp::capability::Client {
    fn cast_to_output(self) -> sepal_schema::guest_capnp::output::Client {
        capnp::capability::FromClientHook::new(self.hook)
    }
}

//! A guest in each state of its life, and who has part in it.

use std::{fs::File, pin::Pin};

use futures::Future;
use rustix::process::Signal;
use sepal_schema::{
    config::{self, GuestConfig},
    error::Error,
    guest_capnp::guest,
    info::{GuestInfo, GuestStatus},
    lifecycle_capnp::guest_lifecycle,
};
use sepal_tests::{
    Rpc, World,
    process::{self, Process},
    rpc::{RunOutcome, power},
    until,
};

/// The name of the guest.
pub(crate) const NAME: &str = "bee";
/// What the embedded guest prints when it waits for a command.
pub(crate) const PROMPT: &str = "sepal> ";

/// How far a guest has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// The name is taken.
    Named,
    /// `create` is under way, and its component is stopped so that it stays so.
    Creating,
    /// `create` has been answered.
    Created,
    Running,
    Paused,
    /// It was asked to shut down, and does not.
    Asked,
    /// It is being stopped by force, and its component does not react.
    Stopping,
    /// It ran and has ended; its component waits for the next creation.
    Stopped,
}

type Answer<T> = Pin<Box<dyn Future<Output = T>>>;

/// A guest in a state.
pub(crate) struct Scene {
    pub(crate) state: State,
    pub(crate) world: World,
    /// The connection of the client that drives the guest.
    pub(crate) driver: Rpc,
    pub(crate) lifecycle: guest_lifecycle::Client,
    /// The answer to `create`, where it is awaited.
    pub(crate) create: Option<Answer<Result<(), Error>>>,
    /// The answer to `run`, where it is awaited.
    pub(crate) run: Option<Answer<RunOutcome>>,
    pub(crate) guest: Option<guest::Client>,
    /// The component, where there is one.
    pub(crate) component: Option<Process>,
    /// Calls that shall not be dropped, their answers of no interest.
    pub(crate) pending: Vec<Answer<()>>,
}

impl Scene {
    /// Brings a guest into a state.
    pub(crate) fn at(state: State) -> Self {
        let world = World::with_manager();
        let mut driver = world.connect();
        let lifecycle = driver.new_guest(NAME).unwrap();
        let mut scene = Self {
            state,
            world,
            driver,
            lifecycle,
            create: None,
            run: None,
            guest: None,
            component: None,
            pending: Vec::new(),
        };
        match state {
            State::Named => {}
            State::Creating => scene.begin_to_create(),
            _ => scene.create(),
        }
        if !matches!(state, State::Named | State::Creating | State::Created) {
            scene.run();
        }
        match state {
            State::Paused => scene.driver.set_paused(&scene.guest(), true).unwrap(),
            State::Asked => scene.ask(),
            State::Stopping => scene.begin_to_stop(),
            State::Stopped => scene.shut_down(),
            _ => {}
        }
        let info = scene.info().unwrap();
        let expected = match state {
            State::Named => GuestStatus::NotStarted,
            State::Creating | State::Created => GuestStatus::Starting,
            State::Running | State::Paused | State::Asked => GuestStatus::Running,
            State::Stopping => GuestStatus::Stopping,
            State::Stopped => GuestStatus::Stopped,
        };
        assert!(
            info.status == expected && info.paused == (state == State::Paused),
            "{state:?}: {info:?}"
        );
        scene
    }

    fn config() -> GuestConfig {
        GuestConfig {
            cmdline: "nobutton".into(),
            memory_mib: 32,
            ..GuestConfig::default()
        }
    }

    /// Sends a create that takes long, and stops the component in the middle of it.
    fn begin_to_create(&mut self) {
        let (kernel, initrd) = self.world.slow_to_create();
        let config = GuestConfig {
            memory_mib: 1200,
            kernel: config::File::Fd(File::open(kernel).unwrap().into()),
            initrd: config::File::Fd(File::open(initrd).unwrap().into()),
            ..Self::config()
        };
        let answer = self.driver.send_create(&self.lifecycle, config).unwrap();
        self.create = Some(Box::pin(answer));
        // Sends what waits, and is answered after it has arrived.
        self.driver.list();
        let component = until("the component is there", || component(&self.world).filter(is_sealed));
        component.signal(Signal::STOP);
        until("it stands still", || {
            Process::of(component.pid).filter(|process| process.state == 'T')
        });
        let answered = self.driver.poll(self.create.as_mut().unwrap());
        assert!(answered.is_none(), "create was faster than the test: {answered:?}");
        self.component = Some(component);
    }

    /// Creates a guest.
    fn create(&mut self) {
        self.driver.create(&self.lifecycle, Self::config()).unwrap();
        self.component = component(&self.world);
        assert!(self.component.is_some());
    }

    /// Runs what was created, to its prompt.
    fn run(&mut self) {
        let run = self.driver.send_run(&self.lifecycle);
        self.run = Some(Box::pin(run));
        let guest = self.driver.bind(&self.lifecycle);
        let shown = self.driver.read_until(&guest, PROMPT);
        assert!(shown.ends_with(PROMPT), "{shown}");
        self.guest = Some(guest);
    }

    pub(crate) fn guest(&self) -> guest::Client {
        self.guest.clone().unwrap()
    }

    /// Asks the guest to shut down, which it ignores.
    fn ask(&mut self) {
        let shutdown = power(&self.guest()).shutdown_request().send().promise;
        self.driver.wait("the power button", shutdown).unwrap();
        let mut request = power(&self.guest()).stop_request();
        request.get().set_timeout_ms(3_600_000);
        let answer = request.send().promise;
        self.pending.push(Box::pin(async { drop(answer.await) }));
    }

    /// Stops the guest while its component stands still: the manager gives it some time before it kills it.
    fn begin_to_stop(&mut self) {
        self.component.as_ref().unwrap().signal(Signal::STOP);
        let answer = self.lifecycle.stop_request().send().promise;
        self.pending.push(Box::pin(async { drop(answer.await) }));
        until("it is being stopped", || {
            self.info().filter(|info| info.status == GuestStatus::Stopping)
        });
    }

    /// Types the command that ends the guest, and waits until it has.
    fn shut_down(&mut self) {
        let serial = self.guest().serial_request().send().pipeline.get_serial();
        let mut request = serial.write_request();
        request.get().set_bytes(b"shutdown\r");
        self.driver.wait("typing", request.send()).unwrap();
        let run = self.run.take().unwrap();
        self.driver.wait("the shutdown", run).unwrap();
    }

    /// What the manager tells about the guest; none if it knows no such name.
    pub(crate) fn info(&mut self) -> Option<GuestInfo> {
        self.driver.list().into_iter().find(|info| info.name == NAME)
    }

    /// Kills a process as nobody can prevent it, and waits until it is reaped.
    pub(crate) fn kill(&self, process: &Process) {
        process.signal(Signal::KILL);
        until("it is reaped", || self.world.is_gone(process).then_some(()));
    }

    /// Checks that the holder of the name can go on as if nothing had happened, and ends everything.
    pub(crate) fn go_on_and_end(mut self) {
        self.create();
        self.run();
        self.driver.stop(&self.lifecycle).unwrap();
        let Self { world, driver, .. } = self;
        drop(driver);
        world.end();
    }
}

/// The only component of a world.
pub(crate) fn component(world: &World) -> Option<Process> {
    let mut components = world.family().into_iter().filter(is_component);
    let component = components.next();
    assert!(components.next().is_none(), "there is one component at most");
    component
}

/// True once a component has closed its jail.
pub(crate) fn is_sealed(component: &Process) -> bool {
    process::try_status(component.pid, "Seccomp").is_some_and(|mode| mode == "2")
}

/// True once the program of a component runs (and not yet the keeper's copy that becomes one).
pub(crate) fn is_component(process: &Process) -> bool {
    process.name == "vmm-component" && process.state != 'Z'
}

//! A world whose managers come and go while guests stay.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Command,
    rc::Rc,
    sync::{Mutex, MutexGuard, PoisonError},
};

use rustix::process::Signal;
use sepal_schema::{
    config::{self, GuestConfig},
    guest_capnp::{event, event_sink, guest},
    info::{GuestInfo, GuestStatus},
    manager_capnp::guest_manager,
    report::Reason,
    transport::guard,
};
use sepal_tests::{Rpc, World, process::Process, program, rpc::observer, until};

use crate::printer::{self, LINE};

/// Keepers without a manager cannot be told from those of another test's, so that only one test at a time has any.
static ALONE: Mutex<()> = Mutex::new(());

/// Where managers log to, in the world's folder.
const LOG: &str = "managers.log";

/// What the embedded guest prints when it waits for a command.
pub(crate) const PROMPT: &str = "sepal> ";

/// What a launch will be answered.
pub(crate) type SlowLaunch =
    capnp::capability::Promise<capnp::capability::Response<guest_manager::launch_result::Owned>, capnp::Error>;

/// The world.
pub(crate) struct Scene {
    pub(crate) rpc: Rpc,
    /// The parents of components, so that a test which fails leaves nothing.
    keepers: BTreeMap<u32, Process>,
    pub(crate) world: World,
    _alone: MutexGuard<'static, ()>,
}

/// An event, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) sequence: u64,
    pub(crate) guest: String,
    pub(crate) generation: u64,
    pub(crate) kind: &'static str,
}

impl Scene {
    /// A manager, and no guests.
    pub(crate) fn new() -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut world = World::new();
        start_manager(&mut world, &program("guest-manager"));
        Self {
            rpc: world.connect(),
            keepers: BTreeMap::new(),
            world,
            _alone: alone,
        }
    }

    /// The configuration of a guest that goes on without its manager.
    pub(crate) fn config(name: &str) -> GuestConfig {
        GuestConfig {
            name: name.into(),
            memory_mib: 32,
            durable: true,
            ..GuestConfig::default()
        }
    }

    /// As [`Scene::config`], of the guest that never stops printing.
    pub(crate) fn printing(name: &str) -> GuestConfig {
        GuestConfig {
            kernel: config::File::Bytes(printer::kernel()),
            ..Self::config(name)
        }
    }

    /// Launches a guest that nobody has to keep.
    #[track_caller]
    pub(crate) fn launch(&mut self, config: GuestConfig) -> guest::Client {
        let launched = self.rpc.launch(config, true).unwrap();
        self.note_keepers();
        launched.guest
    }

    /// Sends the launch of a guest that is slow to create, of these files (`World::slow_to_create`), and returns what will be its answer.
    pub(crate) fn send_slow_launch(&self, name: &str, (kernel, initrd): &(PathBuf, PathBuf)) -> SlowLaunch {
        let config = GuestConfig {
            memory_mib: 1200,
            kernel: file(kernel),
            initrd: file(initrd),
            ..Self::config(name)
        };
        let mut request = self.rpc.manager.launch_request();
        config
            .encode(request.get().init_config(), &self.rpc.connection.fds())
            .unwrap();
        request.get().set_detach(true);
        request.send().promise
    }

    /// What the manager tells of a guest.
    #[track_caller]
    pub(crate) fn info(&mut self, name: &str) -> GuestInfo {
        let found = self.rpc.list().into_iter().find(|info| info.name == name);
        found.unwrap_or_else(|| panic!("there is no {name}"))
    }

    /// Waits until a guest is as `wanted`.
    #[track_caller]
    pub(crate) fn until(&mut self, name: &str, what: &str, wanted: impl Fn(&GuestInfo) -> bool) -> GuestInfo {
        until(what, || Some(self.info(name)).filter(|info| wanted(info)))
    }

    /// Waits until a guest runs.
    #[track_caller]
    pub(crate) fn until_running(&mut self, name: &str) -> GuestInfo {
        let info = self.until(name, "it runs", |info| {
            info.status == GuestStatus::Running && info.component_pid != 0
        });
        self.note_keepers();
        info
    }

    /// Waits until a guest has been created and runs, or has run and shut itself down.
    #[track_caller]
    pub(crate) fn until_it_ran(&mut self, name: &str) -> GuestInfo {
        let shut_down = |info: &GuestInfo| info.stop.as_ref().is_some_and(|stop| stop.reason == Reason::Shutdown);
        let info = self.until(name, "it runs", |info| {
            info.status == GuestStatus::Running || shut_down(info)
        });
        self.note_keepers();
        info
    }

    fn note_keepers(&mut self) {
        for info in self.rpc.list() {
            let keeper = Process::of(info.component_pid).and_then(|component| Process::of(component.parent));
            if let Some(keeper) = keeper {
                self.keepers.insert(keeper.pid, keeper);
            }
        }
    }

    /// The component of a guest.
    #[track_caller]
    pub(crate) fn component(&mut self, name: &str) -> Process {
        let pid = self.info(name).component_pid;
        Process::of(pid).unwrap_or_else(|| panic!("the component {pid} of {name} is gone"))
    }

    /// Kills the manager as nobody can prevent it.
    pub(crate) fn kill_manager(&mut self) {
        let manager = self.world.take_manager();
        manager.signal(Signal::KILL);
        assert_eq!(manager.wait().code(), 128 + 9);
    }

    /// The next manager, which takes over.
    pub(crate) fn start_manager(&mut self) {
        self.start_version(&program("guest-manager"));
    }

    /// The next manager, which is this program.
    pub(crate) fn start_version(&mut self, manager: &Path) {
        start_manager(&mut self.world, manager);
        self.rpc = self.world.connect();
    }

    /// What the managers have logged so far.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.world.folder().join(LOG)).unwrap()
    }

    /// One manager after the other.
    pub(crate) fn replace_manager(&mut self) {
        self.kill_manager();
        self.start_manager();
    }

    /// What a printing guest prints from `position` on, until there are `lines` lines; whole ones.
    #[track_caller]
    pub(crate) fn lines(&mut self, name: &str, position: &mut u64, lines: usize) -> String {
        let guest = self.rpc.lookup(name).unwrap();
        let output: sepal_schema::guest_capnp::output::Client =
            observer(&guest).output_request().send().pipeline.get_output();
        let mut all = Vec::new();
        while all.len() < lines * LINE {
            let mut request = output.read_request();
            request.get().set_position(*position + all.len() as u64);
            let answer = self.rpc.wait("reading the output", request.send().promise).unwrap();
            let piece = answer.get().unwrap();
            assert_eq!(piece.get_dropped(), 0, "everything is kept that long");
            all.extend(piece.get_bytes().unwrap());
        }
        all.truncate(all.len() / LINE * LINE);
        *position += all.len() as u64;
        String::from_utf8(all).unwrap()
    }

    /// The events that are kept, oldest first.
    #[track_caller]
    pub(crate) fn events(&mut self) -> Vec<Told> {
        let sink = Rc::new(Sink::default());
        let mut request = self.rpc.manager.subscribe_request();
        request.get().set_sink(guard::new_client(Server(sink.clone())));
        request.get().set_replay(u32::MAX);
        let subscribed = self.rpc.wait("subscribing", request.send().promise).unwrap();
        let subscription = subscribed.get().unwrap().get_subscription().unwrap();
        // Each is told when the one before has been answered.
        let mut heard = 0;
        loop {
            for _ in 0..4 {
                let asked = self.rpc.manager.version_request().send().promise;
                self.rpc.wait("version", asked).unwrap();
            }
            let now = sink.0.borrow().len();
            if now == heard && now > 0 {
                break;
            }
            heard = now;
        }
        drop(subscription);
        let events = sink.0.borrow();
        events.clone()
    }

    /// Stops all guests and the manager; nothing is left.
    pub(crate) fn end(mut self) {
        self.note_keepers();
        let asked = self.rpc.manager.shutdown_request().send().promise;
        // The connection may end before the answer is read.
        let _ = self.rpc.wait("shutdown", asked);
        self.world.take_manager().wait().expect_code(0);
        self.world.assert_nothing_left();
        assert_eq!(self.keepers_files(), Vec::<String>::new());
    }

    /// What is in the folder by which the next manager finds keepers.
    pub(crate) fn keepers_files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.world.state().join("keepers"));
        let names = entries.into_iter().flatten().flatten();
        names
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect()
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("-- the managers' log\n{}", self.log());
        }
        // Components end with their keepers.
        for keeper in self.keepers.values().filter(|keeper| keeper.exists()) {
            keeper.signal(Signal::KILL);
        }
    }
}

/// Starts a manager whose standard error is a file: its keeper, which has it too, outlives it.
fn start_manager(world: &mut World, manager: &Path) {
    let log = world.folder().join(LOG);
    let state = world.state();
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" \"$@\" 2>> \"$LOG\""]).arg(manager);
    command.env("LOG", log);
    world.start_manager_by(command, |command, socket, ready| {
        command.arg("--socket").arg(socket).arg("--ready-fd").arg(ready);
        command.arg("--state").arg(state);
    });
}

/// A file that is passed as a descriptor.
fn file(path: &Path) -> config::File {
    let fd: OwnedFd = std::fs::File::open(path).unwrap().into();
    config::File::Fd(fd)
}

#[derive(Default)]
struct Sink(RefCell<Vec<Told>>);

struct Server(Rc<Sink>);

impl event_sink::Server for Server {
    async fn event(self: Rc<Self>, params: event_sink::EventParams) -> Result<(), capnp::Error> {
        let params = params.get()?;
        let event = params.get_event()?;
        let kind = match event.which()? {
            event::Defined(()) => "defined",
            event::Starting(()) => "starting",
            event::Started(()) => "started",
            event::Paused(()) => "paused",
            event::Resumed(()) => "resumed",
            event::Stopped(_) => "stopped",
            event::Crashed(_) => "crashed",
            event::Restarting(_) => "restarting",
            event::Removed(()) => "removed",
            _ => "another",
        };
        self.0.0.borrow_mut().push(Told {
            sequence: event.get_sequence(),
            guest: event.get_guest()?.to_string()?,
            generation: event.get_generation(),
            kind,
        });
        Ok(())
    }
}

//! A folder, a guest manager, and everything that descends from them; and the search for what they may have left.
//!
//! ```text
//!   test process (adopts orphans of its descendants)
//!     |-- guest ...                      children, known by their ids
//!     |-- guest-manager
//!     |     `-- sepal-keeper
//!     |           `-- vmm-component
//!     `-- (an orphan: whatever lost its parent; a manager is known by the world's folder in its environment)
//! ```

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, Read},
    os::{fd::AsRawFd, unix::fs::DirBuilderExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::{
    io::FdFlags,
    process::{Pid, Signal, WaitOptions},
};
use tempfile::TempDir;

use crate::{
    PATIENCE, Pty, Rpc,
    patience::{try_until, until},
    process::{self, Process},
    program,
    spawn::{Finished, Running, children},
};

/// How the names of the folders begin.
const PREFIX: &str = "sepal-test-";

/// A folder with a guest manager's socket in it, and the programs that were started for it.
pub struct World {
    id: u64,
    folder: TempDir,
    manager: Option<Running>,
    /// Ids of all processes that were ever seen to belong to it; groups are named after them.
    seen: RefCell<BTreeSet<u32>>,
    mounts: Vec<String>,
}

impl World {
    /// A world without a manager.
    ///
    /// # Panics
    /// If the host refuses a folder.
    pub fn new() -> Self {
        static IDS: AtomicU64 = AtomicU64::new(1);
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).unwrap();
        let folder = tempfile::Builder::new().prefix(PREFIX).tempdir().unwrap();
        Self {
            id: IDS.fetch_add(1, Ordering::Relaxed),
            folder,
            manager: None,
            seen: RefCell::default(),
            mounts: process::mounts(),
        }
    }

    /// A world with a manager that listens.
    ///
    /// # Panics
    /// If the manager does not start.
    pub fn with_manager() -> Self {
        let mut world = Self::new();
        world.start_manager();
        world
    }

    /// A world with a manager that keeps so many components waiting, once they do.
    ///
    /// # Panics
    /// If the manager or one of them does not start.
    pub fn with_pool(size: usize) -> Self {
        let mut world = Self::new();
        let mut command = Command::new("env");
        command.arg("RUST_LOG=info,sepal_guest_manager::pool=debug");
        command.arg(program("guest-manager"));
        world.start_manager_by(command, |command, socket, ready| {
            command.arg("--socket").arg(socket).arg("--ready-fd").arg(ready);
            command.arg("--pool").arg(size.to_string());
        });
        world.until_waiting(size);
        world
    }

    /// Waits until so many components have begun to wait in all, since the manager [`with_pool`](Self::with_pool) started.
    ///
    /// # Panics
    /// If they do not.
    pub fn until_waiting(&self, total: usize) {
        let count = || self.manager().stderr.text().matches("a component waits").count();
        until("components wait", || (count() >= total).then_some(()));
    }

    /// The components that are there, those that wait included.
    pub fn components(&self) -> Vec<Process> {
        let keeper = self.keeper().pid;
        let all = process::all().into_values();
        all.filter(|process| process.parent == keeper && process.cmdline == "vmm-component")
            .collect()
    }

    /// Starts the manager, and returns when it listens.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start_manager(&mut self) {
        let command = Command::new(program("guest-manager"));
        let state = self.state();
        self.start_manager_by(command, |command, socket, ready| {
            command.arg("--socket").arg(socket).arg("--ready-fd").arg(ready);
            command.arg("--state").arg(state);
        });
    }

    /// Starts the manager by another command; `arguments` adds the socket and the number of the descriptor that takes a byte when it listens.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start_manager_by(&mut self, mut command: Command, arguments: impl FnOnce(&mut Command, &Path, &str)) {
        let socket = self.socket();
        let folder = socket.parent().unwrap();
        if !folder.exists() {
            fs::DirBuilder::new().mode(0o700).create(folder).unwrap();
        }
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(self.state_home()).unwrap();
        let (mut ready, theirs) = io::pipe().unwrap();
        // Inherited by this child, and for a moment by others that are started at the same time: they do no harm with it.
        rustix::io::fcntl_setfd(&theirs, FdFlags::empty()).unwrap();
        arguments(&mut command, &socket, &theirs.as_raw_fd().to_string());
        self.surroundings(&mut command);
        let manager = Running::start(command, None, self.id);
        drop(theirs);
        let mut byte = [0];
        let told = ready.read(&mut byte).unwrap();
        if told == 0 {
            let finished = manager.wait();
            panic!("the manager did not start: {}\n{}", finished.status, finished.stderr);
        }
        self.manager = Some(manager);
        // Its keeper may outlive it, and can be told to be of this world only as long as it does not.
        self.family();
    }

    /// The environment of everything that is started here: the user's manager is this world's.
    fn surroundings(&self, command: &mut Command) {
        for variable in ["SEPAL_MANAGER", "RUST_LOG", "NO_COLOR"] {
            command.env_remove(variable);
        }
        command.env("XDG_RUNTIME_DIR", self.folder()).env("TERM", "xterm");
        command.env("XDG_STATE_HOME", self.state_home());
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A kernel, and an initramfs of a GiB (a hole) that takes a while to be copied into guest memory; a guest with 1200 MiB has room for both.
    ///
    /// # Panics
    /// If the files cannot be written.
    pub fn slow_to_create(&self) -> (PathBuf, PathBuf) {
        let (kernel, initrd) = (self.folder().join("kernel"), self.folder().join("initrd"));
        std::fs::write(&kernel, sepal_driver_guest::IMAGE).unwrap();
        std::fs::File::create(&initrd).unwrap().set_len(1 << 30).unwrap();
        (kernel, initrd)
    }

    /// The manager's socket.
    pub fn socket(&self) -> PathBuf {
        self.folder().join("sepal/manager.sock")
    }

    /// The folder (`XDG_STATE_HOME`) that the manager's state is in. Tell it, as `XDG_RUNTIME_DIR`, to whatever may start a manager.
    pub fn state_home(&self) -> PathBuf {
        self.folder().join("state")
    }

    /// The folder of what the manager keeps across its restarts: what [`start_manager`](Self::start_manager) tells it by `--state`.
    pub fn state(&self) -> PathBuf {
        self.state_home().join("sepal")
    }

    /// The manager that was started.
    ///
    /// # Panics
    /// If none was.
    pub fn manager(&self) -> &Running {
        self.manager.as_ref().expect("a manager was started")
    }

    /// The manager, to be waited for.
    ///
    /// # Panics
    /// If none was started.
    pub fn take_manager(&mut self) -> Running {
        self.manager.take().expect("a manager was started")
    }

    /// The manager's keeper.
    ///
    /// # Panics
    /// If there is none, in the end.
    pub fn keeper(&self) -> Process {
        let manager = self.manager().pid();
        until("the keeper runs", || {
            process::all().into_values().find(|process| process.parent == manager)
        })
    }

    /// The command `guest` with these arguments, not started.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program("guest"));
        command.args(arguments);
        self.surroundings(&mut command);
        command
    }

    /// Starts `guest`.
    pub fn start(&self, arguments: &[&str]) -> Running {
        self.start_command(self.command(arguments), None)
    }

    /// Starts a program of this world, standard output captured or sent elsewhere.
    pub fn start_command(&self, command: Command, stdout: Option<Stdio>) -> Running {
        Running::start(command, stdout, self.id)
    }

    /// Runs `guest` to its end, without input.
    #[track_caller]
    pub fn guest(&self, arguments: &[&str]) -> Finished {
        let mut running = self.start(arguments);
        running.close_input();
        running.wait()
    }

    /// Starts `guest` on a terminal.
    pub fn pty(&self, arguments: &[&str]) -> Pty {
        self.pty_of(self.command(arguments))
    }

    /// Starts a command of this world on a terminal.
    pub fn pty_of(&self, command: Command) -> Pty {
        Pty::start(command, self.id)
    }

    /// Connects to the manager.
    ///
    /// # Panics
    /// If nobody listens.
    pub fn connect(&self) -> Rpc {
        Rpc::connect(&self.socket())
    }

    /// Every process that descends from this world and is still there.
    ///
    /// # Panics
    /// If `/proc` cannot be read.
    pub fn family(&self) -> Vec<Process> {
        self.find(false)
    }

    /// True once a process is gone and reaped, by this process if it came here as an orphan.
    pub fn is_gone(&self, process: &Process) -> bool {
        self.family();
        !process.exists()
    }

    /// The family, with or without orphans that nobody can be told to be of another world: their managers are gone.
    fn find(&self, orphans: bool) -> Vec<Process> {
        let children = children();
        let all = process::all();
        let own = self.folder().to_string_lossy();
        let family = all.values().filter(|process| {
            let Some(top) = top(&all, process) else { return false };
            match children.get(&top.pid) {
                Some(owner) => *owner == self.id,
                None if top.state == 'Z' => {
                    // Adopted, and nobody else will reap it. A later look finds it gone.
                    let pid = Pid::from_raw(top.pid.cast_signed());
                    let _ = rustix::process::waitpid(pid, WaitOptions::NOHANG);
                    false
                }
                None => {
                    let marks = format!("{} {}", top.cmdline, process::environment(top.pid));
                    marks.contains(&*own) || (orphans && !marks.contains(PREFIX))
                }
            }
        });
        let family: Vec<Process> = family.cloned().collect();
        self.seen.borrow_mut().extend(family.iter().map(|process| process.pid));
        family
    }

    /// Control groups that were made for components of this world.
    pub fn groups(&self) -> Vec<PathBuf> {
        let seen = self.seen.borrow();
        let mut found = Vec::new();
        let mut folders = vec![(PathBuf::from("/sys/fs/cgroup"), 0)];
        while let Some((folder, depth)) = folders.pop() {
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
                let name = entry.file_name().to_string_lossy().into_owned();
                let owner = name
                    .strip_prefix("sepal-")
                    .and_then(|rest| rest.split('-').next()?.parse().ok());
                if is_folder && owner.is_some_and(|pid: u32| seen.contains(&pid)) {
                    found.push(entry.path());
                } else if is_folder && depth < 6 {
                    folders.push((entry.path(), depth + 1));
                }
            }
        }
        found
    }

    /// Checks that nothing of this world is left: no process, control group, mount, socket or lock file.
    ///
    /// # Panics
    /// If something is, after [`PATIENCE`], saying what.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        let missing = try_until(|| {
            let mut left: Vec<String> = self
                .find(true)
                .into_iter()
                .map(|process| format!("{process:?}"))
                .collect();
            left.extend(self.groups().iter().map(|group| group.display().to_string()));
            left.extend(self.files());
            left.extend(
                process::mounts()
                    .into_iter()
                    .filter(|mount| !self.mounts.contains(mount)),
            );
            if left.is_empty() { Ok(()) } else { Err(left) }
        });
        if let Err(left) = missing {
            panic!("left behind after {PATIENCE:?}: {left:#?}");
        }
    }

    /// Files beside the manager's log, and addresses of sockets in the folder that are still in use.
    fn files(&self) -> Vec<String> {
        let folder = self.folder().join("sepal");
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.path().display().to_string());
        let files = names.filter(|name| !name.ends_with(".log"));
        let sockets = fs::read_to_string("/proc/net/unix").unwrap();
        let own = folder.to_string_lossy().into_owned();
        let sockets = sockets.lines().filter(|line| line.contains(&own)).map(str::to_owned);
        files.chain(sockets).collect()
    }

    /// Ends the manager as a service manager would, and checks that nothing is left.
    ///
    /// # Panics
    /// If the manager does not end well, or something is left.
    #[track_caller]
    pub fn end(mut self) {
        self.family();
        if let Some(manager) = self.manager.take() {
            manager.signal(Signal::TERM);
            manager.wait().expect_code(0);
        }
        self.assert_nothing_left();
    }
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(manager) = &self.manager
            && std::thread::panicking()
        {
            eprintln!("-- the manager's log\n{}", manager.stderr.text());
        }
        // What a failed test leaves: keepers of guests that go on, and managers that lost their parents. Children end with their owners, and whatever
        // descends from a manager or keeper ends with it.
        let own = self.folder().to_string_lossy().into_owned();
        let spare: BTreeMap<u32, u64> = children().clone();
        for process in self.family() {
            if !spare.contains_key(&process.pid) && process::environment(process.pid).contains(&own) {
                process.signal(Signal::KILL);
            }
        }
        let keepers = self.seen.borrow().clone().into_iter().filter_map(Process::of);
        for keeper in keepers.filter(|process| process.name == "sepal-keeper") {
            keeper.signal(Signal::KILL);
        }
    }
}

/// The child of this process that `process` descends from, or is.
fn top<'a>(all: &'a BTreeMap<u32, Process>, process: &'a Process) -> Option<&'a Process> {
    let own = std::process::id();
    let mut at = process;
    for _ in 0..64 {
        if at.parent == own {
            return Some(at);
        }
        at = all.get(&at.parent)?;
    }
    None
}

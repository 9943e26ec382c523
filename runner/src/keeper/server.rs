//! The keeper's process: one loop over the manager's connection, child signals, components that are starting, and, without a manager,
//! the socket at which its successor comes.

use std::ffi::CString;
use std::fs;
use std::io::{Read, Seek};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::process::WaitOptions;

use super::book::{Book, Life};
use super::door::{Door, VERSION};
use super::wire::{Channel, CleanFile, Ended, Event, MAX_LABEL, Received, Request, Spawn, State, WireError};
use super::{KeeperError, OWN, process, say, system};
use crate::cgroup::Groups;
use crate::descriptors;
use crate::outer::{Component, ComponentSpec, ExitStatus, Handles, Program, Runner, SpawnError};

/// Runs the keeper on the connection that is its standard input, until that closes and nothing durable is left.
///
/// # Errors
///
/// If the process was not started by [`super::KeeperClient::start`], or the system refuses what a keeper needs.
pub fn run() -> Result<(), KeeperError> {
    let connection = process::settle()?;
    let signals = process::catch_signals()?;
    // Those of every durable component are kept here.
    descriptors::raise_limit();
    if let Ok(groups) = Groups::new() {
        let _ = groups.sweep();
    }
    let runner = Runner::new().map_err(|error| KeeperError::System {
        action: "preparing",
        source: std::io::Error::other(error),
    })?;
    let channel = Channel::new(connection).map_err(system("using the connection"))?;
    let mut keeper = Keeper {
        manager: Some(channel),
        inherited: false,
        ending: false,
        signals,
        runner,
        book: Book::new(),
        files: Vec::new(),
        door: None,
        linger: Duration::ZERO,
        last_life: Instant::now(),
        idle: true,
    };
    let result = keeper.serve();
    keeper.end();
    result
}

/// How long there has to be nothing to do before the next start is prepared: that takes a processor for up to a millisecond, and the component that
/// was started last needs it more until its guest runs.
const QUIET: Duration = Duration::from_millis(4);

/// How long a process that has hung up may take to be gone.
const DYING: Duration = Duration::from_secs(1);

struct Keeper {
    /// None while it waits for a successor.
    manager: Option<Channel>,
    /// The manager is not the one that started it.
    inherited: bool,
    /// The manager has said that this is the end.
    ending: bool,
    signals: OwnedFd,
    runner: Runner,
    book: Book<Component, Vec<Arc<OwnedFd>>>,
    files: Vec<CleanFile>,
    door: Option<Door>,
    /// How long it stays without a manager and without a component that lives.
    linger: Duration,
    /// When a component was last seen to live, without a manager.
    last_life: Instant,
    /// True after a turn that found nothing to do for [`QUIET`].
    idle: bool,
}

/// What a turn of the loop found to do.
#[derive(Default)]
struct Ready {
    manager: bool,
    signals: bool,
    starting: Vec<u64>,
}

impl Keeper {
    /// Serves until there is nothing left to serve for.
    fn serve(&mut self) -> Result<(), KeeperError> {
        while !self.is_done(Instant::now()) {
            self.turn()?;
        }
        Ok(())
    }

    fn is_done(&mut self, now: Instant) -> bool {
        match &self.manager {
            _ if self.ending => true,
            Some(manager) => self.inherited && self.book.is_empty() && !manager.has_unsent(),
            None if self.book.components().next().is_some() => {
                self.last_life = now;
                false
            }
            None => self.book.is_empty() || now.duration_since(self.last_life) >= self.linger,
        }
    }

    fn turn(&mut self) -> Result<(), KeeperError> {
        // An inherited keeper starts nothing any more.
        if self.idle && self.manager.is_some() && !self.inherited {
            self.runner.prepare();
        }
        let ready = self.wait()?;
        for id in ready.starting {
            self.finish_start(id);
        }
        if ready.signals {
            // Any number of children may stand behind one signal.
            let mut drained = [0_u8; 8 * size_of::<libc::signalfd_siginfo>()];
            while rustix::io::read(&self.signals, &mut drained).is_ok_and(|read| read > 0) {}
            self.reap();
        }
        if ready.manager {
            self.hear();
        }
        if self.manager.is_none()
            && let Some(successor) = self.door.as_mut().and_then(|door| door.look(Instant::now()))
        {
            self.hand_over(successor);
        }
        Ok(())
    }

    /// Waits until there is something to do.
    fn wait(&mut self) -> Result<Ready, KeeperError> {
        let starting = self
            .book
            .components()
            .filter_map(|(id, component)| Some((id, component.starting()?)));
        let (starting, channels): (Vec<u64>, Vec<_>) = starting.unzip();
        let mut poll = vec![PollFd::new(&self.signals, PollFlags::IN)];
        let mut deadline = None;
        if let Some(manager) = &self.manager {
            let mut wanted = PollFlags::IN;
            wanted.set(PollFlags::OUT, manager.has_unsent());
            poll.push(PollFd::new(manager, wanted));
            // Nothing to do for a while, and no component between its clone and its exec: time to prepare the next start.
            if !self.idle && starting.is_empty() {
                deadline = Some(Instant::now() + QUIET);
            }
        } else {
            if let Some(door) = &self.door {
                poll.extend(door.watched().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
                deadline = door.deadline();
            }
            if self.book.components().next().is_none() {
                let end = self.last_life + self.linger;
                deadline = Some(deadline.map_or(end, |deadline| deadline.min(end)));
            }
        }
        let others = poll.len();
        poll.extend(
            channels
                .into_iter()
                .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)),
        );
        let timeout = deadline.map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            Timespec::try_from(left).unwrap_or(Timespec {
                tv_sec: 3600,
                tv_nsec: 0,
            })
        });
        match rustix::event::poll(&mut poll, timeout.as_ref()) {
            Ok(ready) => self.idle = ready == 0,
            Err(Errno::INTR) => return Ok(Ready::default()),
            Err(errno) => return Err(system("waiting")(errno)),
        }
        let ready: Vec<bool> = poll.iter().map(|fd| !fd.revents().is_empty()).collect();
        let starting = starting.into_iter().zip(ready.iter().skip(others));
        Ok(Ready {
            signals: ready.first() == Some(&true),
            manager: self.manager.is_some() && ready.get(1) == Some(&true),
            starting: starting.filter(|(_, ready)| **ready).map(|(id, _)| id).collect(),
        })
    }

    /// Sends the manager what waits, and does what it asks for. All that it sent is heard before its end is.
    fn hear(&mut self) {
        let Some(manager) = &mut self.manager else { return };
        let unsendable = manager.flush().is_err();
        while let Some(manager) = &mut self.manager {
            match manager.receive::<Request>() {
                Ok(Some(Received { message, name, fds })) => match message {
                    Ok(request) => self.handle(request, fds),
                    Err(reason) => self.refuse(name, reason),
                },
                Ok(None) if unsendable => self.orphan(),
                Ok(None) => return,
                Err(error) => {
                    if !matches!(error, WireError::Closed) {
                        say(format_args!("the manager's connection: {error}"));
                    }
                    self.orphan();
                }
            }
        }
    }

    fn handle(&mut self, request: Request, fds: Vec<OwnedFd>) {
        match request {
            Request::Spawn(spawn) => self.spawn(spawn, fds),
            Request::Kill { id } => {
                // Cannot fail for a child of this process that has this process's uid or a lesser one.
                if let Some(Err(error)) = self.book.component(id).map(|component| component.kill()) {
                    say(format_args!("killing component {id}: {error}"));
                }
            }
            Request::Remove(file) => {
                self.files.retain(|known| known.path != file.path);
                self.files.push(file);
            }
            Request::Forget { path } => self.files.retain(|known| known.path != path),
            Request::Keep { id, label, count } => {
                let message = if label.len() > MAX_LABEL {
                    format!("a label has at most {MAX_LABEL} bytes")
                } else if fds.len() != count {
                    format!(
                        "{} of {count} descriptors arrived; the limit of open files is reached",
                        fds.len()
                    )
                } else {
                    self.book.keep(id, label, fds.into_iter().map(Arc::new).collect());
                    return;
                };
                self.tell(&Event::NotKept { id, label, message });
            }
            Request::DropKept { id, label } => self.book.drop_kept(id, &label),
            Request::Release { id } => self.book.release(id),
            Request::Durable { id, durable } => self.book.set_durable(id, durable),
            Request::Succession { key, linger_ms } => match fds.into_iter().next().map(|fd| Door::new(fd, &key)) {
                Some(Ok(door)) => {
                    self.door = Some(door);
                    self.linger = Duration::from_millis(linger_ms.into());
                }
                Some(Err(reason)) => self.refuse("succession".to_owned(), reason),
                None => self.refuse("succession".to_owned(), "there is no descriptor".to_owned()),
            },
            Request::Limits { id, limits } => {
                let error = match self.book.component(id) {
                    Some(component) => self
                        .runner
                        .set_limits(component, &limits)
                        .err()
                        .map(|error| error.to_string()),
                    None => Some("the component has ended".to_owned()),
                };
                self.tell(&Event::LimitsSet { id, error });
            }
            Request::End => self.ending = true,
        }
    }

    fn spawn(&mut self, spawn: Spawn, fds: Vec<OwnedFd>) {
        let id = spawn.id;
        if id == OWN || self.book.component(id).is_some() {
            let message = match id {
                OWN => "the id 0 is not for components".to_owned(),
                id => format!("a component with the id {id} exists"),
            };
            return self.tell(&Event::Failed {
                id,
                layer: None,
                message,
            });
        }
        match component_spec(spawn, fds).and_then(|spec| self.runner.start(spec)) {
            // There is none under this id, so that it is taken.
            Ok(component) => drop(self.book.start(id, component)),
            Err(error) => self.failed(id, &error),
        }
    }

    /// Tells the manager, if there is one; its end is noticed when nothing more comes from it.
    fn tell(&mut self, event: &Event) {
        self.tell_with(event, Vec::new());
    }

    fn tell_with(&mut self, event: &Event, fds: Vec<Arc<OwnedFd>>) {
        if let Some(manager) = &mut self.manager
            && let Err(error) = manager.send(event, fds)
            && !matches!(error, WireError::Closed)
        {
            say(format_args!("telling the manager: {error}"));
            // It does not read, and would miss something: better to be rid of it, for a successor is told all.
            manager.hang_up();
        }
    }

    fn refuse(&mut self, request: String, reason: String) {
        self.tell(&Event::Refused { request, reason });
    }

    fn failed(&mut self, id: u64, error: &SpawnError) {
        self.tell(&Event::Failed {
            id,
            layer: error.layer(),
            message: error.to_string(),
        });
    }

    fn finish_start(&mut self, id: u64) {
        let Some(component) = self.book.component(id) else {
            return;
        };
        let started = component.finish_start().and_then(|()| {
            let pidfd = component.pidfd().try_clone_to_owned();
            pidfd.map_err(|source| SpawnError::System {
                action: "duplicating the handle on its process",
                source,
            })
        });
        match started {
            Ok(pidfd) => {
                let pid = component.pid();
                let event = Event::Started {
                    id,
                    pid,
                    host_uid: component.host_uid(),
                };
                self.tell_with(&event, vec![Arc::new(pidfd)]);
                process::do_not_spare(pid);
            }
            Err(error) => {
                drop(self.book.end(id, Ended::Failed(error.to_string())));
                self.failed(id, &error);
            }
        }
    }

    /// Reaps every child that has ended: components, and what a component without a process namespace left.
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let pid = pid.as_raw_pid().unsigned_abs();
            let Some((id, is_starting)) = self
                .book
                .components()
                .find(|(_, component)| component.pid() == pid)
                .map(|(id, component)| (id, component.starting().is_some()))
            else {
                continue;
            };
            if is_starting {
                self.finish_start(id);
            }
            let (code, signal) = (status.exit_status(), status.terminating_signal());
            let status = code.map(ExitStatus::Code).or(signal.map(ExitStatus::Signal));
            let status = status.unwrap_or(ExitStatus::Signal(libc::SIGKILL));
            if let Some(mut component) = self.book.end(id, Ended::Exited(status)) {
                component.ended(code, signal);
                self.tell(&Event::Exited { id, status });
            }
        }
    }

    /// The manager is gone: with it what is not durable, or everything if nobody can come after it.
    fn orphan(&mut self) {
        self.manager = None;
        self.last_life = Instant::now();
        let end = match self.door {
            Some(_) => self.book.orphan(),
            None => self.book.clear(),
        };
        end_all(end);
        self.remove_files(false);
    }

    /// Tells a successor what there is; from here on it is the manager.
    fn hand_over(&mut self, successor: OwnedFd) {
        let mut manager = match Channel::new(successor) {
            Ok(manager) => manager,
            Err(error) => return say(format_args!("a successor's connection: {error}")),
        };
        let hello = Event::Hello {
            version: VERSION,
            pid: std::process::id(),
        };
        let mut queue = |event: &Event, fds| manager.queue(event, fds);
        let mut told = queue(&hello, Vec::new());
        for (id, entry) in self.book.entries() {
            let (state, pidfd) = match &entry.life {
                Life::None => (State::None, None),
                Life::Alive(component) if component.starting().is_some() => (State::Starting, None),
                Life::Alive(component) => {
                    let (pid, host_uid) = (component.pid(), component.host_uid());
                    (
                        State::Running { pid, host_uid },
                        component.pidfd().try_clone_to_owned().ok(),
                    )
                }
                Life::Ended(Ended::Exited(status)) => (State::Exited { status: *status }, None),
                Life::Ended(Ended::Failed(message)) => (
                    State::Failed {
                        message: message.clone(),
                    },
                    None,
                ),
            };
            let durable = entry.durable;
            let pidfd = pidfd.map(Arc::new).into_iter().collect();
            told = told.and_then(|()| queue(&Event::Inherited { id, durable, state }, pidfd));
            for (label, fds) in &entry.kept {
                let (label, count) = (label.clone(), fds.len());
                told = told.and_then(|()| queue(&Event::InheritedFds { id, label, count }, fds.clone()));
            }
        }
        told = told.and_then(|()| queue(&Event::InheritedAll, Vec::new()));
        // It may be gone already: that is noticed as any manager's end is.
        match told.and_then(|()| manager.flush()) {
            Ok(()) | Err(WireError::Closed) => {}
            Err(error) => say(format_args!("handing over: {error}")),
        }
        self.manager = Some(manager);
        self.inherited = true;
    }

    /// Leaves nothing behind.
    fn end(&mut self) {
        end_all(self.book.clear());
        self.remove_files(true);
    }

    /// Removes files whose time has come.
    fn remove_files(&mut self, all: bool) {
        for file in self.files.extract_if(.., |file| all || !file.with_keeper) {
            remove(&file);
        }
    }
}

fn end_all(components: Vec<Component>) {
    for component in &components {
        let _ = component.kill();
    }
    // Each is waited for as it is dropped, and its groups go.
    drop(components);
}

/// Takes a lock that `owner` had, unless another process has it by now.
fn take(path: &Path, mut lock: &fs::File, owner: u32) -> bool {
    // A process that is killed hangs up before it lets go of its locks, or after.
    let deadline = Instant::now() + DYING;
    loop {
        if rustix::fs::flock(lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            // Else whoever had it removed it meanwhile, and somebody may have the lock in the file that took its place.
            return is_there(path, lock);
        }
        let mut holder = String::new();
        let read = lock.rewind().and_then(|()| lock.take(16).read_to_string(&mut holder));
        if read.is_err() || holder.trim() != owner.to_string() || Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whether this file is what the path names.
fn is_there(path: &Path, file: &fs::File) -> bool {
    let (there, file) = (path.symlink_metadata(), file.metadata());
    matches!((there, file), (Ok(there), Ok(file)) if (there.dev(), there.ino()) == (file.dev(), file.ino()))
}

/// Removes a file unless another one has taken its place, or somebody its lock.
fn remove(file: &CleanFile) {
    // Numbers alone do not tell: the next manager locks the same file, and a socket that it makes may get the number of the one that it removed.
    let held = file.lock.as_ref().map(|path| (path, fs::File::open(path)));
    if let Some((path, Ok(lock))) = &held
        && !take(path, lock, file.owner)
    {
        return;
    }
    let there = file.path.symlink_metadata();
    if there.is_ok_and(|now| (now.dev(), now.ino()) == (file.device, file.inode)) {
        let _ = fs::remove_file(&file.path);
    }
}

/// Puts a request and its descriptors together again.
fn component_spec(spawn: Spawn, fds: Vec<OwnedFd>) -> Result<ComponentSpec, SpawnError> {
    let mut fds = fds.into_iter();
    let fault = |reason: &str| SpawnError::Program {
        path: spawn.program.clone(),
        reason: reason.to_owned(),
    };
    if fds.len() != 1 + usize::from(spawn.stderr) + spawn.handles.len() {
        return Err(fault("the request does not have the descriptors that it names"));
    }
    let program = fds.next().ok_or_else(|| fault("no descriptor"))?;
    let stderr = if spawn.stderr { fds.next() } else { None };
    let mut handles = Handles::new();
    for (entry, fd) in spawn.handles.iter().zip(fds) {
        handles.add(&entry.name, entry.kind, fd)?;
    }
    let args = spawn.args.into_iter().map(CString::new).collect::<Result<Vec<_>, _>>();
    let args = args.map_err(|_| SpawnError::Program {
        path: spawn.program.clone(),
        reason: "an argument has a NUL byte".to_owned(),
    })?;
    let program = Program::from_fd(program, spawn.program)?;
    Ok(ComponentSpec {
        program,
        args,
        handles,
        stderr,
        jail: spawn.jail,
    })
}

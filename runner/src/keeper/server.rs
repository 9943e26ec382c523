//! The keeper's process: one loop over the connection, child signals, and components that are starting.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::WaitOptions;

use super::wire::{Channel, CleanFile, Event, Request, Spawn, WireError};
use super::{KeeperError, system};
use crate::cgroup::Groups;
use crate::outer::{Component, ComponentSpec, ExitStatus, Handles, Program, Runner, SpawnError};

/// Where the connection goes after the start; it arrives as standard input.
const CONNECTION: RawFd = 3;

/// Runs the keeper on the connection that is its standard input, until that closes.
///
/// # Errors
///
/// If the process was not started by [`super::KeeperClient::start`], or the system refuses what a keeper needs.
pub fn run() -> Result<(), KeeperError> {
    let connection = settle()?;
    let signals = catch_signals()?;
    if let Ok(groups) = Groups::new() {
        let _ = groups.sweep();
    }
    let runner = Runner::new().map_err(|error| KeeperError::System {
        action: "preparing",
        source: std::io::Error::other(error),
    })?;
    let channel = Channel::new(connection).map_err(system("using the connection"))?;
    let mut keeper = Keeper {
        channel,
        signals,
        runner,
        components: BTreeMap::new(),
        files: Vec::new(),
        idle: true,
    };
    let result = keeper.serve();
    keeper.end();
    result
}

/// Leaves the manager's session and descriptors.
fn settle() -> Result<OwnedFd, KeeperError> {
    let kind = rustix::net::sockopt::socket_type(std::io::stdin().as_fd());
    if kind != Ok(rustix::net::SocketType::SEQPACKET) {
        return Err(KeeperError::Protocol(
            "standard input is no connection: the guest manager starts the keeper".into(),
        ));
    }
    let null = fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(system("opening /dev/null"))?;
    // SAFETY: nothing of this process owns a descriptor other than 0 to 2 and `null`, which is not used after it.
    let moved = unsafe {
        let null = null.as_raw_fd();
        let moved = libc::dup3(
            0,
            if null == CONNECTION { CONNECTION + 1 } else { CONNECTION },
            libc::O_CLOEXEC,
        );
        libc::dup2(null, 0);
        moved
    };
    if moved < 0 {
        return Err(system("moving the connection")(std::io::Error::last_os_error()));
    }
    drop(null);
    // SAFETY: closes what was inherited by mistake; nothing here owns it.
    unsafe {
        for number in CONNECTION..moved {
            libc::close(number);
        }
        libc::close_range(moved.cast_unsigned() + 1, u32::MAX, 0);
    }
    // SAFETY: made above, and owned by nothing.
    let connection = unsafe { OwnedFd::from_raw_fd(moved) };
    // Fails where it leads a session already.
    let _ = rustix::process::setsid();
    let _ = rustix::thread::set_name(c"sepal-keeper");
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).map_err(system("becoming a subreaper"))?;
    Ok(connection)
}

/// Takes child signals by descriptor, and those that a terminal or a service manager sends to end a program with them:
/// the keeper ends when its manager does.
fn catch_signals() -> Result<OwnedFd, KeeperError> {
    // SAFETY: the set is a local that the calls fill; the mask concerns the only thread.
    let fd = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGCHLD, libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT] {
            libc::sigaddset(&raw mut set, signal);
        }
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    if fd < 0 {
        return Err(system("signalfd")(std::io::Error::last_os_error()));
    }
    // SAFETY: fresh, and owned by nothing.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// How long there has to be nothing to do before the next start is prepared: that takes a processor for up to a millisecond, and the component that
/// was started last needs it more until its guest runs.
const QUIET: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 4_000_000,
};

struct Keeper {
    channel: Channel,
    signals: OwnedFd,
    runner: Runner,
    components: BTreeMap<u64, Component>,
    files: Vec<CleanFile>,
    /// True after a turn that found nothing to do for [`QUIET`].
    idle: bool,
}

impl Keeper {
    /// Serves until the manager is gone.
    fn serve(&mut self) -> Result<(), KeeperError> {
        loop {
            match self.turn() {
                Ok(()) => {}
                Err(WireError::Closed) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn turn(&mut self) -> Result<(), WireError> {
        if self.idle {
            self.runner.prepare();
        }
        let mut wanted = PollFlags::IN;
        wanted.set(PollFlags::OUT, self.channel.has_unsent());
        let mut poll = vec![
            PollFd::new(&self.channel, wanted),
            PollFd::new(&self.signals, PollFlags::IN),
        ];
        let starting: Vec<u64> = self
            .components
            .iter()
            .filter(|(_, component)| component.starting().is_some())
            .map(|(id, _)| *id)
            .collect();
        for component in self.components.values() {
            poll.extend(
                component
                    .starting()
                    .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)),
            );
        }
        // Nothing to do for a while, and no component between its clone and its exec: time to prepare the next start.
        let timeout = (!self.idle && starting.is_empty()).then_some(&QUIET);
        match rustix::event::poll(&mut poll, timeout) {
            Ok(ready) => self.idle = ready == 0,
            Err(Errno::INTR) => return Ok(()),
            Err(errno) => return Err(WireError::System(errno.into())),
        }
        let ready: Vec<bool> = poll.iter().map(|fd| !fd.revents().is_empty()).collect();

        for (id, _) in starting
            .into_iter()
            .zip(ready.iter().skip(2))
            .filter(|(_, ready)| **ready)
        {
            self.finish_start(id)?;
        }
        if ready.get(1) == Some(&true) {
            // Any number of children may stand behind one signal.
            let mut drained = [0_u8; 8 * size_of::<libc::signalfd_siginfo>()];
            while rustix::io::read(&self.signals, &mut drained).is_ok_and(|read| read > 0) {}
            self.reap()?;
        }
        if ready.first() == Some(&true) {
            self.channel.flush()?;
            while let Some((request, fds)) = self.channel.receive()? {
                self.handle(request, fds)?;
            }
        }
        Ok(())
    }

    fn handle(&mut self, request: Request, fds: Vec<OwnedFd>) -> Result<(), WireError> {
        match request {
            Request::Spawn(spawn) => {
                let id = spawn.id;
                if self.components.contains_key(&id) {
                    let message = format!("a component with the id {id} exists");
                    return self.channel.send(
                        &Event::Failed {
                            id,
                            layer: None,
                            message,
                        },
                        Vec::new(),
                    );
                }
                match component_spec(spawn, fds).and_then(|spec| self.runner.start(spec)) {
                    Ok(component) => {
                        self.components.insert(id, component);
                    }
                    Err(error) => self.failed(id, &error)?,
                }
            }
            Request::Kill { id } => {
                // Cannot fail for a child of this process that has this process's uid or a lesser one.
                if let Some(Err(error)) = self.components.get(&id).map(Component::kill) {
                    eprintln!("sepal-keeper: killing component {id}: {error}");
                }
            }
            Request::Remove(file) => {
                self.files.retain(|known| known.path != file.path);
                self.files.push(file);
            }
            Request::Forget { path } => self.files.retain(|known| known.path != path),
        }
        Ok(())
    }

    fn failed(&mut self, id: u64, error: &SpawnError) -> Result<(), WireError> {
        self.channel.send(
            &Event::Failed {
                id,
                layer: error.layer(),
                message: error.to_string(),
            },
            Vec::new(),
        )
    }

    fn finish_start(&mut self, id: u64) -> Result<(), WireError> {
        let Some(component) = self.components.get_mut(&id) else {
            return Ok(());
        };
        match component.finish_start() {
            Ok(()) => {
                let pidfd = component.pidfd().try_clone_to_owned()?;
                let event = Event::Started {
                    id,
                    pid: component.pid(),
                    host_uid: component.host_uid(),
                };
                self.channel.send(&event, vec![pidfd])
            }
            Err(error) => {
                self.components.remove(&id);
                self.failed(id, &error)
            }
        }
    }

    /// Reaps every child that has ended: components, and what a component without a process namespace left.
    fn reap(&mut self) -> Result<(), WireError> {
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let pid = pid.as_raw_pid().unsigned_abs();
            let Some(id) = self
                .components
                .iter()
                .find(|(_, component)| component.pid() == pid)
                .map(|(id, _)| *id)
            else {
                continue;
            };
            if self
                .components
                .get(&id)
                .is_some_and(|component| component.starting().is_some())
            {
                self.finish_start(id)?;
            }
            if let Some(mut component) = self.components.remove(&id) {
                let (code, signal) = (status.exit_status(), status.terminating_signal());
                component.ended(code, signal);
                let status = code.map(ExitStatus::Code).or(signal.map(ExitStatus::Signal));
                let status = status.unwrap_or(ExitStatus::Signal(libc::SIGKILL));
                self.channel.send(&Event::Exited { id, status }, Vec::new())?;
            }
        }
        Ok(())
    }

    /// Leaves nothing behind.
    fn end(&mut self) {
        for component in self.components.values() {
            let _ = component.kill();
        }
        // Each is waited for as it is dropped, and its groups go.
        self.components.clear();
        for file in &self.files {
            remove_if_same(&file.path, file.device, file.inode);
        }
    }
}

/// Removes a file unless another one has taken its place.
fn remove_if_same(path: &Path, device: u64, inode: u64) {
    if path
        .symlink_metadata()
        .is_ok_and(|now| now.dev() == device && now.ino() == inode)
    {
        let _ = fs::remove_file(path);
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

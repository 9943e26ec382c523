//! The guest manager's process: where the program is, how it is started in somebody else's process, and how it ends.
//!
//! It ends with the connection that it was given. A process that the program made by fork may have a copy of that, so it ends with the thread that
//! started it, too (PR_SET_PDEATHSIG), which is the service's.

use std::{
    ffi::{CStr, OsStr, OsString},
    fs, io, mem,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{ffi::OsStrExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    ptr,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid},
};

use crate::environment;

/// Names the guest manager's program.
const PROGRAM_VARIABLE: &str = "SEPAL_GUEST_MANAGER";
const PROGRAM: &str = "guest-manager";
/// Where it is installed, seen from the library's folder.
const LIBEXEC: &str = "../libexec/sepal";
/// How long a manager may take to end its guests and itself; then it is killed, and its keeper ends them.
const END_WITHIN: Duration = Duration::from_secs(10);
/// Descriptors below this number have other uses in a new process.
const FIRST_FREE: i32 = 3;

/// A manager that runs.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    /// None where the kernel has none, or the process has ended and the program does not wait for its children.
    pidfd: Option<OwnedFd>,
}

impl Process {
    /// Starts the manager, to serve `socket` and end with it, or with the calling thread.
    ///
    /// # Errors
    /// `NotFound` if there is no such program; whatever keeps it from being started.
    pub(crate) fn start(socket: OwnedFd) -> io::Result<Self> {
        let program = find()?;
        // The program may have closed its standard descriptors, and then this is one of them.
        let socket = rustix::io::fcntl_dupfd_cloexec(&socket, FIRST_FREE)?;
        let number = socket.as_raw_fd();
        let mut command = Command::new(program);
        command.arg("--fd").arg(number.to_string());
        // What the program's folder is asked to do is none of the manager's business. What the manager has to say, its user reads.
        command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null());
        let parent = rustix::process::getpid();
        // SAFETY: between fork and exec only system calls are made; the descriptor is open until the command has been started.
        unsafe {
            command.pre_exec(move || prepare(number, parent));
        }
        let child = command.spawn()?;
        drop(socket);
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pidfd = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        Ok(Self { child, pidfd })
    }

    /// Waits until it has ended, which is up to it for a while.
    pub(crate) fn end(mut self) {
        let Some(pidfd) = &self.pidfd else {
            // Fails if the program waits for all children itself, and then there is nothing left to wait for.
            let _ = self.child.wait();
            return;
        };
        if !ends_within(pidfd, END_WITHIN) {
            self.kill();
        }
        // By the descriptor, since the number may be another child's if the program waits for all children itself. Then this fails.
        while let Err(Errno::INTR) = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED) {}
    }

    /// Ends it at once.
    pub(crate) fn kill(&self) {
        if let Some(pidfd) = &self.pidfd {
            // It may have ended.
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
    }
}

/// Whether a process ends in time, however often the program's signals interrupt this thread.
fn ends_within(process: &OwnedFd, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Never longer than the limit, which fits.
        let left = Timespec::try_from(left).unwrap_or_default();
        match poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&left)) {
            Err(Errno::INTR) => {}
            ready => return matches!(ready, Ok(1..)),
        }
    }
}

/// In the new process: it ends with the thread that made it, and neither takes what is typed at the program's terminal, nor is stopped because it writes there
/// (TOSTOP). Signals do what they do by default, whatever the program has chosen, and no descriptor but the standard ones and `socket` goes along.
fn prepare(socket: i32, parent: Pid) -> io::Result<()> {
    // SAFETY: all of these only make system calls, and a set of signals is a plain C struct. Numbers that are no signal, or one that cannot be changed, are
    // refused.
    unsafe {
        for signal in 1..=libc::SIGRTMAX() {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
        libc::setsid();
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
        // It may have ended before.
        if libc::getppid() != parent.as_raw_nonzero().get() {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        if libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) != 0 {
            // Something between us and the kernel does not know the call (valgrind of 2022).
            let most = libc::sysconf(libc::_SC_OPEN_MAX);
            for number in 3..i32::try_from(most).unwrap_or(i32::MAX) {
                libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC);
            }
        }
        if libc::fcntl(socket, libc::F_SETFD, 0) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The manager's program: the one that the environment names, beside the library, or where the library's installation puts it.
fn find() -> io::Result<PathBuf> {
    if let Some(named) = environment::variable(PROGRAM_VARIABLE) {
        // The new process has another folder.
        return runnable(std::path::absolute(named)?);
    }
    let library = fs::canonicalize(library()?)?;
    let folder = library.parent().unwrap_or(Path::new("/"));
    let places = [folder.join(PROGRAM), folder.join(LIBEXEC).join(PROGRAM)];
    let found = places.into_iter().find(|place| place.is_file());
    runnable(found.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?)
}

/// The program, if this process may run it. That it cannot would otherwise be told by a child, and a program may have chosen not to hear of its children.
fn runnable(program: PathBuf) -> io::Result<PathBuf> {
    rustix::fs::access(&program, rustix::fs::Access::EXEC_OK)?;
    Ok(program)
}

/// The file that this code was loaded from: the library, or the program that it is linked into.
fn library() -> io::Result<OsString> {
    let mut found = libc::Dl_info {
        dli_fname: std::ptr::null(),
        dli_fbase: std::ptr::null_mut(),
        dli_sname: std::ptr::null(),
        dli_saddr: std::ptr::null_mut(),
    };
    let here: *const () = (library as fn() -> io::Result<OsString>) as *const ();
    // SAFETY: the address is of this code, and the result is a local that the call fills.
    if unsafe { libc::dladdr(here.cast(), &raw mut found) } == 0 || found.dli_fname.is_null() {
        return Err(io::Error::from_raw_os_error(libc::ENOENT));
    }
    // SAFETY: a string that the loader keeps as long as this code is loaded.
    let name = unsafe { CStr::from_ptr(found.dli_fname) };
    Ok(OsStr::from_bytes(name.to_bytes()).to_owned())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    static SIGNALS: AtomicU32 = AtomicU32::new(0);

    extern "C" fn count(_: libc::c_int) {
        SIGNALS.fetch_add(1, Ordering::Relaxed);
    }

    #[test]
    fn a_signal_is_no_reason_to_give_a_process_less_time() {
        let handler: extern "C" fn(libc::c_int) = count;
        // SAFETY: the handler only counts.
        unsafe { libc::signal(libc::SIGUSR2, handler as libc::sighandler_t) };
        // Ends when its input does.
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        let input = child.stdin.take();
        // SAFETY: only asks which thread this is.
        let waiting = unsafe { libc::pthread_self() };
        let disturber = std::thread::spawn(move || {
            while SIGNALS.load(Ordering::Relaxed) < 100 {
                // SAFETY: that thread joins this one.
                unsafe { libc::pthread_kill(waiting, libc::SIGUSR2) };
                std::thread::yield_now();
            }
            drop(input);
        });
        let ended = ends_within(&pidfd, Duration::from_secs(60));
        disturber.join().unwrap();
        child.wait().unwrap();
        assert!(ended);
    }
}

//! The keeper's process before it serves: its descriptors, its session, its signals.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::{KeeperError, system};

/// Where the connection goes after the start; it arrives as standard input.
const CONNECTION: RawFd = 3;

/// Leaves the manager's session and descriptors.
pub(super) fn settle() -> Result<OwnedFd, KeeperError> {
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
pub(super) fn catch_signals() -> Result<OwnedFd, KeeperError> {
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

/// Where memory runs out, guests are no more spared than other programs, though the manager and this process may be (`OOMScoreAdjust=` of a service): what
/// the process `pid` has of their protection is taken back.
pub(super) fn do_not_spare(pid: u32) {
    let own = fs::read_to_string("/proc/self/oom_score_adj");
    let spared = own.is_ok_and(|text| text.trim().parse().is_ok_and(|adjustment: i32| adjustment < 0));
    if spared {
        // To raise it takes no privilege. It fails if the process has ended.
        let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), "0");
    }
}

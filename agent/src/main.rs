//! `sepal-agent`: listens in a guest for its host, and serves each connection on a thread of its own.
//!
//! ```text
//!   sepal-agent [--port PORT] [--no-ready]     vsock: takes connections of the host (CID 2) only, and tells it when it listens
//!   sepal-agent --listen-fd FD                 a socket that listens already, whoever connects
//!   sepal-agent --fd FD                        one connection, then ends
//! ```

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::io::Errno;
use rustix::net::SendFlags;
use sepal_agent::protocol::PORT;
use sepal_agent::server;

mod vsock;

/// Operations under way at once; more are refused.
const OPERATIONS_MAX: usize = 64;
/// Refused connections that stay open until later ones take their places.
const REFUSED_KEPT: usize = 16;

const USAGE: &str = "usage: sepal-agent [--port PORT] [--no-ready] | --listen-fd FD | --fd FD";

/// What to serve.
enum Mode {
    Vsock { port: u32, ready: bool },
    Listen(RawFd),
    One(RawFd),
}

fn mode(arguments: impl Iterator<Item = String>) -> Option<Mode> {
    let mut arguments = arguments;
    let mut mode = Mode::Vsock {
        port: PORT,
        ready: true,
    };
    while let Some(argument) = arguments.next() {
        match (argument.as_str(), &mut mode) {
            ("--no-ready", Mode::Vsock { ready, .. }) => *ready = false,
            ("--port", Mode::Vsock { port, .. }) => *port = arguments.next()?.parse().ok()?,
            ("--listen-fd", Mode::Vsock { .. }) => mode = Mode::Listen(arguments.next()?.parse().ok()?),
            ("--fd", Mode::Vsock { .. }) => mode = Mode::One(arguments.next()?.parse().ok()?),
            _ => return None,
        }
    }
    Some(mode)
}

fn main() -> ExitCode {
    let Some(mode) = mode(std::env::args().skip(1)) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let result = match mode {
        Mode::Vsock { port, ready } => serve_host(port, ready),
        Mode::Listen(fd) => inherited(fd).and_then(|listener| accept_all(&listener, |_| true)),
        Mode::One(fd) => inherited(fd).map(server::serve),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sepal-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A descriptor that this process was started with.
fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 3 {
        return Err(io::Error::other(format!("{fd} is no socket to serve")));
    }
    // SAFETY: this is the only place that takes descriptors by number, and is called once at the start, when nothing else is open but the
    // first three. One that is not open is noticed just below, before anything uses it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    match rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC) {
        Ok(()) => Ok(fd),
        Err(errno) => {
            // Not open, so not to be closed.
            std::mem::forget(fd);
            Err(errno.into())
        }
    }
}

fn serve_host(port: u32, ready: bool) -> io::Result<()> {
    let listener = vsock::listen(port)?;
    // Kept open: that it ends tells the host that the agent has.
    let _ready = if ready { say_ready() } else { None };
    // Programs in the guest could connect, too, and are not the host.
    accept_all(&listener, vsock::is_host)
}

/// Tells the host that the agent listens, if the host wants to know.
fn say_ready() -> Option<OwnedFd> {
    let socket = vsock::connect_to_host(PORT).ok()?;
    // A host that does not listen to this asks by a connection of its own.
    rustix::net::send(&socket, &server::greeting(), SendFlags::NOSIGNAL).ok()?;
    Some(socket)
}

/// Serves whoever connects and is `welcome`, for good.
fn accept_all(listener: &OwnedFd, welcome: impl Fn(&OwnedFd) -> bool) -> io::Result<()> {
    let under_way = Arc::new(AtomicUsize::new(0));
    let mut refused = VecDeque::new();
    loop {
        // The standard library would give the descriptor without the flag to programs that are started meanwhile.
        let socket = match rustix::net::accept_with(listener, rustix::net::SocketFlags::CLOEXEC) {
            Ok(socket) => socket,
            Err(Errno::INTR | Errno::CONNABORTED) => continue,
            // Whoever holds the descriptors or the memory gives them back some day.
            Err(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS) => {
                std::thread::sleep(std::time::Duration::from_millis(100));
                continue;
            }
            Err(errno) => return Err(errno.into()),
        };
        if !welcome(&socket) {
            continue;
        }
        if under_way.load(Ordering::Relaxed) >= OPERATIONS_MAX {
            server::refuse(&socket);
            refused.push_back(socket);
            if refused.len() > REFUSED_KEPT {
                refused.pop_front();
            }
            continue;
        }
        let place = Place::take(&under_way);
        let number = socket.as_raw_fd();
        let thread = std::thread::Builder::new().name(format!("connection {number}"));
        // Without a thread the connection is closed, which the host sees.
        let _ = thread.spawn(move || {
            let _place = place;
            server::serve(socket);
        });
    }
}

/// One of the operations under way.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

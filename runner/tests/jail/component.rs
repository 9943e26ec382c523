//! The component that the tests jail: seals itself, reports on its control socket, then does one thing in a thread of a
//! role, as its arguments say: `component ROLE ATTEMPT`.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use sepal_runner::LayerStatus;
use sepal_runner::inner::{self, StartupHandles, ThreadRole};

use crate::attempts;

/// What it exits with when the attempt returned, by outcome.
pub(crate) const EXIT_ALLOWED: i32 = 0;
/// The attempt answered with EPERM, ENOSYS or the like; the errno is in the report.
pub(crate) const EXIT_REFUSED: i32 = 10;
/// The jail could not be set up; the message is on the control socket.
pub(crate) const EXIT_UNSEALED: i32 = 11;

pub(crate) fn main() -> ! {
    let arguments: Vec<String> = std::env::args().collect();
    let role = arguments.get(1).and_then(|name| role_called(name));
    let attempt = arguments.get(2).cloned().unwrap_or_default();

    let mut handles = StartupHandles::take().expect("startup handles");
    let mut control = UnixStream::from(handles.remove("control").expect("a control handle"));
    let kvm = handles.remove("kvm").ok();
    let report = match inner::seal(handles.seal_spec()) {
        Ok(report) => report,
        Err(error) => {
            let _ = writeln!(control, "unsealed {error}");
            std::process::exit(EXIT_UNSEALED);
        }
    };
    // Whoever started it may be gone already.
    let report = serde_json::to_string::<Vec<LayerStatus>>(&report).unwrap();
    let _ = writeln!(control, "{report}");

    let errno = match role {
        // Stays until the other end says or closes.
        None => {
            let _ = control.read(&mut [0]);
            0
        }
        Some(ThreadRole::Control) => attempts::run(&attempt, kvm),
        Some(role) => in_thread(role, attempt, kvm),
    };
    if errno == 0 {
        std::process::exit(EXIT_ALLOWED);
    }
    let _ = writeln!(control, "errno {errno}");
    std::process::exit(EXIT_REFUSED);
}

fn in_thread(role: ThreadRole, attempt: String, kvm: Option<OwnedFd>) -> i32 {
    // What a vCPU has at hand was made by the control thread.
    let prepared = attempts::prepare(&attempt, kvm);
    std::thread::Builder::new()
        .name(role.to_string())
        .spawn(move || {
            inner::narrow(role).expect("a narrower filter");
            attempts::run_prepared(&attempt, prepared)
        })
        .expect("a thread")
        .join()
        .expect("no panic")
}

fn role_called(name: &str) -> Option<ThreadRole> {
    ThreadRole::ALL.into_iter().find(|role| role.to_string() == name)
}

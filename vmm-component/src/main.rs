//! The component: one jailed process for one virtual machine, started by the guest manager's keeper.
//!
//! ```text
//!   take the startup handles -> close the jail -> serve the lifecycle on the control socket -> end with the connection, or, with a durable
//!                                                                                              guest, when nobody can come after it
//! ```
//!
//! Exit status: 0 after the connection has closed and everything is torn down, 1 if the component could not start, 3 if a machine's threads would
//! not end.
//!
//! The C library calls `main` without the standard library's own preparations: they cost a start (and each thread) a dozen system calls, among
//! them a read of `/proc/self/maps`, for a message about stacks that overflow. Here that is told by SIGSEGV.

#![no_main]

mod log;

use std::{
    ffi::{c_char, c_int},
    io::{self, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    panic::catch_unwind,
};

use anyhow::{Context, Result};
use kvm_ioctls::Kvm;
use sepal_runner::{
    descriptors,
    inner::{self, StartupHandles},
    layer::{LayerState, LayerStatus},
    startup,
};
use sepal_schema::{
    info::{LayerInfo, LayerState as State},
    transport::Reactor,
};
use sepal_vmm_component::server::{Controller, vm};

// SAFETY: the name is the C library's for this very function, and nobody else's.
#[unsafe(no_mangle)]
extern "C" fn main(_: c_int, _: *const *const c_char) -> c_int {
    // A peer that is gone is an error of the write, and never a signal.
    // SAFETY: there is no other thread and no handler yet.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    // A panic has said why by itself.
    match catch_unwind(run) {
        Ok(Ok(())) => libc::EXIT_SUCCESS,
        Ok(Err(error)) => {
            // Who is to read it may be gone, or not reading.
            let _ = writeln!(io::stderr(), "vmm-component: {error:#}");
            libc::EXIT_FAILURE
        }
        Err(_) => libc::EXIT_FAILURE,
    }
}

/// Descriptors that there is room for from the start: more than 64 vCPUs and 32 disks take.
const DESCRIPTORS: u32 = 1024;

fn run() -> Result<()> {
    let mut handles = StartupHandles::take().context("taking the startup handles")?;
    let control = UnixStream::from(handles.remove(startup::CONTROL)?);
    let kvm = kvm(handles.remove(startup::KVM)?);
    descriptors::reserve(DESCRIPTORS).context("making room for descriptors")?;
    let layers = inner::seal(handles.seal_spec()).context("closing the jail")?;
    drop(handles);
    log::to_stderr();

    let mut reactor = Reactor::single_threaded().context("making the control loop")?;
    let handle = reactor.handle();
    let layers = layers.iter().map(layer_info).collect();
    let (controller, exited) = Controller::new(&handle, layers, vm::builder(kvm));
    controller.serve(control).context("serving the control socket")?;
    drop(controller);
    // Resolves after the last machine is gone, or fails if nobody is left who could say so.
    let _ = reactor.run_until(exited).context("running the control loop")?;
    Ok(())
}

fn kvm(fd: OwnedFd) -> Kvm {
    use std::os::fd::{FromRawFd, IntoRawFd};
    // SAFETY: the descriptor is owned and is /dev/kvm, which the startup handles have checked; ownership moves into the Kvm.
    unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) }
}

fn layer_info(status: &LayerStatus) -> LayerInfo {
    LayerInfo {
        name: status.layer.name().into(),
        state: match status.state {
            LayerState::Holds => State::Holds,
            LayerState::Waived => State::Waived,
            LayerState::NotRequested => State::NotRequested,
        },
        detail: status.detail.clone(),
    }
}

//! Threads of the library in somebody else's program: they take no signal, so that its handlers run on its own threads, and what a broken pipe raises ends
//! nobody.

use std::{
    io, mem, ptr,
    thread::{Builder, JoinHandle},
};

/// Starts a thread that has all signals blocked.
///
/// # Errors
/// There is none to be had.
pub(crate) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    // SAFETY: signal sets are plain C structs that the calls fill. The mask is this thread's; the new one inherits it, and then it is as before.
    unsafe {
        let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = (mem::zeroed(), mem::zeroed());
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        let thread = Builder::new().name(name.to_owned()).spawn(body);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut());
        thread
    }
}

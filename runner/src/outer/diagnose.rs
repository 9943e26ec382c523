//! Finds out which layer made `clone3` fail: the call itself does not say.

use std::io;

use super::{JailSpec, SpawnError};
use crate::layer::Layer;

/// The error for a failed `clone3`. Tries the required namespaces one by one to name the one that the host refuses.
pub(super) fn clone_failure(jail: &JailSpec, error: &io::Error) -> SpawnError {
    // Not for lack of a layer: there may be no further process at all, which a probe would run into as well.
    if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ENOMEM)) {
        let source = match error.raw_os_error() {
            Some(libc::EAGAIN) => io::Error::other(
                "no further process may be made (raise ulimit -u, or pids.max of the manager's control group)",
            ),
            _ => io::Error::from_raw_os_error(libc::ENOMEM),
        };
        return SpawnError::System {
            action: "making its process",
            source,
        };
    }
    let user = if jail.waives(Layer::UserNamespace) {
        0
    } else {
        libc::CLONE_NEWUSER
    };
    for (layer, flag, name) in Layer::NAMESPACES {
        if jail.waives(layer) {
            continue;
        }
        if let Err(cause) = probe(user | flag) {
            let without = if user == 0 {
                " (without a user namespace this takes CAP_SYS_ADMIN)"
            } else {
                ""
            };
            return SpawnError::Layer {
                layer,
                cause: format!("a new {name} namespace: {}{without}", in_words(&cause)),
            };
        }
    }
    SpawnError::System {
        action: "making its process (clone3)",
        source: error
            .raw_os_error()
            .map_or_else(|| io::Error::from(error.kind()), io::Error::from_raw_os_error),
    }
}

/// Makes a child with these flags that ends at once.
pub(crate) fn probe(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: all-zero is a valid value of this plain struct.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = u64::from(flags.cast_unsigned());
    args.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    // SAFETY: the struct is valid for its size; without CLONE_VM the child runs on a copy of this memory.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    if pid == 0 {
        // SAFETY: ends the child without running anything of this process.
        unsafe { libc::_exit(0) }
    }
    let error = io::Error::last_os_error();
    let pid = i32::try_from(pid)
        .ok()
        .filter(|pid| *pid > 0)
        .and_then(rustix::process::Pid::from_raw);
    let Some(pid) = pid else { return Err(error) };
    rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty())?;
    Ok(())
}

/// What the errno of a namespace's creation means (`clone(2)`, `user_namespaces(7)`).
fn in_words(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOSPC) => "the host's limit on namespaces of this kind is reached or 0".to_owned(),
        Some(libc::EUSERS) => "user namespaces are nested too deep".to_owned(),
        Some(libc::EINVAL) => "this kernel does not have it".to_owned(),
        _ => error.to_string(),
    }
}

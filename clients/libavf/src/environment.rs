//! The environment's variables, which only count where the program's user may not do less than the program.

use std::{env, ffi::OsString};

/// The variable's value, unless it is empty, or the program has more rights than its user (set-uid, file capabilities).
pub(crate) fn variable(name: &str) -> Option<OsString> {
    // SAFETY: only asks what the kernel told this process when it was started.
    let secure = unsafe { libc::getauxval(libc::AT_SECURE) } != 0;
    env::var_os(name).filter(|value| !secure && !value.is_empty())
}

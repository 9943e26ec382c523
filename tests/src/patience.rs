//! Deadlines: how long anything may take before a test fails.

use std::{
    thread,
    time::{Duration, Instant},
};

/// How long a test waits for anything. Generous: the host may be busy with other work.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// Pause between two looks at something that announces itself to nobody.
const PAUSE: Duration = Duration::from_millis(5);

/// Looks again and again until `look` finds something.
///
/// # Panics
/// After [`PATIENCE`], saying that `what` did not happen.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    try_until(|| look().ok_or(())).unwrap_or_else(|()| panic!("{what}: not within {PATIENCE:?}"))
}

/// Looks again and again until `look` succeeds; the last failure after [`PATIENCE`].
///
/// # Errors
/// What `look` returned last.
pub fn try_until<T, E>(mut look: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match look() {
            Ok(found) => return Ok(found),
            Err(missing) if Instant::now() > deadline => return Err(missing),
            Err(_) => thread::sleep(PAUSE),
        }
    }
}

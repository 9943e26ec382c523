//! Counts and times as values of figures.

use std::time::Duration;

/// A count.
#[expect(clippy::cast_precision_loss, reason = "nothing is counted for that long")]
pub(super) fn number(count: u64) -> f64 {
    count as f64
}

/// How many there are of something.
pub(super) fn amount(count: usize) -> f64 {
    number(count as u64)
}

/// A time in ms.
pub(super) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// A time in us.
pub(super) fn microseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

//! Counts and times as values of figures.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::results::Summary;

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

/// The median of times, in us.
///
/// # Errors
/// There are none.
pub(super) fn median_microseconds(times: impl IntoIterator<Item = Duration>) -> Result<f64> {
    let times: Vec<_> = times.into_iter().map(microseconds).collect();
    let summary = Summary::of(&times).context("nothing was measured")?;
    Ok(summary.median)
}

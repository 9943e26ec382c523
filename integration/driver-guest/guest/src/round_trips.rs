//! How long answers take, for the commands that measure round trips.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use crate::guest::{Failure, Guest};

/// The times of round trips, in nanoseconds.
#[derive(Default)]
pub(crate) struct RoundTrips(Vec<u64>);

impl RoundTrips {
    /// Times one.
    pub(crate) fn time(
        &mut self,
        guest: &mut Guest,
        trip: impl FnOnce(&mut Guest) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let start = guest.now();
        trip(guest)?;
        self.0.push(guest.now() - start);
        Ok(())
    }

    /// `count=`, and `median_us=` and `p90_us=` with two decimals.
    pub(crate) fn report(mut self) -> String {
        self.0.sort_unstable();
        let at = |share: usize| {
            let time = self.0.get(self.0.len().saturating_sub(1) * share / 100);
            time.copied().unwrap_or(0) as f64 / 1000.0
        };
        format!("count={} median_us={:.2} p90_us={:.2}", self.0.len(), at(50), at(90))
    }
}

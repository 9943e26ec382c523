//! What is taken from guests when the host runs short of memory, and when it is given back. Pure.
//!
//! ```text
//!   calm --(pressure: a step is taken from each guest)--> pressed --(pressure: another step, down to the reserve)--> pressed
//!    ^                                                       |
//!    '--- nothing is taken any more <--- a step is given back to each <--(no pressure for the calm time; again for each step)
//! ```

use std::time::Duration;

use sepal_schema::{error::Error, node_capnp::pressure_policy};

/// Bytes of a balloon's page (virtio 1.2, section 5.5.6).
const PAGE: u64 = 4096;

/// The policy, with all defaults resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Whether anything is done at all.
    pub enabled: bool,
    /// Pressure begins when tasks of the host stall for memory this share of the time, in percent: 1 to 100.
    pub stall_percent: u8,
    /// In each window of this length: 500 ms to 10 s, what the kernel takes (linux/Documentation/accounting/psi.rst).
    pub window: Duration,
    /// How much of a guest's memory is taken or given back at a time, in percent: 1 to 50.
    pub step_percent: u8,
    /// What each guest keeps at least, in percent: 10 to 100.
    pub reserve_percent: u8,
    /// How long there has to be no pressure before each step that is given back; an hour at most.
    pub calm: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            enabled: true,
            stall_percent: 10,
            window: Duration::from_secs(1),
            step_percent: 5,
            reserve_percent: 50,
            calm: Duration::from_secs(10),
        }
    }
}

impl Policy {
    /// Reads one; zeros are the defaults.
    ///
    /// # Errors
    /// `BAD_CONFIG` about the first field that is out of its range.
    pub fn read(from: pressure_policy::Reader<'_>) -> Result<Self, Error> {
        let default = Self::default();
        let percent = |field: &'static str, given: u8, least: u8, most: u8, default: u8| match given {
            0 => Ok(default),
            given if (least..=most).contains(&given) => Ok(given),
            given => {
                let message = format!("{field} is {given}, and has to be {least} to {most} percent");
                Err(Error::bad_config(field, message))
            }
        };
        let time = |field: &'static str, given: u32, least: u32, most: u32, default| match given {
            0 => Ok(default),
            given if (least..=most).contains(&given) => Ok(Duration::from_millis(given.into())),
            given => {
                let message = format!("{field} is {given}, and has to be {least} to {most} milliseconds");
                Err(Error::bad_config(field, message))
            }
        };
        Ok(Self {
            enabled: from.get_enabled(),
            stall_percent: percent("stallPercent", from.get_stall_percent(), 1, 100, default.stall_percent)?,
            window: time("windowMs", from.get_window_ms(), 500, 10_000, default.window)?,
            step_percent: percent("stepPercent", from.get_step_percent(), 1, 50, default.step_percent)?,
            reserve_percent: percent(
                "reservePercent",
                from.get_reserve_percent(),
                10,
                100,
                default.reserve_percent,
            )?,
            calm: time("calmMs", from.get_calm_ms(), 1, 3_600_000, default.calm)?,
        })
    }

    /// Writes it, without zeros.
    pub fn write(&self, mut to: pressure_policy::Builder<'_>) {
        let ms = |time: Duration| u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
        to.set_enabled(self.enabled);
        to.set_stall_percent(self.stall_percent);
        to.set_window_ms(ms(self.window));
        to.set_step_percent(self.step_percent);
        to.set_reserve_percent(self.reserve_percent);
        to.set_calm_ms(ms(self.calm));
    }

    /// It in a few words, for the audit and the log.
    pub fn in_words(&self) -> String {
        match self.enabled {
            false => "off".to_owned(),
            true => format!(
                "at {}% of {} ms stalled, {}% at a time, {}% left, back after {} ms",
                self.stall_percent,
                self.window.as_millis(),
                self.step_percent,
                self.reserve_percent,
                self.calm.as_millis()
            ),
        }
    }

    /// The most that may be taken from a guest with so much memory; in bytes, whole pages.
    pub fn most(&self, memory: u64) -> u64 {
        pages(share(memory, 100_u8.saturating_sub(self.reserve_percent)))
    }

    fn step(&self, memory: u64) -> u64 {
        pages(share(memory, self.step_percent)).max(PAGE)
    }

    /// How much is to be taken in all from a guest with so much memory, of which `taken` is, when there is pressure.
    pub fn take(&self, memory: u64, taken: u64) -> u64 {
        taken.saturating_add(self.step(memory)).min(self.most(memory))
    }

    /// How much is to stay taken when it is calm.
    pub fn give(&self, memory: u64, taken: u64) -> u64 {
        taken.saturating_sub(self.step(memory)).min(self.most(memory))
    }

    /// How much may stay taken now that this is the policy.
    pub fn keep(&self, memory: u64, taken: u64) -> u64 {
        if self.enabled { taken.min(self.most(memory)) } else { 0 }
    }
}

fn share(memory: u64, percent: u8) -> u64 {
    // Hundredths first: no memory is so large that it overflows, and a page more or less is all that is lost.
    memory / 100 * u64::from(percent)
}

fn pages(bytes: u64) -> u64 {
    bytes / PAGE * PAGE
}

/// When memory is given back. Times are of a clock that only goes forward, from any beginning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Calm {
    /// When there was pressure last.
    last: Option<Duration>,
    /// When the next step is given back; none if nothing is taken.
    next: Option<Duration>,
}

impl Calm {
    /// There is pressure.
    pub fn pressed(&mut self, now: Duration, policy: &Policy) {
        self.last = Some(now);
        self.next = Some(now.saturating_add(policy.calm));
    }

    /// When [`Calm::due`] is to be asked next; none as long as there is no pressure.
    pub fn deadline(&self) -> Option<Duration> {
        self.next
    }

    /// Whether a step is to be given back now. If it is, the next one is due after another calm time.
    pub fn due(&mut self, now: Duration, policy: &Policy) -> bool {
        let due = self.next.is_some_and(|next| now >= next);
        if due {
            self.next = Some(now.saturating_add(policy.calm));
        }
        due
    }

    /// The policy is another now, or was told again.
    pub fn changed(&mut self, now: Duration, policy: &Policy) {
        if self.next.is_some() {
            self.next = Some(now.saturating_add(policy.calm));
        }
    }

    /// Something is taken since before this began.
    pub fn resumed(&mut self, now: Duration, policy: &Policy) {
        self.next.get_or_insert(now.saturating_add(policy.calm));
    }

    /// Nothing is taken any more.
    pub fn over(&mut self) {
        self.next = None;
    }

    /// Whether there is pressure: the kernel tells of it once a window, as long as it lasts.
    pub fn is_pressed(&self, now: Duration, policy: &Policy) -> bool {
        let lasts = policy.window.saturating_mul(2);
        self.last.is_some_and(|last| now.saturating_sub(last) < lasts)
    }
}

#[cfg(test)]
mod tests;

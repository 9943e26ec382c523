//! The rate limit of one direction, which all pairs of queues share.

use std::io;

use crate::rate::{RateLimit, RateTimer};

/// A rate limit of one direction.
pub(super) struct Limit {
    pub(super) timer: Option<RateTimer>,
    /// A frame is held back until the timer expires.
    pub(super) waiting: bool,
}

impl Limit {
    pub(super) fn new(limit: &RateLimit) -> io::Result<Self> {
        Ok(Self {
            timer: RateTimer::new(limit)?,
            waiting: false,
        })
    }

    /// Whether a frame of `len` bytes may pass now.
    pub(super) fn admit(&mut self, len: usize) -> io::Result<bool> {
        if let (Some(timer), false) = (&mut self.timer, self.waiting) {
            self.waiting = !timer.admit(len as u64)?;
        }
        Ok(!self.waiting)
    }

    /// The timer's descriptor was readable.
    pub(super) fn expired(&mut self) {
        if let Some(timer) = &self.timer {
            timer.expired();
        }
        self.waiting = false;
    }
}

//! Rate limits of devices: token buckets for bytes and for operations, and the timer that a limited device sleeps on.
//!
//! ```text
//!   take(now, bytes) -- both buckets have enough --> Ok, and both are charged
//!                    '- one has not --> Err(how long until they have)   RateTimer: timerfd -> the device's loop -> take again
//! ```
//!
//! [`RateLimiter`] only calculates: time is its parameter, in nanoseconds since whenever. What a device admits in any stretch of time is at most
//! the burst and what the rate gives for that time. An operation larger than the burst waits for a full bucket and leaves it in debt, so that no
//! operation waits for ever, and the rate still holds over time.

mod timer;

pub use timer::RateTimer;

const NANOS_PER_SECOND: i128 = 1_000_000_000;

/// Limits of one device. 0 means none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimit {
    /// Bytes a second.
    pub bytes_per_second: u64,
    /// Operations (requests, frames) a second.
    pub operations_per_second: u64,
    /// Bytes that may pass at once after a rest; 0: what passes in a second.
    pub burst_bytes: u64,
    /// Operations that may pass at once after a rest; 0: what passes in a second.
    pub burst_operations: u64,
}

impl RateLimit {
    /// Whether anything is limited.
    pub fn is_limited(&self) -> bool {
        self.bytes_per_second != 0 || self.operations_per_second != 0
    }
}

/// Tokens that come at a steady rate, up to a number.
#[derive(Clone, Debug)]
struct Bucket {
    /// Tokens a second, which are billionths of a token a nanosecond; not 0.
    rate: i128,
    /// The most it holds, in billionths of a token.
    capacity: i128,
    /// What it holds; below 0 after an operation larger than the capacity.
    level: i128,
}

impl Bucket {
    fn new(rate: u64, burst: u64) -> Option<Self> {
        let tokens = if burst == 0 { rate } else { burst };
        // Each product of two numbers below 2^64 fits.
        let capacity = i128::from(tokens) * NANOS_PER_SECOND;
        (rate != 0).then_some(Self {
            rate: rate.into(),
            capacity,
            level: capacity,
        })
    }

    fn fill(&mut self, nanoseconds: u64) {
        let gained = self.rate.saturating_mul(nanoseconds.into());
        self.level = self.level.saturating_add(gained).min(self.capacity);
    }

    /// Nanoseconds until `tokens` may be taken.
    fn wait(&self, tokens: u64) -> u64 {
        let needed = (i128::from(tokens) * NANOS_PER_SECOND).min(self.capacity);
        let missing = (needed - self.level).max(0);
        // Rounded up, so that the wait is long enough.
        u64::try_from((missing + self.rate - 1) / self.rate).unwrap_or(u64::MAX)
    }

    fn charge(&mut self, tokens: u64) {
        self.level -= i128::from(tokens) * NANOS_PER_SECOND;
    }
}

/// Decides which operations of a device may pass (see the module's head).
#[derive(Clone, Debug)]
pub struct RateLimiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
    /// Up to when the buckets are filled.
    filled: u64,
}

impl RateLimiter {
    /// A limiter with full buckets at `now`, in nanoseconds of a clock that does not go back.
    pub fn new(limit: &RateLimit, now: u64) -> Self {
        Self {
            bytes: Bucket::new(limit.bytes_per_second, limit.burst_bytes),
            operations: Bucket::new(limit.operations_per_second, limit.burst_operations),
            filled: now,
        }
    }

    /// Whether it limits anything.
    pub fn is_limited(&self) -> bool {
        self.bytes.is_some() || self.operations.is_some()
    }

    /// Asks to let one operation of `bytes` bytes pass at `now`.
    ///
    /// # Errors
    ///
    /// The nanoseconds, at least 1, after which asking again for as much succeeds; nothing is charged.
    pub fn take(&mut self, now: u64, bytes: u64) -> Result<(), u64> {
        let elapsed = now.saturating_sub(self.filled);
        self.filled = self.filled.max(now);
        let mut buckets = [(&mut self.bytes, bytes), (&mut self.operations, 1)];
        let mut wait = 0;
        for (bucket, tokens) in &mut buckets {
            if let Some(bucket) = bucket {
                bucket.fill(elapsed);
                wait = wait.max(bucket.wait(*tokens));
            }
        }
        if wait > 0 {
            return Err(wait);
        }
        for (bucket, tokens) in buckets {
            if let Some(bucket) = bucket {
                bucket.charge(tokens);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

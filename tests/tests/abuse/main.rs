//! Hostile clients of a guest manager: its memory stays flat, others are served meanwhile, and a guest runs on.
//!
//! The limits of a connection are tested one by one where they are implemented (`schema/tests`); this is about what they do for a whole manager.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: a failure is a panic with a message"
)]

mod calls;
mod noise;
mod raw;
mod scene;

//! The parts of the suite. Each is one file: its figures as constants, and what measures them.

mod events;
pub(crate) mod rpc;
mod size;

mod growth;
mod idle;
mod many;
mod memory;
mod resting;
mod units;

mod balloon;
mod block;
mod drivers;
mod linux;
mod net;
mod streams;

mod start;
mod turnover;

use anyhow::Result;

use crate::{bench::Bench, figure::Figure};

/// A part.
pub(crate) struct Part {
    /// Its name on the command line.
    pub(crate) name: &'static str,
    /// What it measures, in a few words.
    pub(crate) about: &'static str,
    /// All that it measures: a run without one of them fails.
    pub(crate) figures: &'static [&'static Figure],
    /// Measures.
    pub(crate) run: fn(&mut Bench) -> Result<()>,
}

/// All parts, in the order in which they run: what busy parts leave behind (page cache, heat) comes after what is sensitive to it.
pub(crate) const PARTS: &[Part] = &[
    start::PART,
    turnover::PART,
    memory::PART,
    idle::PART,
    many::PART,
    growth::PART,
    rpc::PART,
    events::PART,
    size::PART,
    block::PART,
    net::PART,
    streams::PART,
    balloon::PART,
    linux::PART,
];

//! The manager's protocol, in one process: real connections and descriptors, a fake component behind them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod access;
mod audit;
mod check;
mod cpu;
mod definitions;
mod devices;
mod events;
mod fake;
mod fake_devices;
mod figures;
mod files;
mod host;
mod launch;
mod leases;
mod lifecycle;
mod pool;
mod power;
mod power_ends;
mod queries;
mod restarts;
mod roles;
mod stopping;
mod succession;
mod vsock;
mod world;

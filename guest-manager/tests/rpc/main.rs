//! The manager's protocol, in one process: real connections and descriptors, a fake component behind them.

mod events;
mod fake;
mod files;
mod launch;
mod lifecycle;
mod stopping;
mod world;

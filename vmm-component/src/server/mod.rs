//! The component's server: the protocol on one side, the lifecycle and the machine on the other.
//!
//! ```text
//!   successors.rs  who the manager is, and who may come after it
//!   component.rs   GuestLifecycle: decodes (host_setup.rs), asks the controller, answers
//!   guest.rs       Guest, for one generation; power.rs, observer.rs, debug.rs: its facets; facets.rs, vsock.rs: those of devices
//!   state.rs       what is known about it; teller.rs, journal.rs: who is told, and what nobody may have heard
//!        |  requests, in the order in which they arrived
//!   controller.rs  feeds the lifecycle, carries out its effects on the control loop
//!        |  build, tear down: a thread each (jobs.rs), so that no request waits behind them
//!   vm.rs          the machine, as the controller sees it; devices.rs: its devices, from the configuration
//!        |  reports
//!   news.rs        what devices tell, at a pace; memory_news.rs: when a guest is asked how its memory fares; settle.rs: memory that goes back a while after the start
//! ```

mod component;
mod controller;
mod debug;
pub mod devices;
mod facets;
mod guest;
mod host_setup;
mod jobs;
mod journal;
mod memory_news;
mod news;
mod observer;
mod power;
mod settle;
mod state;
mod successors;
mod teller;
#[cfg(test)]
mod tests;
pub mod vm;
mod vsock;

pub use controller::Controller;

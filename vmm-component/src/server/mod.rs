//! The component's server: the protocol on one side, the lifecycle and the machine on the other.
//!
//! ```text
//!   component.rs   GuestLifecycle: decodes, asks the controller, answers
//!   guest.rs       Guest and its facets, for one generation
//!        |  requests, in the order in which they arrived
//!   controller.rs  feeds the lifecycle, carries out its effects on the control loop
//!        |  build, tear down: a thread each (jobs.rs), so that no request waits behind them
//!   vm.rs          the machine, as the controller sees it
//! ```

mod component;
mod controller;
mod guest;
mod jobs;
#[cfg(test)]
mod tests;
pub mod vm;

pub use component::ComponentServer;
pub use controller::Controller;

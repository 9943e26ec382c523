//! The jail, tried for real: this binary is both the tests and the component that they jail.
//!
//! Started by the runner (with a startup record) it is the component: it seals itself and does what its arguments say.
//! Otherwise it runs the tests.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests, but with a harness of their own"
)]

mod attempts;
mod component;
mod figures;
mod harness;
mod keeper;
mod layers;
mod missing;
mod outside;
mod succession;

fn main() {
    if std::env::var_os(sepal_runner::startup::STARTUP_VARIABLE).is_some() {
        component::main();
    }
    if std::env::var_os(keeper::MANAGER).is_some() {
        keeper::manager();
    }
    harness::main();
}

//! SIGKILL at every state of a guest's life: nothing is left behind, and whoever survives says the right reason.
//!
//! ```text
//!   states      a guest held in each state, driven step by step over the protocol
//!   component, keeper, manager, client   who is killed
//!   command     the same as a user of the command sees it
//!   stopped     a component that does not react any more (SIGSTOP)
//! ```

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: a failure is a panic with a message"
)]

mod client;
mod command;
mod component;
mod keeper;
mod manager;
mod states;
mod stopped;

/// Makes a test of `$check` for each state.
macro_rules! at_every_state {
    ($check:ident: $($name:ident $state:ident),+ $(,)?) => {
        $(#[test]
        fn $name() {
            if !sepal_tests::kvm_missing() {
                $check($crate::states::Scene::at($crate::states::State::$state));
            }
        })+
    };
}
pub(crate) use at_every_state;

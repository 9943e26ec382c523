//! One virtual machine: its lifecycle, its machine and its server, as a library for the `vmm-component` binary and the tests.

pub mod acpi;
pub mod boot;
pub mod layout;
pub mod lifecycle;
pub mod machine;
pub mod memory;
pub(crate) mod paging;
pub mod server;
pub(crate) mod stack;
pub mod unassisted;

//! Boots guests for tests: through a guest manager, in the jail, over the protocol, as any client would.
//!
//! ```no_run
//! use std::time::Duration;
//! use sepal_integration::{Boot, artifacts};
//!
//! let kernel = artifacts::kernel()?;
//! let mut guest = Boot::new().kernel(kernel.vmlinux).initrd(artifacts::initramfs()?).cmdline("console=ttyS0").start()?;
//! guest.wait_for("USERSPACE", Duration::from_secs(120))?;
//! let report = guest.wait(Duration::from_secs(60))?;
//! println!("{}: {}", report.detail, guest.output());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! - `artifacts`: the test kernel and its initramfs, built once and cached.
//! - `boot`: [`Boot`] says what to boot; [`Guest`] waits for lines, types, and asserts how it ended.
//! - `manager`: [`Manager`], a guest manager of one's own.
//! - `programs`: where the programs of this build are.

pub mod artifacts;
mod boot;
mod error;
mod manager;
mod programs;

pub use boot::{Boot, Guest};
pub use error::HarnessError;
pub use manager::Manager;
pub use programs::program;

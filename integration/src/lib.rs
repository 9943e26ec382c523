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
//! - `archive`: an initramfs with more files in it.
//! - `artifacts`: the test kernel and its initramfs, built once and cached; the guests' agent, virtiofsd.
//! - `boot`: [`Boot`] says what to boot; [`Guest`] waits for lines, types, and asserts how it ended.
//! - `events`: what the manager tells about devices.
//! - `facets`: what a client does to the devices of a guest, and what it sees in it.
//! - `host`: what devices need on the host: images, networks apart from the host's, the other ends of connections.
//! - `manager`: [`Manager`], a guest manager of one's own or one that runs.
//! - `power`: what a client does to whether a guest runs.
//! - `printed`: [`Printed`], a guest's output and how much of it was waited for.
//! - `programs`: where the programs of this build are.

mod archive;
pub mod artifacts;
mod boot;
mod error;
mod events;
mod facets;
pub mod host;
mod manager;
mod power;
mod printed;
mod programs;
mod report;

pub use archive::initrd;
pub use boot::{Boot, Guest, disk};
pub use error::HarnessError;
pub use facets::{BalloonSize, Frame, MemorySize, Translation};
pub use manager::{LaunchRequest, Manager};
pub use printed::{Printed, end_of};
pub use programs::program;
pub use report::Report;

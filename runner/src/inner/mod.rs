//! The inner half: what a component does with itself before it touches anything that others control.
//!
//! ```text
//!   StartupHandles::take   the handles are what the table says, and nothing else is open
//!   seal                   everything but the handles is given up; the control thread's filter is in force
//!   narrow(role)           each thread, first of all: its own filter on top
//! ```
//!
//! [`seal`] has to run while the process has one thread: capabilities, Landlock and filters are properties of threads,
//! which later threads inherit.

mod handles;
mod landlock;
mod seal;

use std::sync::OnceLock;

pub use handles::{HandleError, StartupHandles};
pub use seal::{SealError, SealSpec, seal};

use crate::layer::Layer;
pub use crate::seccomp::ThreadRole;

/// Set once by [`seal`]: whether threads have filters.
static FILTERED: OnceLock<bool> = OnceLock::new();

/// Puts the role's filter on the calling thread, for good. Call it first in a new thread, before guest data is touched.
/// Threads that this thread starts later inherit it.
///
/// Does nothing where the [`Layer::Seccomp`] layer was waived.
///
/// # Errors
///
/// [`SealError::NotSealed`] before [`seal`]; [`SealError::Layer`] if the kernel refuses the filter.
pub fn narrow(role: ThreadRole) -> Result<(), SealError> {
    match FILTERED.get() {
        None => Err(SealError::NotSealed),
        Some(false) => Ok(()),
        Some(true) => crate::seccomp::install(role).map_err(|error| SealError::Layer {
            layer: Layer::Seccomp,
            cause: format!("installing the {role} filter: {error}"),
        }),
    }
}

//! Who does the host's work while the device's loop goes on: the kernel, through an io_uring, or a few threads.
//!
//! ```text
//!   device --submit(id, job)--> engine --kick--> kernel or threads
//!          <--completed: Done { id, job, result }--'   fd() becomes readable, once before_sleep() was called
//! ```
//!
//! A job that is under way points into guest memory: whoever ends a device waits for all of them, or leaves guest memory mapped for ever.

mod pool;
mod ring;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::GuestMemoryMmap;

use super::backend::{Backend, Job};
use super::raw::HostFile;

/// Who does the host's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EngineKind {
    /// The kernel, through an io_uring that is restricted to the image and to what a disk does.
    IoUring,
    /// Threads of the device.
    Threads,
}

/// A job that was done.
#[derive(Debug)]
pub(super) struct Done {
    /// As it was submitted.
    pub(super) id: u32,
    pub(super) job: Job,
    pub(super) result: io::Result<()>,
}

/// See the module's head. An id is in use from [`submit`](Self::submit) until it is completed, and below the number that the engine was made for.
pub(super) trait Engine: Send {
    fn kind(&self) -> EngineKind;

    /// Whether several reads of what the host has in memory, submitted together, cost less than one after the other on the device's own thread.
    fn is_for_batches(&self) -> bool;

    /// Takes on a job, whose buffers lie in `memory`.
    fn submit(&mut self, id: u32, job: Job, memory: &GuestMemoryMmap);

    /// Has what was submitted begun.
    fn kick(&mut self);

    /// Whether there is something for [`completed`](Self::completed); costs next to nothing.
    fn pending(&self) -> bool;

    /// Appends what is done to `done`.
    fn completed(&mut self, done: &mut Vec<Done>);

    /// Waits until something is done, or until `deadline`: whether something is. There has to be a job under way.
    fn wait(&mut self, deadline: Option<Instant>) -> bool;

    /// What becomes readable when something is done.
    fn fd(&self) -> RawFd;

    /// The loop is going to sleep. True: something is done already.
    fn before_sleep(&mut self) -> bool;

    /// The loop found [`fd`](Self::fd) readable.
    fn woken(&mut self);
}

/// A ring that was made where that is allowed, for the device's thread, where it is not.
pub(super) struct Prepared(Option<ring::Ring>);

/// Makes a ring for a raw file that is written in place, if the host allows one. `capacity` jobs may be under way. Runs on the thread that makes
/// the device: the device's own may only use it.
pub(super) fn prepare(allow_ring: bool, file: Option<&Arc<HostFile>>, capacity: u32) -> Prepared {
    let ring = file.filter(|_| allow_ring).and_then(|file| {
        ring::Ring::new(file.clone(), capacity)
            // Forbidden by the administrator, by a filter, or not known to this kernel.
            .inspect_err(|error| tracing::info!(%error, "no io_uring: threads do the work"))
            .ok()
    });
    Prepared(ring)
}

impl Prepared {
    /// The fastest engine that this host allows, on the thread that uses it: the ring, else threads.
    ///
    /// # Errors
    ///
    /// The host gives neither.
    pub(super) fn begin(self, backend: &Arc<dyn Backend>) -> io::Result<Box<dyn Engine>> {
        if let Some(ring) = self.0 {
            match ring.enable() {
                Ok(()) => return Ok(Box::new(ring)),
                Err(error) => tracing::info!(%error, "the io_uring cannot be used: threads do the work"),
            }
        }
        Ok(Box::new(pool::Pool::new(backend.clone())?))
    }
}

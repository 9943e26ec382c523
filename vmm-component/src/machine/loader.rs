//! The thread that looks at kernels: made ahead of time with the filter that such work gets, it loads one while another asks KVM for the rest of its machine.
//!
//! ```text
//!   narrowed ── waits ── a job ──▶ loads ──▶ its result ──▶ gone
//!                 '── nobody is left to give it one ───────▶ gone
//! ```

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use vm_memory::GuestMemoryMmap;

use super::config::{ThreadRole, ThreadSetup};
use super::error::MachineError;
use crate::boot::{self, BootEntry, BootRequest};
use crate::memory::MemoryMap;

/// What is to be loaded, and where to.
pub(super) struct Job {
    pub(super) memory: GuestMemoryMmap,
    pub(super) map: MemoryMap,
    pub(super) kernel: File,
    pub(super) initrd: Option<File>,
    pub(super) cmdline: String,
    pub(super) rsdp: u64,
    pub(super) cancel: Arc<AtomicBool>,
}

type Outcome = Result<BootEntry, MachineError>;

/// A loader that waits for its job. Dropping it ends its thread.
#[derive(Debug)]
pub(super) struct Loader {
    job: Sender<Job>,
    outcome: Receiver<Outcome>,
}

/// The thread's side of a loader.
pub(super) struct Desk {
    job: Receiver<Job>,
    outcome: Sender<Outcome>,
}

/// A job that is being done. Dropping it calls the job off and waits until the loader has let go of the memory.
#[derive(Debug)]
pub(super) struct Loading {
    cancel: Arc<AtomicBool>,
    /// Until the outcome was taken.
    outcome: Option<Receiver<Outcome>>,
}

/// A loader, and what some thread must [serve](Desk::serve) for it.
pub(super) fn loader() -> (Loader, Desk) {
    let (job, jobs) = channel();
    let (outcome, outcomes) = channel();
    let loader = Loader { job, outcome: outcomes };
    (loader, Desk { job: jobs, outcome })
}

impl Loader {
    /// One with a thread of its own.
    ///
    /// # Errors
    ///
    /// [`MachineError::Host`]: there is no thread.
    pub(super) fn spawn(setup: ThreadSetup) -> Result<Self, MachineError> {
        let (loader, desk) = loader();
        let thread = thread::Builder::new().name("loader".to_owned());
        thread
            .spawn(move || desk.serve(&setup))
            .map_err(MachineError::host("start the loader's thread"))?;
        Ok(loader)
    }

    /// Gives it its job.
    pub(super) fn begin(self, job: Job) -> Loading {
        let cancel = Arc::clone(&job.cancel);
        // If its thread is gone, the outcome says so.
        let _ = self.job.send(job);
        Loading {
            cancel,
            outcome: Some(self.outcome),
        }
    }
}

impl Loading {
    /// Waits for the outcome.
    ///
    /// # Errors
    ///
    /// What keeps the kernel from being loaded.
    pub(super) fn wait(mut self) -> Outcome {
        let gone = || MachineError::host("load the kernel")(std::io::Error::other("its thread panicked"));
        let outcome = self.outcome.take().and_then(|outcome| outcome.recv().ok());
        outcome.unwrap_or_else(|| Err(gone()))
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        if let Some(outcome) = &self.outcome {
            // The creation has failed: nobody waits for its kernel.
            self.cancel.store(true, Ordering::SeqCst);
            // What comes of it, or the end of the thread.
            let _ = outcome.recv();
        }
    }
}

impl Desk {
    /// Narrows the calling thread, waits for the job, and does it.
    pub(super) fn serve(self, setup: &ThreadSetup) {
        let narrowed = setup(ThreadRole::Loader);
        let Ok(job) = self.job.recv() else { return };
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            // What follows is hostile.
            narrowed.map_err(MachineError::host("narrow the loader's system calls"))?;
            load(job)
        }));
        // A panic has told itself; the sender is dropped then, after the job.
        if let Ok(outcome) = outcome {
            let _ = self.outcome.send(outcome);
        }
    }
}

fn load(job: Job) -> Outcome {
    let request = BootRequest {
        kernel: &job.kernel,
        initrd: job.initrd.as_ref(),
        cmdline: &job.cmdline,
        rsdp: job.rsdp,
        protocol: None,
        cancel: &job.cancel,
    };
    Ok(boot::load(&job.memory, &job.map, &request)?)
}

//! The kernel does the work, through an io_uring.
//!
//! A ring goes round the thread's system-call filter, so it is restricted before it is first used (IORING_REGISTER_RESTRICTIONS): it reads, writes,
//! syncs and punches the one file that is registered with it, and nothing more can be registered.
//!
//! An eventfd wakes the loop, and is silent while the loop is awake. (A ring whose completions are deferred to its thread does not make its own
//! descriptor readable when a kernel thread has done something.)
//!
//! System calls of the thread that makes the device: `io_uring_setup`, `mmap`, `eventfd2`, and `io_uring_register` with IORING_REGISTER_FILES,
//! IORING_REGISTER_EVENTFD and IORING_REGISTER_RESTRICTIONS. Of the device's own thread: `io_uring_register` with IORING_REGISTER_ENABLE_RINGS once;
//! then `io_uring_enter`, `read` of the eventfd, and `poll` while a reset or stop waits.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Instant;

use io_uring::register::Restriction;
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};
use rustix::event::{PollFd, PollFlags, Timespec};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Done, Engine, EngineKind};
use crate::virtio::block::backend::Job;
use crate::virtio::block::raw::{HostFile, RWF_DSYNC};
use crate::virtio::block::request::Operation;

/// Entries of the submission queue: what is handed over at once.
const SUBMISSIONS: u32 = 256;
/// Times that a full submission queue is handed over before a job is done without it.
const PUSHES: u32 = 3;
/// The registered file.
const IMAGE: Fixed = Fixed(0);

/// See the module's head.
pub(super) struct Ring {
    ring: IoUring,
    file: Arc<HostFile>,
    /// What the kernel has, by id.
    jobs: Vec<Option<Job>>,
    under_way: u32,
    /// What needed no kernel.
    done: Vec<Done>,
    /// Room for what the kernel said: ids and results.
    said: Vec<(u32, i32)>,
    event: EventFd,
    /// Completions make `event` readable.
    armed: bool,
    /// Where the jobs' buffers lie.
    memory: Option<GuestMemoryMmap>,
}

impl Ring {
    /// A ring for `capacity` jobs at a time on `file`, to be used by the thread that [`enable`](Self::enable)s it.
    ///
    /// # Errors
    ///
    /// What the kernel says: EPERM and ENOSYS where io_uring is forbidden, EINVAL where it is too old.
    pub(super) fn new(file: Arc<HostFile>, capacity: u32) -> io::Result<Self> {
        let completions = capacity.max(SUBMISSIONS).next_power_of_two();
        let mut newest = IoUring::builder();
        // Completions are worked off when this thread asks for them, not by interrupting it (Linux 6.1).
        newest
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_r_disabled()
            .setup_cqsize(completions);
        let mut oldest = IoUring::builder();
        oldest.setup_r_disabled().setup_cqsize(completions);
        let ring = newest.build(SUBMISSIONS).or_else(|error| {
            if error.raw_os_error() == Some(libc::EINVAL) {
                oldest.build(SUBMISSIONS)
            } else {
                Err(error)
            }
        })?;
        let fixed_file = squeue::Flags::FIXED_FILE.bits();
        let mut allowed = [
            Restriction::sqe_op(opcode::Read::CODE),
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_op(opcode::Fallocate::CODE),
            Restriction::sqe_flags_allowed(fixed_file),
            Restriction::sqe_flags_required(fixed_file),
        ];
        let submitter = ring.submitter();
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        submitter.register_files(&[file.as_raw_fd()])?;
        submitter.register_eventfd(event.as_raw_fd())?;
        submitter.register_restrictions(&mut allowed)?;
        Ok(Self {
            ring,
            file,
            jobs: (0..capacity).map(|_| None).collect(),
            under_way: 0,
            done: Vec::new(),
            said: Vec::new(),
            event,
            armed: true,
            memory: None,
        })
    }

    /// Lets the ring work, for the calling thread only.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub(super) fn enable(&self) -> io::Result<()> {
        self.ring.submitter().register_enable_rings()
    }

    /// Puts `job` into the submission queue; gives it back if the kernel does not take what is there.
    fn push(&mut self, id: u32, job: Job) -> Result<(), Job> {
        let entry = entry(&job).user_data(id.into());
        for _ in 0..PUSHES {
            // SAFETY: the job's vectors and the file live until the completion: `jobs` and `self.file` keep them (the kernel copies the vectors
            // when they are submitted, in any case). The buffers lie in guest memory that `memory` keeps mapped, for ever if this is dropped
            // with jobs under way.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                self.jobs[id as usize] = Some(job);
                self.under_way += 1;
                return Ok(());
            }
            self.kick();
        }
        Err(job)
    }

    /// What the kernel said about job `id`.
    fn complete(&mut self, id: u32, result: i32, done: &mut Vec<Done>) {
        let Some(mut job) = self.jobs.get_mut(id as usize).and_then(Option::take) else {
            return;
        };
        self.under_way -= 1;
        let transfer = matches!(job.operation, Operation::Read | Operation::Write);
        let result = match u64::try_from(result) {
            Ok(0) if transfer => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the image ends before the disk does",
            )),
            Ok(n) if transfer && n < job.buffers.bytes() => {
                job.buffers.advance(n);
                job.offset += n;
                return self.submit_job(id, job, done);
            }
            Ok(_) => Ok(()),
            Err(_) if again(&job, -result) => job.run(&*self.file),
            Err(_) => Err(io::Error::from_raw_os_error(-result)),
        };
        done.push(Done { id, job, result });
    }

    fn submit_job(&mut self, id: u32, job: Job, done: &mut Vec<Done>) {
        // What is not aligned as O_DIRECT needs it goes through a buffer of our own. Drivers align what they care about.
        let fits = self.file.takes(&job.buffers) && direct_range(&self.file, &job);
        let pushed = if fits { self.push(id, job) } else { Err(job) };
        if let Err(job) = pushed {
            let result = job.run(&*self.file);
            done.push(Done { id, job, result });
        }
    }

    fn enter(&self, wait: usize) {
        loop {
            match self.ring.submitter().submit_and_wait(wait) {
                // Nothing was lost: what was not taken stays in the queue.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => return,
                Err(error) => {
                    tracing::error!(%error, "io_uring_enter");
                    return;
                }
                Ok(_) => return,
            }
        }
    }
}

/// The submission that does `job`.
fn entry(job: &Job) -> squeue::Entry {
    // At most MAX_VECTORS.
    let (vectors, count) = (job.buffers.vectors().as_ptr(), job.buffers.vectors().len() as u32);
    match job.operation {
        // Cheaper than a row of one.
        Operation::Read
            if let [only] = job.buffers.vectors()
                && let Ok(len) = u32::try_from(only.iov_len) =>
        {
            opcode::Read::new(IMAGE, only.iov_base.cast(), len)
                .offset(job.offset)
                .build()
        }
        Operation::Read => opcode::Readv::new(IMAGE, vectors, count).offset(job.offset).build(),
        Operation::Write => {
            let flags = if job.durable { RWF_DSYNC } else { 0 };
            opcode::Writev::new(IMAGE, vectors, count)
                .offset(job.offset)
                .rw_flags(flags)
                .build()
        }
        Operation::Flush => opcode::Fsync::new(IMAGE).flags(FsyncFlags::DATASYNC).build(),
        Operation::Discard | Operation::WriteZeroes { unmap: true } => fallocate(job, libc::FALLOC_FL_PUNCH_HOLE),
        Operation::WriteZeroes { unmap: false } => fallocate(job, libc::FALLOC_FL_ZERO_RANGE),
    }
}

fn fallocate(job: &Job, mode: i32) -> squeue::Entry {
    opcode::Fallocate::new(IMAGE, job.len)
        .offset(job.offset)
        .mode(mode | libc::FALLOC_FL_KEEP_SIZE)
        .build()
}

/// Whether a job that the kernel refused is to be tried by ordinary system calls: it was not its time, or the file cannot punch or zero.
fn again(job: &Job, errno: i32) -> bool {
    let ranged = matches!(job.operation, Operation::Discard | Operation::WriteZeroes { .. });
    match errno {
        libc::EAGAIN | libc::EINTR => true,
        libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV => ranged,
        _ => false,
    }
}

/// Whether the range of a transfer is one that a direct file takes; shortened transfers may have left one that is not.
fn direct_range(file: &HostFile, job: &Job) -> bool {
    file.alignment().is_none_or(|alignment| {
        let mask = u64::from(alignment.offset).wrapping_sub(1);
        job.buffers.bytes() == 0 || (job.offset | job.buffers.bytes()) & mask == 0
    })
}

/// Whether both are the same mappings.
fn is_same(one: &GuestMemoryMmap, other: &GuestMemoryMmap) -> bool {
    one.num_regions() == other.num_regions() && one.iter().zip(other.iter()).all(|(a, b)| std::ptr::eq(a, b))
}

impl Engine for Ring {
    fn kind(&self) -> EngineKind {
        EngineKind::IoUring
    }

    fn is_for_batches(&self) -> bool {
        // What is not in memory, as with a direct file, goes to the ring in any case.
        self.file.alignment().is_none()
    }

    fn submit(&mut self, id: u32, job: Job, memory: &GuestMemoryMmap) {
        if self.under_way == 0 && !self.memory.as_ref().is_some_and(|kept| is_same(kept, memory)) {
            self.memory = Some(memory.clone());
        }
        if std::mem::take(&mut self.armed) {
            self.ring.completion().disable_eventfd();
        }
        let mut done = std::mem::take(&mut self.done);
        self.submit_job(id, job, &mut done);
        self.done = done;
    }

    fn kick(&mut self) {
        if !self.ring.submission().is_empty() {
            self.enter(0);
        }
    }

    fn pending(&self) -> bool {
        if !self.done.is_empty() {
            return true;
        }
        if self.under_way == 0 {
            return false;
        }
        // SAFETY: no other view of either queue exists: all are temporaries of methods of this object, which belongs to one thread.
        let (submissions, completions) = unsafe { (self.ring.submission_shared(), self.ring.completion_shared()) };
        submissions.taskrun() || submissions.cq_overflow() || !completions.is_empty()
    }

    fn completed(&mut self, done: &mut Vec<Done>) {
        done.append(&mut self.done);
        if self.under_way == 0 {
            return;
        }
        let to_enter = {
            let submissions = self.ring.submission();
            submissions.taskrun() || submissions.cq_overflow() || !submissions.is_empty()
        };
        if to_enter {
            self.enter(0);
        }
        let mut said = std::mem::take(&mut self.said);
        // As submitted: ids of 32 bits.
        said.extend(
            self.ring
                .completion()
                .map(|entry| (entry.user_data() as u32, entry.result())),
        );
        for (id, result) in said.drain(..) {
            self.complete(id, result, done);
        }
        self.said = said;
        // What was continued.
        self.kick();
    }

    fn wait(&mut self, deadline: Option<Instant>) -> bool {
        while !self.before_sleep() {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return false;
            }
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            // SAFETY: the eventfd is open for as long as this object.
            let fd = unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) };
            // A signal, or nothing yet: looked at again.
            let _ = rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], left.as_ref());
            self.woken();
        }
        true
    }

    fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    fn before_sleep(&mut self) -> bool {
        self.kick();
        if !std::mem::replace(&mut self.armed, true) {
            self.ring.completion().enable_eventfd();
            // The kernel looks at this after it noted what is done; so the other order here.
            fence(Ordering::SeqCst);
        }
        self.pending()
    }

    fn woken(&mut self) {
        // Not readable any more: woken for something else.
        let _ = self.event.read();
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.under_way > 0 {
            // The kernel may go on with what it has after the ring is closed.
            std::mem::forget(self.memory.take());
        }
    }
}

//! What the owner wants of a vCPU, and how the vCPU comes to hear of it wherever it is.
//!
//! Orders are levels ("be paused", "an NMI is due"), not a queue: the last word holds, and a client that repeats itself can't pile anything up.
//!
//! # No order is lost
//!
//! The sender does, in this order: (1) write the order, (2) ring the bell (an eventfd), (3) set `immediate_exit`, (4) send the kick signal.
//! The vCPU thread looks at its orders when KVM_RUN returned EINTR; it does, in this order: (a) clear `immediate_exit`, (b) poll the bell with its
//! event manager and, if it rang, (c) take the orders. Then it enters KVM_RUN again, or parks in its event manager.
//!
//! - The vCPU is parked: (2) wakes it, (c) follows.
//! - It is in KVM_RUN, in the guest or halted: the signal is pending, which makes KVM return EINTR.
//! - It is on its way into KVM_RUN: the signal's handler has run and done nothing, but (3) came before (4), so KVM finds `immediate_exit` set when it
//!   looks, which it does after the system call has begun; a signal that arrives after that look is pending inside KVM_RUN.
//! - It is between (a) and the end of (c): if (2) came before (b), the order is taken now, and the most that is left over is one needless EINTR. If (2)
//!   came after (b), then so did (3), hence after (a): `immediate_exit` stands, and the next KVM_RUN returns at once.
//!
//! KVM finishes the access of the last exit before it looks at `immediate_exit`, so a vCPU that took its orders after EINTR has no half-done
//! instruction. A guest whose exits follow one another without EINTR (a string instruction with a large count) does not escape: whether the machine is
//! over is looked at after each exit ([`Reporter`](crate::machine::report::Reporter)), and after some hundreds of them with `immediate_exit` set the vCPU
//! does (a) to (c) in the middle of its instruction.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::thread::JoinHandle;

use libc::c_int;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN};

use super::run_page::RunMapping;
use crate::machine::error::MachineError;
use crate::machine::event::RegisterDump;

/// Takes a vCPU's registers, or why KVM does not show them; called on the vCPU's thread.
pub(in crate::machine) type Inspector = Box<dyn FnOnce(Result<RegisterDump, MachineError>) + Send>;

/// Most register readings that may wait for one vCPU.
pub(in crate::machine) const MAX_INSPECTORS: usize = 16;

/// What a vCPU is to do.
#[derive(Default)]
pub(in crate::machine) struct Orders {
    /// Stay out of the guest.
    pub(in crate::machine) pause: bool,
    /// End the thread.
    pub(in crate::machine) stop: bool,
    /// Give the guest a non-maskable interrupt, once.
    pub(in crate::machine) nmi: bool,
    /// Show the registers, once each.
    pub(in crate::machine) inspectors: Vec<Inspector>,
}

impl fmt::Debug for Orders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Orders")
            .field("pause", &self.pause)
            .field("stop", &self.stop)
            .field("nmi", &self.nmi)
            .field("inspectors", &self.inspectors.len())
            .finish()
    }
}

/// One vCPU's orders and their bell.
#[derive(Debug)]
pub(in crate::machine) struct Mailbox {
    orders: Mutex<Orders>,
    bell: EventFd,
}

impl Mailbox {
    /// A mailbox whose vCPU is to be paused until told otherwise.
    pub(in crate::machine) fn new() -> io::Result<Self> {
        Ok(Self {
            orders: Mutex::new(Orders {
                pause: true,
                ..Orders::default()
            }),
            bell: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Changes the orders and rings: steps 1 and 2.
    pub(in crate::machine) fn change<R>(&self, change: impl FnOnce(&mut Orders) -> R) -> R {
        let result = change(&mut self.orders.lock().unwrap_or_else(PoisonError::into_inner));
        // It can fail only when the counter is full, and then the bell is ringing already.
        let _ = self.bell.write(1);
        result
    }

    /// Takes the orders: levels are copied, what is to be done once is removed.
    pub(in crate::machine) fn take(&self) -> Orders {
        // It fails with EAGAIN when nobody rang since; the orders are good in any case.
        let _ = self.bell.read();
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        Orders {
            pause: orders.pause,
            stop: orders.stop,
            nmi: std::mem::take(&mut orders.nmi),
            inspectors: std::mem::take(&mut orders.inspectors),
        }
    }
}

impl AsRawFd for Mailbox {
    fn as_raw_fd(&self) -> RawFd {
        self.bell.as_raw_fd()
    }
}

/// The signal that gets a vCPU's thread out of KVM_RUN.
pub(in crate::machine) fn kick_signal() -> c_int {
    SIGRTMIN()
}

extern "C" fn ignore(_: c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Gives the kick signal a handler that does nothing, once a process. SA_RESTART spares the device models' system calls on vCPU threads; KVM_RUN
/// returns EINTR all the same.
pub(in crate::machine) fn install_kick_handler() -> io::Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| {
        // SAFETY: an all-zero sigaction is a valid one; the handler, which does nothing, is safe at any moment.
        let status = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = ignore as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
            libc::sigaction(kick_signal(), &action, std::ptr::null_mut())
        };
        if status != 0 {
            result = Err(io::Error::last_os_error());
        }
    });
    result
}

/// Lets the kick signal through on the calling thread, whatever mask it inherited.
pub(in crate::machine) fn unblock_kick() -> io::Result<()> {
    // SAFETY: `set` is initialised by sigemptyset before it is used, and outlives the calls.
    let status = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, kick_signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut())
    };
    if status == 0 {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(status))
    }
}

/// Steps 3 and 4. The handle has not been joined, since it is borrowed, so the signal meets the right thread or none.
pub(in crate::machine) fn kick(mapping: &Arc<RunMapping>, thread: &JoinHandle<()>) {
    mapping.immediate_exit().store(1, Ordering::SeqCst);
    // It fails only for a thread that has ended, which needs no kick.
    let _ = thread.kill(kick_signal());
}

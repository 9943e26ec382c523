//! The steps between `clone3` and `exec`, in the child.
//!
//! The child is a copy of a process that may have had other threads, so it may not allocate, lock or unwind: it makes
//! plain system calls on data that its parent laid out before.

use std::ffi::c_char;
use std::os::fd::RawFd;

/// What the parent prepared for the child. Every pointer and slice stays valid, because the child has its own copy of
/// the parent's memory.
pub(super) struct Plan<'a> {
    /// Sources for descriptors 0 and up; all of them numbered above the last of these targets. The last two are for the
    /// child alone and close on exec: its end of the socket pair (a byte comes in when the parent is done, a failure
    /// message goes out if exec fails), and the binary.
    pub(super) fds: &'a [RawFd],
    /// True to become uid and gid 0 of the user namespace, with no supplementary groups.
    pub(super) become_namespace_root: bool,
    /// NULL-terminated arguments and environment.
    pub(super) argv: *const *const c_char,
    pub(super) envp: *const *const c_char,
}

/// Where the child failed: sent to the parent as two native-endian `i32`s, the step and the errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Descriptors = 1,
    Session = 2,
    Uid = 3,
    Signals = 4,
    Exec = 5,
    Personality = 6,
}

impl Plan<'_> {
    /// How many descriptors stay open across exec.
    fn kept(&self) -> usize {
        self.fds.len().saturating_sub(2)
    }

    fn channel(&self) -> RawFd {
        self.kept() as RawFd
    }

    fn program(&self) -> RawFd {
        self.kept() as RawFd + 1
    }
}

/// The length of a failure message, in bytes.
pub(super) const FAILURE_LEN: usize = 8;

/// Reads a failure message.
pub(super) fn parse_failure(message: &[u8]) -> Option<(Step, i32)> {
    let (step, errno) = message.split_first_chunk::<4>()?;
    let errno = i32::from_ne_bytes(errno.try_into().ok()?);
    let step = match i32::from_ne_bytes(*step) {
        1 => Step::Descriptors,
        2 => Step::Session,
        3 => Step::Uid,
        4 => Step::Signals,
        5 => Step::Exec,
        6 => Step::Personality,
        _ => return None,
    };
    Some((step, errno))
}

fn errno() -> i32 {
    // SAFETY: the calling thread's errno is always valid to read.
    unsafe { *libc::__errno_location() }
}

/// Runs the plan; never returns.
///
/// # Safety
///
/// Only for the child of a fresh `clone3`, with every signal blocked; `plan`'s pointers have to be NULL-terminated
/// arrays of NUL-terminated strings.
pub(super) unsafe fn run(plan: &Plan<'_>) -> ! {
    // SAFETY: forwarded from the caller.
    let (step, errno) = unsafe { steps(plan) };
    let mut message = [0_u8; FAILURE_LEN];
    message[..4].copy_from_slice(&(step as i32).to_ne_bytes());
    message[4..].copy_from_slice(&errno.to_ne_bytes());
    // SAFETY: the buffer is valid for its length; `_exit` is async-signal-safe and ends this copy of the process.
    unsafe {
        libc::send(
            plan.channel(),
            message.as_ptr().cast(),
            message.len(),
            libc::MSG_NOSIGNAL,
        );
        libc::_exit(127)
    }
}

/// Returns only where a step failed.
unsafe fn steps(plan: &Plan<'_>) -> (Step, i32) {
    for (target, &source) in plan.fds.iter().enumerate() {
        let flags = if target < plan.kept() { 0 } else { libc::O_CLOEXEC };
        // SAFETY: plain descriptor numbers; the sources lie above every target, so none is overwritten before use.
        if unsafe { libc::dup3(source, target as RawFd, flags) } < 0 {
            return (Step::Descriptors, errno());
        }
    }
    // The copies of the parent's end of the channel and of the lifeline have to go now: else the child itself would keep
    // the parent's death from it.
    // SAFETY: closes this copy's descriptors, which nothing here uses.
    if unsafe { libc::syscall(libc::SYS_close_range, plan.fds.len(), u32::MAX as usize, 0) } < 0 {
        return (Step::Descriptors, errno());
    }
    // SAFETY: no arguments.
    if unsafe { libc::setsid() } < 0 {
        return (Step::Session, errno());
    }

    // The parent writes the id maps and moves this process into its groups meanwhile; end of file means that it died.
    let mut go = 0_u8;
    // SAFETY: one byte into a local.
    while unsafe { libc::recv(plan.channel(), (&raw mut go).cast(), 1, 0) } != 1 {
        if errno() != libc::EINTR {
            // SAFETY: ends this copy of the process.
            unsafe { libc::_exit(126) }
        }
    }

    if plan.become_namespace_root {
        // The raw calls: the C library's would signal threads that this copy of the process does not have.
        // SAFETY: plain numbers and a NULL list of length 0.
        let ok = unsafe {
            libc::syscall(libc::SYS_setgroups, 0_usize, std::ptr::null::<libc::gid_t>()) == 0
                && libc::syscall(libc::SYS_setresgid, 0, 0, 0) == 0
                && libc::syscall(libc::SYS_setresuid, 0, 0, 0) == 0
        };
        if !ok {
            return (Step::Uid, errno());
        }
    }

    let none: u64 = 0;
    // SAFETY: a mask of 8 bytes, the size that the kernel expects on x86-64.
    let unblocked = unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const none,
            std::ptr::null_mut::<u64>(),
            size_of::<u64>(),
        )
    };
    if unblocked < 0 {
        return (Step::Signals, errno());
    }
    // What the starter may have been given by `setarch` must not last: with ADDR_NO_RANDOMIZE the binary would lie where others
    // know it, with READ_IMPLIES_EXEC readable memory could be executed, whatever the filter says about PROT_EXEC.
    // SAFETY: sets the process's execution domain; takes no pointer.
    if unsafe { libc::syscall(libc::SYS_personality, 0) } < 0 {
        return (Step::Personality, errno());
    }
    // SAFETY: the caller promises well-formed argument and environment arrays.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            plan.program(),
            c"".as_ptr(),
            plan.argv,
            plan.envp,
            libc::AT_EMPTY_PATH,
        );
    }
    (Step::Exec, errno())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_read_back() {
        let mut message = [0_u8; FAILURE_LEN];
        message[..4].copy_from_slice(&(Step::Exec as i32).to_ne_bytes());
        message[4..].copy_from_slice(&libc::ENOEXEC.to_ne_bytes());
        assert_eq!(parse_failure(&message), Some((Step::Exec, libc::ENOEXEC)));
        assert_eq!(parse_failure(&message[..7]), None);
        assert_eq!(parse_failure(&[9; FAILURE_LEN]), None);
    }
}

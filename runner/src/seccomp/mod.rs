//! The system-call filters: one for each thread role, each a subset of the control thread's.
//!
//! A call that no part of a component has any business making kills the process with SIGSYS, so that an attempt shows.
//! The few that libraries probe for harmlessly answer with an error instead (see the table).

mod compile;
mod table;

use std::borrow::Cow;
use std::fmt;
use std::io;

use libc::sock_filter;

use compile::{Program, compile};

/// What a thread is for, which decides what it may call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ThreadRole {
    /// The control loop: all that any of its threads may, since they start with its filter.
    Control,
    /// The dispatch loop of a device whose host side is a stream, or nothing: console, entropy, clock, a back end in another process.
    DeviceLoop,
    /// The dispatch loop of a disk, and workers that it starts: files, and submissions to a ring that was made and restricted before.
    Disk,
    /// The dispatch loop of a network card: frames, and what a tap device takes.
    Network,
    /// The dispatch loop of the socket device: makes the ends of streams that it hands out.
    Vsock,
    /// The dispatch loop of a device that gives memory back to the host.
    Memory,
    /// A virtual processor.
    Vcpu,
    /// Work on hostile files, such as loading a kernel: reads handles and writes memory.
    Helper,
}

impl ThreadRole {
    /// All roles.
    pub const ALL: [Self; 8] = [
        Self::Control,
        Self::DeviceLoop,
        Self::Disk,
        Self::Network,
        Self::Vsock,
        Self::Memory,
        Self::Vcpu,
        Self::Helper,
    ];

    const fn bit(self) -> u8 {
        1 << self as u8
    }
}

impl fmt::Display for ThreadRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Control => "control",
            Self::DeviceLoop => "device loop",
            Self::Disk => "disk",
            Self::Network => "network",
            Self::Vsock => "vsock",
            Self::Memory => "memory",
            Self::Vcpu => "vCPU",
            Self::Helper => "helper",
        })
    }
}

/// What a component is in a process namespace of its own: its first process.
const FIRST_PROCESS: u32 = 1;

/// The role's program, which names this process's id.
fn program(role: ThreadRole) -> Cow<'static, [sock_filter]> {
    match std::process::id() {
        FIRST_PROCESS => Cow::Borrowed(ready_made(role)),
        // Without the process namespace, which was waived then.
        pid => Cow::Owned(compile(role, pid).code().to_vec()),
    }
}

/// The role's program for the first process of a process namespace.
fn ready_made(role: ThreadRole) -> &'static [sock_filter] {
    macro_rules! programs {
        ($($role:ident),*) => {
            match role {
                $(ThreadRole::$role => {
                    const PROGRAM: Program = compile(ThreadRole::$role, FIRST_PROCESS);
                    static CODE: [sock_filter; PROGRAM.len()] = PROGRAM.exact();
                    &CODE
                })*
            }
        };
    }
    programs!(Control, DeviceLoop, Disk, Network, Vsock, Memory, Vcpu, Helper)
}

/// The number of BPF instructions in the role's filter.
#[must_use]
pub fn program_len(role: ThreadRole) -> usize {
    ready_made(role).len()
}

/// Installs the role's filter on the calling thread.
///
/// # Errors
///
/// What the kernel answers: EINVAL without filters, EACCES without `no_new_privs` or privilege, EFAULT or ENOMEM.
pub(crate) fn install(role: ThreadRole) -> io::Result<()> {
    let program = program(role);
    let fprog = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(io::Error::other)?,
        // The kernel only reads.
        filter: program.as_ptr().cast_mut(),
    };
    // The system call and not `prctl`, which stays forbidden for everything but thread names.
    // SAFETY: the program outlives the call, which copies it.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const fprog) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

//! The table behind the filters: which thread role may make which system call, with which arguments.
//!
//! Whatever is not here kills the process. To let a component do more, add the narrowest line that serves, for the
//! fewest roles.

use super::ThreadRole;

/// What an argument has to be.
pub(super) enum Value {
    /// This 32-bit value.
    Is(u32),
    /// The process's own id.
    IsOwnPid,
    /// Null.
    IsNull,
    /// These bits are as in `value`.
    Masked {
        /// The bits that matter.
        mask: u64,
        /// Their values.
        value: u64,
    },
}

/// A condition on one argument.
pub(super) struct Argument {
    /// Which, from 0.
    pub(super) index: u8,
    /// What it has to be.
    pub(super) value: Value,
}

/// A system call that roles may make.
pub(super) struct Call {
    pub(super) number: i64,
    /// Bits of [`ThreadRole::bit`].
    pub(super) roles: u8,
    /// Alternatives, each a set of conditions that all have to hold. Empty: any arguments.
    pub(super) when: &'static [&'static [Argument]],
}

/// An `ioctl` that roles may make.
pub(super) struct Ioctl {
    pub(super) request: u32,
    pub(super) roles: u8,
}

/// A call that answers with an error and does nothing.
pub(super) struct Answered {
    pub(super) number: i64,
    /// For `ioctl`: with this request.
    pub(super) request: Option<u32>,
    pub(super) errno: u32,
}

const C: u8 = ThreadRole::Control.bit();
const DISK: u8 = ThreadRole::Disk.bit();
const NET: u8 = ThreadRole::Network.bit();
const VSOCK: u8 = ThreadRole::Vsock.bit();
const MEMORY: u8 = ThreadRole::Memory.bit();
/// All dispatch loops.
const LOOPS: u8 = ThreadRole::DeviceLoop.bit() | DISK | NET | VSOCK | MEMORY;
const V: u8 = ThreadRole::Vcpu.bit();
const H: u8 = ThreadRole::Helper.bit();
const ALL: u8 = C | LOOPS | V | H;
/// Threads that work on files.
const FILES: u8 = C | DISK | H;
/// Threads that work on sockets.
const SOCKETS: u8 = C | ThreadRole::DeviceLoop.bit() | NET | VSOCK;

const fn any(number: i64, roles: u8) -> Call {
    Call {
        number,
        roles,
        when: &[],
    }
}

const fn when(number: i64, roles: u8, when: &'static [&'static [Argument]]) -> Call {
    Call { number, roles, when }
}

const fn is(index: u8, value: i32) -> Argument {
    Argument {
        index,
        value: Value::Is(value.cast_unsigned()),
    }
}

const fn masked(index: u8, mask: u64, value: u64) -> Argument {
    Argument {
        index,
        value: Value::Masked { mask, value },
    }
}

/// Memory that cannot be executed.
const NOT_EXECUTABLE: &[&[Argument]] = &[&[masked(2, libc::PROT_EXEC as u64, 0)]];

/// A thread of this process: exactly what the C library asks `clone` for (`pthread_create`; musl adds the obsolete
/// `CLONE_DETACHED`). A new process or namespace needs other flags.
const THREAD: &[&[Argument]] = &[&[masked(0, !(libc::CLONE_DETACHED as u64), THREAD_FLAGS as u64)]];
const THREAD_FLAGS: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID;

const FCNTL: &[&[Argument]] = &[
    &[is(1, libc::F_GETFD)],
    &[is(1, libc::F_SETFD)],
    &[is(1, libc::F_GETFL)],
    &[is(1, libc::F_SETFL)],
    &[is(1, libc::F_DUPFD)],
    &[is(1, libc::F_DUPFD_CLOEXEC)],
    &[is(1, libc::F_ADD_SEALS)],
    &[is(1, libc::F_GET_SEALS)],
];

/// Status of an open descriptor. The path beside the flag can only be looked up in the empty root.
const BY_DESCRIPTOR_FLAG_3: &[&[Argument]] = &[&[masked(3, libc::AT_EMPTY_PATH as u64, libc::AT_EMPTY_PATH as u64)]];
const BY_DESCRIPTOR_FLAG_2: &[&[Argument]] = &[&[masked(2, libc::AT_EMPTY_PATH as u64, libc::AT_EMPTY_PATH as u64)]];

/// The two ends of a stream. Datagram sockets, unlike streams, can send to any address at any time.
const STREAM_PAIR: &[&[Argument]] = &[&[
    is(0, libc::AF_UNIX),
    masked(
        1,
        !((libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) as u64),
        libc::SOCK_STREAM as u64,
    ),
]];

/// Socket options of the general level that change only this socket.
const SOCKET_OPTIONS: &[&[Argument]] = &[
    &[is(1, libc::SOL_SOCKET), is(2, libc::SO_SNDBUF)],
    &[is(1, libc::SOL_SOCKET), is(2, libc::SO_RCVBUF)],
];

/// What is registered with a ring before its first use: IORING_REGISTER_FILES, IORING_REGISTER_EVENTFD, IORING_REGISTER_RESTRICTIONS,
/// IORING_REGISTER_ENABLE_RINGS (linux/io_uring.h). A ring that was restricted takes nothing after that.
const RING_SETUP: &[&[Argument]] = &[&[is(1, 2)], &[is(1, 4)], &[is(1, 11)], &[is(1, 12)]];

pub(super) const CALLS: &[Call] = &[
    // Descriptors that a thread has.
    any(libc::SYS_read, ALL),
    any(libc::SYS_write, ALL),
    any(libc::SYS_readv, ALL),
    any(libc::SYS_writev, ALL),
    any(libc::SYS_close, ALL),
    any(libc::SYS_dup, ALL),
    when(libc::SYS_fcntl, ALL, FCNTL),
    // Waiting.
    any(libc::SYS_epoll_create1, ALL),
    any(libc::SYS_epoll_ctl, ALL),
    any(libc::SYS_epoll_wait, ALL),
    any(libc::SYS_epoll_pwait, ALL),
    any(libc::SYS_epoll_pwait2, ALL),
    any(libc::SYS_poll, ALL),
    any(libc::SYS_ppoll, ALL),
    any(libc::SYS_eventfd2, ALL),
    any(libc::SYS_timerfd_create, ALL),
    any(libc::SYS_timerfd_settime, ALL),
    any(libc::SYS_timerfd_gettime, ALL),
    any(libc::SYS_futex, ALL),
    any(libc::SYS_sched_yield, ALL),
    any(libc::SYS_nanosleep, ALL),
    any(libc::SYS_clock_nanosleep, ALL),
    any(libc::SYS_restart_syscall, ALL),
    // Time, where the vDSO cannot tell it.
    any(libc::SYS_clock_gettime, ALL),
    any(libc::SYS_clock_getres, ALL),
    any(libc::SYS_gettimeofday, ALL),
    any(libc::SYS_time, ALL),
    // Memory, never executable.
    when(libc::SYS_mmap, ALL, NOT_EXECUTABLE),
    when(libc::SYS_mprotect, ALL, NOT_EXECUTABLE),
    any(libc::SYS_munmap, ALL),
    any(libc::SYS_mremap, ALL),
    any(libc::SYS_madvise, ALL),
    any(libc::SYS_brk, ALL),
    // The thread itself.
    any(libc::SYS_getpid, ALL),
    any(libc::SYS_gettid, ALL),
    any(libc::SYS_getrandom, ALL),
    any(libc::SYS_sched_getaffinity, ALL),
    any(libc::SYS_rseq, ALL),
    any(libc::SYS_set_robust_list, ALL),
    any(libc::SYS_sigaltstack, ALL),
    any(libc::SYS_rt_sigprocmask, ALL),
    any(libc::SYS_rt_sigaction, ALL),
    any(libc::SYS_rt_sigreturn, ALL),
    any(libc::SYS_exit, ALL),
    any(libc::SYS_exit_group, ALL),
    // A signal to a thread of this process: the kick that gets a vCPU out of the guest; abort.
    when(
        libc::SYS_tgkill,
        ALL,
        &[&[Argument {
            index: 0,
            value: Value::IsOwnPid,
        }]],
    ),
    when(
        libc::SYS_prctl,
        ALL,
        &[&[is(0, libc::PR_SET_NAME)], &[is(0, libc::PR_GET_NAME)]],
    ),
    // Reading one's own limits (the C library's thread attributes), setting none.
    when(
        libc::SYS_prlimit64,
        ALL,
        &[&[
            is(0, 0),
            Argument {
                index: 2,
                value: Value::IsNull,
            },
        ]],
    ),
    // New threads; a vCPU needs none, nor does a loop without slow files.
    when(libc::SYS_clone, FILES, THREAD),
    // Files that are open.
    any(libc::SYS_pread64, FILES),
    any(libc::SYS_pwrite64, FILES),
    any(libc::SYS_preadv, FILES),
    any(libc::SYS_pwritev, FILES),
    any(libc::SYS_preadv2, FILES),
    any(libc::SYS_pwritev2, FILES),
    any(libc::SYS_lseek, FILES),
    any(libc::SYS_fsync, FILES),
    any(libc::SYS_fdatasync, FILES),
    any(libc::SYS_sync_file_range, FILES),
    any(libc::SYS_fallocate, FILES | MEMORY),
    any(libc::SYS_ftruncate, FILES),
    any(libc::SYS_fstat, FILES),
    when(libc::SYS_newfstatat, FILES, BY_DESCRIPTOR_FLAG_3),
    when(libc::SYS_statx, FILES, BY_DESCRIPTOR_FLAG_2),
    // A ring goes round these filters, so only the control thread's job of creation makes one, and restricts it to the operations and files of
    // its disk for good; the disk's loop can only enable it, which binds it to that thread, and submit.
    any(libc::SYS_io_uring_setup, C),
    when(libc::SYS_io_uring_register, C | DISK, RING_SETUP),
    any(libc::SYS_io_uring_enter, C | DISK),
    // Sockets that are connected, and pipes.
    any(libc::SYS_sendto, SOCKETS),
    any(libc::SYS_recvfrom, SOCKETS),
    any(libc::SYS_sendmsg, SOCKETS),
    any(libc::SYS_recvmsg, SOCKETS),
    any(libc::SYS_sendmmsg, SOCKETS),
    any(libc::SYS_recvmmsg, SOCKETS),
    any(libc::SYS_shutdown, SOCKETS),
    any(libc::SYS_getsockopt, SOCKETS),
    when(libc::SYS_setsockopt, SOCKETS, SOCKET_OPTIONS),
    any(libc::SYS_pipe2, C | H),
    // Ends of streams that are handed out, and guest memory.
    when(libc::SYS_socketpair, C | VSOCK, STREAM_PAIR),
    any(libc::SYS_memfd_create, C | H),
    any(libc::SYS_fstatfs, C | H),
    // How much memory the host has, when a guest is given its own.
    any(libc::SYS_sysinfo, C | H),
    any(libc::SYS_getrusage, C),
    // Narrowing: a filter on the calling thread, without flags.
    when(
        libc::SYS_seccomp,
        C,
        &[&[
            Argument {
                index: 0,
                value: Value::Is(libc::SECCOMP_SET_MODE_FILTER),
            },
            is(1, 0),
        ]],
    ),
];

pub(super) const ANSWERED: &[Answered] = &[
    // The C library then uses `clone`, whose flags a filter can see.
    Answered {
        number: libc::SYS_clone3,
        request: None,
        errno: libc::ENOSYS.cast_unsigned(),
    },
    // "Is this a terminal?" No.
    Answered {
        number: libc::SYS_ioctl,
        request: Some(libc::TCGETS as u32),
        errno: libc::ENOTTY.cast_unsigned(),
    },
];

const KVMIO: u32 = 0xae;

/// The encodings of asm-generic/ioctl.h: number, and direction and size of the argument.
const fn io(number: u32) -> u32 {
    KVMIO << 8 | number
}

const fn iow(number: u32, size: u32) -> u32 {
    1 << 30 | size << 16 | KVMIO << 8 | number
}

const fn ior(number: u32, size: u32) -> u32 {
    2 << 30 | size << 16 | KVMIO << 8 | number
}

const fn iowr(number: u32, size: u32) -> u32 {
    3 << 30 | size << 16 | KVMIO << 8 | number
}

const fn ioctl(request: u32, roles: u8) -> Ioctl {
    Ioctl { request, roles }
}

/// Interrupts towards the guest: sent by whatever thread emulates the IOAPIC or a device.
const IRQ: u8 = C | LOOPS | V;
/// Interrupt routes and doorbells: changed where a guest programs MSI-X tables, redirection entries and BARs, which is
/// in a vCPU's exit.
const ROUTE: u8 = C | V;
/// State of a vCPU; the control thread sets it before the vCPU's thread exists.
const CPU: u8 = C | V;

/// Requests and argument sizes as in linux/kvm.h and the x86 asm/kvm.h.
pub(super) const IOCTLS: &[Ioctl] = &[
    ioctl(io(0x80), CPU), // KVM_RUN
    // Interrupts.
    ioctl(iow(0xa5, 32), IRQ),   // KVM_SIGNAL_MSI
    ioctl(iow(0x61, 8), IRQ),    // KVM_IRQ_LINE
    ioctl(iow(0x6a, 8), ROUTE),  // KVM_SET_GSI_ROUTING
    ioctl(iow(0x76, 32), ROUTE), // KVM_IRQFD
    ioctl(iow(0x79, 64), ROUTE), // KVM_IOEVENTFD
    // A vCPU.
    ioctl(ior(0x81, 144), CPU),  // KVM_GET_REGS
    ioctl(iow(0x82, 144), CPU),  // KVM_SET_REGS
    ioctl(ior(0x83, 312), CPU),  // KVM_GET_SREGS
    ioctl(iow(0x84, 312), CPU),  // KVM_SET_SREGS
    ioctl(ior(0xcc, 320), CPU),  // KVM_GET_SREGS2
    ioctl(iow(0xcd, 320), CPU),  // KVM_SET_SREGS2
    ioctl(iowr(0x85, 24), CPU),  // KVM_TRANSLATE
    ioctl(iow(0x86, 4), CPU),    // KVM_INTERRUPT
    ioctl(iowr(0x88, 8), CPU),   // KVM_GET_MSRS
    ioctl(iow(0x89, 8), CPU),    // KVM_SET_MSRS
    ioctl(ior(0x8c, 416), CPU),  // KVM_GET_FPU
    ioctl(iow(0x8d, 416), CPU),  // KVM_SET_FPU
    ioctl(ior(0x8e, 1024), CPU), // KVM_GET_LAPIC
    ioctl(iow(0x8f, 1024), CPU), // KVM_SET_LAPIC
    ioctl(iow(0x90, 8), CPU),    // KVM_SET_CPUID2
    ioctl(iowr(0x91, 8), CPU),   // KVM_GET_CPUID2
    ioctl(ior(0x98, 4), CPU),    // KVM_GET_MP_STATE
    ioctl(iow(0x99, 4), CPU),    // KVM_SET_MP_STATE
    ioctl(io(0x9a), CPU),        // KVM_NMI
    ioctl(iow(0x9b, 72), CPU),   // KVM_SET_GUEST_DEBUG
    ioctl(ior(0x9f, 64), CPU),   // KVM_GET_VCPU_EVENTS
    ioctl(iow(0xa0, 64), CPU),   // KVM_SET_VCPU_EVENTS
    ioctl(ior(0xa1, 128), CPU),  // KVM_GET_DEBUGREGS
    ioctl(iow(0xa2, 128), CPU),  // KVM_SET_DEBUGREGS
    ioctl(io(0xa2), CPU),        // KVM_SET_TSC_KHZ
    ioctl(io(0xa3), CPU),        // KVM_GET_TSC_KHZ
    ioctl(ior(0xa4, 4096), CPU), // KVM_GET_XSAVE
    ioctl(ior(0xcf, 4096), CPU), // KVM_GET_XSAVE2
    ioctl(iow(0xa5, 4096), CPU), // KVM_SET_XSAVE
    ioctl(ior(0xa6, 392), CPU),  // KVM_GET_XCRS
    ioctl(iow(0xa7, 392), CPU),  // KVM_SET_XCRS
    ioctl(io(0xad), CPU),        // KVM_KVMCLOCK_CTRL
    // The system and the machine.
    ioctl(io(0x00), C),       // KVM_GET_API_VERSION
    ioctl(io(0x01), C),       // KVM_CREATE_VM
    ioctl(iowr(0x02, 4), C),  // KVM_GET_MSR_INDEX_LIST
    ioctl(io(0x03), C),       // KVM_CHECK_EXTENSION
    ioctl(io(0x04), C),       // KVM_GET_VCPU_MMAP_SIZE
    ioctl(iowr(0x05, 8), C),  // KVM_GET_SUPPORTED_CPUID
    ioctl(iowr(0x0a, 4), C),  // KVM_GET_MSR_FEATURE_INDEX_LIST
    ioctl(io(0x41), C),       // KVM_CREATE_VCPU
    ioctl(iow(0x42, 16), C),  // KVM_GET_DIRTY_LOG
    ioctl(iowr(0xc0, 24), C), // KVM_CLEAR_DIRTY_LOG
    ioctl(iow(0x46, 32), C),  // KVM_SET_USER_MEMORY_REGION
    ioctl(iow(0x49, 160), C), // KVM_SET_USER_MEMORY_REGION2
    ioctl(io(0x47), C),       // KVM_SET_TSS_ADDR
    ioctl(iow(0x48, 8), C),   // KVM_SET_IDENTITY_MAP_ADDR
    ioctl(io(0x78), C),       // KVM_SET_BOOT_CPU_ID
    ioctl(iow(0x7b, 48), C),  // KVM_SET_CLOCK
    ioctl(ior(0x7c, 48), C),  // KVM_GET_CLOCK
    ioctl(iow(0xa3, 104), C), // KVM_ENABLE_CAP
    ioctl(iow(0xc6, 392), C), // KVM_X86_SET_MSR_FILTER
    ioctl(io(0xce), C),       // KVM_GET_STATS_FD
    // What the standard library does to descriptors.
    ioctl(libc::FIONBIO as u32, ALL),
    ioctl(libc::FIOCLEX as u32, ALL),
    // A disk on a block device: its size and geometry, discard, write zeroes (linux/fs.h).
    ioctl(0x8008_1272, C | DISK), // BLKGETSIZE64
    ioctl(0x1268, C | DISK),      // BLKSSZGET
    ioctl(0x127b, C | DISK),      // BLKPBSZGET
    ioctl(0x1278, C | DISK),      // BLKIOMIN
    ioctl(0x1279, C | DISK),      // BLKIOOPT
    ioctl(0x125e, C | DISK),      // BLKROGET
    ioctl(0x1277, C | DISK),      // BLKDISCARD
    ioctl(0x127f, C | DISK),      // BLKZEROOUT
    // A tap device: offloads and header size follow the guest's features (linux/if_tun.h).
    ioctl(0x4004_54d0, C | NET), // TUNSETOFFLOAD
    ioctl(0x4004_54d8, C | NET), // TUNSETVNETHDRSZ
    ioctl(0x8004_54d2, C | NET), // TUNGETIFF
];

#[cfg(test)]
mod tests {
    use kvm_bindings as kvm;

    use super::*;

    /// The numbers above are typed by hand; the bindings' structs are not.
    #[test]
    fn argument_sizes_are_those_of_the_kernel_headers() {
        macro_rules! listed {
            ($($encode:ident $number:literal $argument:ty),* $(,)?) => {
                $({
                    let request = $encode($number, size_of::<$argument>() as u32);
                    assert!(IOCTLS.iter().any(|ioctl| ioctl.request == request), stringify!($encode $number $argument));
                })*
            };
        }
        listed!(
            iow 0xa5 kvm::kvm_msi, iow 0x61 kvm::kvm_irq_level, iow 0x6a kvm::kvm_irq_routing, iow 0x76 kvm::kvm_irqfd,
            iow 0x79 kvm::kvm_ioeventfd, ior 0x81 kvm::kvm_regs, iow 0x82 kvm::kvm_regs, ior 0x83 kvm::kvm_sregs,
            iow 0x84 kvm::kvm_sregs, ior 0xcc kvm::kvm_sregs2, iow 0xcd kvm::kvm_sregs2, iowr 0x85 kvm::kvm_translation,
            iow 0x86 kvm::kvm_interrupt, iowr 0x88 kvm::kvm_msrs, iow 0x89 kvm::kvm_msrs, ior 0x8c kvm::kvm_fpu,
            iow 0x8d kvm::kvm_fpu, ior 0x8e kvm::kvm_lapic_state, iow 0x8f kvm::kvm_lapic_state,
            iow 0x90 kvm::kvm_cpuid2, iowr 0x91 kvm::kvm_cpuid2, ior 0x98 kvm::kvm_mp_state, iow 0x99 kvm::kvm_mp_state,
            iow 0x9b kvm::kvm_guest_debug, ior 0x9f kvm::kvm_vcpu_events, iow 0xa0 kvm::kvm_vcpu_events,
            ior 0xa1 kvm::kvm_debugregs, iow 0xa2 kvm::kvm_debugregs, ior 0xa4 kvm::kvm_xsave, ior 0xcf kvm::kvm_xsave,
            iow 0xa5 kvm::kvm_xsave, ior 0xa6 kvm::kvm_xcrs, iow 0xa7 kvm::kvm_xcrs, iowr 0x02 kvm::kvm_msr_list,
            iowr 0x05 kvm::kvm_cpuid2, iowr 0x0a kvm::kvm_msr_list, iow 0x42 kvm::kvm_dirty_log,
            iowr 0xc0 kvm::kvm_clear_dirty_log, iow 0x46 kvm::kvm_userspace_memory_region,
            iow 0x49 kvm::kvm_userspace_memory_region2, iow 0x48 u64, iow 0x7b kvm::kvm_clock_data,
            ior 0x7c kvm::kvm_clock_data, iow 0xa3 kvm::kvm_enable_cap, iow 0xc6 kvm::kvm_msr_filter,
        );
    }
}

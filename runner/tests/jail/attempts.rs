//! What jailed threads attempt, and what has to come of it in each role.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use sepal_runner::inner::ThreadRole;
use sepal_runner::inner::ThreadRole::{Control, DeviceLoop, Disk, Helper, Memory, Network, Vcpu, Vsock};

/// One thing to attempt.
pub(crate) struct Attempt {
    pub name: &'static str,
    /// Roles in which it works; in all others SIGSYS ends the process.
    pub allowed: &'static [ThreadRole],
    /// The errno it answers with where it is allowed; 0 for success.
    pub errno: i32,
    run: fn(&mut Prepared) -> i32,
}

/// What a thread has at hand that it could not make itself.
pub(crate) struct Prepared {
    file: OwnedFd,
    guest: Option<Guest>,
}

/// A real machine with one processor and one page of memory.
struct Guest {
    vcpu: VcpuFd,
    _vm: VmFd,
    page: *mut u8,
}

// SAFETY: the page is a mapping that stays; only the thread that has the guest touches it.
unsafe impl Send for Guest {}

const EVERY: &[ThreadRole] = &ThreadRole::ALL;
const FILES: &[ThreadRole] = &[Control, Disk, Helper];
const SOCKETS: &[ThreadRole] = &[Control, DeviceLoop, Network, Vsock];

const fn forbidden(name: &'static str, run: fn(&mut Prepared) -> i32) -> Attempt {
    Attempt {
        name,
        allowed: &[],
        errno: 0,
        run,
    }
}

const fn allowed(name: &'static str, allowed: &'static [ThreadRole], run: fn(&mut Prepared) -> i32) -> Attempt {
    Attempt {
        name,
        allowed,
        errno: 0,
        run,
    }
}

const fn answers(
    name: &'static str,
    errno: i32,
    allowed: &'static [ThreadRole],
    run: fn(&mut Prepared) -> i32,
) -> Attempt {
    Attempt {
        name,
        allowed,
        errno,
        run,
    }
}

/// A system call with up to six arguments; its errno or 0.
fn sys<const N: usize>(number: i64, arguments: [usize; N]) -> i32 {
    let mut all = [0; 6];
    all[..N].copy_from_slice(&arguments);
    let [a, b, c, d, e, f] = all;
    // SAFETY: what is attempted either fails, or is harmless with the arguments given below.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if result < 0 {
        std::io::Error::last_os_error().raw_os_error().unwrap_or(-1)
    } else {
        0
    }
}

/// An ioctl on no descriptor: the filter decides before the kernel looks, so EBADF says that it is allowed.
fn request(request: u64) -> i32 {
    sys(libc::SYS_ioctl, [usize::MAX, request as usize, 0])
}

fn path(path: &'static std::ffi::CStr) -> usize {
    path.as_ptr() as usize
}

const AT_CWD: usize = libc::AT_FDCWD as usize;
const SELF: usize = 1;
const RW: usize = (libc::PROT_READ | libc::PROT_WRITE) as usize;
const RX: usize = (libc::PROT_READ | libc::PROT_EXEC) as usize;
const PRIVATE: usize = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;

pub(crate) const ATTEMPTS: &[Attempt] = &[
    // Files by path.
    forbidden("open", |_| sys(libc::SYS_open, [path(c"/etc/passwd"), 0])),
    forbidden("openat-root", |_| {
        sys(libc::SYS_openat, [AT_CWD, path(c"/"), libc::O_RDONLY as usize])
    }),
    forbidden("openat2", |_| sys(libc::SYS_openat2, [AT_CWD, path(c"/"), 0, 24])),
    forbidden("read-proc", |_| {
        sys(libc::SYS_openat, [AT_CWD, path(c"/proc/1/mem"), 2])
    }),
    forbidden("open-by-handle", |_| sys(libc::SYS_open_by_handle_at, [AT_CWD, 0, 0])),
    forbidden("readlink", |_| sys(libc::SYS_readlink, [path(c"/proc/self/exe"), 0, 0])),
    forbidden("getdents", |_| sys(libc::SYS_getdents64, [0, 0, 0])),
    forbidden("unlink", |_| sys(libc::SYS_unlink, [path(c"/x")])),
    forbidden("mkdir", |_| sys(libc::SYS_mkdir, [path(c"/x"), 0o700])),
    forbidden("chdir", |_| sys(libc::SYS_chdir, [path(c"/..")])),
    forbidden("chroot", |_| sys(libc::SYS_chroot, [path(c"/..")])),
    forbidden("stat-path", |_| sys(libc::SYS_newfstatat, [AT_CWD, path(c"/"), 0, 0])),
    forbidden("memfd-exec", |p| {
        sys(
            libc::SYS_execveat,
            [
                p.file.as_raw_fd() as usize,
                path(c""),
                0,
                0,
                libc::AT_EMPTY_PATH as usize,
            ],
        )
    }),
    // Network.
    forbidden("socket-inet", |_| {
        sys(
            libc::SYS_socket,
            [libc::AF_INET as usize, libc::SOCK_STREAM as usize, 0],
        )
    }),
    forbidden("socket-unix", |_| {
        sys(
            libc::SYS_socket,
            [libc::AF_UNIX as usize, libc::SOCK_STREAM as usize, 0],
        )
    }),
    forbidden("socket-netlink", |_| {
        sys(
            libc::SYS_socket,
            [libc::AF_NETLINK as usize, libc::SOCK_RAW as usize, 0],
        )
    }),
    forbidden("socketpair-vsock", |_| {
        sys(libc::SYS_socketpair, [libc::AF_VSOCK as usize, 1, 0, 0])
    }),
    forbidden("socketpair-datagram", |_| {
        sys(
            libc::SYS_socketpair,
            [libc::AF_UNIX as usize, libc::SOCK_DGRAM as usize, 0, 0],
        )
    }),
    forbidden("connect", |_| sys(libc::SYS_connect, [3, 0, 0])),
    forbidden("bind", |_| sys(libc::SYS_bind, [3, 0, 0])),
    forbidden("listen", |_| sys(libc::SYS_listen, [3, 1])),
    // Processes.
    forbidden("fork", |_| sys(libc::SYS_fork, [])),
    forbidden("vfork", |_| sys(libc::SYS_vfork, [])),
    forbidden("clone-process", |_| {
        sys(libc::SYS_clone, [libc::SIGCHLD as usize, 0, 0, 0, 0])
    }),
    forbidden("clone-newuser", |_| {
        sys(
            libc::SYS_clone,
            [(libc::CLONE_NEWUSER | libc::SIGCHLD) as usize, 0, 0, 0, 0],
        )
    }),
    answers("clone3", libc::ENOSYS, EVERY, |_| sys(libc::SYS_clone3, [0, 88])),
    forbidden("execve", |_| sys(libc::SYS_execve, [path(c"/bin/sh"), 0, 0])),
    forbidden("ptrace", |_| sys(libc::SYS_ptrace, [libc::PTRACE_ATTACH as usize, 1])),
    forbidden("process-vm-readv", |_| {
        sys(libc::SYS_process_vm_readv, [SELF, 0, 0, 0, 0, 0])
    }),
    forbidden("process-vm-writev", |_| {
        sys(libc::SYS_process_vm_writev, [SELF, 0, 0, 0, 0, 0])
    }),
    forbidden("pidfd-open", |_| sys(libc::SYS_pidfd_open, [SELF, 0])),
    forbidden("pidfd-getfd", |_| sys(libc::SYS_pidfd_getfd, [0, 0, 0])),
    forbidden("kill-all", |_| sys(libc::SYS_kill, [usize::MAX, 0])),
    forbidden("kill-self", |_| sys(libc::SYS_kill, [SELF, 0])),
    forbidden("tkill", |_| sys(libc::SYS_tkill, [SELF, 0])),
    forbidden("tgkill-other", |_| sys(libc::SYS_tgkill, [2, 2, 0])),
    forbidden("setsid", |_| sys(libc::SYS_setsid, [])),
    forbidden("setuid", |_| sys(libc::SYS_setuid, [0])),
    forbidden("setns", |_| sys(libc::SYS_setns, [0, 0])),
    forbidden("unshare", |_| sys(libc::SYS_unshare, [libc::CLONE_NEWUSER as usize])),
    forbidden("personality", |_| sys(libc::SYS_personality, [0x0400_0000])),
    forbidden("prctl-dumpable", |_| {
        sys(libc::SYS_prctl, [libc::PR_SET_DUMPABLE as usize, 1])
    }),
    forbidden("prctl-seccomp", |_| {
        sys(libc::SYS_prctl, [libc::PR_SET_SECCOMP as usize, 1])
    }),
    forbidden("seccomp-strict", |_| sys(libc::SYS_seccomp, [0, 0, 0])),
    forbidden("setrlimit", |p| {
        sys(
            libc::SYS_prlimit64,
            [0, libc::RLIMIT_NOFILE as usize, &raw const *p as usize, 0],
        )
    }),
    forbidden("limits-of-others", |_| {
        sys(libc::SYS_prlimit64, [2, libc::RLIMIT_NOFILE as usize, 0, 0])
    }),
    // The kernel's less travelled parts.
    forbidden("mount", |_| sys(libc::SYS_mount, [0, path(c"/"), path(c"proc"), 0, 0])),
    forbidden("umount", |_| sys(libc::SYS_umount2, [path(c"/"), 0])),
    forbidden("pivot-root", |_| sys(libc::SYS_pivot_root, [path(c"/"), path(c"/")])),
    forbidden("fsopen", |_| sys(libc::SYS_fsopen, [path(c"proc"), 0])),
    forbidden("open-tree", |_| sys(libc::SYS_open_tree, [AT_CWD, path(c"/"), 1])),
    forbidden("bpf", |_| sys(libc::SYS_bpf, [0, 0, 0])),
    forbidden("perf-event-open", |_| sys(libc::SYS_perf_event_open, [0, 0, 0, 0, 0])),
    forbidden("userfaultfd", |_| sys(libc::SYS_userfaultfd, [0])),
    forbidden("keyctl", |_| sys(libc::SYS_keyctl, [0, 0])),
    forbidden("add-key", |_| sys(libc::SYS_add_key, [0, 0, 0, 0, 0])),
    forbidden("init-module", |_| sys(libc::SYS_init_module, [0, 0, 0])),
    forbidden("reboot", |_| sys(libc::SYS_reboot, [0, 0, 0, 0])),
    forbidden("iopl", |_| sys(libc::SYS_iopl, [3])),
    forbidden("modify-ldt", |_| sys(libc::SYS_modify_ldt, [0, 0, 0])),
    forbidden("shmget", |_| sys(libc::SYS_shmget, [0, 4096, 0o600])),
    forbidden("sethostname", |_| sys(libc::SYS_sethostname, [path(c"x"), 1])),
    // Rings open files and sockets without a system call for each: whoever could make one, or change what one may do, would be out of its filter.
    answers("io-uring-setup", libc::EINVAL, &[Control], |_| ring()),
    forbidden("io-uring-register-buffers", |_| {
        sys(libc::SYS_io_uring_register, [1 << 20, 0, 0, 0])
    }),
    answers("io-uring-enable", libc::EBADF, &[Control, Disk], |_| {
        without_rings(sys(libc::SYS_io_uring_register, [1 << 20, 12, 0, 0]), libc::EBADF)
    }),
    answers("io-uring-enter", libc::EBADF, &[Control, Disk], |_| {
        without_rings(sys(libc::SYS_io_uring_enter, [usize::MAX, 1, 0, 0, 0, 0]), libc::EBADF)
    }),
    answers("ioctl-tunsetoffload", libc::EBADF, &[Control, Network], |_| {
        request(0x4004_54d0)
    }),
    answers("recvmsg", libc::EBADF, SOCKETS, |_| {
        sys(libc::SYS_recvmsg, [usize::MAX, 0, 0])
    }),
    answers("fallocate", libc::EBADF, &[Control, Disk, Helper, Memory], |_| {
        sys(libc::SYS_fallocate, [usize::MAX, 0, 0, 1])
    }),
    // The 32-bit and x32 tables.
    forbidden("x32-write", |_| sys(0x4000_0000 | libc::SYS_write, [1, 0, 0])),
    forbidden("int80-getpid", |_| int80(20)),
    // Code.
    forbidden("mmap-exec", |_| {
        sys(libc::SYS_mmap, [0, 4096, RX, PRIVATE, usize::MAX, 0])
    }),
    forbidden("mprotect-exec", |_| {
        let page = map_page();
        sys(libc::SYS_mprotect, [page as usize, 4096, RX])
    }),
    forbidden("pkey-mprotect", |_| sys(libc::SYS_pkey_mprotect, [0, 4096, RX, 0])),
    // ioctl.
    forbidden("ioctl-tiocsti", |_| request(libc::TIOCSTI)),
    forbidden("ioctl-tiocgwinsz", |_| request(libc::TIOCGWINSZ)),
    forbidden("ioctl-tunsetiff", |_| request(0x4004_54ca)),
    forbidden("ioctl-ficlone", |_| request(0x4004_9409)),
    forbidden("ioctl-kvm-create-device", |_| request(0xc00c_aee0)),
    forbidden("ioctl-kvm-memory-encrypt", |_| request(0xc008_aeba)),
    answers("ioctl-tcgets", libc::ENOTTY, EVERY, |_| request(libc::TCGETS)),
    answers("ioctl-fionbio", libc::EBADF, EVERY, |_| request(libc::FIONBIO)),
    answers("ioctl-kvm-create-vm", libc::EBADF, &[Control], |_| request(0xae01)),
    answers("ioctl-kvm-create-vcpu", libc::EBADF, &[Control], |_| request(0xae41)),
    answers("ioctl-kvm-memory-region", libc::EBADF, &[Control], |_| {
        request(0x4020_ae46)
    }),
    answers("ioctl-kvm-enable-cap", libc::EBADF, &[Control], |_| {
        request(0x4068_aea3)
    }),
    answers("ioctl-kvm-run", libc::EBADF, &[Control, Vcpu], |_| request(0xae80)),
    answers("ioctl-kvm-set-regs", libc::EBADF, &[Control, Vcpu], |_| {
        request(0x4090_ae82)
    }),
    answers(
        "ioctl-kvm-signal-msi",
        libc::EBADF,
        &[Control, DeviceLoop, Disk, Network, Vsock, Memory, Vcpu],
        |_| request(0x4020_aea5),
    ),
    answers("ioctl-blkdiscard", libc::EBADF, &[Control, Disk], |_| request(0x1277)),
    // What threads need.
    allowed("nothing", EVERY, |_| 0),
    allowed("memory", EVERY, |_| {
        let mut blocks: Vec<Vec<u8>> = (12..24).map(|bits| vec![1; 1 << bits]).collect();
        blocks.iter_mut().for_each(|block| block.resize(block.len() * 2, 2));
        i32::from(blocks.iter().map(Vec::len).sum::<usize>() == 0)
    }),
    allowed("panic-caught", EVERY, |_| {
        i32::from(std::panic::catch_unwind(|| panic!("caught, as it should be")).is_ok())
    }),
    allowed("event-loop", EVERY, |_| {
        event_loop().map_or_else(|error| error.raw_os_error().unwrap_or(-1), |()| 0)
    }),
    allowed("signal-own-thread", EVERY, |_| {
        // SAFETY: signal 0 only checks.
        unsafe { libc::pthread_kill(libc::pthread_self(), 0) }
    }),
    allowed("sleep", EVERY, |_| {
        let start = std::time::Instant::now();
        std::thread::sleep(std::time::Duration::from_micros(50));
        i32::from(start.elapsed().is_zero())
    }),
    allowed("thread", FILES, |_| {
        let thread = std::thread::Builder::new().name("worker".into()).spawn(|| 7);
        thread.map_or_else(
            |error| error.raw_os_error().unwrap_or(-1),
            |thread| i32::from(thread.join().ok() != Some(7)),
        )
    }),
    allowed("file", FILES, |p| {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::from(p.file.try_clone().unwrap());
        let mut back = [0; 4];
        let done = file
            .set_len(8192)
            .and_then(|()| file.write_all_at(b"data", 4096))
            .and_then(|()| file.read_exact_at(&mut back, 4096))
            .and_then(|()| file.sync_data())
            .and_then(|()| file.metadata());
        done.map_or_else(
            |error| error.raw_os_error().unwrap_or(-1),
            |metadata| i32::from(metadata.len() != 8192 || back != *b"data"),
        )
    }),
    allowed("memfd", &[Control, Helper], |_| {
        sys(libc::SYS_memfd_create, [path(c"ram"), libc::MFD_CLOEXEC as usize])
    }),
    allowed("socketpair", &[Control, Vsock], |_| {
        i32::from(std::os::unix::net::UnixStream::pair().is_err())
    }),
    // A real machine: made by the control thread, run by a vCPU. (What may not run one may not make one either.)
    allowed("kvm-guest", &[Control, Vcpu], |p| run_guest(p.guest.as_mut())),
];

/// A ring without entries: refused, but by the kernel.
fn ring() -> i32 {
    let mut parameters = [0_u8; 120];
    without_rings(
        sys(libc::SYS_io_uring_setup, [0, (&raw mut parameters) as usize]),
        libc::EINVAL,
    )
}

/// `errno`, or `expected` where the host has no rings or forbids them.
fn without_rings(errno: i32, expected: i32) -> i32 {
    match errno {
        libc::EPERM | libc::ENOSYS => expected,
        errno => errno,
    }
}

/// A call through the gate of 32-bit programs.
fn int80(number: u64) -> i32 {
    let result: u64;
    // SAFETY: the gate saves every register that it does not return in; r8 to r11 may be cleared.
    unsafe {
        std::arch::asm!(
            "int 0x80", inlateout("rax") number => result,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    result as i32
}

fn map_page() -> *mut u8 {
    // SAFETY: a fresh anonymous page.
    let page = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            RW as i32,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert_ne!(page, libc::MAP_FAILED);
    page.cast()
}

fn event_loop() -> std::io::Result<()> {
    use rustix::event::epoll;
    let queue = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let event = rustix::event::eventfd(1, rustix::event::EventfdFlags::CLOEXEC)?;
    epoll::add(&queue, &event, epoll::EventData::new_u64(7), epoll::EventFlags::IN)?;
    let mut found = [epoll::Event {
        flags: epoll::EventFlags::empty(),
        data: epoll::EventData::new_u64(0),
    }];
    let count = epoll::wait(&queue, &mut found[..], None)?;
    assert_eq!((count, found[0].data.u64()), (1, 7));
    rustix::io::read(&event, &mut [0; 8])?;
    Ok(())
}

/// Makes what the attempt needs; runs under the control thread's filter.
pub(crate) fn prepare(attempt: &str, kvm: Option<OwnedFd>) -> Prepared {
    let file = rustix::fs::memfd_create("file", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let guest = kvm.filter(|_| attempt == "kvm-guest").map(make_guest);
    Prepared { file, guest }
}

pub(crate) fn run(attempt: &str, kvm: Option<OwnedFd>) -> i32 {
    run_prepared(attempt, prepare(attempt, kvm))
}

pub(crate) fn run_prepared(attempt: &str, mut prepared: Prepared) -> i32 {
    let attempt = ATTEMPTS
        .iter()
        .find(|known| known.name == attempt)
        .expect("a known attempt");
    (attempt.run)(&mut prepared)
}

fn make_guest(kvm: OwnedFd) -> Guest {
    use std::os::fd::IntoRawFd;
    // SAFETY: the handle was checked to be the KVM device.
    let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
    let vm = kvm.create_vm().unwrap();
    let page = map_page();
    let region = kvm_bindings::kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0x1000,
        memory_size: 4096,
        userspace_addr: page as u64,
    };
    // SAFETY: the page is mapped and stays.
    unsafe { vm.set_user_memory_region(region) }.unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    Guest { vcpu, _vm: vm, page }
}

/// Lets the guest store a byte and halt; 0 if it did.
fn run_guest(guest: Option<&mut Guest>) -> i32 {
    let guest = guest.expect("a KVM handle");
    // mov byte ptr [0x1800], 42; hlt
    let code = [0xc6, 0x06, 0x00, 0x18, 42, 0xf4];
    // SAFETY: the page is ours, and the guest does not run yet.
    unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), guest.page, code.len()) };
    let mut special = guest.vcpu.get_sregs().unwrap();
    special.cs.base = 0;
    special.cs.selector = 0;
    special.ds.base = 0;
    special.ds.selector = 0;
    guest.vcpu.set_sregs(&special).unwrap();
    let mut registers = guest.vcpu.get_regs().unwrap();
    registers.rip = 0x1000;
    registers.rflags = 2;
    guest.vcpu.set_regs(&registers).unwrap();
    match guest.vcpu.run() {
        Ok(VcpuExit::Hlt) => {}
        other => panic!("the guest left with {other:?}"),
    }
    // SAFETY: the guest has halted.
    i32::from(unsafe { guest.page.add(0x800).read_volatile() } != 42)
}

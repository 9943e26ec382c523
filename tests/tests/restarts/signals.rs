//! Components that die of a signal of their own making: what is on record of it, and what follows. A component is the first process of its namespace, so that
//! no signal from outside but SIGKILL ends it; these are what the kernel sends it for what it does itself.

use std::{fs::File, io, mem::MaybeUninit, ptr::null_mut};

use rustix::fs::{MemfdFlags, memfd_create};
use sepal_schema::config::{GuestConfig, MemoryBacking, Restart, RestartPolicy};
use sepal_tests::{Rpc, World, kvm_missing, process::Process, until};
use serde_json::Value;

use crate::{component, info};

/// Where the guest has memory of the test's.
const SHARED: u64 = 1 << 32;
const SHARED_BYTES: u64 = 64 << 10;

/// The only crash on record, once there is one.
fn crash(world: &World) -> Value {
    let told = until("the crash is on record", || {
        let told = info(world);
        (told["failures"] == 1).then_some(told)
    });
    let crashes = told["crashes"].as_array().unwrap();
    assert_eq!(crashes.len(), 1, "{told}");
    crashes[0].clone()
}

/// The signal's number and name are on record, in words, too.
fn expect_signal(world: &World, number: i32, name: &str) {
    let crash = crash(world);
    assert_eq!(crash["report"]["reason"], "vmm-terminated", "{crash}");
    assert_eq!(crash["report"]["componentSignal"], number, "{crash}");
    let detail = crash["report"]["detail"].as_str().unwrap();
    assert!(detail.contains(name), "{detail}");
    let output = crash["output"].as_str().unwrap();
    assert!(output.contains("hello"), "{crash}");
    let shown = world.guest(&["info", "bee"]).expect_code(0).out();
    assert!(shown.contains(name), "{shown}");
}

fn launch(rpc: &mut Rpc, restart: Restart, custom_memory: Vec<MemoryBacking>) {
    let config = GuestConfig {
        name: "bee".into(),
        cmdline: "quiet run=\"echo hello; hang\"".into(),
        memory_mib: 16,
        custom_memory,
        restart,
        ..GuestConfig::default()
    };
    let launched = rpc.launch(config, true).unwrap();
    rpc.read_until(&launched.guest, "hello");
}

#[test]
fn who_cuts_a_guests_memory_ends_its_component_by_a_bus_error() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let mut rpc = Rpc::connect(&world.socket());
    // Without seals, so that its owner may cut it.
    let memory = File::from(memfd_create("shared", MemfdFlags::CLOEXEC).unwrap());
    memory.set_len(SHARED_BYTES).unwrap();
    let backing = MemoryBacking {
        memfd: memory.try_clone().unwrap().into(),
        start: SHARED,
        end: SHARED + SHARED_BYTES,
    };
    let restart = Restart {
        policy: RestartPolicy::OnFailure,
        delay_ms: 3_600_000,
        max_delay_ms: 3_600_000,
        ..Restart::default()
    };
    launch(&mut rpc, restart, vec![backing]);
    let before = component(&world, 1);
    let peek = ["peek", "bee", "--physical", "0x100000000"];
    world.guest(&peek).expect_code(0);
    world.guest(&["launch", "other", "--detach"]).expect_code(0);

    memory.set_len(0).unwrap();
    // Who reads it there loses the guest.
    let refused = world.guest(&peek);
    assert_ne!(refused.code(), 0, "{}", refused.out());
    expect_signal(&world, libc::SIGBUS, "SIGBUS");
    assert!(!before.exists());
    assert_eq!(info(&world)["status"], "starting");
    // Nobody else notices.
    world.guest(&["peek", "other", "--physical", "0"]).expect_code(0);
    world.guest(&["stop", "other", "--force"]).expect_code(0);
    world.guest(&["stop", "bee", "--force"]).expect_code(0);
    world.end();
}

/// What `ptrace` says; `data` is a number or a pointer, by the request.
fn trace(request: libc::c_uint, pid: u32, data: *mut libc::c_void) -> io::Result<libc::c_long> {
    // SAFETY: it writes at most to `data`, which the callers below make as large as the request has it.
    let told = unsafe { libc::ptrace(request, pid, null_mut::<libc::c_void>(), data) };
    if told < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(told)
    }
}

/// Waits until a process that is traced stands still.
fn stands_still(pid: u32) {
    let mut status = 0;
    // SAFETY: the status is written to a variable that is there.
    let waited = unsafe { libc::waitpid(pid.cast_signed(), &raw mut status, libc::__WALL) };
    assert!(
        waited == pid.cast_signed() && libc::WIFSTOPPED(status),
        "{waited} {status:#x}"
    );
}

/// Has the first thread of a process make a system call, as one would who has taken it over. False: nobody may trace it.
fn call_as(process: &Process, call: libc::c_long) -> bool {
    let pid = process.pid;
    if let Err(error) = trace(libc::PTRACE_SEIZE, pid, null_mut()) {
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        return false;
    }
    trace(libc::PTRACE_INTERRUPT, pid, null_mut()).unwrap();
    stands_still(pid);
    let mut registers = MaybeUninit::<libc::user_regs_struct>::uninit();
    trace(libc::PTRACE_GETREGS, pid, registers.as_mut_ptr().cast()).unwrap();
    // SAFETY: the kernel has filled it in.
    let mut registers = unsafe { registers.assume_init() };
    // It waits for events: behind the instruction that it makes system calls with, to which it goes back. What it waited in is not begun again.
    assert_eq!(registers.orig_rax.cast_signed(), libc::SYS_epoll_wait);
    registers.rip -= 2;
    registers.orig_rax = u64::MAX;
    registers.rax = call.cast_unsigned();
    trace(libc::PTRACE_SETREGS, pid, (&raw mut registers).cast()).unwrap();
    trace(libc::PTRACE_DETACH, pid, null_mut()).unwrap();
    true
}

#[test]
fn a_component_that_does_what_it_must_not_is_ended_by_its_filter_and_begins_again() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let mut rpc = Rpc::connect(&world.socket());
    let restart = Restart {
        policy: RestartPolicy::OnFailure,
        delay_ms: 1,
        ..Restart::default()
    };
    launch(&mut rpc, restart, Vec::new());
    let before = component(&world, 1);
    if !call_as(&before, libc::SYS_execve) {
        println!("skipped: no right to trace another process");
        world.guest(&["stop", "bee", "--force"]).expect_code(0);
        return world.end();
    }
    expect_signal(&world, libc::SIGSYS, "SIGSYS");
    assert!(!before.exists());
    component(&world, 2);
    world.guest(&["stop", "bee", "--force"]).expect_code(0);
    world.end();
}

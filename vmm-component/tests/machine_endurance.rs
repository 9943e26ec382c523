//! Machines ended at any moment, many times: nothing hangs, and no thread or file descriptor is left. In a program of its own, since it counts
//! what the process has. Needs /dev/kvm; prints "skipped" without it.

#![allow(clippy::expect_used, reason = "what is not as expected fails the program")]

#[path = "machine/guests.rs"]
#[allow(
    dead_code,
    reason = "shared with the other tests of the machine, which use all of it"
)]
mod guests;
#[path = "machine/rig.rs"]
#[allow(
    dead_code,
    reason = "shared with the other tests of the machine, which use all of it"
)]
mod rig;

use std::time::Instant;

use rig::{PATIENCE, Rig, kvm};

/// Entries of a directory of /proc/self.
fn count(directory: &str) -> usize {
    std::fs::read_dir(format!("/proc/self/{directory}"))
        .expect("procfs")
        .count()
}

/// A thread that was joined may still be on its way out of the process's list: waits until the list is as short as it was.
fn await_threads(expected: usize) {
    let start = Instant::now();
    while count("task") > expected {
        assert!(
            start.elapsed() < PATIENCE,
            "{} threads are left, there were {expected}",
            count("task")
        );
        std::thread::yield_now();
    }
}

#[test]
fn machines_ended_at_any_moment_leave_nothing() {
    let Some(kvm) = kvm() else { return };
    let guests = [
        guests::count(),
        guests::idle(),
        guests::hello(),
        guests::smp(3),
        guests::triple_fault(),
        guests::smp(200),
    ];
    // What the process keeps for good (the temporary directory's name, the allocator's arenas) comes with the first.
    Rig::start(&kvm, &guests[0], 2).stop();
    let (threads, descriptors) = (count("task"), count("fd"));

    // A fixed sequence of moments that looks random (the constants of a 64-bit linear congruential generator).
    let mut state = 42u64;
    let mut random = move |below: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    for round in 0..100 {
        let guest = &guests[round % guests.len()];
        let rig = Rig::start(&kvm, guest, 1 + random(4) as u8);
        for _ in 0..random(50_000) {
            std::hint::spin_loop();
        }
        match random(4) {
            0 => drop(rig),
            1 => {
                rig.machine.pause();
                rig.stop();
            }
            2 => {
                rig.machine.kick();
                rig.stop();
            }
            _ => {
                rig.stop();
            }
        }
    }
    await_threads(threads);
    assert_eq!(count("fd"), descriptors);
}

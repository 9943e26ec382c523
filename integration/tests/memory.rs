//! Memory of a guest that a client brings, and takes away again while the guest runs: the guest ends, and the reason is told.

#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::{fs::File, path::Path, time::Duration};

use rustix::fs::{MemfdFlags, memfd_create};
use sepal_integration::{Boot, Guest};
use sepal_schema::{
    config::MemoryBacking,
    report::{ComponentEnd, Reason, StopReport},
};

/// Far more than any step takes.
const PATIENCE: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
/// Where the memory lies: above what the guest itself uses.
const START: u64 = 5 << 30;

/// A guest that has `commands` to follow and 2 MiB of memory in a file that nobody has sealed, and that file.
fn with_memory(commands: &str) -> Option<(Guest, File)> {
    if !Path::new("/dev/kvm").exists() {
        println!("skipped: no /dev/kvm");
        return None;
    }
    let memory: File = memfd_create("shared", MemfdFlags::CLOEXEC).unwrap().into();
    memory.set_len(2 * MIB).unwrap();
    let theirs = memory.try_clone().unwrap();
    let boot = Boot::drivers(commands).configure(|config| {
        config.custom_memory.push(MemoryBacking {
            memfd: theirs.into(),
            start: START,
            end: START + 2 * MIB,
        });
    });
    Some((boot.start().unwrap(), memory))
}

fn ends(guest: &mut Guest, reason: Reason) -> StopReport {
    guest.assert_ends_with(reason, PATIENCE).unwrap()
}

#[test]
fn a_vcpu_that_meets_what_is_gone_is_a_crash() {
    let Some((mut guest, memory)) = with_memory(&format!("mem-sum:{START:#x}:{MIB},mem-wait:{START:#x}:9")) else {
        return;
    };
    guest.wait_for_report("mem-sum", PATIENCE).unwrap();
    guest.wait_for("waiting mem-wait", PATIENCE).unwrap();
    memory.set_len(0).unwrap();
    let report = ends(&mut guest, Reason::Crash);
    assert_eq!(report.about, "vcpu0");
    assert!(
        report.detail.contains("guest memory") && report.detail.contains("cut short"),
        "{report:?}"
    );
}

#[test]
fn a_component_that_does_ends_with_it() {
    let Some((mut guest, memory)) = with_memory("say:here,hang") else {
        return;
    };
    guest.wait_for_report("say", PATIENCE).unwrap();
    assert_eq!(guest.read_physical(START, 64).unwrap(), [0; 64]);
    memory.set_len(0).unwrap();
    // On behalf of whoever looks, as a device does on behalf of a driver.
    guest.read_physical(START, 64).unwrap_err();
    let report = ends(&mut guest, Reason::VmmTerminated);
    assert_eq!(report.component, Some(ComponentEnd::Killed(7)), "{report:?}");
    assert!(
        report.detail.contains("SIGBUS") && report.detail.contains("cut short"),
        "{report:?}"
    );
}

//! Linux boots through manager, jail and protocol, and ends in every way that a user can tell apart.
//!
//! On hosts without hardware virtualization a boot takes from ten seconds to minutes, so each does as much as it can.

#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::{path::Path, time::Duration};

use sepal_integration::{Boot, Guest, artifacts};
use sepal_schema::{
    config::OnPanic,
    news::{DeviceNews, Panic},
    report::Reason,
};

/// Longer than any boot takes; it only ever makes a test fail.
const BOOT: Duration = Duration::from_secs(300);
const END: Duration = Duration::from_secs(120);

/// False, with a loud word, on a host without KVM.
fn kvm() -> bool {
    let there = Path::new("/dev/kvm").exists();
    if !there {
        println!("skipped: no /dev/kvm");
    }
    there
}

fn linux(run: &str) -> Boot {
    Boot::new()
        .kernel(artifacts::kernel().unwrap().vmlinux)
        .initrd(artifacts::initramfs().unwrap())
        .cmdline(format!("console=ttyS0 panic=-1 sepal.run={run}"))
        .memory_mib(128)
}

/// Waits for user space, and returns what its first line says about processors and memory.
fn user_space(guest: &mut Guest) -> (u32, u64) {
    let line = guest.wait_for_line("USERSPACE", BOOT).unwrap();
    let number = |key: &str| {
        let word = line.split_whitespace().find_map(|word| word.strip_prefix(key));
        word.and_then(|value| value.parse::<u64>().ok())
            .unwrap_or_else(|| panic!("no {key} in {line:?}"))
    };
    (u32::try_from(number("cpus=")).unwrap(), number("mem_kib="))
}

#[test]
fn two_cpus_run_a_script_and_power_off() {
    if !kvm() {
        return;
    }
    // `echo $((6 * 7)); uname -s; exit 3` in base64.
    let mut guest = linux("script:ZWNobyBhbnN3ZXI9JCgoNiAqIDcpKTsgdW5hbWUgLXM7IGV4aXQgMwo=")
        .cpus(2)
        .start()
        .unwrap();
    let (cpus, memory) = user_space(&mut guest);
    assert_eq!(cpus, 2);
    assert!((100 << 10..128 << 10).contains(&memory), "{memory} KiB");
    guest.wait_for("answer=42", END).unwrap();
    guest.wait_for("SCRIPT exit=3", END).unwrap();
    let report = guest.assert_ends_with(Reason::Shutdown, END).unwrap();
    assert_eq!(report.error, None);
    assert!(guest.output().contains("\nLinux\r\n"), "{}", guest.output());
    assert!(guest.finish().unwrap().close().unwrap().success());
}

#[test]
fn memory_on_both_sides_of_the_hole_and_a_reboot() {
    if !kvm() {
        return;
    }
    // 3.5 GiB and more do not fit below the hole, which begins at 3 GiB.
    let mut guest = linux("reboot").memory_mib(3712).start().unwrap();
    let (_, memory) = user_space(&mut guest);
    assert!((3500 << 10..3712 << 10).contains(&memory), "{memory} KiB");
    guest.assert_ends_with(Reason::Reset, END).unwrap();
}

#[test]
fn a_bz_image_boots_and_panics() {
    if !kvm() {
        return;
    }
    let mut guest = linux("script")
        .kernel(artifacts::kernel().unwrap().bz_image)
        .script("echo c >/proc/sysrq-trigger")
        .configure(|config| {
            config.panic_device = true;
            config.on_panic = OnPanic::Stop;
        })
        .start()
        .unwrap();
    user_space(&mut guest);
    guest.wait_for("Kernel panic", END).unwrap();
    let told = guest.wait_for_news("the panic", END, |news| matches!(news, DeviceNews::GuestPanicked(_)));
    assert_eq!(told.unwrap(), DeviceNews::GuestPanicked(Panic::Panicked));
    // `panic=-1` reboots at once; that it panicked is what a client sees all the same.
    let report = guest.assert_ends_with(Reason::Crash, END).unwrap();
    assert!(report.detail.contains("kernel panicked"), "{report:?}");
}

#[test]
fn a_shell_answers_what_is_typed() {
    if !kvm() {
        return;
    }
    let mut guest = linux("shell").start().unwrap();
    guest.wait_for("SHELL ready", BOOT).unwrap();
    guest.type_text("echo typed-$((1 + 1))\n").unwrap();
    guest.wait_for("typed-2", END).unwrap();
    guest.type_text("exit\n").unwrap();
    guest.assert_ends_with(Reason::Shutdown, END).unwrap();
}

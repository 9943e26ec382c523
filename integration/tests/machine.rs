//! What the driver guest does besides driving devices: commands out of its initial RAM file system, memory that the host sees, the serial port, single
//! ports of a console, and the ways in which it ends.

#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::{
    fs::File,
    io::{Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
    path::Path,
    time::Duration,
};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use sepal_integration::Boot;
use sepal_schema::{
    config::{File as Source, MemoryBacking, OnReset, device::WatchdogAction},
    report::Reason,
};

/// Far more than any step takes.
const PATIENCE: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;

/// False, with a loud word, on a host without KVM.
fn kvm() -> bool {
    let there = Path::new("/dev/kvm").exists();
    if !there {
        println!("skipped: no /dev/kvm");
    }
    there
}

/// A memfd of this content that nobody can shorten.
fn memfd(content: &[u8]) -> File {
    let mut file: File = memfd_create("shared", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC)
        .unwrap()
        .into();
    file.write_all(content).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
    file
}

/// The driver guest with its commands in the initial RAM file system.
fn scripted(script: &str) -> Boot {
    let script = memfd(script.as_bytes());
    Boot::drivers("").configure(|config| {
        config.cmdline = "console=hvc0".into();
        config.initrd = Source::Fd(script.into());
    })
}

#[test]
fn commands_come_from_the_initial_ram_file_system() {
    if !kvm() {
        return;
    }
    let mut guest = scripted("say:one,say:two\n  say:three\r\nmemory").start().unwrap();
    for word in ["one", "two", "three"] {
        let report = guest.wait_for_report("say", PATIENCE).unwrap();
        assert_eq!(report.text(), word);
    }
    assert_eq!(guest.wait_for_report("memory", PATIENCE).unwrap().value("mib"), "128");
    guest.assert_ends_with(Reason::Shutdown, PATIENCE).unwrap();
}

#[test]
fn memory_is_shared_with_the_host() {
    if !kvm() {
        return;
    }
    // Inside the memory and above the hole below 4 GiB.
    for start in [64 * MIB, 5 << 30] {
        let ours: Vec<u8> = (0..MIB).map(|index| (index * 7) as u8).collect();
        let memory = memfd(&[ours.as_slice(), &vec![0; ours.len()]].concat());
        let theirs = memory.try_clone().unwrap();
        let script = format!(
            "mem-sum:{start:#x}:{MIB},mem-wait:{:#x}:9,mem-fill:{:#x}:{MIB}:5",
            start + MIB,
            start + MIB
        );
        let boot = scripted(&script).configure(|config| {
            config.custom_memory.push(MemoryBacking {
                memfd: theirs.into(),
                start,
                end: start + 2 * MIB,
            });
        });
        let mut guest = boot.start().unwrap();
        let fnv = ours.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let report = guest.wait_for_report("mem-sum", PATIENCE).unwrap();
        assert_eq!(report.value("fnv"), format!("{fnv:016x}"));
        guest.wait_for("waiting mem-wait", PATIENCE).unwrap();
        memory.write_all_at(&[9], MIB).unwrap();
        guest.wait_for_report("mem-fill", PATIENCE).unwrap();
        guest.assert_ends_with(Reason::Shutdown, PATIENCE).unwrap();
        let mut written = vec![0; ours.len()];
        memory.read_exact_at(&mut written, MIB).unwrap();
        assert!((5_u64..).zip(&written).all(|(index, &byte)| index % 251 == byte.into()));
    }
}

#[test]
fn lines_come_over_the_serial_port_and_single_ports_of_a_console() {
    if !kvm() {
        return;
    }
    let mut guest = scripted("serial-line console-say:2:second console-echo:1:6")
        .configure(|config| config.console.get_or_insert_default().ports = 3)
        .start()
        .unwrap();
    guest.wait_for("waiting serial-line", PATIENCE).unwrap();
    guest.type_text("typed\n").unwrap();
    assert_eq!(
        guest.wait_for_report("serial-line", PATIENCE).unwrap().value("got"),
        "typed"
    );
    guest.wait_for_on_console(2, "second\n", PATIENCE).unwrap();
    guest.wait_for_report("console-say", PATIENCE).unwrap();
    guest.wait_for("waiting console-echo", PATIENCE).unwrap();
    guest.type_on_console(1, "twelve").unwrap();
    guest.wait_for_on_console(1, "twelve", PATIENCE).unwrap();
    guest.assert_ends_with(Reason::Shutdown, PATIENCE).unwrap();
}

#[test]
fn it_ends_in_every_way() {
    if !kvm() {
        return;
    }
    for (command, reason) in [
        ("reset", Reason::Reset),
        ("reset:i8042", Reason::Reset),
        ("reset:triple-fault", Reason::Reset),
        ("crash", Reason::Crash),
        ("watchdog", Reason::Killed),
    ] {
        let boot = scripted(command).configure(|config| {
            config.on_reset = OnReset::Stop;
            config.watchdog = Some(WatchdogAction::Stop);
        });
        let mut guest = boot.start().unwrap();
        let report = guest.wait(PATIENCE).unwrap();
        assert_eq!(report.reason, reason, "{command}: {report:?}\n{}", guest.output());
    }
}

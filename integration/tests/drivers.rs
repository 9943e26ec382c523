//! Every virtio device driven by an independent implementation, the driver guest's, through the manager and in the jail.

#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    thread,
    time::Duration,
};

use sepal_integration::{
    Boot, Guest, disk,
    host::{Image, Namespace, check_qcow2},
};
use sepal_schema::{
    config::{
        File as Source,
        device::{Balloon, Console, DiskFormat, DiskMode, Link, MemoryDevice, Network, Rng, Vsock},
    },
    report::Reason,
};

/// Far more than any step takes.
const PATIENCE: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
/// Bytes of a page of a balloon.
const PAGE: u64 = 4096;

/// False, with a loud word, on a host without KVM.
fn kvm() -> bool {
    let there = Path::new("/dev/kvm").exists();
    if !there {
        println!("skipped: no /dev/kvm");
    }
    there
}

/// Waits for a report on each of the commands, in order.
fn reports(guest: &mut Guest, commands: &[&str]) {
    for command in commands {
        guest.wait_for_report(command, PATIENCE).unwrap();
    }
}

/// Waits for the guest's end and checks that it was as it should be.
fn ends(mut guest: Guest) {
    guest.wait_for("DONE", PATIENCE).unwrap();
    guest.assert_ends_with(Reason::Shutdown, PATIENCE).unwrap();
    assert!(guest.finish().unwrap().close().unwrap().success());
}

#[test]
fn a_disk_keeps_what_is_written_and_survives_resets() {
    if !kvm() {
        return;
    }
    let image = Image::raw(64 * MIB).unwrap();
    let commands = "pci-ways,bar-move,blk-info,blk-rw,blk-fill:1000:100:5,blk-past-end,blk-zero:8:64,blk-discard:256:64,msix,\
                    blk-reset-in-flight,blk-queue-reset,blk-wait-size:262144,hostile:block,blk-rw:7";
    let mut guest = Boot::drivers(commands)
        .disk({
            let mut disk = disk(image.path(), DiskMode::ReadWrite, DiskFormat::Raw).unwrap();
            disk.id = "first".into();
            disk
        })
        .start()
        .unwrap();
    reports(&mut guest, &["pci-ways", "bar-move"]);
    let info = guest.wait_for_report("blk-info", PATIENCE).unwrap();
    assert_eq!(
        (info.value("capacity"), info.value("ro"), info.value("id")),
        ("131072", "0", "first")
    );
    reports(
        &mut guest,
        &["blk-rw", "blk-fill", "blk-past-end", "blk-zero", "blk-discard", "msix"],
    );
    reports(&mut guest, &["blk-reset-in-flight", "blk-queue-reset"]);
    guest.wait_for("waiting blk-wait-size", PATIENCE).unwrap();
    guest.resize_disk("disk0", 128 * MIB).unwrap();
    guest.wait_for_report("blk-wait-size", PATIENCE).unwrap();
    let hostile = guest.wait_for_report("hostile", PATIENCE).unwrap();
    assert_eq!(
        (hostile.value("used"), hostile.value("ignored")),
        ("", ""),
        "{hostile:?}"
    );
    guest.wait_for_report("blk-rw", PATIENCE).unwrap();
    ends(guest);

    let written = fs::read(image.path()).unwrap();
    assert_eq!(written.len() as u64, 128 * MIB);
    // What `blk-fill:1000:100:5` writes, as the driver guest's documentation has it.
    for sector in 1000..1100_usize {
        for (offset, &byte) in written[sector * 512..][..512].iter().enumerate() {
            assert_eq!(
                usize::from(byte),
                (5 + 7 * sector + offset) % 251,
                "byte {offset} of sector {sector}"
            );
        }
    }
}

#[test]
fn a_disk_without_messages_interrupts_by_its_pin() {
    if !kvm() {
        return;
    }
    let image = Image::raw(MIB).unwrap();
    // The first device is in slot 1 and has INTA#: interrupt 16 + (1 + 1 - 1) (`pci_gsi` in the component's layout.rs).
    let mut guest = Boot::drivers("intx:17,blk-rw")
        .disk(disk(image.path(), DiskMode::ReadWrite, DiskFormat::Raw).unwrap())
        .start()
        .unwrap();
    reports(&mut guest, &["intx", "blk-rw"]);
    ends(guest);
}

#[test]
fn disks_that_may_not_be_changed_are_not() {
    if !kvm() {
        return;
    }
    let images = [Image::raw(8 * MIB).unwrap(), Image::raw(8 * MIB).unwrap()];
    for (image, byte) in images.iter().zip([0x11, 0x22]) {
        fs::write(image.path(), vec![byte; 8 * MIB as usize]).unwrap();
    }
    let mut guest =
        Boot::drivers("blk-ro@0,blk-rw@1,blk-fill@1:0:16384,blk-sum@1,blk-zero@1,blk-discard@1,hostile:block")
            .disk(disk(images[0].path(), DiskMode::ReadOnly, DiskFormat::Raw).unwrap())
            .disk(disk(images[1].path(), DiskMode::VolatileWrite, DiskFormat::Raw).unwrap())
            .start()
            .unwrap();
    reports(
        &mut guest,
        &[
            "blk-ro",
            "blk-rw",
            "blk-fill",
            "blk-sum",
            "blk-zero",
            "blk-discard",
            "hostile",
        ],
    );
    ends(guest);
    for (image, byte) in images.iter().zip([0x11, 0x22]) {
        assert!(
            fs::read(image.path()).unwrap().iter().all(|&found| found == byte),
            "disk of {byte:#x}"
        );
    }
}

#[test]
fn a_qcow2_image_stays_sound() {
    if !kvm() {
        return;
    }
    let below = Image::raw(16 * MIB).unwrap();
    fs::write(below.path(), vec![0x33; 16 * MIB as usize]).unwrap();
    let images = [
        Image::qcow2(64 * MIB, None).unwrap(),
        Image::qcow2(16 * MIB, Some(&below)).unwrap(),
    ];
    let mut layered = disk(images[1].path(), DiskMode::ReadWrite, DiskFormat::Qcow2).unwrap();
    layered.backing.push(sepal_schema::config::device::Backing {
        file: Source::Fd(File::open(below.path()).unwrap().into()),
        format: DiskFormat::Raw,
    });
    let mut guest = Boot::drivers(
        "blk-rw,blk-fill:64:4096,blk-zero,blk-discard,blk-sum:64:4096,blk-sum@1,blk-rw@1,blk-reset-in-flight@1",
    )
    .disk(disk(images[0].path(), DiskMode::ReadWrite, DiskFormat::Qcow2).unwrap())
    .disk(layered)
    .start()
    .unwrap();
    reports(
        &mut guest,
        &["blk-rw", "blk-fill", "blk-zero", "blk-discard", "blk-sum"],
    );
    let untouched = guest.wait_for_report("blk-sum", PATIENCE).unwrap();
    assert_eq!(
        untouched.value("fnv"),
        format!("{:016x}", fnv(&vec![0x33; 16 * MIB as usize]))
    );
    reports(&mut guest, &["blk-rw", "blk-reset-in-flight"]);
    ends(guest);
    for image in &images {
        check_qcow2(image.path()).unwrap();
    }
    assert!(fs::read(below.path()).unwrap().iter().all(|&byte| byte == 0x33));
}

/// FNV-1a of 64 bits, as the guest computes it.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[test]
fn entropy_and_a_console() {
    if !kvm() {
        return;
    }
    let mut guest =
        Boot::drivers("rng:4096,hostile:rng,rng,console:over-there,console-bulk:300000,hostile:console,console:again")
            .configure(|config| {
                config.rng = Some(Rng::default());
                config.console = Some(Console::default());
            })
            .start()
            .unwrap();
    reports(&mut guest, &["rng", "hostile", "rng"]);
    guest.wait_for_on_console(0, "over-there\n", PATIENCE).unwrap();
    guest.type_on_console(0, "typed\n").unwrap();
    assert_eq!(
        guest.wait_for_report("console", PATIENCE).unwrap().value("got"),
        "typed"
    );
    reports(&mut guest, &["console-bulk"]);
    let hostile = guest.wait_for_report("hostile", PATIENCE).unwrap();
    assert_eq!(
        (hostile.value("used"), hostile.value("ignored")),
        ("", ""),
        "{hostile:?}"
    );
    guest.wait_for_on_console(0, "again\n", PATIENCE).unwrap();
    guest.type_on_console(0, "once more\n").unwrap();
    assert_eq!(guest.wait_for_report("console", PATIENCE).unwrap().value("got"), "once");
    ends(guest);
}

#[test]
fn a_console_with_several_ports() {
    if !kvm() {
        return;
    }
    let mut guest = Boot::drivers("console-ports:through,hostile:console,console-ports:again")
        .configure(|config| {
            config.console = Some(Console {
                ports: 3,
                ..Console::default()
            });
        })
        .start()
        .unwrap();
    for (word, typed) in [("through", ["zero", "one", "two"]), ("again", ["0", "1", "2"])] {
        for (port, line) in (0..).zip(typed) {
            guest
                .wait_for_on_console(port, &format!("{word}-{port}\n"), PATIENCE)
                .unwrap();
            guest.type_on_console(port, &format!("{line}\n")).unwrap();
        }
        let report = guest.wait_for_report("console-ports", PATIENCE).unwrap();
        assert_eq!(report.value("names"), "console+port1+port2");
        assert_eq!(report.value("got"), typed.join("+"));
        if word == "through" {
            guest.wait_for_report("hostile", PATIENCE).unwrap();
        }
    }
    ends(guest);
}

#[test]
fn a_balloon_gives_memory_back_and_memory_is_plugged() {
    if !kvm() {
        return;
    }
    let pages = u32::try_from(16 * MIB / PAGE).unwrap();
    let mut guest = Boot::drivers("balloon,balloon-report:16,hostile:balloon,mem:64,hostile:mem")
        .configure(|config| {
            config.balloon = Some(Balloon {
                deflate_on_oom: true,
                free_page_reporting: true,
            });
            config.memory_device = Some(MemoryDevice {
                region_size: 256 * MIB,
                ..MemoryDevice::default()
            });
        })
        .start()
        .unwrap();
    guest.wait_for("waiting balloon inflate", PATIENCE).unwrap();
    guest.request_balloon(pages).unwrap();
    guest.wait_for("waiting balloon touched", PATIENCE).unwrap();
    guest.wait_for("waiting balloon deflate", PATIENCE).unwrap();
    let size = guest
        .wait_until_it_tells(PATIENCE, Guest::balloon_size, |size| size.current == pages)
        .unwrap();
    assert_eq!(size.requested, pages);
    guest.request_balloon(0).unwrap();
    let report = guest.wait_for_report("balloon", PATIENCE).unwrap();
    // None of what the guest had written was left.
    assert_eq!(
        (report.value("pages"), report.value("kept")),
        (pages.to_string().as_str(), "0")
    );
    let report = guest.wait_for_report("balloon-report", PATIENCE).unwrap();
    assert_eq!(report.value("zero"), report.value("pages"));
    guest.wait_for_report("hostile", PATIENCE).unwrap();

    guest.wait_for("waiting mem plug", PATIENCE).unwrap();
    guest.request_memory(64 * MIB).unwrap();
    guest.wait_for("waiting mem unplug", PATIENCE).unwrap();
    assert_eq!(guest.memory_size().unwrap().plugged, 64 * MIB);
    guest.request_memory(0).unwrap();
    guest.wait_for_report("mem", PATIENCE).unwrap();
    assert_eq!(guest.memory_size().unwrap().plugged, 0);
    guest.wait_for_report("hostile", PATIENCE).unwrap();
    ends(guest);
}

#[test]
fn a_network_card_on_a_tap() {
    if !kvm() {
        return;
    }
    let namespace = Namespace::new().unwrap();
    let tap = namespace.tap("tap0", "10.0.0.1/24").unwrap();
    let mut network = Network::new(Link::Tap(vec![tap]));
    network.mac = Some([2, 0, 0, 0, 0, 7]);
    let mut guest = Boot::drivers("net-info,net-ping:10.0.0.2:10.0.0.1:20:1200,hostile:net,net-serve:10.0.0.2,net-tx:10.0.0.2:10.0.0.1:1400:20000")
        .network(network)
        .start()
        .unwrap();
    assert_eq!(
        guest.wait_for_report("net-info", PATIENCE).unwrap().value("mac"),
        "02-00-00-00-00-07"
    );
    reports(&mut guest, &["net-ping", "hostile"]);
    guest.wait_for("waiting net-serve", PATIENCE).unwrap();
    namespace
        .enter(|| {
            let socket = std::net::UdpSocket::bind("10.0.0.1:0").unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut echoed = [0; 2048];
            for length in [1, 100, 1400] {
                socket.send_to(&vec![length as u8; length], "10.0.0.2:7").unwrap();
                let count = socket.recv(&mut echoed).unwrap();
                assert_eq!(echoed[..count], vec![length as u8; length]);
            }
            socket.send_to(b"end", "10.0.0.2:9").unwrap();
        })
        .unwrap();
    assert_eq!(
        guest.wait_for_report("net-serve", PATIENCE).unwrap().value("echoed"),
        "3"
    );
    guest.wait_for_report("net-tx", PATIENCE).unwrap();
    ends(guest);
}

#[test]
fn sockets_both_ways() {
    if !kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vsock");
    let beside = |port: u32| format!("{}_{port}", path.display());
    let echo = UnixListener::bind(beside(1024)).unwrap();
    let sink = UnixListener::bind(beside(1025)).unwrap();
    let mut guest = Boot::drivers(
        "vsock-refused:9,vsock-echo:1024:500000,vsock-bulk:1025:4000000,hostile:vsock,vsock-echo:1024,vsock-listen:700",
    )
    .configure(|config| {
        config.vsock = Some(Vsock {
            socket_path: path.display().to_string(),
            ..Vsock::default()
        });
    })
    .start()
    .unwrap();
    let echoes = thread::spawn(move || {
        for _ in 0..2 {
            let (mut stream, _) = echo.accept().unwrap();
            let mut buffer = vec![0; 65536];
            while let Ok(count) = stream.read(&mut buffer)
                && count > 0
            {
                stream.write_all(&buffer[..count]).unwrap();
            }
        }
    });
    let sunk = thread::spawn(move || {
        let mut data = Vec::new();
        sink.accept().unwrap().0.read_to_end(&mut data).unwrap();
        data.len()
    });
    reports(
        &mut guest,
        &["vsock-refused", "vsock-echo", "vsock-bulk", "hostile", "vsock-echo"],
    );
    assert_eq!(sunk.join().unwrap(), 4_000_000);
    echoes.join().unwrap();

    guest.wait_for("waiting vsock-listen", PATIENCE).unwrap();
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"CONNECT 700\n").unwrap();
    let mut answer = [0; 3];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"OK ");
    while answer[0] != b'\n' {
        stream.read_exact(&mut answer[..1]).unwrap();
    }
    stream.write_all(b"to the guest and back").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut back = String::new();
    stream.read_to_string(&mut back).unwrap();
    assert_eq!(back, "to the guest and back");
    assert_eq!(
        guest.wait_for_report("vsock-listen", PATIENCE).unwrap().value("bytes"),
        "21"
    );
    ends(guest);
}

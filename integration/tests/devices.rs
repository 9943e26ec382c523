//! Linux drives every virtio device, in one boot: what a user of a guest would do with disks, networks, sockets, consoles and memory.

#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{IpAddr, TcpListener, UdpSocket},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    thread,
    time::Duration,
};

use sepal_integration::{
    Boot, Guest, artifacts, disk,
    host::{Image, Namespace, check_ext4, check_qcow2, compare_images, noise, read_ext4, receive_all, serve_once},
};
use sepal_schema::{
    config::device::{Balloon, Console, DiskFormat, DiskMode, Link, MemoryDevice, Network, Rng, Vsock},
    report::Reason,
};

/// Longer than any boot or step takes; they only ever make a test fail.
const BOOT: Duration = Duration::from_secs(400);
const STEP: Duration = Duration::from_secs(400);
const MIB: u64 = 1 << 20;
/// What goes over the tap in each direction: 50 MB, or 2 where the guest's kernel is emulated, which copies every byte several times at less than a
/// megabyte a second.
fn bulk_bytes() -> usize {
    let emulated = Path::new("/sys/module/kvm_pvm").exists();
    if emulated { 2 << 20 } else { 50 << 20 }
}
/// Largest packet of the tap device.
const MTU: u16 = 65520;
/// What the guest says about its memory: free, and all of it (virtio 1.2, section 5.5.6.4).
const FREE: u16 = 4;
const TOTAL: u16 = 5;
/// Pages of 4096 bytes that the balloon takes for a time.
const BALLOON: u32 = 4096;
/// What is plugged for a time: Linux's memory blocks are this large.
const PLUGGED: u64 = 128 * MIB;

/// What the guest does; the host's part is in the test, in the same order. `/bin/busybox` serves as a file whose content both sides have.
const SCRIPT: &str = r#"
not() { ! "$@"; }
total() { while read -r key value _; do [ $key = MemTotal: ] && echo kib=$value; done </proc/meminfo; }
mkdir /mnt

step ext4-mount mount -t ext4 /dev/vda /mnt
cp /bin/busybox /mnt/program
echo 'kept by the disk' >/mnt/words
step ext4-sync sync
step ext4-unmount umount /mnt

step ro-flag cat /sys/block/vdb/ro
step ro-refused not dd if=/bin/busybox of=/dev/vdb bs=4k count=1
step ro-read dd if=/dev/vdb of=/dev/null bs=64k count=4

step volatile-write dd if=/bin/busybox of=/dev/vdc bs=64k conv=fsync
echo 3 >/proc/sys/vm/drop_caches
dd if=/dev/vdc of=/from-disk bs=64k count=40
step volatile-read cmp -n $(stat -c %s /bin/busybox) /bin/busybox /from-disk
rm /from-disk

step qcow2-write dd if=/bin/busybox of=/dev/vdd bs=64k seek=16 conv=fsync

step rng dd if=/dev/hwrng of=/dev/null bs=64 count=4
step rng-name cat /sys/class/misc/hw_random/rng_current

echo 'on the console' >/dev/hvc0
echo 'on another' >/dev/hvc1
for port in /sys/class/virtio-ports/*; do
    [ -f $port/name ] && read -r name <$port/name && [ "$name" = port2 ] && break
done
exec 3<>/dev/${port##*/}
echo 'on the port' >&3
read -r line <&3
echo "ok port got=$line"

ip link set lo up
ip addr add 198.18.0.2/24 dev eth0
step tap-up ip link set eth0 up
step tap-ping ping -c 3 198.18.0.1
nc 198.18.0.1 5001 </dev/null >/bulk
echo "ok tap-received bytes=$(stat -c %s /bulk)"
nc 198.18.0.1 5002 </bulk
echo "ok tap-sent"
rm /bulk

ip addr add 10.0.2.15/24 dev eth1
step user-up ip link set eth1 up
ip route add default via 10.0.2.2
# The end of input has to come after the answer: older passt forgets a connection whose guest is the first to close its side.
step user-get sh -c "sleep 5 | nc $SERVER"

step vsock-connect sh -c 'echo to the host | vsock connect 5003'
# Not as a step, which would keep back that it waits.
vsock echo 5004 && echo 'ok vsock-echo'

before=$(total)
echo "ok mem-before $before"
echo "waiting mem-plug"
read -r line
# The device has plugged it; that Linux uses it comes a moment later.
tries=0
while [ "$(total)" = "$before" ] && [ $((tries += 1)) -le 300 ]; do sleep 0.1; done
echo "ok mem-plugged $(total)"
echo "waiting mem-unplug"
read -r line
# As above.
tries=0
while [ "$(total)" != "$before" ] && [ $((tries += 1)) -le 300 ]; do sleep 0.1; done
echo "ok mem-unplugged $(total)"
"#;

#[test]
fn linux_uses_every_virtio_device() {
    if !Path::new("/dev/kvm").exists() {
        println!("skipped: no /dev/kvm");
        return;
    }
    let disks = Disks::new();
    let namespace = Namespace::new().unwrap();
    let tap = namespace.tap("tap0", "198.18.0.1/24").unwrap();
    namespace
        .command("ip", &["link", "set", "tap0", "mtu", &MTU.to_string()])
        .unwrap();
    let listen = |port| {
        namespace
            .enter(|| TcpListener::bind(("198.18.0.1", port)).unwrap())
            .unwrap()
    };
    let bulk = noise(1, bulk_bytes());
    let (download, upload) = (serve_once(listen(5001), bulk.clone()), receive_all(listen(5002)));
    let server = TcpListener::bind((host_address(), 0)).unwrap();
    let address = server.local_addr().unwrap();
    let user = serve_once(server, b"from a server of the host\n".to_vec());
    let folder = tempfile::tempdir().unwrap();
    let sockets = folder.path().join("vsock");
    let greeter = greet(UnixListener::bind(format!("{}_5003", sockets.display())).unwrap());

    let boot = Boot::new()
        .kernel(artifacts::kernel().unwrap().vmlinux)
        .initrd(artifacts::initramfs().unwrap())
        .script(format!("SERVER='{} {}'\n{SCRIPT}", address.ip(), address.port()))
        // Memory that the kernel uses for itself cannot be given back, and so is kept elsewhere.
        .cmdline("console=ttyS0 panic=-1 quiet memhp_default_state=online_movable sepal.run=script")
        .memory_mib(256)
        .network({
            // 50 MB in packets of 1500 bytes would take minutes where the guest's kernel is emulated.
            let mut network = Network::new(Link::Tap(vec![tap]));
            network.mtu = MTU;
            network
        })
        .network(Network::new(Link::User))
        .configure(|config| {
            config.rng = Some(Rng::default());
            config.console = Some(Console {
                ports: 3,
                console_ports: 2,
            });
            config.balloon = Some(Balloon {
                deflate_on_oom: true,
                free_page_reporting: true,
            });
            config.vsock = Some(Vsock {
                socket_path: sockets.display().to_string(),
                ..Vsock::default()
            });
            config.memory_device = Some(MemoryDevice {
                region_size: 2 * PLUGGED,
                ..MemoryDevice::default()
            });
        });
    let mut guest = disks.add_to(boot).start().unwrap();
    guest.wait_for_line("USERSPACE", BOOT).unwrap();
    steps(&mut guest, &["ext4-mount", "ext4-sync", "ext4-unmount"]);
    assert_eq!(guest.wait_for_report("ro-flag", STEP).unwrap().text(), "1");
    steps(
        &mut guest,
        &[
            "ro-refused",
            "ro-read",
            "volatile-write",
            "volatile-read",
            "qcow2-write",
            "rng",
        ],
    );
    assert!(
        guest
            .wait_for_report("rng-name", STEP)
            .unwrap()
            .text()
            .starts_with("virtio_rng")
    );
    consoles(&mut guest);

    steps(&mut guest, &["tap-up", "tap-ping"]);
    let received = guest.wait_for_report("tap-received", STEP).unwrap();
    assert_eq!(received.value("bytes"), bulk.len().to_string());
    download.join().unwrap().unwrap();
    guest.wait_for_report("tap-sent", STEP).unwrap();
    // What went to the guest and came back is what it was.
    assert!(
        upload.join().unwrap().unwrap() == bulk,
        "the bytes came back differently"
    );

    guest.wait_for_report("user-up", STEP).unwrap();
    assert_eq!(
        guest.wait_for_report("user-get", STEP).unwrap().text(),
        "from a server of the host"
    );
    user.join().unwrap().unwrap();

    assert_eq!(
        guest.wait_for_report("vsock-connect", STEP).unwrap().text(),
        "to the host, said the guest"
    );
    greeter.join().unwrap();
    echo_from_guest(&sockets, &mut guest);
    memory(&mut guest);
    guest.wait_for("SCRIPT exit=0", STEP).unwrap();
    guest.assert_ends_with(Reason::Shutdown, STEP).unwrap();
    assert!(guest.finish().unwrap().close().unwrap().success());
    disks.check();
}

/// An address of the host that is not its loopback's, which user-mode networking keeps guests away from.
fn host_address() -> IpAddr {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    // Only looks the route up: nothing is sent.
    socket.connect("198.51.100.1:9").unwrap();
    socket.local_addr().unwrap().ip()
}

/// Waits for a report on each step, in order.
fn steps(guest: &mut Guest, names: &[&str]) {
    for name in names {
        guest.wait_for_report(name, STEP).unwrap();
    }
}

/// The guest's disks, in its order.
struct Disks {
    ext4: Image,
    read_only: Image,
    volatile: Image,
    qcow2: Image,
}

/// What is in the disks that must not change.
const READ_ONLY: u8 = 0x5a;
const VOLATILE: u8 = 0xa5;

impl Disks {
    fn new() -> Self {
        let filled = |byte: u8| {
            let image = Image::raw(8 * MIB).unwrap();
            fs::write(image.path(), vec![byte; 8 * MIB as usize]).unwrap();
            image
        };
        Self {
            ext4: Image::ext4(32 * MIB).unwrap(),
            read_only: filled(READ_ONLY),
            volatile: filled(VOLATILE),
            qcow2: Image::qcow2(16 * MIB, None).unwrap(),
        }
    }

    fn add_to(&self, boot: Boot) -> Boot {
        boot.disk(disk(self.ext4.path(), DiskMode::ReadWrite, DiskFormat::Raw).unwrap())
            .disk(disk(self.read_only.path(), DiskMode::ReadOnly, DiskFormat::Raw).unwrap())
            .disk(disk(self.volatile.path(), DiskMode::VolatileWrite, DiskFormat::Raw).unwrap())
            .disk(disk(self.qcow2.path(), DiskMode::ReadWrite, DiskFormat::Qcow2).unwrap())
    }

    /// What the host finds in the images afterwards.
    fn check(&self) {
        let program = fs::read("/bin/busybox").unwrap();
        check_ext4(self.ext4.path()).unwrap();
        assert_eq!(read_ext4(self.ext4.path(), "/words").unwrap(), b"kept by the disk\n");
        assert!(
            read_ext4(self.ext4.path(), "/program").unwrap() == program,
            "the program differs"
        );

        for (image, byte) in [(&self.read_only, READ_ONLY), (&self.volatile, VOLATILE)] {
            let content = fs::read(image.path()).unwrap();
            assert_eq!(content.len() as u64, 8 * MIB);
            assert!(
                content.iter().all(|&found| found == byte),
                "the disk of {byte:#x} has changed"
            );
        }

        check_qcow2(self.qcow2.path()).unwrap();
        let expected = Image::raw(16 * MIB).unwrap();
        let mut content = vec![0; 16 * MIB as usize];
        content[MIB as usize..][..program.len()].copy_from_slice(&program);
        File::create(expected.path()).unwrap().write_all(&content).unwrap();
        compare_images(self.qcow2.path(), expected.path()).unwrap();
    }
}

/// Two consoles and a port, that one both ways.
fn consoles(guest: &mut Guest) {
    guest.wait_for_on_console(0, "on the console", STEP).unwrap();
    guest.wait_for_on_console(1, "on another", STEP).unwrap();
    guest.wait_for_on_console(2, "on the port", STEP).unwrap();
    guest.type_on_console(2, "typed at the host\n").unwrap();
    assert_eq!(
        guest.wait_for_report("port", STEP).unwrap().text(),
        "got=typed at the host"
    );
}

/// Takes one connection, reads to its end and answers.
fn greet(listener: UnixListener) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).unwrap();
        writeln!(stream, "{}, said the guest", said.trim_end()).unwrap();
    })
}

/// Connects to the guest as clients of Firecracker do.
fn echo_from_guest(sockets: &Path, guest: &mut Guest) {
    guest.wait_for("waiting vsock", STEP).unwrap();
    let mut stream = UnixStream::connect(sockets).unwrap();
    stream.set_read_timeout(Some(STEP)).unwrap();
    stream.write_all(b"CONNECT 5004\n").unwrap();
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        answer.push(byte[0]);
    }
    assert!(answer.starts_with(b"OK "), "{:?}", String::from_utf8_lossy(&answer));
    let sent = noise(2, 200_000);
    let (mut writer, data) = (stream.try_clone().unwrap(), sent.clone());
    let writing = thread::spawn(move || {
        writer.write_all(&data).unwrap();
        writer.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap();
    writing.join().unwrap();
    assert!(back == sent, "{} bytes came back", back.len());
    guest.wait_for_report("vsock-echo", STEP).unwrap();
}

/// Balloon and memory device: the guest's own figures follow what the host asks for.
fn memory(guest: &mut Guest) {
    let before = guest
        .wait_for_report("mem-before", STEP)
        .unwrap()
        .number("kib")
        .unwrap();
    guest.wait_for("waiting mem-plug", STEP).unwrap();
    guest.request_balloon(BALLOON).unwrap();
    guest
        .wait_until_it_tells(STEP, Guest::balloon_size, |size| size.current == BALLOON)
        .unwrap();
    // The driver tells once when it begins, and then whenever the guest has run a while.
    let total = |told: &[(u16, u64)]| told.iter().find(|(tag, _)| *tag == TOTAL).map(|(_, bytes)| *bytes);
    let (bytes, told) = guest.told_memory().unwrap();
    let known = total(&told).unwrap();
    assert!(known > bytes / 2 && known <= bytes, "{told:?} of {bytes}");
    let statistics = guest.balloon_statistics().unwrap();
    assert!(statistics.iter().any(|&(_, value)| value > 0), "{statistics:?}");
    let free = |told: &[(u16, u64)]| told.iter().find(|(tag, _)| *tag == FREE).map(|(_, bytes)| *bytes);
    let asked = free(&statistics).unwrap();
    assert!(asked < known, "{statistics:?}");
    guest.request_balloon(0).unwrap();
    guest
        .wait_until_it_tells(STEP, Guest::balloon_size, |size| size.current == 0)
        .unwrap();

    guest.request_memory(PLUGGED).unwrap();
    guest
        .wait_until_it_tells(STEP, Guest::memory_size, |size| size.plugged == PLUGGED)
        .unwrap();
    assert_eq!(guest.told_memory().unwrap().0, bytes + PLUGGED);
    guest.type_text("go on\n").unwrap();
    let plugged = guest
        .wait_for_report("mem-plugged", STEP)
        .unwrap()
        .number("kib")
        .unwrap();
    assert!(
        plugged >= before + (PLUGGED / 1024) as f64 * 0.9,
        "{before} KiB, then {plugged}"
    );
    guest.wait_for("waiting mem-unplug", STEP).unwrap();
    guest.request_memory(0).unwrap();
    guest
        .wait_until_it_tells(STEP, Guest::memory_size, |size| size.plugged == 0)
        .unwrap();
    guest.type_text("go on\n").unwrap();
    let unplugged = guest
        .wait_for_report("mem-unplugged", STEP)
        .unwrap()
        .number("kib")
        .unwrap();
    assert!(
        (before - unplugged).abs() < 1024.0,
        "{before} KiB, then {plugged}, then {unplugged}"
    );
}

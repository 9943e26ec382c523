//! Linux with what serves it from outside of its rings, in one boot and by the command line: the agent, a folder that virtiofsd shares, the generation
//! id, the watchdog.

#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::{
    fs::{self, Permissions},
    os::{fd::AsRawFd, unix::fs::PermissionsExt, unix::net::UnixListener},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use sepal_integration::{Guest, Manager, artifacts, host::noise, initrd};
use sepal_schema::{news::DeviceNews, report::Reason};
use sepal_tests::{Finished, Running, World};

/// Longer than any boot or step takes; they only ever make a test fail.
const BOOT: Duration = Duration::from_secs(400);
const STEP: Duration = Duration::from_secs(100);
/// Bytes of the file that is copied: several of the largest pieces, the last one not whole.
const FILE: usize = 300_001;

#[test]
fn linux_is_served_by_agent_shared_folder_and_watchdog() {
    if !Path::new("/dev/kvm").exists() {
        println!("skipped: no /dev/kvm");
        return;
    }
    let world = World::with_manager();
    let share = Share::new(&world);
    let virtiofsd = share.serve(&world);
    let mut guest = launch(&world, &share);
    guest
        .wait_for_news("the agent", BOOT, |news| *news == DeviceNews::GuestReady)
        .unwrap();

    programs(&world);
    terminal(&world);
    files(&world);
    drivers(&world);
    shared_folder(&world, &share, &mut guest, virtiofsd);
    watchdog(&world, &mut guest);
    guest.finish().unwrap();
    world.end();
}

fn launch(world: &World, share: &Share) -> Guest {
    let agent = fs::read(artifacts::agent().unwrap()).unwrap();
    let initrd = initrd(
        &artifacts::initramfs().unwrap(),
        &[("bin/sepal-agent", agent.as_slice())],
    )
    .unwrap();
    let kernel = artifacts::kernel().unwrap().vmlinux;
    let shared = format!("data={}", share.socket.display());
    let id = instance_id();
    let devices = [
        "--vsock",
        "--watchdog=reset",
        "--generation-id",
        "--panic-device",
        "--instance-id",
        &id,
    ];
    let arguments = [
        &["launch", "bee", "--detach", "--memory", "192"][..],
        &["--kernel", kernel.to_str().unwrap()],
        &["--initrd", initrd.path().to_str().unwrap()],
        &[
            "--cmdline",
            "console=ttyS0 panic=-1 quiet i6300esb.heartbeat=2 sepal.agent sepal.run=idle",
        ],
        &["--share", &shared],
        &devices,
    ];
    world.guest(&arguments.concat()).expect_code(0);
    Manager::connect(&world.socket()).unwrap().find("bee").unwrap()
}

/// Starts a shell's command in the guest.
fn start(world: &World, script: &str) -> Running {
    world.start(&["exec", "bee", "--", "sh", "-c", script])
}

/// Runs it to its end, without input.
fn run(world: &World, script: &str) -> Finished {
    let mut running = start(world, script);
    running.close_input();
    running.wait()
}

fn programs(world: &World) {
    let mut running = start(world, "cat; pwd >&2; exit 3");
    running.type_in("typed at the host\n");
    running.close_input();
    let finished = running.wait().expect_code(3);
    assert_eq!(
        (finished.out().as_str(), finished.stderr.as_str()),
        ("typed at the host\n", "/\n")
    );

    let killed = run(world, "kill -9 $$").expect_code(128 + 9);
    assert_eq!(
        (killed.out().as_str(), killed.stderr.as_str()),
        ("", "killed by signal 9\n")
    );

    let missing = world.guest(&["exec", "bee", "--", "no-such-program"]).expect_code(1);
    assert_eq!(
        missing.stderr,
        "guest: NOT_FOUND: in the guest: no-such-program: No such file or directory (os error 2)\n"
    );
}

/// A program's terminal has the size of the one here, also when that changes.
fn terminal(world: &World) {
    let script = "stty size; trap 'stty size; exit 7' WINCH; echo ready; while :; do sleep 0.1; done";
    let mut pty = world.pty(&["exec", "--tty", "bee", "--", "sh", "-c", script]);
    pty.expect("24 80");
    pty.expect("ready");
    pty.resize(101, 33);
    pty.expect("33 101");
    assert_eq!(pty.wait().code(), Some(7));
}

fn files(world: &World) {
    let path = |name: &str| world.folder().join(name).to_str().unwrap().to_owned();
    let (here, back, kept) = (path("here"), path("back"), path("kept"));
    let content = noise(3, FILE);
    fs::write(&here, &content).unwrap();
    fs::set_permissions(&here, Permissions::from_mode(0o751)).unwrap();
    world.guest(&["cp", &here, "bee:/there"]).expect_code(0);
    assert_eq!(
        run(world, "stat -c '%a %s' /there").expect_code(0).out(),
        format!("751 {FILE}\n")
    );
    world.guest(&["cp", "bee:/there", &back]).expect_code(0);
    assert!(fs::read(&back).unwrap() == content, "the file came back differently");
    assert_eq!(fs::metadata(&back).unwrap().permissions().mode() & 0o7777, 0o751);

    fs::write(&kept, "kept").unwrap();
    let missing = world.guest(&["cp", "bee:/nothing", &kept]).expect_code(1);
    assert!(
        missing.stderr.contains("NOT_FOUND: in the guest: /nothing: "),
        "{}",
        missing.stderr
    );
    assert_eq!(fs::read_to_string(&kept).unwrap(), "kept");

    let folder = world.guest(&["cp", &here, "bee:/bin"]).expect_code(1);
    assert!(
        folder
            .stderr
            .contains("/bin: there is something that is no regular file"),
        "{}",
        folder.stderr
    );
    let folder = world
        .guest(&["cp", "bee:/there", world.folder().to_str().unwrap()])
        .expect_code(1);
    assert!(folder.stderr.contains("Is a directory"), "{}", folder.stderr);
}

/// What the guest is told that it is.
fn instance_id() -> String {
    (0..64).map(|n| format!("{:02x}", n * 3 + 7)).collect()
}

/// Linux's own drivers have found the devices that are described to it.
fn drivers(world: &World) {
    let drivers = [
        "acpi/drivers/vmgenid",
        "platform/drivers/pvpanic-mmio",
        "pci/drivers/i6300ESB timer",
    ];
    // That one needs no driver.
    let id = run(world, "cat /sys/bus/acpi/devices/SEPL0002:00/uid").expect_code(0);
    assert_eq!(id.out(), format!("{}\n", instance_id()));
    let bound = drivers.map(|driver| format!("for found in '/sys/bus/{driver}/'*:*; do echo ${{found##*/}}; done"));
    let found = run(world, &bound.join("; ")).expect_code(0).out();
    let found: Vec<&str> = found.lines().collect();
    assert!(
        matches!(found[..], ["SEPL0001:00", "QEMU0001:00", watchdog] if watchdog.starts_with("0000:00:")),
        "{found:?}"
    );
}

/// A folder of the host and where it is served.
struct Share {
    program: PathBuf,
    folder: PathBuf,
    socket: PathBuf,
}

impl Share {
    fn new(world: &World) -> Self {
        let folder = world.folder().join("shared");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("words"), "from the host\n").unwrap();
        Self {
            program: artifacts::virtiofsd().unwrap(),
            folder,
            socket: world.folder().join("virtiofsd.sock"),
        }
    }

    /// Starts virtiofsd. It is handed a socket that listens, so there is nothing to wait for.
    fn serve(&self, world: &World) -> Running {
        // The one of a virtiofsd that has ended.
        let _ = fs::remove_file(&self.socket);
        let listener = UnixListener::bind(&self.socket).unwrap();
        rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
        let help = Command::new(&self.program).arg("--help").output().unwrap();
        let source = format!("source={}", self.folder.display());
        let shared = format!("--shared-dir={}", self.folder.display());
        // The one in C and the one in Rust take different words. A chroot keeps it one process, which can be killed.
        let arguments = match String::from_utf8_lossy(&help.stdout).contains("-o source=PATH") {
            true => ["-o", &source, "-o", "sandbox=chroot", "-o", "cache=none"]
                .map(str::to_owned)
                .to_vec(),
            false => [&shared, "--sandbox=chroot", "--cache=never"]
                .map(str::to_owned)
                .to_vec(),
        };
        let mut command = Command::new(&self.program);
        command.arg(format!("--fd={}", listener.as_raw_fd())).args(arguments);
        world.start_command(command, None)
    }
}

fn shared_folder(world: &World, share: &Share, guest: &mut Guest, virtiofsd: Running) {
    let mount = "mount -t virtiofs data /share";
    let used = run(
        world,
        &format!("mkdir /share && {mount} && cat /share/words && cp /there /share/copy && echo done"),
    );
    assert_eq!(used.expect_code(0).out(), "from the host\ndone\n");
    let copy = fs::read(share.folder.join("copy")).unwrap();
    assert!(copy == noise(3, FILE), "the guest wrote something else");

    virtiofsd.signal(rustix::process::Signal::KILL);
    virtiofsd.wait();
    guest
        .wait_for_news(
            "the lost back end",
            STEP,
            |news| matches!(news, DeviceNews::BackendLost { device, .. } if device == "share0"),
        )
        .unwrap();
    let _virtiofsd = share.serve(world);
    guest
        .wait_for_news(
            "the new back end",
            STEP,
            |news| matches!(news, DeviceNews::BackendRestored { device } if device == "share0"),
        )
        .unwrap();
    // The successor knows nothing of the session that was begun with the first one; a new one goes well.
    let lost = run(world, "cat /share/words").expect_code(1);
    assert!(lost.stderr.contains("Input/output error"), "{}", lost.stderr);
    let again = run(
        world,
        &format!("umount /share && {mount} && cat /share/words; umount /share"),
    );
    assert_eq!(again.expect_code(0).out(), "from the host\n");
}

/// What begins with it and does not go on is reset.
fn watchdog(world: &World, guest: &mut Guest) {
    // Closed without the magic letter, it goes on. Nobody asks how the shell ended: the guest may be gone by then.
    let _shell = start(world, "echo begin >/dev/watchdog");
    guest
        .wait_for_news(
            "the watchdog",
            STEP,
            |news| matches!(news, DeviceNews::WatchdogExpired { action } if action == "reset"),
        )
        .unwrap();
    guest.assert_ends_with(Reason::Reset, STEP).unwrap();
    let ended = world.guest(&["wait", "bee"]).expect_code(10);
    assert!(
        ended.stderr.contains("watchdog") || ended.out().contains("watchdog"),
        "{ended:?}"
    );
}

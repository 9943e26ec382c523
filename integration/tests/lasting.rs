//! Linux with everything that has another side on the host, in one boot, whose manager is killed and replaced: the agent, sockets, consoles, a tap device, and
//! a folder that virtiofsd shares. What the manager serves is there again with the next one; the rest never misses it.

#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::{
    fs,
    io::{Read, Write},
    net::UdpSocket,
    os::{
        fd::AsRawFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use rustix::process::Signal;
use sepal_integration::{Boot, Guest, Manager, artifacts, host::Namespace, initrd};
use sepal_schema::{
    config::device::{Backend, Console, Link, Network, Share, Vsock},
    news::DeviceNews,
};
use sepal_tests::{Finished, Running, World, process::Process, program, until};

/// Longer than any boot or step takes; they only ever make a test fail.
const BOOT: Duration = Duration::from_secs(200);
const STEP: Duration = Duration::from_secs(100);
/// Where the managers log to, in the world's folder.
const LOG: &str = "managers.log";
/// What the guest does besides: numbers on a console, and in the shared folder.
const COUNT: &str = "mkdir /share && mount -t virtiofs data /share || exit 1
    for port in /sys/class/virtio-ports/*; do
        [ -f $port/name ] && read -r name <$port/name && [ \"$name\" = port1 ] && break
    done
    exec </dev/null >/dev/${port##*/} 2>/dev/null; i=0
    while :; do i=$((i + 1)); echo $i; echo $i >/share/count; done &";

/// Once the host says so, another agent begins in the place of the first one.
const AGAIN: &str = "setsid sh -c 'until [ -f /share/now ]; do sleep 0.1; done; kill $(pidof sepal-agent)
    while pidof sepal-agent; do sleep 0.1; done; sepal-agent & echo >/share/begun' </dev/null >/dev/null 2>&1 &";

/// The host's side of all of it.
struct Scene {
    world: World,
    namespace: Namespace,
    folder: PathBuf,
    /// Where virtiofsd serves.
    shared: PathBuf,
    /// Where the guest's sockets are offered.
    sockets: PathBuf,
    /// Components end with it.
    keepers: Vec<Process>,
}

impl Scene {
    fn new() -> Self {
        let mut world = World::new();
        start_manager(&mut world);
        let (folder, shared) = (world.folder().join("shared"), world.folder().join("virtiofsd.sock"));
        fs::create_dir(&folder).unwrap();
        let sockets = world.folder().join("vsock");
        let listener = UnixListener::bind(format!("{}_5003", sockets.display())).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                thread::spawn(move || std::io::copy(&mut stream.try_clone().unwrap(), &mut stream));
            }
        });
        Self {
            world,
            namespace: Namespace::new().unwrap(),
            folder,
            shared,
            sockets,
            keepers: Vec::new(),
        }
    }

    /// Starts virtiofsd. It is handed a socket that listens, so there is nothing to wait for.
    fn virtiofsd(&self) -> Running {
        let program = artifacts::virtiofsd().unwrap();
        // The one of a virtiofsd that has ended.
        let _ = fs::remove_file(&self.shared);
        let listener = UnixListener::bind(&self.shared).unwrap();
        rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
        let help = Command::new(&program).arg("--help").output().unwrap();
        let folder = self.folder.display();
        // The one in C and the one in Rust take different words. A chroot keeps it one process, which can be killed.
        let arguments = match String::from_utf8_lossy(&help.stdout).contains("-o source=PATH") {
            true => vec!["-o".to_owned(), format!("source={folder},sandbox=chroot,cache=none")],
            false => vec![
                format!("--shared-dir={folder}"),
                "--sandbox=chroot".to_owned(),
                "--cache=never".to_owned(),
            ],
        };
        let mut command = Command::new(program);
        command.arg(format!("--fd={}", listener.as_raw_fd())).args(arguments);
        self.world.start_command(command, None)
    }

    fn launch(&mut self) {
        let agent = fs::read(artifacts::agent().unwrap()).unwrap();
        let initrd = initrd(
            &artifacts::initramfs().unwrap(),
            &[("bin/sepal-agent", agent.as_slice())],
        )
        .unwrap();
        let tap = self.namespace.tap("tap0", "10.0.0.1/24").unwrap();
        let boot = Boot::new()
            .kernel(artifacts::kernel().unwrap().vmlinux)
            .initrd(initrd.path())
            .cmdline("console=ttyS0 panic=-1 quiet sepal.agent sepal.run=idle")
            .memory_mib(192)
            .network(Network::new(Link::Tap(vec![tap])))
            .configure(|config| {
                config.name = "bee".into();
                config.durable = true;
                config.agent = true;
                config.vsock = Some(Vsock {
                    socket_path: self.sockets.display().to_string(),
                    ..Vsock::default()
                });
                config.console = Some(Console {
                    ports: 2,
                    ..Console::default()
                });
                config.shares.push(Share {
                    tag: "data".into(),
                    backend: Backend::Path(self.shared.display().to_string()),
                    queues: 0,
                });
            });
        let mut manager = self.manager();
        let mut request = manager.launch_request(boot).unwrap();
        request.get().set_detach(true);
        let launched = manager.within(STEP, request.send().promise).unwrap().unwrap().unwrap();
        assert!(!launched.get().unwrap().has_error());
        self.note_keeper();
    }

    /// A connection to the manager that there is.
    fn manager(&self) -> Manager {
        Manager::connect(&self.world.socket()).unwrap()
    }

    fn guest(&self) -> Guest {
        self.manager().find("bee").unwrap()
    }

    fn note_keeper(&mut self) {
        let info = self.guest().info().unwrap();
        let component = Process::of(info.component_pid).unwrap();
        self.keepers.push(Process::of(component.parent).unwrap());
    }

    fn kill_manager(&mut self) {
        let manager = self.world.take_manager();
        manager.signal(Signal::KILL);
        assert_eq!(manager.wait().code(), 128 + 9);
    }

    /// Runs a shell's commands in the guest to their end.
    fn run(&self, script: &str) -> Finished {
        self.world.guest(&["exec", "bee", "--", "sh", "-c", script])
    }

    /// Waits until the guest answers to packets: nobody is at the port that they go to, which it says.
    fn reach_by_network(&self) {
        let answers = || {
            let socket = UdpSocket::bind("10.0.0.1:0").unwrap();
            socket.connect("10.0.0.2:9").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
            let refused = |error: std::io::Error| error.kind() == std::io::ErrorKind::ConnectionRefused;
            socket.send(b"?").is_err_and(refused) || socket.recv(&mut [0]).is_err_and(refused)
        };
        until("the guest answers on the network", || {
            self.namespace.enter(answers).unwrap().then_some(())
        });
    }

    /// How far the guest has counted in the shared folder.
    fn count(&self) -> u64 {
        let text = fs::read_to_string(self.folder.join("count")).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }

    fn until_it_counts_on(&self) {
        let before = self.count();
        until("the guest writes to the shared folder", || {
            (self.count() > before).then_some(())
        });
    }

    /// Everything that the manager serves, and what it does not.
    fn everything_works(&self, word: &str) {
        let echo = format!("echo {word} | vsock connect 5003");
        assert_eq!(self.run(&echo).expect_code(0).out(), format!("{word}\n"));
        let mut stream = UnixStream::connect(&self.sockets).unwrap();
        stream.set_read_timeout(Some(STEP)).unwrap();
        stream.write_all(b"CONNECT 1024\n").unwrap();
        let mut answer = [0; 3];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"OK ");
        let path = self.world.folder().join("file");
        fs::write(&path, word).unwrap();
        let path = path.to_str().unwrap();
        self.world.guest(&["cp", path, "bee:/there"]).expect_code(0);
        self.world.guest(&["cp", "bee:/there", path]).expect_code(0);
        assert_eq!(fs::read_to_string(path).unwrap(), word);
        self.reach_by_network();
        let reading = "exec </dev/hvc0; echo open; read -r line; echo $line";
        let running = self.world.start(&["exec", "bee", "--", "sh", "-c", reading]);
        running.stdout.expect("open\n");
        self.guest().type_on_console(0, &format!("{word}\n")).unwrap();
        assert_eq!(running.wait().expect_code(0).out(), format!("open\n{word}\n"));
    }

    fn set_up(&self) {
        self.run("ifconfig lo up; ifconfig eth0 10.0.0.2 up").expect_code(0);
        self.run(COUNT).expect_code(0);
        self.until_it_counts_on();
    }

    fn end(mut self, virtiofsd: Running) {
        self.note_keeper();
        self.world.guest(&["end-manager"]).expect_code(0);
        self.world.take_manager().wait().expect_code(0);
        virtiofsd.wait();
        self.world.assert_nothing_left();
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!(
                "{}",
                fs::read_to_string(self.world.folder().join(LOG)).unwrap_or_default()
            );
        }
        for keeper in self.keepers.iter().filter(|keeper| keeper.exists()) {
            keeper.signal(Signal::KILL);
        }
    }
}

/// Starts a manager whose standard error is a file: its keeper, which has it too, outlives it.
fn start_manager(world: &mut World) {
    let (log, state) = (world.folder().join(LOG), world.state());
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" \"$@\" 2>> \"$LOG\""]);
    command.arg(program("guest-manager")).env("LOG", log);
    world.start_manager_by(command, |command, socket, ready| {
        command.arg("--socket").arg(socket).arg("--ready-fd").arg(ready);
        command.arg("--state").arg(state);
    });
}

/// Checks that a port printed numbers that follow each other; returns the position after the last whole one, and the number that comes next.
fn check_numbers(guest: &mut Guest, next: u64) -> u64 {
    let text = guest
        .wait_for_on_console(1, &format!("\n{}\n", next + 20), STEP)
        .unwrap();
    let (whole, _) = text.rsplit_once('\n').unwrap();
    let mut last = None;
    for line in whole.lines() {
        let number: u64 = line.trim().parse().unwrap_or_else(|_| panic!("{line:?}"));
        if let Some(last) = last {
            assert_eq!(number, last + 1, "the port's output has a gap");
        }
        last = Some(number);
    }
    last.unwrap() + 1
}

fn guest_ready(news: &DeviceNews) -> bool {
    *news == DeviceNews::GuestReady
}

#[test]
fn linux_goes_on_with_all_that_it_has_on_the_host() {
    if !Path::new("/dev/kvm").exists() {
        println!("skipped: no /dev/kvm");
        return;
    }
    let mut scene = Scene::new();
    let virtiofsd = scene.virtiofsd();
    scene.launch();
    scene.guest().wait_for_news("the agent", BOOT, guest_ready).unwrap();
    scene.set_up();
    scene.everything_works("first");
    let next = check_numbers(&mut scene.guest(), 0);

    scene.kill_manager();
    // What nobody in the middle is needed for.
    scene.until_it_counts_on();
    scene.reach_by_network();
    start_manager(&mut scene.world);
    scene.everything_works("second");
    check_numbers(&mut scene.guest(), next);

    // An agent that begins while nobody hears it, and a back end that ends while nobody could connect to its successor.
    scene.run(AGAIN).expect_code(0);
    scene.kill_manager();
    fs::write(scene.folder.join("now"), "").unwrap();
    until("another agent begins", || {
        scene.folder.join("begun").exists().then_some(())
    });
    virtiofsd.signal(Signal::KILL);
    virtiofsd.wait();
    let virtiofsd = scene.virtiofsd();
    start_manager(&mut scene.world);
    let mut guest = scene.guest();
    guest
        .wait_for_news(
            "the new back end",
            STEP,
            |news| matches!(news, DeviceNews::BackendRestored { device } if device == "share0"),
        )
        .unwrap();
    scene.everything_works("third");

    // From what the first manager was given.
    let reset = scene.world.start(&["reset", "bee"]);
    // It ends with its connection.
    virtiofsd.wait();
    let virtiofsd = scene.virtiofsd();
    reset.wait().expect_code(0);
    until("the agent of the second run", || {
        // Not from the news: agents of the first run are in it, too.
        let answered = scene.run("true").code() == 0;
        answered.then_some(())
    });
    assert_eq!(scene.guest().info().unwrap().generation, 2);
    scene.set_up();
    scene.everything_works("fourth");
    scene.end(virtiofsd);
}

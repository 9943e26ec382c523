//! A guest with devices that have another side on the host: who has that after the manager was killed, and which of it a restart brings back.
//!
//! ```text
//!   guest, stage N:  sockets both ways - a line through each port - balloon - disk --> waits for the byte N in memory shared with the test
//!   test:                                                manager killed, byte N <--'
//!   guest:           prints by itself, while there is no manager --> says so in memory --> waits for a line --> stage N + 1
//! ```

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::{
        linux::net::SocketAddrExt,
        unix::{
            fs::FileExt,
            net::{SocketAddr, UnixDatagram, UnixListener, UnixStream},
        },
    },
    path::PathBuf,
    thread,
};

use capnp::capability::FromClientHook;
use rustix::fs::MemfdFlags;
use sepal_schema::{
    config::{
        self, GuestConfig, Limits, MemoryBacking, OnReset, Pin,
        device::{Balloon, Console, Disk, DiskMode, Rng, Vsock},
    },
    guest_capnp::{output, serial},
    info::GuestStatus,
};
use sepal_tests::{PATIENCE, kvm_missing, until};
use serde_json::Value;

use crate::scene::Scene;

/// Where the memory is that is shared with the test.
const SHARED: u64 = 1 << 30;
/// Its bytes.
const SHARED_BYTES: u64 = 1 << 20;
/// Where in it the guest tells that it has gone on alone.
const ALONE: u64 = 4096;
/// Ports of the console.
const PORTS: u16 = 3;
const MIB: u64 = 1 << 20;

/// The guest with everything, and the host's side of it.
struct Bee {
    scene: Scene,
    /// Of the serial port's output, after what was read.
    position: u64,
    /// The same, of the console's ports.
    positions: [u64; PORTS as usize],
    memory: File,
    image: PathBuf,
    sockets: PathBuf,
}

/// What the guest is to do, from stage to stage.
fn script() -> String {
    let stage = |n: u64| {
        let (alone, told) = (SHARED + ALONE, n + 1);
        format!(
            "vsock-echo:1024:2000,vsock-listen:700,console-ports:stage{n},balloon:256,blk-rw:{n},mem-wait:{SHARED:#x}:{n},\
             vsock-refused:9,console-say:1:alone{n},say:alone{n},mem-fill:{alone:#x}:1:{told},serial-line"
        )
    };
    format!("run={},{},hang", stage(1), stage(2))
}

impl Bee {
    fn launch() -> Self {
        let scene = Scene::new();
        let memory = memory(&[0; SHARED_BYTES as usize]);
        let image = scene.world.folder().join("image");
        File::create(&image).unwrap().set_len(8 * MIB).unwrap();
        let sockets = scene.world.folder().join("vsock");
        serve_echoes(&beside(&sockets, 1024));
        let mut bee = Self {
            scene,
            position: 0,
            positions: [0; PORTS as usize],
            memory,
            image,
            sockets,
        };
        let config = bee.config();
        bee.scene.launch(config);
        bee
    }

    fn config(&self) -> GuestConfig {
        let open = File::options().read(true).write(true).open(&self.image);
        let mut disk = Disk::new(config::File::Fd(open.unwrap().into()), DiskMode::ReadWrite);
        disk.id = "root".into();
        disk.format = config::device::DiskFormat::Raw;
        GuestConfig {
            kernel: config::File::Fd(memory(sepal_driver_guest::IMAGE).into()),
            cmdline: script(),
            cpus: 2,
            memory_mib: 128,
            custom_memory: vec![MemoryBacking {
                memfd: self.memory.try_clone().unwrap().into(),
                start: SHARED,
                end: SHARED + SHARED_BYTES,
            }],
            disks: vec![disk],
            console: Some(Console {
                ports: PORTS,
                ..Console::default()
            }),
            rng: Some(Rng::default()),
            balloon: Some(Balloon::default()),
            vsock: Some(Vsock {
                cid: cid(),
                socket_path: self.sockets.display().to_string(),
                ..Vsock::default()
            }),
            pins: vec![Pin {
                vcpu: 1,
                cpus: vec![last_processor()],
            }],
            limits: Limits {
                tasks: 100,
                ..Limits::default()
            },
            on_reset: OnReset::Restart,
            ..Scene::config("bee")
        }
    }

    /// Waits until the guest has printed this, after what was waited for before.
    #[track_caller]
    fn expect(&mut self, text: &str) -> String {
        let guest = self.scene.rpc.lookup("bee").unwrap();
        let printed = self.scene.rpc.read_on(&guest, &mut self.position, text);
        assert!(
            printed.contains(text) && !printed.contains("fail "),
            "{text:?} is not in {printed:?}"
        );
        let after = printed.find(text).unwrap() + text.len();
        self.position -= (printed.len() - after) as u64;
        printed[..after].to_owned()
    }

    fn type_line(&mut self, port: Option<u16>, text: &str) {
        let guest = self.scene.rpc.lookup("bee").unwrap();
        let serial: serial::Client = match port {
            None => guest.serial_request().send().pipeline.get_serial(),
            Some(port) => {
                let mut request = guest.console_request();
                request.get().set_port(port.into());
                request.send().pipeline.get_console().cast_to()
            }
        };
        let mut request = serial.write_request();
        request.get().set_bytes(format!("{text}\n").as_bytes());
        self.scene.rpc.wait("typing", request.send()).unwrap();
    }

    /// Waits until a port of the console has printed this, and nothing else, after what was waited for before.
    #[track_caller]
    fn expect_of_port(&mut self, port: u16, line: &str) {
        let guest = self.scene.rpc.lookup("bee").unwrap();
        let mut request = guest.console_request();
        request.get().set_port(port.into());
        let console: output::Client = request.send().pipeline.get_console().cast_to();
        let (mut printed, position) = (Vec::new(), &mut self.positions[usize::from(port)]);
        while printed.len() < line.len() {
            let mut request = console.read_request();
            request.get().set_position(*position);
            let answer = self.scene.rpc.wait(line, request.send().promise).unwrap();
            let piece = answer.get().unwrap();
            assert!(!piece.get_ended(), "port {port} printed only {printed:?}");
            let bytes = piece.get_bytes().unwrap();
            *position += bytes.len() as u64;
            printed.extend_from_slice(bytes);
        }
        assert_eq!(String::from_utf8(printed).unwrap(), line, "on port {port}");
    }

    /// What the guest does in a stage, up to where it waits for its byte.
    #[track_caller]
    fn stage(&mut self, n: u64) {
        self.expect("ok vsock-echo");
        self.expect("waiting vsock-listen");
        assert_eq!(echo_from_guest(&self.sockets), "to the guest and back");
        self.expect("ok vsock-listen");
        for port in 0..PORTS {
            self.expect_of_port(port, &format!("stage{n}-{port}\n"));
            self.type_line(Some(port), &format!("typed{port}"));
        }
        let got = self.expect("\nok console-ports names=console+port1+port2 got=typed0+typed1+typed2");
        assert!(!got.contains("got=typed0+typed1+typed2+"), "{got}");
        self.expect("waiting balloon inflate");
        self.cli(&["balloon", "set", "bee", "1M"]);
        self.expect("waiting balloon deflate pages=256");
        self.cli(&["balloon", "set", "bee", "0"]);
        self.expect("ok balloon pages=256 kept=0");
        self.expect("ok blk-rw");
        self.expect("waiting mem-wait");
    }

    /// Lets the guest go on to the end of the stage, and waits until it is there.
    fn go_on_alone(&mut self, n: u8) {
        self.memory.write_all_at(&[n], 0).unwrap();
        until("the guest goes on without its manager", || {
            let mut told = [0];
            self.memory.read_exact_at(&mut told, ALONE).unwrap();
            (told[0] == n + 1).then_some(())
        });
    }

    /// What was printed to the end of the stage is there, once.
    #[track_caller]
    fn went_on_alone(&mut self, n: u64) {
        let printed = self.expect("ok mem-fill");
        for word in ["ok vsock-refused\r\n", &format!("ok say alone{n}\r\n")] {
            assert_eq!(printed.matches(word).count(), 1, "{word:?} in {printed:?}");
        }
        self.expect_of_port(1, &format!("alone{n}\n"));
        self.type_line(None, "go on");
        self.expect("ok serial-line got=go on");
    }

    #[track_caller]
    fn cli(&self, arguments: &[&str]) -> String {
        self.scene.world.guest(arguments).expect_code(0).out()
    }

    #[track_caller]
    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.cli(&[arguments, &["--json"]].concat())).unwrap()
    }

    /// What a guest's owner can look at, without what passes by itself.
    #[track_caller]
    fn view(&self) -> Vec<(&'static str, Value)> {
        let mut info = self.json(&["info", "bee"]);
        for passing in ["uptimeSeconds", "uptimeNs"] {
            info.as_object_mut().unwrap().remove(passing);
        }
        let mut cpu = self.json(&["cpu", "bee"]);
        for vcpu in cpu["vcpus"].as_array_mut().unwrap() {
            for passing in ["cpuTimeNs", "state", "lastCpu", "hostCpu", "waitTimeNs", "switches"] {
                vcpu.as_object_mut().unwrap().remove(passing);
            }
        }
        vec![
            ("info", info),
            ("cpu", cpu),
            ("configuration", self.cli(&["info", "bee", "--toml"]).into()),
            ("disks", self.json(&["disk", "list", "bee"])),
            ("shares", self.json(&["shares", "bee"])),
        ]
    }
}

/// A file of memory with this in it.
fn memory(content: &[u8]) -> File {
    let file = File::from(rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(content, 0).unwrap();
    file
}

/// A context id that nobody chooses.
fn cid() -> u32 {
    0x5000_0000 + std::process::id()
}

fn last_processor() -> u16 {
    let set = rustix::thread::sched_getaffinity(None).unwrap();
    (0..1024).rev().find(|cpu| set.is_set(usize::from(*cpu))).unwrap()
}

fn beside(sockets: &std::path::Path, port: u32) -> PathBuf {
    PathBuf::from(format!("{}_{port}", sockets.display()))
}

/// Sends back to everyone who connects what they send.
fn serve_echoes(path: &std::path::Path) {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || std::io::copy(&mut stream.try_clone().unwrap(), &mut stream));
        }
    });
}

/// Connects to the guest as clients of Firecracker do; what comes back.
#[track_caller]
fn echo_from_guest(sockets: &std::path::Path) -> String {
    let mut stream = UnixStream::connect(sockets).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"CONNECT 700\nto the guest and back").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut back = String::new();
    stream.read_to_string(&mut back).unwrap();
    let (answer, back) = back.split_once('\n').unwrap();
    assert!(answer.starts_with("OK "), "{answer}");
    back.to_owned()
}

/// The numbers in figures, by their place.
fn numbers(figures: &Value, place: &str, found: &mut Vec<(String, f64)>) {
    match figures {
        Value::Number(number) => found.push((place.to_owned(), number.as_f64().unwrap())),
        Value::Array(all) => {
            for (i, value) in all.iter().enumerate() {
                numbers(value, &format!("{place}[{i}]"), found);
            }
        }
        Value::Object(all) => {
            for (name, value) in all {
                numbers(value, &format!("{place}.{name}"), found);
            }
        }
        _ => {}
    }
}

/// Checks that nothing that is counted has become less.
#[track_caller]
fn check_counters(before: &Value, after: &Value) {
    let (mut earlier, mut later) = (Vec::new(), Vec::new());
    numbers(before, "", &mut earlier);
    numbers(after, "", &mut later);
    assert_eq!(earlier.len(), later.len(), "{before} {after}");
    for ((place, earlier), (_, later)) in earlier.into_iter().zip(later) {
        let passes = ["age", "resident", "memory", "balloon", "wss", "proportional"];
        let counts = !passes.iter().any(|word| place.to_lowercase().contains(word));
        assert!(!counts || later >= earlier, "{place}: {earlier}, then {later}");
    }
}

#[test]
fn devices_have_their_other_side_after_takeover_and_restart() {
    if kvm_missing() {
        return;
    }
    let mut bee = Bee::launch();
    bee.stage(1);
    bee.cli(&["share", "bee", "disk", "--label", "for later"]);
    bee.cli(&["disk", "resize", "bee", "root", "16M"]);
    bee.cli(&["pin", "bee", &format!("0={}", last_processor())]);
    let (view, figures) = (bee.view(), bee.json(&["stats", "bee"]));

    bee.scene.kill_manager();
    bee.go_on_alone(1);
    let name = SocketAddr::from_abstract_name(format!("sepal/cid/{}", cid())).unwrap();
    assert!(
        UnixDatagram::bind_addr(&name).is_err(),
        "nobody else gets the context id"
    );
    bee.scene.start_manager();
    // At once: nobody has to wait for what is there.
    for ((what, before), (_, after)) in view.iter().zip(bee.view()) {
        assert_eq!(before, &after, "{what}");
    }
    check_counters(&figures, &bee.json(&["stats", "bee"]));
    bee.went_on_alone(1);
    bee.stage(2);
    others_are_kept_away(&bee);

    // The same again, from what the first manager was given.
    bee.memory.write_all_at(&[0], 0).unwrap();
    let image = fs::metadata(&bee.image).unwrap();
    assert_eq!(image.len(), 16 * MIB);
    bee.cli(&["reset", "bee"]);
    bee.scene.until("bee", "it runs again", |info| {
        info.generation == 2 && info.status == GuestStatus::Running
    });
    bee.stage(1);
    bee.scene.kill_manager();
    bee.go_on_alone(1);
    bee.scene.start_manager();
    bee.went_on_alone(1);
    bee.stage(2);
    let cpu = bee.json(&["cpu", "bee"]);
    for vcpu in cpu["vcpus"].as_array().unwrap() {
        assert_eq!(vcpu["cpus"], Value::from(vec![last_processor()]), "{cpu}");
    }
    let sockets = bee.sockets.clone();
    // Whatever was held for it can be had again when it has ended.
    for _ in 0..5 {
        bee.cli(&["stop", "bee", "--force"]);
        let config = bee.config();
        bee.scene.launch(config);
    }
    bee.scene.end();
    assert!(!sockets.exists(), "the socket's file is gone with the guest");
}

/// What the guest has, nobody else gets.
#[track_caller]
fn others_are_kept_away(bee: &Bee) {
    let world = &bee.scene.world;
    let (image, sockets) = (bee.image.display(), bee.sockets.display());
    for (option, words) in [
        (format!("--disk={image}"), "guest \"bee\" writes to it"),
        (format!("--vsock={}", cid()), "guest \"bee\" has the context id"),
        (format!("--vsock=0,socket={sockets}"), "ALREADY_BOUND"),
    ] {
        let refused = world.guest(&["launch", "other", &option]).expect_code(1);
        assert!(refused.stderr.contains(words), "{}", refused.stderr);
    }
}

//! A guest manager on another machine: the whole command line over a connection that carries bytes alone.
//!
//! A script stands in for ssh: it takes ssh's arguments, and lets a shell run the rest, as sshd does. What is between is two pipes, which cannot carry
//! a descriptor.

use std::{fs, os::unix::fs::PermissionsExt, process::Command};

use rustix::process::Signal;
use sepal_tests::{Finished, Pty, Running, World, kvm_missing, program, until};
use serde_json::Value;

use crate::{BANNER, PROMPT};

/// A world that is talked to through the stand-in.
struct Far(World);

impl Far {
    fn new(world: World) -> Self {
        let folder = program("guest");
        let folder = folder.parent().unwrap().display();
        let log = world.folder().join("ssh.log");
        let script = format!(
            "#!/bin/sh\necho \"$*\" >>{}\n\
             while :; do case \"$1\" in -p) shift 2;; --) shift; break;; -*) shift;; *) exit 255;; esac; done\n\
             shift\nPATH={folder}:$PATH exec sh -c \"$*\"\n",
            log.display()
        );
        let path = world.folder().join("ssh");
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        Self(world)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.0.command(arguments);
        command
            .env("SEPAL_SSH", self.0.folder().join("ssh"))
            .env("SEPAL_MANAGER", "ssh://me@there:2222");
        command
    }

    fn start(&self, arguments: &[&str]) -> Running {
        self.0.start_command(self.command(arguments), None)
    }

    #[track_caller]
    fn guest(&self, arguments: &[&str]) -> Finished {
        let mut running = self.start(arguments);
        running.close_input();
        running.wait()
    }

    #[track_caller]
    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.guest(arguments).expect_code(0).out()).unwrap()
    }

    fn pty(&self, arguments: &[&str]) -> Pty {
        self.0.pty_of(self.command(arguments))
    }
}

/// The commands that help names.
fn commands(help: &str) -> Vec<&str> {
    let lines = help.lines().filter_map(|line| line.strip_prefix("  "));
    let names = lines.filter_map(|line| line.split_once("  ").map(|(name, _)| name));
    let plain = |name: &&str| !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase() || c == '-');
    names.filter(plain).filter(|name| !name.starts_with('-')).collect()
}

#[test]
fn every_command_works_where_no_descriptor_can_be_passed() {
    if kvm_missing() {
        return;
    }
    let far = Far::new(World::with_manager());
    let image = far.0.folder().join("image");
    fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let image = image.to_str().unwrap();
    let mut said = Vec::new();
    let mut run = |arguments: &[&str], code: i32, words: &str| {
        let finished = far.guest(arguments).expect_code(code);
        let all = format!("{}{}", finished.out(), finished.stderr);
        assert!(all.contains(words), "{words:?} of {arguments:?}: {all}");
        said.push(arguments[0].to_owned());
        finished.out().trim_end().to_owned()
    };
    // The same image, by the path that it has over there.
    let disk = format!("--disk=path:{image}");
    let launch = [
        "launch",
        "bee",
        "--detach",
        &disk,
        "--balloon",
        "--memory-device=64M",
        "--console=2",
        "--vsock",
        "--no-agent",
        "--net=user",
    ];
    run(&launch, 0, "bee");
    run(&["list"], 0, "running");
    run(&["info", "bee"], 0, "disk0");
    run(&["events", "bee", "--no-follow"], 0, "started");
    run(&["stats", "bee"], 0, "VCPU");
    run(&["registers", "bee"], 0, "rip");
    run(&["top", "--once"], 0, "bee");
    run(&["metrics"], 0, "# EOF");
    run(&["cpu", "bee"], 0, "VCPU");
    run(&["pin", "bee"], 0, "");
    run(&["peek", "bee", "--physical", "0x1000", "16"], 0, "");
    run(&["stack", "bee"], 0, "");
    run(&["pressure"], 0, "");
    run(&["doctor"], 0, "");
    run(&["version"], 0, "protocol 1");
    run(&["whoami"], 0, "admin");
    run(&["balloon", "set", "bee", "16M"], 0, "");
    run(&["balloon", "stats", "bee"], 0, "16 MiB");
    run(&["mem", "request", "bee", "4M"], 0, "");
    run(&["mem", "show", "bee"], 0, "requested  4 MiB");
    run(&["disk", "resize", "bee", "disk0", "16M"], 0, "");
    run(&["disk", "list", "bee"], 0, "16M");
    run(&["net", "link", "bee", "net0", "down"], 0, "");
    run(&["net", "list", "bee"], 0, "down");
    run(&["vsock", "connect", "bee", "7"], 1, "CONNECTION_REFUSED");
    run(&["exec", "bee", "true"], 1, "DEVICE_NOT_PRESENT");
    run(&["cp", "bee:/etc/hosts", image], 1, "DEVICE_NOT_PRESENT");
    run(&["pause", "bee"], 0, "");
    run(&["list"], 0, "paused");
    run(&["resume", "bee"], 0, "");
    let token = run(&["share", "bee", "console", "--port", "1"], 0, "guest revoke bee 1");
    run(&["shares", "bee"], 0, "console");
    run(&["redeem", &token, "describe"], 0, "input");
    run(&["revoke", "bee", "all"], 0, "");
    run(&["redeem", &token, "describe"], 1, "NOT_FOUND");
    run(&["launch", "ant", "--detach"], 0, "ant");
    run(&["reset", "ant"], 0, "");

    run(&["info", "ant", "--toml"], 0, "name = \"ant\"");

    // Files of a definition are the other machine's.
    let relative = far.guest(&["define", "fly", "--disk=fly.img"]).expect_code(1);
    assert!(relative.stderr.contains("has to begin with '/'"), "{}", relative.stderr);
    let (file, own) = (far.0.folder().join("fly.toml"), far.0.folder().join("fly.img"));
    fs::copy(image, &own).unwrap();
    let own = own.display();
    fs::write(&file, format!("[[disk]]\nfile = \"path:{own}\"\nmode = \"ro\"\n")).unwrap();
    run(&["define", "fly", "-f", file.to_str().unwrap()], 0, "");
    run(&["definition", "fly"], 0, &format!("file = \"path:{own}\""));
    run(&["autostart", "fly", "on"], 0, "");
    run(&["start", "fly"], 0, "");
    run(&["undefine", "fly"], 0, "");
    run(&["stop", "fly", "--kill"], 0, "fly: ");

    // Ports are typed into and read: at a terminal, and without one.
    let mut terminal = far.pty(&["attach", "ant"]);
    terminal.expect("connected to ant");
    terminal.type_in("echo good day\r");
    terminal.expect("\ngood day\r\n");
    terminal.type_in("\x1d");
    assert_eq!(terminal.wait().code(), Some(0));
    terminal.expect("detached from ant");
    let mut console = far.pty(&["console", "bee:1"]);
    console.expect("connected to bee");
    console.type_in("\x1d");
    assert_eq!(console.wait().code(), Some(0));
    run(&["logs", "ant"], 0, "good day");
    let waiting = far.start(&["wait", "ant"]);
    run(&["stop", "ant", "--kill"], 0, "ant: ");
    waiting.wait().expect_code(12);
    run(&["remove", "ant"], 0, "");
    // This guest takes it for its end.
    run(&["nmi", "bee"], 0, "");
    run(&["wait", "bee"], 10, "reset");
    run(&["completions", "bash"], 0, "complete");
    run(&["end-manager"], 0, "");

    said.extend(["attach", "console", "wait"].map(String::from));
    let help = far.guest(&["--help"]).expect_code(0).out();
    let missing: Vec<_> = commands(&help)
        .into_iter()
        .filter(|name| !said.iter().any(|said| said == name))
        .collect();
    assert_eq!(missing, Vec::<&str>::new(), "commands that are not tried here");
    let log = fs::read_to_string(far.0.folder().join("ssh.log")).unwrap();
    assert!(
        log.lines()
            .all(|line| line.starts_with("-T -p 2222 -- me@there guest relay")),
        "{log}"
    );
    let mut world = far.0;
    world.take_manager().wait().expect_code(0);
    world.assert_nothing_left();
}

/// FNV-1a of 64 bits.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}

#[test]
fn files_are_uploaded_and_streams_reach_the_guest() {
    if kvm_missing() {
        return;
    }
    let far = Far::new(World::with_manager());
    let file = |name: &str, content: &[u8]| {
        let path = far.0.folder().join(name);
        fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let content: Vec<u8> = (0..300_000u32 / 512 * 512).map(|i| (i % 251) as u8).collect();
    let (kernel, disk) = (file("kernel", sepal_driver_guest::IMAGE), file("disk", &content));
    let disk = format!("--disk={disk},ro");
    let cmdline = "run=blk-sum,console-ports:hi,vsock-listen:700,vsock-bulk:1025:200000";
    let launch = [
        "launch",
        "bee",
        "--detach",
        "--kernel",
        &kernel,
        "--memory=128M",
        "--cmdline",
        cmdline,
        &disk,
        "--console=2",
        "--vsock",
        "--no-agent",
    ];
    far.guest(&launch).expect_code(0);
    let info = far.json(&["info", "bee", "--json"]);
    assert_eq!(info["kernel"], "upload", "{info}");
    let following = far.start(&["logs", "bee", "-f"]);
    let sum = following.stdout.expect("ok blk-sum").len() + following.stdout.expect("\n").len();
    let report = String::from_utf8(following.stdout.bytes()).unwrap();
    assert!(report[..].contains(&format!("{:x}", fnv(&content))), "{sum}: {report}");

    let mut consoles = [far.start(&["console", "bee:0"]), far.start(&["console", "bee:1"])];
    for (port, console) in consoles.iter_mut().enumerate() {
        console.type_in(&format!("line-{port}\n"));
    }
    following.stdout.expect("line-0+line-1");

    // Both ways: what is sent comes back, and the end is passed on.
    let listening = far.start(&["vsock", "listen", "bee", "1025"]);
    listening.stderr.expect("listening on port 1025");
    following.stdout.expect("waiting vsock-listen");
    let mut connected = far.start(&["vsock", "connect", "bee", "700"]);
    connected.type_in("to the guest and back");
    connected.close_input();
    assert_eq!(connected.wait().expect_code(0).out(), "to the guest and back");
    let report = following.stdout.expect("DONE");
    assert!(
        report.contains("ok vsock-listen") && report.contains("ok vsock-bulk"),
        "{report}"
    );
    assert_eq!(listening.wait().expect_code(0).stdout.len(), 200_000, "{report}");
    following.wait().expect_code(0);
    for console in consoles {
        console.wait().expect_code(0);
    }
    far.0.end();
}

#[test]
fn a_terminal_far_away_is_a_terminal() {
    if kvm_missing() {
        return;
    }
    // Nobody runs a manager there: one is started for this guest alone, and ends with it.
    let far = Far::new(World::new());
    let mut terminal = far.pty(&["launch"]);
    terminal.expect(PROMPT);
    assert!(terminal.screen.text().contains(BANNER) && !terminal.is_cooked());
    terminal.type_in("shutdown\r");
    assert_eq!(terminal.wait().code(), Some(0));
    assert!(terminal.is_cooked());
    far.0.assert_nothing_left();

    // One that stays.
    far.guest(&["launch", "bee", "--detach"]).expect_code(0);
    assert_eq!(far.json(&["list", "--json"])[0]["name"], "bee");
    far.guest(&["end-manager"]).expect_code(0);
    far.0.assert_nothing_left();
}

#[test]
fn who_may_only_watch_goes_on_watching_when_something_is_typed() {
    if kvm_missing() {
        return;
    }
    let far = Far::new(World::with_manager());
    far.guest(&["launch", "ant", "--detach"]).expect_code(0);
    let token = far
        .guest(&["share", "ant", "serial", "--only", "output"])
        .expect_code(0)
        .out();
    let mut watcher = far.pty(&["redeem", token.trim_end()]);
    watcher.expect("connected to");
    watcher.type_in("echo mine\r");
    let mut other = far.pty(&["attach", "ant"]);
    other.expect("connected to ant");
    other.type_in("echo theirs\r");
    let seen = watcher.expect("\ntheirs\r\n");
    assert!(!seen.contains("\nmine"), "{seen}");
    watcher.type_in("\x1d");
    assert_eq!(watcher.wait().code(), Some(0));
    other.type_in("\x1d");
    assert_eq!(other.wait().code(), Some(0));
    far.guest(&["stop", "ant", "--kill"]).expect_code(0);
    far.0.end();
}

#[test]
fn whatever_ends_the_command_ends_what_it_started() {
    if kvm_missing() {
        return;
    }
    let far = Far::new(World::with_manager());
    for signal in [Signal::KILL, Signal::TERM, Signal::INT] {
        let guest = far.start(&["launch", "bee"]);
        guest.stdout.expect(PROMPT);
        guest.signal(signal);
        let finished = guest.wait();
        assert_ne!(finished.code(), 0);
        // The lease was lost with the connection.
        let waited = far.guest(&["wait", "bee"]);
        assert_eq!(waited.code(), 12, "{}", waited.stderr);
        until("ssh and relay are gone", || {
            let family = far.0.family();
            (!family.iter().any(|process| process.cmdline.contains("relay"))).then_some(())
        });
    }
    far.0.end();
}

#[test]
fn what_cannot_be_done_from_afar_says_what_can() {
    if kvm_missing() {
        return;
    }
    let far = Far::new(World::with_manager());
    let image = far.0.folder().join("image");
    fs::write(&image, [0; 4096]).unwrap();
    let image = image.to_str().unwrap();
    let disk = format!("--disk={image}");
    let folder = format!("--kernel={}", far.0.folder().display());
    for (arguments, words) in [
        (&["launch", &disk][..], &["NOT_SUPPORTED", "path:", "volatile"][..]),
        (&["launch", &folder], &["uploading the kernel", "no regular file"]),
        (
            &["launch", "--kernel=path:/nonexistent"],
            &["NOT_FOUND", "/nonexistent"],
        ),
        (
            &["launch", "--kernel=/nonexistent"],
            &["opening the kernel /nonexistent"],
        ),
        (&["launch", "--share=home=fs.sock"], &["fs.sock", "begin with '/'"]),
        (
            &["--manager=ssh://there/nonexistent", "list"],
            &["status 1", "no guest manager runs", "/nonexistent"],
        ),
        (
            &["--ssh=/nonexistent/ssh", "list"],
            &["starting /nonexistent/ssh", "No such file"],
        ),
        (&["--ssh=false", "list"], &["false ended with status 1"]),
    ] {
        let finished = far.guest(arguments).expect_code(1);
        for word in words {
            assert!(
                finished.stderr.contains(word),
                "{word:?} of {arguments:?}: {}",
                finished.stderr
            );
        }
    }
    for address in ["ssh://-oProxyCommand=x/", "ssh://", "ssh://there:none", "http://there"] {
        let finished = far.guest(&["--manager", address, "list"]).expect_code(2);
        assert!(finished.stderr.contains("--manager"), "{}", finished.stderr);
    }
    far.0.end();
}

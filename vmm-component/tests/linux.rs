//! Linux on a bare machine, without manager, jail and protocol: it boots, uses all of its vCPUs, and ends as it should.
//!
//! On a host without hardware virtualization this is the test of `unassisted`: nothing of a boot there works without it.

#![allow(clippy::expect_used, reason = "what is not as expected fails the test")]

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use kvm_ioctls::Kvm;
use sepal_vmm_component::machine::{Happening, Hooks, HostKind, Machine, MachineConfig, MachineEvent};
use sepal_vmm_component::memory::{MIB, MemoryConfig};

/// A boot takes about 15 s on an idle host without hardware virtualization, under 1 s on others; a busy one takes its time.
const PATIENCE: Duration = Duration::from_secs(600);

/// What the script `integration/NAME/build` built and printed.
fn built(name: &str) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../integration/{name}/build"));
    let output = Command::new(&script)
        .stderr(Stdio::inherit())
        .output()
        .expect("the build script runs");
    assert!(output.status.success(), "{} failed", script.display());
    String::from_utf8(output.stdout).expect("a path").trim_end().to_owned()
}

/// A guest that was started, its console and its events.
struct Guest {
    machine: Machine,
    console: BufReader<UnixStream>,
    events: Receiver<MachineEvent>,
    seen: String,
}

impl Guest {
    /// `None`, with a word about it, on a machine without KVM.
    fn boot(vcpus: u8, action: &str) -> Option<Self> {
        if !Path::new("/dev/kvm").exists() {
            println!("skipped: no /dev/kvm");
            return None;
        }
        let host = if sepal_runner::host::is_unassisted() {
            HostKind::Unassisted
        } else {
            HostKind::Hardware
        };
        let (console, guest_end) = UnixStream::pair().expect("a socket pair");
        console.set_read_timeout(Some(PATIENCE)).expect("a read timeout");
        let config = MachineConfig {
            generation: 1,
            memory: MemoryConfig {
                size_bytes: 128 * MIB,
                custom: Vec::new(),
                huge_pages: false,
                device_bytes: 0,
            },
            vcpus,
            kernel: File::open(built("kernel") + "/vmlinux").expect("the kernel"),
            initrd: Some(File::open(built("initramfs")).expect("the initramfs")),
            cmdline: format!("console=ttyS0 quiet panic=-1 rodata=off sepal.run={action}"),
            serial: Some(guest_end.into()),
            host,
            devices: Vec::new(),
        };
        let (sender, events) = channel();
        let hooks = Hooks {
            thread_setup: Arc::new(|_| Ok(())),
            events: Arc::new(move |event| {
                // A test that is over wants no more news.
                let _ = sender.send(event);
            }),
        };
        let kvm = Kvm::new().expect("/dev/kvm opens");
        let mut machine = Machine::create(&kvm, config, hooks, &AtomicBool::new(false)).expect("the machine is made");
        machine.start().expect("the machine starts");
        Some(Self {
            machine,
            console: BufReader::new(console),
            events,
            seen: String::new(),
        })
    }

    /// Reads the console until a line contains `text`.
    fn await_line(&mut self, text: &str) {
        loop {
            let mut line = Vec::new();
            let len = self
                .console
                .read_until(b'\n', &mut line)
                .expect("console output in time");
            assert_ne!(len, 0, "the console closed before {text:?}:\n{}", self.seen);
            let line = String::from_utf8_lossy(&line).into_owned();
            self.seen += &line;
            if line.contains(text) {
                return;
            }
        }
    }

    /// Waits for the guest's end, and returns how it ended.
    fn finish(self) -> Happening {
        let ending = loop {
            let event = self.events.recv_timeout(PATIENCE).expect("the guest ends in time");
            if event.what.ends() {
                break event.what;
            }
        };
        let stopped = self.machine.join(PATIENCE);
        assert_eq!(stopped.stuck, Vec::<String>::new());
        ending
    }
}

#[test]
fn linux_runs_processes_that_keep_their_registers_and_their_place() {
    // vectors; trespass
    let Some(mut guest) = Guest::boot(1, "script:dmVjdG9ycyAmJiB0cmVzcGFzcwo=") else {
        return;
    };
    guest.await_line("USERSPACE cpus=1 ");
    guest.await_line("VECTORS ");
    assert!(guest.seen.contains("kept"), "{}", guest.seen);
    guest.await_line("TRESPASS refused");
    guest.await_line("SCRIPT exit=0");
    assert!(matches!(guest.finish(), Happening::Shutdown));
}

#[test]
fn linux_runs_on_two_vcpus_and_obeys_the_power_button() {
    let Some(mut guest) = Guest::boot(2, "button") else {
        return;
    };
    guest.await_line("USERSPACE cpus=2 ");
    guest.await_line("BUTTON waiting");
    guest.machine.press_power_button().expect("the guest runs");
    guest.await_line("BUTTON pressed");
    assert!(matches!(guest.finish(), Happening::Shutdown));
}

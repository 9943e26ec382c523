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
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use kvm_ioctls::Kvm;
use sepal_devices::virtio::rng::{Rng, RngConfig, RngHandle};
use sepal_vmm_component::machine::{
    DeviceSpec, Guards, Happening, Hooks, HostKind, Machine, MachineConfig, MachineEvent,
};
use sepal_vmm_component::memory::{MIB, MemoryConfig};

/// A boot takes about 15 s on an idle host without hardware virtualization, under 1 s on others; a busy one takes its time.
const PATIENCE: Duration = Duration::from_secs(600);

/// How often a vCPU is looked at while something is awaited of it.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Configurations of the kernel with drivers for virtio devices.
const WITH_VIRTIO: [&str; 6] = ["base", "smp", "acpi", "pci", "trim", "virtio"];

/// What the script `integration/NAME/build` built from `parts` (none: the default ones) and printed.
fn built(name: &str, parts: &[&str]) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../integration/{name}/build"));
    let output = Command::new(&script)
        .args(parts)
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
        Self::boot_with(vcpus, &[], action, Vec::new())
    }

    /// A kernel made from `parts`, with `devices` on the PCI bus.
    fn boot_with(vcpus: u8, parts: &[&str], action: &str, devices: Vec<DeviceSpec>) -> Option<Self> {
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
            kernel: File::open(built("kernel", parts) + "/vmlinux").expect("the kernel"),
            initrd: Some(File::open(built("initramfs", &[])).expect("the initramfs")),
            cmdline: format!("console=ttyS0 quiet panic=-1 rodata=off sepal.run={action}"),
            serial: Some(guest_end.into()),
            host,
            cpuid: None,
            devices,
            guards: Guards::default(),
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
        let mut machine = Machine::create(&kvm, config, hooks, &Arc::default()).expect("the machine is made");
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

    /// Whether this vCPU halts in the kernel: privilege level 0, in the upper half of the addresses.
    fn is_idle(&self, vcpu: u8) -> bool {
        let (sender, receiver) = channel();
        let show = move |dump| sender.send(dump).expect("the test waits");
        self.machine.registers(vcpu, show).expect("the guest runs");
        let dump = receiver.recv_timeout(PATIENCE).expect("an answer").expect("registers");
        dump.halted && dump.privilege() == 0 && dump.regs.rip >> 63 == 1
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
fn linux_runs_on_two_vcpus_gets_nmis_and_obeys_the_power_button() {
    let Some(mut guest) = Guest::boot(2, "button") else {
        return;
    };
    guest.await_line("USERSPACE cpus=2 ");
    guest.await_line("BUTTON waiting");
    // Nothing is left to do for either vCPU, which the kernel's idle loop shows.
    for vcpu in 0..2 {
        while !guest.is_idle(vcpu) {
            // Being looked at all the time would keep it from getting there.
            std::thread::sleep(LOOK_INTERVAL);
        }
    }
    guest.machine.nmi().expect("the guest runs");
    for _ in 0..2 {
        guest.await_line("Dazed and confused, but trying to continue");
    }
    for vcpu in 0..2 {
        assert!(guest.seen.contains(&format!(" on CPU {vcpu}.")), "{}", guest.seen);
    }
    guest.machine.press_power_button().expect("the guest runs");
    guest.await_line("BUTTON pressed");
    assert!(matches!(guest.finish(), Happening::Shutdown));
}

/// An entropy device, and what tells its counters.
fn entropy(n: usize) -> (DeviceSpec, RngHandle) {
    let (device, handle) = Rng::new(RngConfig::default()).expect("an entropy device");
    let spec = DeviceSpec {
        name: format!("rng{n}"),
        device: Box::new(device),
    };
    (spec, handle)
}

/// The way that few take, since the other tests of Linux take ECAM and messages: ports and pins. The second device is taken from its driver, which
/// resets it, and given back.
#[test]
fn linux_drives_devices_by_ports_and_pins_too() {
    let (devices, handles): (Vec<_>, Vec<_>) = (0..2).map(entropy).unzip();
    // d=/sys/bus/virtio/drivers/virtio_rng
    // echo virtio1 > $d/unbind
    // echo virtio1 > $d/bind
    // echo virtio_rng.1 > /sys/class/misc/hw_random/rng_current
    // dd if=/dev/hwrng bs=64 count=4 | wc -c
    // grep virtio /proc/interrupts
    let script = "ZD0vc3lzL2J1cy92aXJ0aW8vZHJpdmVycy92aXJ0aW9fcm5nCmVjaG8gdmlydGlvMSA+ICRkL3VuYmluZAplY2hvIHZpcnRpbzEgPiAkZC9iaW5kCmVjaG8gdmlydGlvX3JuZy4xID4gL3N5cy9jbGFzcy9taXNjL2h3X3JhbmRvbS9ybmdfY3VycmVudApkZCBpZj0vZGV2L2h3cm5nIGJzPTY0IGNvdW50PTQgfCB3YyAtYwpncmVwIHZpcnRpbyAvcHJvYy9pbnRlcnJ1cHRzCg==";
    let action = format!("script:{script} pci=nommconf,nomsi");
    let Some(mut guest) = Guest::boot_with(1, &WITH_VIRTIO, &action, devices) else {
        return;
    };
    guest.await_line("SCRIPT exit=0");
    let seen = &guest.seen;
    assert!(seen.lines().any(|line| line.trim() == "256"), "{seen}");
    for line in ["17-fasteoi", "18-fasteoi"] {
        assert!(seen.contains(line), "{seen}");
    }
    assert!(!seen.contains("PCI-MSI"), "{seen}");
    assert!(matches!(guest.finish(), Happening::Shutdown));
    assert!(handles[1].stats().bytes >= 256, "{:?}", handles[1].stats());
}

//! Boots Linux on a machine without jail, manager or protocol, and copies its console to standard output with the time since the start.
//!
//! `boot_linux KERNEL INITRAMFS [vcpus=1] [mib=128] [button=TEXT] [type=TEXT] [limit=SECONDS] [rng=0] [-- COMMAND LINE]`
//!
//! `rng=` is the number of entropy devices on the PCI bus.
//! `button=` presses the power button when that text was seen on the console, `type=` writes a line to the console when `guest# ` was.

#![allow(clippy::expect_used, reason = "what is not as expected fails the program")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use sepal_devices::virtio::rng::{Rng, RngConfig};
use sepal_vmm_component::machine::{DeviceSpec, Guards, Hooks, HostKind, Machine, MachineConfig};
use sepal_vmm_component::memory::{MIB, MemoryConfig};

fn main() {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (options, words) = match arguments.iter().position(|word| word == "--") {
        Some(at) => (&arguments[..at], &arguments[at + 1..]),
        None => (&arguments[..], &arguments[..0]),
    };
    let option = |name: &str| {
        options
            .iter()
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    };
    let number = |name: &str, default: u64| option(name).map_or(default, |text| text.parse().expect("a number"));
    let host = if sepal_runner::host::is_unassisted() {
        HostKind::Unassisted
    } else {
        HostKind::Hardware
    };
    let (console, guest_end) = UnixStream::pair().expect("a socket pair");
    let config = MachineConfig {
        generation: 1,
        memory: MemoryConfig {
            size_bytes: number("mib", 128) * MIB,
            custom: Vec::new(),
            huge_pages: false,
            device_bytes: 0,
        },
        vcpus: u8::try_from(number("vcpus", 1)).expect("at most 255 vCPUs"),
        kernel: File::open(&options[0]).expect("the kernel"),
        initrd: options
            .get(1)
            .filter(|word| !word.contains('='))
            .map(|path| File::open(path).expect("the initramfs")),
        cmdline: words.join(" "),
        serial: Some(guest_end.into()),
        host,
        cpuid: None,
        guards: Guards::default(),
        devices: (0..number("rng", 0))
            .map(|n| DeviceSpec {
                name: format!("rng{n}"),
                device: Box::new(Rng::new(RngConfig::default()).expect("an entropy device").0),
            })
            .collect(),
    };
    let (sender, events) = channel();
    let hooks = Hooks {
        thread_setup: Arc::new(|_| Ok(())),
        events: Arc::new(move |event| {
            // The program may be over.
            let _ = sender.send(event);
        }),
    };
    let kvm = Kvm::new().expect("/dev/kvm");
    let start = Instant::now();
    let mut machine = Machine::create(&kvm, config, hooks, &Arc::default()).expect("the machine is made");
    machine.start().expect("the machine starts");
    println!("[{:8.3}] started", start.elapsed().as_secs_f64());
    let (button, typed) = (option("button").map(str::to_owned), option("type").map(str::to_owned));
    let (pressed, press) = channel();
    let reader = std::thread::spawn(move || copy_console(console, start, button, typed, &pressed));
    let deadline = start + Duration::from_secs(number("limit", 600));
    let ending = loop {
        if press.try_recv().is_ok() {
            println!("[{:8.3}] pressing the power button", start.elapsed().as_secs_f64());
            machine.press_power_button().expect("the power button");
        }
        match events.recv_timeout(Duration::from_millis(100)) {
            Ok(event) if event.what.ends() => break format!("{:?}", event.what),
            Ok(event) => println!("[{:8.3}] {:?}", start.elapsed().as_secs_f64(), event.what),
            Err(_) if Instant::now() > deadline => {
                for vcpu in 0..number("vcpus", 1) {
                    let (sender, dump) = channel();
                    let shown = machine.registers(vcpu as u8, move |dump| {
                        let _ = sender.send(dump);
                    });
                    if shown.is_ok()
                        && let Ok(dump) = dump.recv_timeout(Duration::from_secs(2))
                    {
                        println!("{dump:#x?}");
                    }
                }
                break "out of time".to_owned();
            }
            Err(_) => {}
        }
    };
    println!("[{:8.3}] {ending}", start.elapsed().as_secs_f64());
    let stopped = machine.join(Duration::from_secs(5));
    reader.join().expect("the console's reader");
    println!("{stopped:#?}");
}

/// Copies the console, line by line, until the machine closes it.
fn copy_console(
    mut console: UnixStream,
    start: Instant,
    button: Option<String>,
    typed: Option<String>,
    pressed: &std::sync::mpsc::Sender<()>,
) {
    let (mut button, mut typed) = (button, typed);
    let mut line = Vec::new();
    let mut byte = [0];
    while console.read_exact(&mut byte).is_ok() {
        line.push(byte[0]);
        let text = String::from_utf8_lossy(&line).into_owned();
        if let Some(wanted) = &button
            && text.contains(wanted)
        {
            button = None;
            pressed.send(()).expect("the main thread");
        }
        if text.ends_with("guest# ")
            && let Some(words) = typed.take()
        {
            console.write_all(format!("{words}\n").as_bytes()).expect("typing");
        }
        if byte[0] == b'\n' {
            println!("[{:8.3}] {}", start.elapsed().as_secs_f64(), text.trim_end());
            line.clear();
        }
    }
}

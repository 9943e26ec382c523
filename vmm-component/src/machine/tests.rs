//! What only shows from inside: a device of the test's on the machine's buses. Needs /dev/kvm; prints "skipped" without it. All else is tested
//! from outside (`tests/machine`).

#[path = "../../tests/machine/guests.rs"]
#[allow(dead_code, reason = "shared with the tests from outside")]
mod guests;

use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::AtomicU32;
use std::sync::mpsc::{Receiver, Sender, channel};

use sepal_devices::bus::BusDevice;
use sepal_devices::interrupt::InterruptLine;

use super::*;
use crate::memory::{MIB, MemoryConfig};

const PATIENCE: Duration = Duration::from_secs(60);

/// A machine that will run `code`, and its events; `None` with a word about it where there is no KVM.
fn machine(code: &[u8], vcpus: u8) -> Option<(Machine, Receiver<MachineEvent>)> {
    if !Path::new("/dev/kvm").exists() {
        println!("skipped: no /dev/kvm");
        return None;
    }
    let mut kernel = tempfile::tempfile().unwrap();
    kernel.write_all(&guests::elf(code)).unwrap();
    let (sender, events) = channel();
    let hooks = Hooks {
        thread_setup: Arc::new(|_| Ok(())),
        events: Arc::new(move |event| {
            let _ = sender.send(event);
        }),
    };
    let config = MachineConfig {
        generation: 1,
        memory: MemoryConfig {
            size_bytes: 16 * MIB,
            custom: Vec::new(),
            huge_pages: false,
            device_bytes: 0,
        },
        vcpus,
        kernel,
        initrd: None,
        cmdline: String::new(),
        serial: None,
        host: HostKind::Hardware,
        cpuid: None,
        devices: Vec::new(),
        guards: Guards::default(),
    };
    let machine = Machine::create(&Kvm::new().unwrap(), config, hooks, &Arc::default()).unwrap();
    Some((machine, events))
}

/// Holds its line until it was written to three times.
struct Insistent {
    line: Arc<dyn InterruptLine>,
    writes: AtomicU32,
}

impl BusDevice for Insistent {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _: u64, _: &[u8]) {
        if self.writes.fetch_add(1, Ordering::Relaxed) == 2 {
            self.line.set(false);
        }
    }
}

#[test]
fn a_level_triggered_interrupt_comes_again_until_its_line_is_released() {
    let Some((mut machine, events)) = machine(&guests::level_triggered(), 1) else {
        return;
    };
    let device = Arc::new(Insistent {
        line: machine.platform.ioapic().line(10),
        writes: AtomicU32::new(0),
    });
    machine
        .platform
        .pio()
        .insert(0x5000, 1, "insistent", Arc::clone(&device) as _)
        .unwrap();
    device.line.set(true);
    machine.start().unwrap();
    let event = events.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(event.what, Happening::Shutdown), "{event:?}");
    let stopped = machine.join(PATIENCE);
    // Hosts without hardware virtualization sometimes end an interrupt before its handler does, if the vCPU's thread was preempted just
    // then; with its line still asserted it comes once more, as a level may.
    assert!((3..=4).contains(&device.writes.load(Ordering::Relaxed)));
    // The third may not have been seen when the guest shut down.
    assert!(
        stopped.stats.vcpus[0].exits_for(ExitReason::IoapicEoi) >= 2,
        "{stopped:?}"
    );
}

/// Ends the guest that writes to it by a panic.
struct Faulty;

impl BusDevice for Faulty {
    fn read(&self, _: u64, _: &mut [u8]) {}

    fn write(&self, _: u64, _: &[u8]) {
        panic!("on purpose");
    }
}

#[test]
fn a_device_that_panics_is_reported_and_the_guest_goes_on() {
    let Some((mut machine, events)) = machine(&guests::hello(), 1) else {
        return;
    };
    machine.platform.pio().remove(layout::SERIAL.into()).unwrap();
    machine
        .platform
        .pio()
        .insert(layout::SERIAL.into(), 8, "faulty", Arc::new(Faulty))
        .unwrap();
    machine.start().unwrap();
    let first = events.recv_timeout(PATIENCE).unwrap().what;
    assert!(
        matches!(&first, Happening::DeviceFailed { device, .. } if device == "faulty"),
        "{first:?}"
    );
    let second = events.recv_timeout(PATIENCE).unwrap().what;
    assert!(
        matches!(second, Happening::Reset { how: ResetCause::I8042 }),
        "{second:?}"
    );
    assert_eq!(machine.join(PATIENCE).stuck, Vec::<String>::new());
}

/// Tells that it was written to, and holds up the writer until the test lets go.
struct Stuck {
    entered: Sender<()>,
    released: Mutex<Receiver<()>>,
}

impl BusDevice for Stuck {
    fn read(&self, _: u64, _: &mut [u8]) {}

    fn write(&self, _: u64, _: &[u8]) {
        // Both fail only when the test is over.
        let _ = self.entered.send(());
        let _ = self.released.lock().unwrap().recv();
    }
}

#[test]
fn a_thread_that_does_not_end_is_named() {
    let Some((mut machine, _events)) = machine(&guests::hello(), 1) else {
        return;
    };
    let (entered, entry) = channel();
    let (release, released) = channel();
    let device = Arc::new(Stuck {
        entered,
        released: Mutex::new(released),
    });
    machine.platform.pio().remove(layout::SERIAL.into()).unwrap();
    machine
        .platform
        .pio()
        .insert(layout::SERIAL.into(), 8, "stuck", device)
        .unwrap();
    machine.start().unwrap();
    entry.recv_timeout(PATIENCE).unwrap();
    machine.pause();
    let error = machine.wait_paused(Duration::from_millis(1)).unwrap_err();
    assert!(
        matches!(&error, MachineError::PauseTimeout { vcpus, .. } if vcpus == &[0]),
        "{error}"
    );
    let stopped = machine.join(Duration::from_millis(1));
    assert_eq!(stopped.stuck, ["vcpu0"]);
    drop(release);
}

#[test]
fn while_a_vcpu_hangs_in_a_device_its_owner_waits_for_nothing() {
    let Some((mut machine, _events)) = machine(&guests::hello(), 2) else {
        return;
    };
    let (entered, entry) = channel();
    let (release, released) = channel();
    let device = Arc::new(Stuck {
        entered,
        released: Mutex::new(released),
    });
    machine.platform.pio().remove(layout::SERIAL.into()).unwrap();
    machine
        .platform
        .pio()
        .insert(layout::SERIAL.into(), 8, "stuck", device)
        .unwrap();
    machine.start().unwrap();
    entry.recv_timeout(PATIENCE).unwrap();
    let (show, shown) = channel();
    for vcpu in [0, 1] {
        let show = show.clone();
        machine
            .registers(vcpu, move |registers| show.send((vcpu, registers.is_ok())).unwrap())
            .unwrap();
    }
    // The other one answers, and nothing of this waits for the first.
    assert_eq!(shown.recv_timeout(PATIENCE), Ok((1, true)));
    assert_eq!(machine.stats().vcpus.len(), 2);
    machine.press_power_button().unwrap();
    machine.nmi().unwrap();
    machine.pause();
    assert!(!machine.is_paused());
    assert_eq!(machine.read_memory(guests::BASE, 1).unwrap(), guests::hello()[..1]);
    assert!(shown.try_recv().is_err());
    drop(release);
    assert_eq!(shown.recv_timeout(PATIENCE), Ok((0, true)));
    machine.wait_paused(PATIENCE).unwrap();
    assert_eq!(machine.join(PATIENCE).stuck, Vec::<String>::new());
}

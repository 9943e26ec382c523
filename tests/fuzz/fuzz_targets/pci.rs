//! Two virtio functions on a PCI bus, and a guest that writes anything to configuration space (by ECAM and ports), their memory, and the memory that
//! its rings may lie in, while the devices' loops have their turns at any time.
//!
//! Besides not failing: nothing is sent and no device works while its function is no bus master, and whatever state it was brought into, a reset and
//! a set-up by the rules make it work.
#![no_main]

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use sepal_devices::bus::BusDevice;
use sepal_devices::dispatch::stepper::Stepper;
use sepal_devices::dispatch::{DeviceEvent, DeviceReporter};
use sepal_devices::interrupt::{InterruptLine, Msi};
use sepal_devices::pci::access::{ConfigPorts, Ecam};
use sepal_devices::pci::function::Doorbells;
use sepal_devices::pci::{MsiVector, MsiVectors, PciAddress, PciBus, PciFunction};
use sepal_devices::virtio::device::{ConfigLayout, Context, DeviceKind, Fault, Reclaim, VirtioDevice};
use sepal_devices::virtio::feature;
use sepal_devices::virtio::transport::{BAR_BYTES, VirtioPci, Wiring, connect};
use sepal_devices::virtio::worker::VirtioWorker;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Windows for the functions' memory, the second above 4 GiB.
const WINDOWS: [std::ops::Range<u64>; 2] = [0xc000_0000..0xc010_0000, 0x1_0000_0000..0x1_0010_0000];
/// Bytes of guest memory.
const MEMORY: usize = 0x2000;
/// Where in a function's memory what lies (`devices/src/virtio/transport.rs`).
const DOORBELLS: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
/// Most messages that the machine has ways for.
const WAYS: u32 = 5;
const FUNCTIONS: usize = 2;

/// Where a guest puts its finger.
#[derive(Arbitrary, Debug)]
enum Place {
    Common(u8),
    Doorbell(u8),
    Table(u8),
    Pending(u8),
    Any(u16),
}

impl Place {
    fn offset(&self) -> u64 {
        match *self {
            Self::Common(at) => u64::from(at % 0x40),
            Self::Doorbell(at) => DOORBELLS + u64::from(at % 16),
            Self::Table(at) => TABLE + u64::from(at % 64),
            Self::Pending(at) => PENDING + u64::from(at % 16),
            Self::Any(at) => u64::from(at) % (BAR_BYTES - 8),
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// One of the devices, and what the guest does to it.
    Config {
        which: bool,
        at: u8,
        width: u8,
        value: u64,
    },
    Extended {
        which: bool,
        at: u16,
        width: u8,
        value: u64,
    },
    ReadConfig {
        which: bool,
        at: u16,
        width: u8,
    },
    Ports {
        at: u8,
        width: u8,
        value: u32,
    },
    ReadPorts {
        at: u8,
        width: u8,
    },
    Bar {
        which: bool,
        place: Place,
        width: u8,
        value: u64,
    },
    ReadBar {
        which: bool,
        place: Place,
        width: u8,
    },
    /// By the address at which the function was at first, whoever answers there now.
    Memory {
        which: bool,
        place: Place,
        width: u8,
        value: u64,
    },
    /// In guest memory.
    Ring {
        at: u16,
        width: u8,
        value: u64,
    },
    Start {
        which: bool,
        messages: bool,
    },
    Request {
        which: bool,
        queue: bool,
    },
    /// Whoever was lent the interrupt of a queue writes to it.
    Outside {
        which: bool,
        queue: bool,
    },
    Turn {
        which: bool,
    },
}

fn bytes(value: u64, width: u8) -> Vec<u8> {
    value.to_le_bytes()[..1 << (width % 4)].to_vec()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What one function has of the machine.
#[derive(Default)]
struct Machine {
    routes: Mutex<BTreeMap<u32, Msi>>,
    taken: AtomicU32,
    sent: AtomicU32,
    bells: Mutex<BTreeSet<u64>>,
}

/// An eventfd that is a message at once, unless it is held back.
struct Way {
    machine: Arc<Machine>,
    fd: EventFd,
    gsi: u32,
    held: AtomicBool,
}

struct Board(Arc<Machine>);

impl Way {
    fn look(&self) {
        if !self.held.load(Ordering::Relaxed) && self.fd.read().is_ok() {
            assert!(
                lock(&self.machine.routes).contains_key(&self.gsi),
                "a message that nobody wrote"
            );
            self.machine.sent.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl MsiVector for Way {
    fn trigger(&self) {
        self.fd.write(1).expect("room in an eventfd");
        self.look();
    }

    fn event_fd(&self) -> Option<&EventFd> {
        Some(&self.fd)
    }

    fn hold(&self, held: bool) {
        assert_ne!(self.held.swap(held, Ordering::Relaxed), held);
        self.look();
    }

    fn take_held(&self) -> bool {
        self.fd.read().is_ok()
    }

    fn gsi(&self) -> u32 {
        self.gsi
    }
}

impl MsiVectors for Board {
    fn allocate(&self) -> io::Result<Arc<dyn MsiVector>> {
        let gsi = self.0.taken.fetch_add(1, Ordering::Relaxed);
        if gsi >= WAYS {
            return Err(io::Error::other("no more"));
        }
        Ok(Arc::new(Way {
            machine: Arc::clone(&self.0),
            fd: EventFd::new(EFD_NONBLOCK)?,
            gsi,
            held: AtomicBool::new(false),
        }))
    }

    fn route(&self, routes: &[(Arc<dyn MsiVector>, Msi)]) {
        lock(&self.0.routes).extend(routes.iter().map(|(way, msi)| (way.gsi(), *msi)));
    }
}

impl Doorbells for Board {
    fn attach(&self, address: u64, _: &EventFd) -> io::Result<()> {
        assert!(WINDOWS.iter().any(|window| window.contains(&address)), "{address:#x}");
        assert!(lock(&self.0.bells).insert(address), "two doorbells at {address:#x}");
        Ok(())
    }

    fn detach(&self, address: u64, _: &EventFd) {
        assert!(lock(&self.0.bells).remove(&address), "no doorbell at {address:#x}");
    }
}

struct Nothing;

impl InterruptLine for Nothing {
    fn set(&self, _: bool) {}
}

impl Reclaim for Nothing {
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
}

impl DeviceReporter for Nothing {
    fn report(&self, event: DeviceEvent) {
        panic!("a function failed: {event:?}");
    }
}

/// What a device and the test share.
#[derive(Default)]
struct Seen {
    active: AtomicBool,
    /// What was lent for each queue.
    lent: Mutex<[Option<RawFd>; 2]>,
}

/// Gives back what it is sent. One that lends gives its interrupts away, and its second doorbell with them.
struct Echo {
    seen: Arc<Seen>,
    lends: bool,
}

impl VirtioDevice for Echo {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn features(&self) -> u64 {
        1
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![64, 8]
    }

    fn config(&self) -> ConfigLayout {
        ConfigLayout {
            bytes: vec![0; 12],
            writable: vec![4..6, 7..8],
        }
    }

    fn activate(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        assert!(!self.seen.active.swap(true, Ordering::Relaxed));
        assert!(context.accepted(feature::VERSION_1));
        if self.lends {
            let (_, interrupt) = context.transport.queue_fds(1);
            lock(&self.seen.lent)[1] = interrupt;
        }
        Ok(())
    }

    fn notify(&mut self, queue: u16, context: &mut Context<'_>) -> Result<(), Fault> {
        assert!(
            self.seen.active.load(Ordering::Relaxed),
            "a device that rests has no doorbells"
        );
        let memory = context.memory;
        while let Some(chain) = context.queue(queue).expect("it is enabled").pop()? {
            let bytes = chain.reader(memory).read_to_end(256);
            let written = chain.writer(memory).write(&bytes).map_or(0, |()| bytes.len() as u32);
            context.queue(queue).expect("it is enabled").push(chain, written)?;
        }
        Ok(context.interrupt(queue)?)
    }

    fn config_written(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        let mut bytes = [0; 12];
        context.read_config(0, &mut bytes);
        assert_eq!((&bytes[..4], &bytes[8..]), (&[0; 4][..], &[0; 4][..]));
        context.update_config(7, &[bytes[4]]);
        Ok(())
    }

    fn reset(&mut self, context: &mut Context<'_>) {
        assert!(self.seen.active.swap(false, Ordering::Relaxed) && context.features != 0);
        *lock(&self.seen.lent) = [None; 2];
    }
}

/// A function, its loop, and what surrounds them.
struct Unit {
    place: PciAddress,
    home: u64,
    /// Where its rings lie when they are set up by the rules.
    rings: u64,
    msix: u16,
    function: Arc<VirtioPci>,
    stepper: Stepper<VirtioWorker>,
    machine: Arc<Machine>,
    seen: Arc<Seen>,
}

impl Unit {
    fn new(n: usize, memory: &GuestMemoryMmap, bus: &PciBus) -> Self {
        let (machine, seen) = (Arc::<Machine>::default(), Arc::<Seen>::default());
        let echo = Echo {
            seen: Arc::clone(&seen),
            lends: n == 1,
        };
        let board = Arc::new(Board(Arc::clone(&machine)));
        let wiring = Wiring {
            memory: memory.clone(),
            reclaim: Arc::new(Nothing),
            vectors: Arc::clone(&board) as _,
            doorbells: board,
            line: Arc::new(Nothing),
        };
        let (function, worker) = connect(Box::new(echo), wiring, 1).expect("a device that can be");
        let home = WINDOWS[0].start + BAR_BYTES * n as u64;
        function.place(home);
        let place = PciAddress::spread(n, FUNCTIONS).expect("room for two");
        bus.insert(place, format!("device{n}"), Arc::clone(&function) as _)
            .expect("a free place");
        let mut at = [0];
        function.read_config(0x34, &mut at);
        let mut capability = [0; 2];
        loop {
            function.read_config(at[0].into(), &mut capability);
            if capability[0] == 0x11 {
                break;
            }
            at[0] = capability[1];
        }
        Self {
            place,
            home,
            rings: (MEMORY / FUNCTIONS * n) as u64,
            msix: at[0].into(),
            stepper: Stepper::start(worker).expect("a loop"),
            function,
            machine,
            seen,
        }
    }

    fn bus_master(&self) -> bool {
        let mut command = [0];
        self.function.read_config(4, &mut command);
        command[0] & 4 != 0
    }

    fn write(&self, at: u64, data: &[u8]) {
        self.function.write_bar(0, at, data);
    }

    fn status(&self) -> u8 {
        let mut status = [0];
        self.function.read_bar(0, 0x14, &mut status);
        status[0]
    }

    /// Everything by the rules, up to DRIVER_OK.
    fn start(&self, messages: bool) {
        self.function.write_config(4, &[0b110]);
        self.function
            .write_config(self.msix + 2, &(u16::from(messages) << 15).to_le_bytes());
        for vector in 0..3_u64 {
            let entry = TABLE + 16 * vector;
            self.write(entry, &0xfee0_0000_u64.to_le_bytes());
            self.write(entry + 8, &(0x40 + vector).to_le_bytes());
        }
        self.write(0x14, &[0]);
        self.write(0x14, &[3]);
        for (select, features) in [
            (0_u32, feature::TRANSPORT as u32),
            (1, (feature::TRANSPORT >> 32) as u32),
        ] {
            self.write(8, &select.to_le_bytes());
            self.write(12, &features.to_le_bytes());
        }
        self.write(0x14, &[11]);
        self.write(0x10, &0_u16.to_le_bytes());
        for queue in 0..2_u16 {
            let base = self.rings + u64::from(queue) * 0x400;
            self.write(0x16, &queue.to_le_bytes());
            self.write(0x18, &8_u16.to_le_bytes());
            self.write(0x1a, &(queue + 1).to_le_bytes());
            for (at, address) in [(0x20, base), (0x28, base + 0x80), (0x30, base + 0x100)] {
                self.write(at, &address.to_le_bytes());
            }
            self.write(0x1c, &1_u16.to_le_bytes());
        }
        self.write(0x14, &[15]);
    }

    /// Makes one more request available, whatever the rings hold.
    fn request(&self, memory: &GuestMemoryMmap, queue: u16) {
        let base = self.rings + u64::from(queue) * 0x400;
        let put = |at: u64, bytes: &[u8]| {
            memory
                .write_slice(bytes, GuestAddress(at))
                .expect("an address in memory")
        };
        for (n, (address, flags, next)) in [(base + 0x200, 1_u16, 1_u16), (base + 0x300, 2, 0)].iter().enumerate() {
            let at = base + 16 * n as u64;
            put(at, &address.to_le_bytes());
            put(at + 8, &16_u32.to_le_bytes());
            put(at + 12, &flags.to_le_bytes());
            put(at + 14, &next.to_le_bytes());
        }
        let index: u16 = memory
            .read_obj(GuestAddress(base + 0x82))
            .expect("an address in memory");
        put(base + 0x84 + 2 * u64::from(index % 8), &[0, 0]);
        put(base + 0x82, &index.wrapping_add(1).to_le_bytes());
        self.write(DOORBELLS + 4 * u64::from(queue), &queue.to_le_bytes());
    }

    /// Somebody who was lent the interrupt of `queue` writes to it.
    fn outside(&self, queue: usize) {
        if let Some(fd) = lock(&self.seen.lent)[queue] {
            // SAFETY: the vector that the descriptor belongs to lives as long as its function, which outlives this call.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
            rustix::io::write(fd, &1_u64.to_ne_bytes()).expect("room in an eventfd");
        }
    }

    fn turn(&mut self) {
        self.stepper.settle();
        let active = self.seen.active.load(Ordering::Relaxed);
        assert!(self.bus_master() || !active, "a device that is no bus master works");
    }
}

fn data(width: u8) -> Vec<u8> {
    vec![0; 1 << (width % 4)]
}

fuzz_target!(|steps: Vec<Step>| {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory for a small guest");
    let bus = PciBus::new(WINDOWS.to_vec(), Arc::new(Nothing));
    let (ecam, ports) = (Ecam::new(Arc::clone(&bus)), ConfigPorts::new(Arc::clone(&bus)));
    let mut units = [0, 1].map(|n| Unit::new(n, &memory, &bus));
    for step in steps.into_iter().take(300) {
        let before = units
            .each_ref()
            .map(|unit| (unit.bus_master(), unit.machine.sent.load(Ordering::Relaxed)));
        let devfn = |unit: &Unit| u64::from(unit.place.slot()) << 3 | u64::from(unit.place.function());
        let unit = |which: bool| &units[usize::from(which)];
        match step {
            Step::Config {
                which,
                at,
                width,
                value,
            } => {
                ecam.write(devfn(unit(which)) << 12 | u64::from(at), &bytes(value, width));
            }
            Step::Extended {
                which,
                at,
                width,
                value,
            } => {
                ecam.write(devfn(unit(which)) << 12 | u64::from(at % 4089), &bytes(value, width));
            }
            Step::ReadConfig { which, at, width } => {
                ecam.read(devfn(unit(which)) << 12 | u64::from(at % 4089), &mut data(width));
            }
            Step::Ports { at, width, value } => ports.write((at % 8).into(), &bytes(value.into(), width % 3)),
            Step::ReadPorts { at, width } => ports.read((at % 8).into(), &mut data(width % 3)),
            Step::Bar {
                which,
                place,
                width,
                value,
            } => unit(which).write(place.offset(), &bytes(value, width)),
            Step::ReadBar { which, place, width } => {
                unit(which).function.read_bar(0, place.offset(), &mut data(width));
            }
            Step::Memory {
                which,
                place,
                width,
                value,
            } => {
                bus.write_memory(unit(which).home + place.offset(), &bytes(value, width));
            }
            Step::Ring { at, width, value } => {
                let at = u64::from(at) % (MEMORY as u64 - 8);
                memory
                    .write_slice(&bytes(value, width), GuestAddress(at))
                    .expect("an address in memory");
            }
            Step::Start { which, messages } => unit(which).start(messages),
            Step::Request { which, queue } => unit(which).request(&memory, queue.into()),
            Step::Outside { which, queue } => unit(which).outside(queue.into()),
            Step::Turn { which } => units[usize::from(which)].turn(),
        }
        for (unit, (master, sent)) in units.iter().zip(before) {
            let silent = !master && !unit.bus_master();
            assert!(
                !silent || unit.machine.sent.load(Ordering::Relaxed) == sent,
                "a message from no bus master"
            );
        }
        assert!(
            bus.memory()
                .iter()
                .all(|(_, bar)| WINDOWS.iter().any(|window| window.contains(&bar.address)))
        );
    }
    memory
        .write_slice(&[0; MEMORY], GuestAddress(0))
        .expect("all of memory");
    for unit in &mut units {
        let mut vendor = [0; 4];
        unit.function.read_config(0, &mut vendor);
        assert_eq!(vendor, [0xf4, 0x1a, 0x44, 0x10]);
        unit.turn();
        unit.write(0x14, &[0]);
        unit.turn();
        assert_eq!(unit.status(), 0);
        unit.start(true);
        unit.turn();
        assert_eq!(unit.status(), 15);
        unit.request(&memory, 0);
        unit.turn();
        let used: u16 = memory
            .read_obj(GuestAddress(unit.rings + 0x102))
            .expect("an address in memory");
        assert_eq!(used, 1, "a request given back");
    }
});

//! A driver as it would sit in a guest, and the machine around its devices, without KVM: it sees the bus through ports and memory only.

use std::collections::BTreeMap;
use std::sync::Condvar;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::bus::BusDevice;
use crate::dispatch::{DeviceEvent, DeviceReporter, DispatchLoop};
use crate::interrupt::Msi;
use crate::pci::access::{ConfigPorts, Ecam};
use crate::pci::function::MsiVector;
use crate::pci::{PciAddress, PciBus};

/// Far more than anything here takes; a test that gets there has failed.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// The windows for BARs.
pub(super) const WINDOW: std::ops::Range<u64> = 0xc000_0000..0xd000_0000;
pub(super) const WINDOW_64: std::ops::Range<u64> = 0x1_0000_0000..0x2_0000_0000;
/// The command register's low byte as a driver has it.
pub(super) const MEMORY_AND_BUS_MASTER: u8 = 0b110;
/// Halves of that.
pub(super) const MEMORY_ONLY: u8 = 0b010;
pub(super) const BUS_MASTER_ONLY: u8 = 0b100;
/// Bytes of guest memory.
const MEMORY: usize = 16 << 20;

/// Something that threads wait for.
#[derive(Default)]
pub(super) struct Awaited<T>(Mutex<T>, Condvar);

impl<T> Awaited<T> {
    pub(super) fn change<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        let result = change(&mut lock(&self.0));
        self.1.notify_all();
        result
    }

    /// Waits until `ready` gives something.
    pub(super) fn wait<R>(&self, mut ready: impl FnMut(&mut T) -> Option<R>) -> R {
        let deadline = Instant::now() + PATIENCE;
        let mut guard = lock(&self.0);
        loop {
            if let Some(result) = ready(&mut guard) {
                return result;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "nothing happened");
            guard = self.1.wait_timeout(guard, left).unwrap().0;
        }
    }
}

/// What is shared by all devices of the machine.
#[derive(Default)]
pub(super) struct Board {
    pub(super) messages: Awaited<Vec<Msi>>,
    pub(super) routes: Mutex<BTreeMap<u32, Msi>>,
    pub(super) route_calls: Mutex<u32>,
    allocated: Mutex<u32>,
    pub(super) bells: Mutex<BTreeMap<u64, EventFd>>,
    pub(super) line: Awaited<bool>,
    pub(super) events: Awaited<Vec<DeviceEvent>>,
}

pub(super) struct Vectors(pub(super) Arc<Board>);

struct Vector {
    board: Arc<Board>,
    gsi: u32,
    fd: EventFd,
}

impl MsiVectors for Vectors {
    fn allocate(&self) -> io::Result<Arc<dyn MsiVector>> {
        let mut allocated = lock(&self.0.allocated);
        *allocated += 1;
        Ok(Arc::new(Vector {
            board: Arc::clone(&self.0),
            gsi: 23 + *allocated,
            fd: EventFd::new(0)?,
        }))
    }

    fn route(&self, routes: &[(Arc<dyn MsiVector>, Msi)]) {
        *lock(&self.0.route_calls) += 1;
        lock(&self.0.routes).extend(routes.iter().map(|(vector, msi)| (vector.gsi(), *msi)));
    }
}

impl MsiVector for Vector {
    fn trigger(&self) {
        let msi = lock(&self.board.routes)[&self.gsi];
        self.board.messages.change(|messages| messages.push(msi));
    }

    fn event_fd(&self) -> Option<&EventFd> {
        Some(&self.fd)
    }

    fn hold(&self, _: bool) {
        panic!("nothing was lent");
    }

    fn take_held(&self) -> bool {
        false
    }

    fn gsi(&self) -> u32 {
        self.gsi
    }
}

struct FakeDoorbells(Arc<Board>);

impl Doorbells for FakeDoorbells {
    fn attach(&self, address: u64, bell: &EventFd) -> io::Result<()> {
        let other = lock(&self.0.bells).insert(address, bell.try_clone()?);
        assert!(other.is_none(), "two doorbells at {address:#x}");
        Ok(())
    }

    fn detach(&self, address: u64, _: &EventFd) {
        assert!(lock(&self.0.bells).remove(&address).is_some());
    }
}

struct Line(Arc<Board>);

impl InterruptLine for Line {
    fn set(&self, asserted: bool) {
        self.0.line.change(|line| *line = asserted);
    }
}

impl DeviceReporter for Board {
    fn report(&self, event: DeviceEvent) {
        self.events.change(|events| events.push(event));
    }
}

struct NoReclaim;

impl Reclaim for NoReclaim {
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
}

/// The machine.
pub(super) struct World {
    pub(super) board: Arc<Board>,
    pub(super) bus: Arc<PciBus>,
    pub(super) memory: GuestMemoryMmap,
    ecam: Arc<Ecam>,
    ports: Arc<ConfigPorts>,
    loops: Vec<DispatchLoop>,
}

impl World {
    /// A machine with `devices`, whose loops run.
    pub(super) fn new(devices: Vec<Box<dyn VirtioDevice>>) -> Self {
        let board = Arc::new(Board::default());
        let bus = PciBus::new(vec![WINDOW, WINDOW_64], Arc::clone(&board) as _);
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let mut world = Self {
            ecam: Ecam::new(Arc::clone(&bus)),
            ports: ConfigPorts::new(Arc::clone(&bus)),
            board,
            bus,
            memory,
            loops: Vec::new(),
        };
        let count = devices.len();
        for (n, device) in devices.into_iter().enumerate() {
            let place = PciAddress::spread(n, count).unwrap();
            let (function, worker) = connect(device, world.wiring(), place.interrupt_pin()).unwrap();
            function.place(WINDOW.start + BAR_BYTES * n as u64);
            let name = format!("device{n}");
            world.bus.insert(place, name.clone(), function).unwrap();
            let setup = || Ok::<_, std::convert::Infallible>(());
            let reporter = Arc::clone(&world.board) as _;
            world
                .loops
                .push(DispatchLoop::spawn(name, setup, worker, reporter).unwrap());
        }
        world
    }

    pub(super) fn wiring(&self) -> Wiring {
        Wiring {
            memory: self.memory.clone(),
            reclaim: Arc::new(NoReclaim),
            vectors: Arc::new(Vectors(Arc::clone(&self.board))),
            doorbells: Arc::new(FakeDoorbells(Arc::clone(&self.board))),
            line: Arc::new(Line(Arc::clone(&self.board))),
        }
    }

    /// Reads configuration space through ECAM.
    pub(super) fn read_config<const N: usize>(&self, place: PciAddress, offset: u16) -> [u8; N] {
        let mut data = [0; N];
        self.ecam.read(ecam_offset(place, offset), &mut data);
        data
    }

    pub(super) fn write_config(&self, place: PciAddress, offset: u16, data: &[u8]) {
        self.ecam.write(ecam_offset(place, offset), data);
    }

    /// Reads configuration space through the ports.
    pub(super) fn read_config_by_ports(&self, place: PciAddress, offset: u16) -> u32 {
        let devfn = u32::from(place.slot()) << 3 | u32::from(place.function());
        let address = 1 << 31 | devfn << 8 | u32::from(offset & 0xfc);
        self.ports.write(0, &address.to_le_bytes());
        let mut data = [0; 4];
        self.ports.read(4, &mut data);
        u32::from_le_bytes(data)
    }

    /// A guest's write to memory: a doorbell rings in the kernel, everything else comes to the bus.
    pub(super) fn write_memory(&self, address: u64, data: &[u8]) {
        let rung = lock(&self.board.bells).get(&address).map(|bell| bell.write(1).unwrap());
        if rung.is_none() {
            self.bus.write_memory(address, data);
        }
    }

    pub(super) fn read_memory<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut data = [0; N];
        self.bus.read_memory(address, &mut data);
        data
    }

    /// The next event of a device.
    pub(super) fn event(&self) -> DeviceEvent {
        let take = |events: &mut Vec<DeviceEvent>| (!events.is_empty()).then(|| events.remove(0));
        self.board.events.wait(take)
    }
}

fn ecam_offset(place: PciAddress, offset: u16) -> u64 {
    let devfn = u64::from(place.slot()) << 3 | u64::from(place.function());
    devfn << 12 | u64::from(offset)
}

/// A virtio structure of a device: offset in its BAR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Structures {
    pub(super) common: u64,
    pub(super) notify: u64,
    pub(super) multiplier: u64,
    pub(super) isr: u64,
    pub(super) device: Option<u64>,
    /// Configuration space offset of the window onto the BAR.
    pub(super) window: u16,
    /// The same of the MSI-X capability.
    pub(super) msix: u16,
}

/// One queue's rings, of 8 entries.
#[derive(Default)]
struct Ring {
    base: u64,
    available: u16,
    used: u16,
}

const SIZE: u16 = 8;

/// The driver of one device.
pub(super) struct Driver<'w> {
    pub(super) world: &'w World,
    pub(super) place: PciAddress,
    pub(super) at: Structures,
    rings: Vec<Ring>,
    scratch: u64,
}

impl<'w> Driver<'w> {
    /// Looks at the device's capabilities. Its rings and buffers lie in a megabyte of its own, the `share`-th.
    pub(super) fn find(world: &'w World, place: PciAddress, share: u64) -> Self {
        assert_eq!(u16::from_le_bytes(world.read_config(place, 0)), 0x1af4);
        let mut at = Structures::default();
        let [mut next] = world.read_config(place, 0x34);
        let mut seen = 0;
        while next != 0 {
            seen += 1;
            assert!(seen < 20, "the list does not end");
            let here = u16::from(next);
            let [id, link, _, kind] = world.read_config::<4>(place, here);
            let offset = u64::from(u32::from_le_bytes(world.read_config(place, here + 8)));
            match (id, kind) {
                (0x11, _) => at.msix = here,
                (0x09, 1) => at.common = offset,
                (0x09, 2) => {
                    at.notify = offset;
                    at.multiplier = u32::from_le_bytes(world.read_config(place, here + 16)).into();
                }
                (0x09, 3) => at.isr = offset,
                (0x09, 4) => at.device = Some(offset),
                (0x09, 5) => at.window = here,
                other => panic!("capability {other:?}"),
            }
            next = link;
        }
        world.write_config(place, 4, &[MEMORY_AND_BUS_MASTER]);
        let count = 64 << 10;
        Self {
            world,
            place,
            at,
            rings: Vec::new(),
            scratch: share * count,
        }
    }

    pub(super) fn bar(&self) -> u64 {
        u64::from_le_bytes(self.world.read_config(self.place, 0x10)) & !0xf
    }

    pub(super) fn move_bar(&self, address: u64) {
        let bytes = address.to_le_bytes();
        self.world.write_config(self.place, 0x10, &bytes[..4]);
        self.world.write_config(self.place, 0x14, &bytes[4..]);
    }

    pub(super) fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        self.world.read_memory(self.bar() + self.at.common + offset)
    }

    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        self.world.write_memory(self.bar() + self.at.common + offset, data);
    }

    pub(super) fn status(&self) -> u8 {
        self.read::<1>(0x14)[0]
    }

    pub(super) fn set_status(&self, status: u8) {
        self.write(0x14, &[status]);
    }

    pub(super) fn offered(&self) -> u64 {
        let half = |select: u32| {
            self.write(0, &select.to_le_bytes());
            u64::from(u32::from_le_bytes(self.read(4)))
        };
        half(0) | half(1) << 32
    }

    pub(super) fn accept(&self, features: u64) {
        for (select, half) in [(0_u32, features as u32), (1, (features >> 32) as u32)] {
            self.write(8, &select.to_le_bytes());
            self.write(12, &half.to_le_bytes());
        }
    }

    pub(super) fn queues(&self) -> u16 {
        u16::from_le_bytes(self.read(0x12))
    }

    pub(super) fn select(&self, queue: u16) {
        self.write(0x16, &queue.to_le_bytes());
    }

    /// Sets message `vector` of the MSI-X table, unmasked.
    pub(super) fn set_message(&self, vector: u64, address: u64, data: u32, control: u32) {
        let table = u64::from(u32::from_le_bytes(self.world.read_config(self.place, self.at.msix + 4)) & !7);
        let entry = self.bar() + table + 16 * vector;
        self.world.write_memory(entry, &(address as u32).to_le_bytes());
        self.world
            .write_memory(entry + 4, &((address >> 32) as u32).to_le_bytes());
        self.world.write_memory(entry + 8, &data.to_le_bytes());
        self.world.write_memory(entry + 12, &control.to_le_bytes());
    }

    /// The pending bits of the first 64 vectors.
    pub(super) fn pending(&self) -> u64 {
        let at = u64::from(u32::from_le_bytes(self.world.read_config(self.place, self.at.msix + 8)) & !7);
        u64::from_le_bytes(self.world.read_memory(self.bar() + at))
    }

    pub(super) fn enable_msix(&self, on: bool) {
        let control = if on { 0x80 } else { 0 };
        self.world.write_config(self.place, self.at.msix + 3, &[control]);
    }

    /// Up to FEATURES_OK, with everything that is offered.
    pub(super) fn negotiate(&self) {
        self.set_status(1);
        self.set_status(3);
        self.accept(self.offered());
        self.set_status(11);
        assert_eq!(self.status(), 11);
    }

    /// Gives the device its queues, with messages: vector 0 for the configuration, vector n + 1 for queue n.
    pub(super) fn set_up_queues(&mut self) {
        self.write(0x10, &0_u16.to_le_bytes());
        self.rings.clear();
        for queue in 0..self.queues() {
            let base = self.scratch + 0x1000 * u64::from(queue);
            self.rings.push(Ring {
                base,
                ..Ring::default()
            });
            self.world.memory.write_slice(&[0; 0x1000], GuestAddress(base)).unwrap();
            self.set_up_queue(queue);
        }
    }

    pub(super) fn set_up_queue(&mut self, queue: u16) {
        let base = self.rings[usize::from(queue)].base;
        self.rings[usize::from(queue)] = Ring {
            base,
            ..Ring::default()
        };
        self.world.memory.write_slice(&[0; 0x400], GuestAddress(base)).unwrap();
        self.select(queue);
        self.write(0x18, &SIZE.to_le_bytes());
        self.write(0x1a, &(queue + 1).to_le_bytes());
        self.set_rings(base, base + 0x100, base + 0x200);
        self.write(0x1c, &1_u16.to_le_bytes());
        assert_eq!(self.read::<2>(0x1c), [1, 0]);
    }

    pub(super) fn set_rings(&self, descriptors: u64, available: u64, used: u64) {
        for (offset, address) in [(0x20, descriptors), (0x28, available), (0x30, used)] {
            self.write(offset, &(address as u32).to_le_bytes());
            self.write(offset + 4, &((address >> 32) as u32).to_le_bytes());
        }
    }

    /// All of the set-up, with MSI-X: the message of vector n carries the data 0x40 + n.
    pub(super) fn start(&mut self) {
        self.enable_msix(true);
        for vector in 0..u64::from(self.queues()) + 1 {
            self.set_message(vector, message(vector).address, message(vector).data, 0);
        }
        self.negotiate();
        self.set_up_queues();
        self.set_status(15);
    }

    /// Makes a request available: `out` to read, room for `room` bytes. The queue's rings must be empty.
    pub(super) fn add(&mut self, queue: u16, out: &[u8], room: u32) {
        let ring = &mut self.rings[usize::from(queue)];
        let memory = &self.world.memory;
        let put = |at: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at)).unwrap();
        let (from, to) = (ring.base + 0x400, ring.base + 0x800);
        put(from, out);
        for (n, (address, len, flags, next)) in [(from, out.len() as u32, 1_u16, 1_u16), (to, room, 2, 0)]
            .into_iter()
            .enumerate()
        {
            let at = ring.base + 16 * n as u64;
            put(at, &address.to_le_bytes());
            put(at + 8, &len.to_le_bytes());
            put(at + 12, &flags.to_le_bytes());
            put(at + 14, &next.to_le_bytes());
        }
        let available = ring.base + 0x100;
        put(
            available + 4 + 2 * u64::from(ring.available % SIZE),
            &0_u16.to_le_bytes(),
        );
        ring.available = ring.available.wrapping_add(1);
        put(available + 2, &ring.available.to_le_bytes());
        // With VIRTIO_F_EVENT_IDX: an interrupt for the next one.
        put(available + 4 + 2 * u64::from(SIZE), &ring.used.to_le_bytes());
    }

    pub(super) fn doorbell(&self, queue: u16) -> u64 {
        self.bar() + self.at.notify + self.at.multiplier * u64::from(queue)
    }

    pub(super) fn ring(&self, queue: u16) {
        self.world.write_memory(self.doorbell(queue), &queue.to_le_bytes());
    }

    /// What the device wrote, if it gave the request back.
    pub(super) fn used(&mut self, queue: u16) -> Option<Vec<u8>> {
        let ring = &mut self.rings[usize::from(queue)];
        let memory = &self.world.memory;
        let used: u16 = memory.read_obj(GuestAddress(ring.base + 0x202)).unwrap();
        if used == ring.used {
            return None;
        }
        let at = ring.base + 0x204 + 8 * u64::from(ring.used % SIZE);
        let len: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        ring.used = ring.used.wrapping_add(1);
        let mut bytes = vec![0; len as usize];
        memory.read_slice(&mut bytes, GuestAddress(ring.base + 0x800)).unwrap();
        Some(bytes)
    }

    /// Waits for the message of `vector`.
    pub(super) fn await_message(&self, wanted: Msi) {
        self.world.board.messages.wait(|messages| {
            let at = messages.iter().position(|msi| *msi == wanted)?;
            messages.remove(at);
            Some(())
        });
    }

    /// Sends `out` through `queue` and waits for what comes back.
    pub(super) fn request(&mut self, queue: u16, out: &[u8]) -> Vec<u8> {
        self.add(queue, out, 1024);
        self.ring(queue);
        self.await_message(message(u64::from(queue) + 1));
        self.used(queue).expect("an interrupt comes with a request given back")
    }

    /// Resets the device and waits until it is done.
    pub(super) fn reset(&self) {
        self.set_status(0);
        let deadline = Instant::now() + PATIENCE;
        while self.status() != 0 {
            assert!(Instant::now() < deadline, "the reset does not end");
            std::thread::yield_now();
        }
    }
}

/// The message of a vector, the same for every device.
pub(super) fn message(vector: u64) -> Msi {
    Msi {
        address: 0xfee0_0000,
        data: 0x40 + vector as u32,
    }
}

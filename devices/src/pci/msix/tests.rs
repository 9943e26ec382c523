//! Tests of MSI-X against a naive model: what goes out, what is pending, and how many routes that takes.

use std::collections::BTreeMap;
use std::io;

use proptest::prelude::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::pci::config_space::Identity;

/// The machine: routes, and messages as they went out.
#[derive(Default)]
struct Host {
    routes: Mutex<BTreeMap<u32, Msi>>,
    sent: Mutex<Vec<Msi>>,
    calls: Mutex<usize>,
    allocated: Mutex<u32>,
    ways: Mutex<Vec<Arc<Way>>>,
    holds: Mutex<usize>,
    /// How many vectors there are.
    most: u32,
}

struct Machine(Arc<Host>);

/// An eventfd that is a message at once, unless it is held back.
struct Way {
    host: Arc<Host>,
    gsi: u32,
    fd: EventFd,
    held: AtomicBool,
}

impl Way {
    /// What the kernel does with an eventfd that was written to.
    fn look(&self) {
        if !self.held.load(Ordering::SeqCst) && self.fd.read().is_ok() {
            let msi = lock(&self.host.routes)[&self.gsi];
            lock(&self.host.sent).push(msi);
        }
    }
}

impl MsiVectors for Machine {
    fn allocate(&self) -> io::Result<Arc<dyn MsiVector>> {
        let mut allocated = lock(&self.0.allocated);
        if *allocated == self.0.most {
            return Err(io::Error::other("no more"));
        }
        *allocated += 1;
        let way = Arc::new(Way {
            host: Arc::clone(&self.0),
            gsi: *allocated,
            fd: EventFd::new(EFD_NONBLOCK)?,
            held: AtomicBool::new(false),
        });
        lock(&self.0.ways).push(Arc::clone(&way));
        Ok(way)
    }

    fn route(&self, routes: &[(Arc<dyn MsiVector>, Msi)]) {
        *lock(&self.0.calls) += 1;
        lock(&self.0.routes).extend(routes.iter().map(|(way, msi)| (way.gsi(), *msi)));
    }
}

impl MsiVector for Way {
    fn trigger(&self) {
        self.fd.write(1).unwrap();
        self.look();
    }

    fn event_fd(&self) -> Option<&EventFd> {
        Some(&self.fd)
    }

    fn hold(&self, held: bool) {
        assert_ne!(self.held.swap(held, Ordering::SeqCst), held, "for nothing");
        *lock(&self.host.holds) += 1;
        self.look();
    }

    fn take_held(&self) -> bool {
        self.fd.read().is_ok()
    }

    fn gsi(&self) -> u32 {
        self.gsi
    }
}

const VECTORS: u16 = 5;
/// The command register's low byte with nothing but bus mastering.
const BUS_MASTER: [u8; 1] = [1 << 2];

struct Bench {
    host: Arc<Host>,
    msix: Msix,
    space: ConfigSpace,
    capability: u16,
}

impl Bench {
    fn new(most: u32) -> Self {
        let host = Arc::new(Host {
            most,
            ..Host::default()
        });
        let msix = Msix::new(VECTORS, Arc::new(Machine(Arc::clone(&host))));
        let mut space = ConfigSpace::new(&Identity {
            vendor: 1,
            device: 2,
            revision: 0,
            class: 0,
            subsystem_vendor: 0,
            subsystem: 0,
            interrupt_pin: 0,
        });
        space.write(4, &BUS_MASTER);
        let capability = msix.add_capability(&mut space, 0, 0x4000, 0x5000).unwrap();
        Self {
            host,
            msix,
            space,
            capability,
        }
    }

    fn control(&mut self, enabled: bool, masked: bool) {
        let high = u8::from(enabled) << 7 | u8::from(masked) << 6;
        self.space.write(self.capability + 3, &[high]);
        self.msix.follow_control(&self.space, self.capability);
    }

    fn bus_master(&mut self, on: bool) {
        self.space.write(4, &[if on { BUS_MASTER[0] } else { 0 }]);
        self.msix.follow_control(&self.space, self.capability);
    }

    /// Another process writes to what it was lent.
    fn write_from_outside(&self, gsi: u32) {
        let ways = lock(&self.host.ways).clone();
        let way = ways.iter().find(|way| way.gsi == gsi).unwrap();
        way.fd.write(1).unwrap();
        way.look();
    }

    fn entry(&self, vector: u16, words: [u32; 4]) {
        for (n, word) in (0..).zip(words) {
            self.msix
                .write_table(u64::from(vector) * 16 + 4 * n, &word.to_le_bytes());
        }
    }

    fn pending(&self) -> u64 {
        let mut bits = [0; 8];
        self.msix.read_pending(0, &mut bits);
        u64::from_le_bytes(bits)
    }

    fn sent(&self) -> Vec<Msi> {
        std::mem::take(&mut *lock(&self.host.sent))
    }
}

#[test]
fn the_capability_says_how_many_and_where() {
    let bench = Bench::new(9);
    assert_eq!(bench.space.half(bench.capability) & 0xff, 0x11);
    assert_eq!(bench.space.half(bench.capability + 2), VECTORS - 1);
    assert_eq!(bench.space.word(bench.capability + 4), 0x4000);
    assert_eq!(bench.space.word(bench.capability + 8), 0x5000);
}

#[test]
fn vectors_start_masked_and_cost_nothing() {
    let mut bench = Bench::new(9);
    bench.control(true, false);
    bench.msix.trigger(0);
    assert_eq!((bench.sent(), bench.pending()), (vec![], 1));
    assert_eq!((*lock(&bench.host.calls), *lock(&bench.host.allocated)), (0, 0));
    bench.entry(0, [0xfee0_0000, 0, 0x41, 0]);
    let msi = Msi {
        address: 0xfee0_0000,
        data: 0x41,
    };
    assert_eq!((bench.sent(), bench.pending()), (vec![msi], 0));
    assert_eq!((*lock(&bench.host.calls), *lock(&bench.host.allocated)), (1, 1));
}

#[test]
fn accesses_of_other_widths_mean_nothing() {
    let bench = Bench::new(9);
    bench.entry(1, [1 << 12, 2, 3, 0]);
    for (at, data) in [
        (16, &[0xff_u8][..]),
        (18, &[0xff; 2]),
        (17, &[0xff; 4]),
        (20, &[0xff; 8]),
    ] {
        bench.msix.write_table(at, data);
    }
    let mut data = [0; 8];
    bench.msix.read_table(16, &mut data);
    assert_eq!(u64::from_le_bytes(data), 2 << 32 | 1 << 12);
    bench.msix.read_table(20, &mut data[..2]);
    assert_eq!(data[..2], [0, 0]);
    bench.msix.write_table(24, &[9, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    bench.msix.read_table(24, &mut data);
    assert_eq!(data, [9, 0, 0, 0, 1, 0, 0, 0], "reserved bits stay 0");
    // Beyond the table and the bits.
    bench.msix.write_table(16 * u64::from(VECTORS), &[0xff; 4]);
    bench.msix.read_table(16 * u64::from(VECTORS), &mut data);
    assert_eq!(data, [0; 8]);
    bench.msix.trigger(VECTORS);
    assert_eq!(bench.pending(), 0);
}

#[test]
fn a_machine_without_more_vectors_loses_messages_and_nothing_else() {
    let mut bench = Bench::new(1);
    bench.control(true, false);
    for vector in 0..2 {
        bench.entry(vector, [0xfee0_0000, 0, u32::from(vector), 0]);
        bench.msix.trigger(vector);
    }
    let msi = Msi {
        address: 0xfee0_0000,
        data: 0,
    };
    assert_eq!(bench.sent(), [msi]);
}

#[test]
fn masks_hold_for_what_was_lent_and_cost_nothing_for_the_rest() {
    let mut bench = Bench::new(9);
    bench.control(true, false);
    let message = |vector: u16| Msi {
        address: 0xfee0_0000,
        data: 0x40 + u32::from(vector),
    };
    assert!(bench.msix.lend(0).is_none(), "there is no way yet");
    for vector in 0..2 {
        bench.entry(vector, [0xfee0_0000, 0, 0x40 + u32::from(vector), 0]);
    }
    let gsi = bench.msix.lend(0).unwrap().gsi();
    bench.write_from_outside(gsi);
    assert_eq!(bench.sent(), [message(0)]);

    bench.control(true, true);
    assert_eq!(*lock(&bench.host.holds), 1, "one was lent");
    assert!(bench.msix.lend(1).is_none());
    bench.write_from_outside(gsi);
    bench.write_from_outside(gsi);
    assert_eq!((bench.sent(), bench.pending()), (vec![], 1));
    bench.control(true, false);
    assert_eq!((bench.sent(), bench.pending()), (vec![message(0)], 0));

    // Forgotten with MSI-X, and not held back any more once it is given back.
    bench.entry(0, [0xfee0_0000, 0, 0x40, 1]);
    bench.write_from_outside(gsi);
    bench.control(false, false);
    bench.msix.take_back();
    bench.entry(0, [0xfee0_0000, 0, 0x40, 0]);
    bench.control(true, false);
    assert_eq!((bench.sent(), bench.pending()), (vec![], 0));
    let holds = *lock(&bench.host.holds);
    bench.control(true, true);
    assert_eq!(*lock(&bench.host.holds), holds);
}

#[test]
fn without_bus_mastering_messages_are_pending() {
    let mut bench = Bench::new(9);
    bench.control(true, false);
    bench.entry(0, [0xfee0_0000, 0, 0x41, 0]);
    bench.bus_master(false);
    bench.msix.trigger(0);
    assert_eq!((bench.sent(), bench.pending()), (vec![], 1));
    bench.bus_master(true);
    assert_eq!((bench.sent().len(), bench.pending()), (1, 0));
}

/// What a guest and its device do.
#[derive(Clone, Debug)]
enum Step {
    BusMaster(bool),
    Lend(u16),
    TakeBack,
    Outside(u16),
    Control { enabled: bool, masked: bool },
    Word { vector: u16, word: u64, value: u32 },
    Trigger(u16),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        1 => (any::<bool>(), any::<bool>()).prop_map(|(enabled, masked)| Step::Control { enabled, masked }),
        3 => (0..VECTORS, 0_u64..4, 0_u32..8).prop_map(|(vector, word, value)| Step::Word { vector, word, value }),
        3 => (0..VECTORS).prop_map(Step::Trigger),
        1 => any::<bool>().prop_map(Step::BusMaster),
        2 => (0..VECTORS).prop_map(Step::Lend),
        1 => Just(Step::TakeBack),
        3 => (0..VECTORS).prop_map(Step::Outside),
    ]
}

/// The same in the words of the specification.
#[derive(Default)]
struct Model {
    entries: [[u32; 4]; VECTORS as usize],
    enabled: bool,
    bus_master: bool,
    masked: bool,
    pending: u64,
    /// The GSI of each vector that another process has.
    lent: BTreeMap<u16, u32>,
}

impl Model {
    fn open(&self, vector: usize) -> bool {
        self.enabled && self.bus_master && !self.masked && self.entries[vector][3] & 1 == 0
    }

    fn message(&self, vector: usize) -> Msi {
        let [low, high, data, _] = self.entries[vector];
        Msi {
            address: u64::from(high) << 32 | u64::from(low & !3),
            data,
        }
    }

    /// Sends what is pending and may go.
    fn flush(&mut self, sent: &mut Vec<Msi>) {
        for vector in 0..VECTORS.into() {
            if self.open(vector) && self.pending >> vector & 1 == 1 {
                self.pending &= !(1 << vector);
                sent.push(self.message(vector));
            }
        }
    }
}

proptest! {
    #[test]
    fn messages_go_out_when_the_specification_says_so(steps in prop::collection::vec(step(), 0..200)) {
        let mut bench = Bench::new(64);
        let mut model = Model {
            entries: [[0, 0, 0, 1]; VECTORS as usize],
            bus_master: true,
            ..Model::default()
        };
        for step in steps {
            let mut expected = Vec::new();
            match step {
                Step::Control { enabled, masked } => {
                    bench.control(enabled, masked);
                    (model.enabled, model.masked) = (enabled, masked);
                    if !enabled {
                        model.pending = 0;
                    }
                }
                Step::Word { vector, word, value } => {
                    bench.msix.write_table(u64::from(vector) * 16 + 4 * word, &value.to_le_bytes());
                    model.entries[usize::from(vector)][word as usize] = value;
                }
                // Without MSI-X a device uses its pin.
                Step::Trigger(vector) if model.enabled => {
                    bench.msix.trigger(vector);
                    model.pending |= 1 << vector;
                }
                Step::Trigger(_) => {}
                Step::BusMaster(on) => {
                    bench.bus_master(on);
                    model.bus_master = on;
                }
                Step::Lend(vector) => {
                    let way = bench.msix.lend(vector);
                    prop_assert_eq!(way.is_some(), model.open(vector.into()));
                    model.lent.extend(way.map(|way| (vector, way.gsi())));
                }
                Step::TakeBack => {
                    bench.msix.take_back();
                    model.lent.clear();
                }
                Step::Outside(vector) => if let Some(&gsi) = model.lent.get(&vector) && model.enabled {
                    bench.write_from_outside(gsi);
                    model.pending |= 1 << vector;
                },
            }
            model.flush(&mut expected);
            prop_assert_eq!(bench.sent(), expected);
            prop_assert_eq!(bench.pending(), model.pending);
            prop_assert_eq!(bench.msix.enabled(), model.enabled);
        }
    }
}

//! Tests of MSI-X against a naive model: what goes out, what is pending, and how many routes that takes.

use std::collections::BTreeMap;
use std::io;

use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::pci::config_space::Identity;

/// The machine: routes, and messages as they went out.
#[derive(Default)]
struct Host {
    routes: Mutex<BTreeMap<u32, Msi>>,
    sent: Mutex<Vec<Msi>>,
    calls: Mutex<usize>,
    allocated: Mutex<u32>,
    /// How many vectors there are.
    most: u32,
}

struct Machine(Arc<Host>);

struct Way(Arc<Host>, u32);

impl MsiVectors for Machine {
    fn allocate(&self) -> io::Result<Arc<dyn MsiVector>> {
        let mut allocated = lock(&self.0.allocated);
        if *allocated == self.0.most {
            return Err(io::Error::other("no more"));
        }
        *allocated += 1;
        Ok(Arc::new(Way(Arc::clone(&self.0), *allocated)))
    }

    fn route(&self, routes: &[(Arc<dyn MsiVector>, Msi)]) {
        *lock(&self.0.calls) += 1;
        lock(&self.0.routes).extend(routes.iter().map(|(way, msi)| (way.gsi(), *msi)));
    }
}

impl MsiVector for Way {
    fn trigger(&self) {
        let msi = lock(&self.0.routes)[&self.1];
        lock(&self.0.sent).push(msi);
    }

    fn event_fd(&self) -> Option<&EventFd> {
        None
    }

    fn gsi(&self) -> u32 {
        self.1
    }
}

const VECTORS: u16 = 5;

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

/// What a guest and its device do.
#[derive(Clone, Debug)]
enum Step {
    Control { enabled: bool, masked: bool },
    Word { vector: u16, word: u64, value: u32 },
    Trigger(u16),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        1 => (any::<bool>(), any::<bool>()).prop_map(|(enabled, masked)| Step::Control { enabled, masked }),
        3 => (0..VECTORS, 0_u64..4, 0_u32..8).prop_map(|(vector, word, value)| Step::Word { vector, word, value }),
        3 => (0..VECTORS).prop_map(Step::Trigger),
    ]
}

/// The same in the words of the specification.
#[derive(Default)]
struct Model {
    entries: [[u32; 4]; VECTORS as usize],
    enabled: bool,
    masked: bool,
    pending: u64,
}

impl Model {
    fn open(&self, vector: usize) -> bool {
        self.enabled && !self.masked && self.entries[vector][3] & 1 == 0
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
            }
            model.flush(&mut expected);
            prop_assert_eq!(bench.sent(), expected);
            prop_assert_eq!(bench.pending(), model.pending);
            prop_assert_eq!(bench.msix.enabled(), model.enabled);
        }
    }
}

//! Tests of the bus: who answers where, whatever guests write into BARs.

use proptest::prelude::*;

use super::*;
use crate::dispatch::stepper::Reports;

/// A function with any BARs that answers with its number.
#[derive(Default)]
struct Fake {
    id: u8,
    wanted: Mutex<Vec<Bar>>,
    told: Mutex<BTreeMap<u8, u64>>,
    bomb: bool,
}

impl PciFunction for Fake {
    fn read_config(&self, _: u16, data: &mut [u8]) {
        assert!(!self.bomb, "boom");
        data.fill(0);
    }

    fn write_config(&self, _: u16, _: &[u8]) {}

    fn bars(&self) -> Vec<Bar> {
        lock(&self.wanted).clone()
    }

    fn bar_moved(&self, index: u8, address: Option<u64>) {
        let mut told = lock(&self.told);
        match address {
            Some(address) => assert!(told.insert(index, address).is_none(), "moved without leaving"),
            None => assert!(told.remove(&index).is_some(), "left twice"),
        }
    }

    fn read_bar(&self, _: u8, _: u64, data: &mut [u8]) {
        data.fill(self.id);
    }

    fn write_bar(&self, _: u8, _: u64, _: &[u8]) {
        panic!("boom");
    }
}

fn place(slot: u8, function: u8) -> PciAddress {
    PciAddress::new(slot, function).unwrap()
}

const LOW: Range<u64> = 0x1_0000..0x2_0000;
const HIGH: Range<u64> = 0x10_0000..0x20_0000;

fn bus() -> (Arc<PciBus>, Arc<Reports>) {
    let reports = Arc::new(Reports::default());
    (PciBus::new(vec![LOW, HIGH], Arc::clone(&reports) as _), reports)
}

fn bar(address: u64, size: u64) -> Bar {
    Bar {
        index: 0,
        address,
        size,
    }
}

fn fake(id: u8, wanted: Vec<Bar>) -> Arc<Fake> {
    Arc::new(Fake {
        id,
        wanted: Mutex::new(wanted),
        ..Fake::default()
    })
}

/// Lets the bus look at the BARs again.
fn touch(bus: &PciBus, place: PciAddress) {
    bus.write_config(place, 4, &[0]);
}

#[test]
fn only_the_host_bridge_is_there_at_first() {
    let (bus, _) = bus();
    let mut id = [0; 4];
    bus.read_config(PciAddress::HOST_BRIDGE, 0, &mut id);
    assert_eq!(u32::from_le_bytes(id), 0x0d57_8086);
    bus.read_config(PciAddress::HOST_BRIDGE, 8, &mut id);
    assert_eq!(u32::from_le_bytes(id) >> 8, 0x06_0000);
    bus.read_config(place(1, 0), 0, &mut id);
    assert_eq!(id, [0xff; 4]);
}

#[test]
fn places_are_given_once_and_from_function_0_on() {
    let (bus, _) = bus();
    bus.insert(place(1, 0), "first", fake(1, vec![])).unwrap();
    let error = bus.insert(place(1, 0), "second", fake(2, vec![])).unwrap_err();
    assert_eq!(error.to_string(), "second: 00:01.0 is taken by first");
    let error = bus.insert(place(2, 1), "second", fake(2, vec![])).unwrap_err();
    assert_eq!(
        error.to_string(),
        "second: 00:02.1 needs a function 0 in its slot first"
    );
    let header = |place| {
        let mut byte = [0; 4];
        bus.read_config(place, 0x0c, &mut byte);
        byte[2]
    };
    assert_eq!(header(place(1, 0)), 0);
    bus.insert(place(1, 1), "second", fake(2, vec![])).unwrap();
    assert_eq!((header(place(1, 0)), header(place(1, 1))), (0x80, 0));
    assert!(bus.remove(place(1, 1)));
    assert!(!bus.remove(place(1, 1)));
    assert_eq!(header(place(1, 0)), 0);
}

#[test]
fn accesses_across_the_end_of_a_bar_are_nobodys() {
    let (bus, _) = bus();
    bus.insert(place(1, 0), "one", fake(1, vec![bar(LOW.start, 0x1000)]))
        .unwrap();
    bus.insert(place(2, 0), "two", fake(2, vec![bar(LOW.start + 0x1000, 0x1000)]))
        .unwrap();
    let read = |address| {
        let mut data = [0; 2];
        bus.read_memory(address, &mut data);
        data
    };
    assert_eq!(read(LOW.start), [1; 2]);
    assert_eq!(read(LOW.start + 0xffe), [1; 2]);
    assert_eq!(read(LOW.start + 0xfff), [0xff; 2]);
    assert_eq!(read(LOW.start + 0x1000), [2; 2]);
    assert_eq!(read(LOW.start + 0x2000), [0xff; 2]);
}

#[test]
fn a_function_that_panics_is_quarantined_alone() {
    let (bus, reports) = bus();
    bus.insert(place(1, 0), "one", fake(1, vec![bar(LOW.start, 0x1000)]))
        .unwrap();
    bus.insert(place(2, 0), "two", fake(2, vec![bar(HIGH.start, 0x1000)]))
        .unwrap();
    bus.write_memory(LOW.start, &[1]);
    bus.write_memory(LOW.start, &[1]);
    assert_eq!(
        reports.take(),
        [DeviceEvent::Failed {
            device: "one".into(),
            reason: "boom".into()
        }]
    );
    let mut data = [0; 4];
    bus.read_memory(LOW.start, &mut data);
    assert_eq!(data, [0xff; 4]);
    bus.read_config(place(1, 0), 0, &mut data);
    assert_eq!(data, [0xff; 4]);
    bus.read_memory(HIGH.start, &mut data);
    assert_eq!(data, [2; 4]);
    let bomb = Fake {
        bomb: true,
        ..Fake::default()
    };
    bus.insert(place(3, 0), "bomb", Arc::new(bomb)).unwrap();
    bus.read_config(place(3, 0), 0, &mut data);
    assert_eq!(data, [0xff; 4]);
    assert_eq!(reports.take().len(), 1);
}

/// BARs of any power of two, mostly near the windows.
fn any_bar() -> impl Strategy<Value = Bar> {
    (0_u64..0x40, 12_u32..18, any::<bool>()).prop_map(|(step, bits, high)| {
        let size = 1 << bits;
        let base = if high { HIGH.start } else { 0 };
        bar((base + step * 0x1000) & !(size - 1), size)
    })
}

proptest! {
    #[test]
    fn whatever_bars_say_each_address_has_one_answer(
        moves in prop::collection::vec((0_u8..6, prop::option::of(any_bar())), 1..60),
    ) {
        let (bus, reports) = bus();
        let functions: Vec<Arc<Fake>> = (0..6).map(|id| fake(id, vec![])).collect();
        for (id, function) in (0..).zip(&functions) {
            bus.insert(place(id + 1, 0), format!("f{id}"), Arc::clone(function) as _).unwrap();
        }
        for (id, wanted) in moves {
            *lock(&functions[usize::from(id)].wanted) = wanted.into_iter().collect();
            touch(&bus, place(id + 1, 0));
            // Lower places first, each if it fits.
            let mut expected: Vec<(u8, Bar)> = Vec::new();
            for (id, function) in (0..).zip(&functions) {
                for bar in lock(&function.wanted).iter() {
                    let end = bar.address + bar.size;
                    let inside = [LOW, HIGH].iter().any(|w| w.start <= bar.address && end <= w.end);
                    let free = expected.iter().all(|(_, b)| end <= b.address || b.address + b.size <= bar.address);
                    if inside && free {
                        expected.push((id, *bar));
                    }
                }
            }
            expected.sort_by_key(|(_, bar)| bar.address);
            let found: Vec<(u8, Bar)> = bus.memory().into_iter().map(|(p, bar)| (p.slot() - 1, bar)).collect();
            prop_assert_eq!(&found, &expected);
            for (id, function) in (0..).zip(&functions) {
                let told: Vec<u64> = lock(&function.told).values().copied().collect();
                let answers: Vec<u64> = expected.iter().filter(|(e, _)| *e == id).map(|(_, b)| b.address).collect();
                prop_assert_eq!(told, answers);
            }
            for (id, bar) in expected {
                let mut data = [0; 8];
                bus.read_memory(bar.address + bar.size - 8, &mut data);
                prop_assert_eq!(data, [id; 8]);
            }
        }
        prop_assert_eq!(reports.take(), vec![]);
    }
}

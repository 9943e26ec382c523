//! Tests of the bus: lookups against a naive model, refused accesses, quarantine.

use std::sync::Mutex;

use proptest::prelude::*;

use super::*;

/// Answers every byte with `id` and remembers where it was asked.
struct Probe {
    id: u8,
    seen: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl Probe {
    fn new(id: u8) -> Arc<Self> {
        Arc::new(Self {
            id,
            seen: Mutex::default(),
        })
    }
}

impl BusDevice for Probe {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.seen.lock().unwrap().push((offset, vec![]));
        data.fill(self.id);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.seen.lock().unwrap().push((offset, data.to_vec()));
    }
}

/// Panics when written to.
struct Bomb;

impl BusDevice for Bomb {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(1);
    }

    fn write(&self, _: u64, _: &[u8]) {
        panic!("boom");
    }
}

#[derive(Default)]
struct Reports(Mutex<Vec<DeviceEvent>>);

impl DeviceReporter for Reports {
    fn report(&self, event: DeviceEvent) {
        self.0.lock().unwrap().push(event);
    }
}

#[test]
fn the_device_sees_the_offset_and_the_bytes() {
    let bus = Bus::new();
    let probe = Probe::new(7);
    bus.insert(0x3f8, 8, "serial", probe.clone()).unwrap();
    let mut data = [0; 2];
    assert!(bus.read(0x3fd, &mut data));
    assert_eq!(data, [7, 7]);
    assert!(bus.write(0x3f8, &[1]));
    assert_eq!(*probe.seen.lock().unwrap(), [(5, vec![]), (0, vec![1])]);
}

#[test]
fn nobody_there_reads_all_ones() {
    let bus = Bus::new();
    bus.insert(0x70, 2, "rtc", Probe::new(0)).unwrap();
    let mut data = [0; 4];
    assert!(!bus.read(0x6f, &mut data[..1]));
    assert!(!bus.read(0x72, &mut data[1..]));
    assert_eq!(data, [0xff; 4]);
    assert!(!bus.write(0x72, &[0]));
}

#[test]
fn an_access_across_the_end_is_refused() {
    let bus = Bus::new();
    bus.insert(0x70, 2, "rtc", Probe::new(0)).unwrap();
    bus.insert(0x72, 2, "other", Probe::new(0)).unwrap();
    let mut data = [0; 2];
    assert!(!bus.read(0x71, &mut data));
    assert_eq!(data, [0xff; 2]);
    assert!(!bus.write(0x71, &[0; 2]));
    assert!(!bus.write(0x70, &[]));
    assert!(!bus.write(0x70, &[0; 9]));
}

#[test]
fn the_last_address_can_be_used() {
    let bus = Bus::new();
    bus.insert(u64::MAX - 3, 4, "top", Probe::new(3)).unwrap();
    let mut data = [0];
    assert!(bus.read(u64::MAX, &mut data));
    assert_eq!(data, [3]);
    assert!(!bus.write(u64::MAX, &[0, 0]));
    assert_eq!(
        bus.insert(u64::MAX - 3, 5, "more", Probe::new(0)),
        Err(BusError::PastEnd {
            name: "more",
            base: u64::MAX - 3,
            len: 5
        })
    );
}

#[test]
fn errors_name_both_devices() {
    let bus = Bus::new();
    bus.insert(0x60, 5, "i8042", Probe::new(0)).unwrap();
    let error = bus.insert(0x64, 4, "probe", Probe::new(0)).unwrap_err();
    assert_eq!(error.to_string(), "probe: 0x64+0x4 overlaps i8042 at 0x60+0x5");
    let error = bus.insert(0x64, 0, "probe", Probe::new(0)).unwrap_err();
    assert_eq!(
        error,
        BusError::Empty {
            name: "probe",
            base: 0x64
        }
    );
    assert_eq!(
        bus.ranges().collect::<Vec<_>>(),
        [BusRange {
            base: 0x60,
            len: 5,
            name: "i8042"
        }]
    );
}

#[test]
fn a_removed_device_is_gone_and_its_place_is_free() {
    let bus = Bus::new();
    bus.insert(0x60, 5, "i8042", Probe::new(0)).unwrap();
    assert_eq!(bus.remove(0x61), Err(BusError::NotThere { base: 0x61 }));
    bus.remove(0x60).unwrap();
    assert!(!bus.write(0x60, &[0]));
    bus.insert(0x62, 1, "other", Probe::new(0)).unwrap();
}

#[test]
fn a_panic_quarantines_the_device_and_is_reported_once() {
    let reports = Arc::new(Reports::default());
    let bus = Bus::with_reporter(reports.clone());
    bus.insert(0, 8, "bomb", Arc::new(Bomb)).unwrap();
    bus.insert(8, 8, "probe", Probe::new(9)).unwrap();
    let mut data = [0];
    assert!(bus.read(0, &mut data));
    assert!(!bus.write(0, &[0]));
    assert!(!bus.write(0, &[0]));
    assert!(!bus.read(0, &mut data));
    assert_eq!(data, [0xff]);
    assert!(bus.read(8, &mut data));
    assert_eq!(data, [9]);
    assert_eq!(
        *reports.0.lock().unwrap(),
        [DeviceEvent::Failed {
            device: "bomb".into(),
            reason: "boom".into()
        }]
    );
}

proptest! {
    #[test]
    fn lookups_agree_with_a_naive_model(
        inserts in prop::collection::vec((0u64..200, 0u64..20), 0..30),
        accesses in prop::collection::vec((0u64..230, 1usize..=8), 1..100),
    ) {
        let bus = Bus::new();
        let mut model: Vec<(u64, u64, u8)> = vec![];
        for (id, (base, len)) in inserts.into_iter().enumerate() {
            let free = len > 0 && model.iter().all(|&(b, l, _)| base + len <= b || b + l <= base);
            prop_assert_eq!(bus.insert(base, len, "probe", Probe::new(id as u8)).is_ok(), free);
            if free {
                model.push((base, len, id as u8));
            }
        }
        for (address, len) in accesses {
            let end = address + len as u64;
            let expected = model.iter().find(|&&(b, l, _)| b <= address && end <= b + l).map_or(0xff, |m| m.2);
            let mut data = vec![0x55; len];
            prop_assert_eq!(bus.read(address, &mut data), expected != 0xff);
            prop_assert_eq!(data, vec![expected; len]);
        }
    }
}

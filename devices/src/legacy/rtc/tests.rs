//! Tests of the clock: a driver's accesses under a clock that the test moves, and the loop under the host's.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};

use proptest::prelude::*;

use super::*;
use crate::bus::BusDevice;
use crate::dispatch::DispatchLoop;
use crate::dispatch::stepper::Reports;

/// A clock that stands still until it is moved.
struct TestClock(AtomicU64);

impl WallClock for TestClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }
}

impl TestClock {
    fn pass(&self, time: Duration) {
        self.0.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }
}

/// Sends its rises to the test.
struct Line(Mutex<Sender<()>>);

impl InterruptLine for Line {
    fn set(&self, asserted: bool) {
        if asserted {
            let _ = lock(&self.0).send(());
        }
    }
}

/// 2023-11-14 22:13:20 UTC, a Tuesday.
const START: Duration = Duration::from_secs(1_700_000_000);
const SECOND: Duration = Duration::from_secs(1);

struct Rig {
    clock: Arc<TestClock>,
    rtc: Arc<Rtc>,
}

fn rig(memory: MemorySizes) -> Rig {
    let clock = Arc::new(TestClock(AtomicU64::new(START.as_nanos() as u64)));
    Rig {
        rtc: Rtc::new(clock.clone(), memory),
        clock,
    }
}

fn get(rtc: &Rtc, index: u8) -> u8 {
    rtc.write(INDEX, &[index]);
    let mut data = [0];
    rtc.read(DATA, &mut data);
    data[0]
}

fn set(rtc: &Rtc, index: u8, value: u8) {
    rtc.write(INDEX, &[index]);
    rtc.write(DATA, &[value]);
}

/// Century, year, month, day, hour, minute, second, as the registers have them.
fn time(rtc: &Rtc) -> [u8; 7] {
    [CENTURY, 9, 8, 7, 4, 2, 0].map(|index| get(rtc, index))
}

const A: u8 = 0x0a;
const B: u8 = 0x0b;
const C: u8 = 0x0c;

#[test]
fn it_starts_with_the_hosts_time_in_bcd_and_24_hours() {
    let Rig { rtc, clock } = rig(MemorySizes::default());
    assert_eq!(get(&rtc, B), 0x02);
    assert_eq!(get(&rtc, 0x0d), 0x80);
    assert_eq!(time(&rtc), [0x20, 0x23, 0x11, 0x14, 0x22, 0x13, 0x20]);
    assert_eq!(get(&rtc, 6), 3, "Tuesday");
    clock.pass(2 * 3600 * SECOND);
    assert_eq!(time(&rtc), [0x20, 0x23, 0x11, 0x15, 0x00, 0x13, 0x20]);
}

#[test]
fn binary_and_12_hours() {
    let Rig { rtc, .. } = rig(MemorySizes::default());
    set(&rtc, B, 0x04);
    assert_eq!(time(&rtc), [20, 23, 11, 14, 0x80 | 10, 13, 20]);
}

#[test]
fn the_index_port_is_write_only_and_ignores_the_nmi_bit() {
    let Rig { rtc, .. } = rig(MemorySizes::default());
    assert_eq!(get(&rtc, 0x80 | B), 0x02);
    let mut both = [0; 2];
    rtc.read(INDEX, &mut both);
    assert_eq!(both, [0xff, 0x02]);
}

#[test]
fn update_in_progress_covers_the_end_of_each_second() {
    let Rig { rtc, clock } = rig(MemorySizes::default());
    let in_progress = || get(&rtc, A) & 0x80 != 0;
    assert!(!in_progress());
    clock.pass(Duration::from_micros(997_700));
    assert!(!in_progress());
    assert_eq!(get(&rtc, 0), 0x20);
    // What the chip grants after a look that says "no".
    clock.pass(Duration::from_micros(244));
    assert_eq!(get(&rtc, 0), 0x20);
    assert!(in_progress());
    clock.pass(Duration::from_micros(2056));
    assert!(!in_progress());
    assert_eq!(get(&rtc, 0), 0x21);
}

#[test]
fn the_guest_sets_the_clock_as_linux_does() {
    let Rig { rtc, clock } = rig(MemorySizes::default());
    clock.pass(Duration::from_millis(300));
    set(&rtc, B, 0x82);
    set(&rtc, A, 0x76);
    for (index, value) in [
        (9, 0x99),
        (8, 0x12),
        (7, 0x31),
        (4, 0x23),
        (2, 0x59),
        (0, 0x58),
        (CENTURY, 0x19),
    ] {
        set(&rtc, index, value);
    }
    clock.pass(10 * SECOND);
    assert_eq!(get(&rtc, A), 0x76, "no update while time is stopped");
    assert_eq!(time(&rtc), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58]);
    set(&rtc, B, 0x02);
    set(&rtc, A, 0x26);
    assert_eq!(time(&rtc), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58]);
    // After the divider's reset the first second is half a second.
    clock.pass(SECOND / 2);
    assert_eq!(time(&rtc), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59]);
    clock.pass(SECOND);
    assert_eq!(time(&rtc), [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]);
}

#[test]
fn a_stop_without_reset_keeps_the_phase() {
    let Rig { rtc, clock } = rig(MemorySizes::default());
    clock.pass(Duration::from_millis(900));
    set(&rtc, B, 0x82);
    set(&rtc, B, 0x02);
    assert_eq!(get(&rtc, 0), 0x20);
    clock.pass(Duration::from_millis(100));
    assert_eq!(get(&rtc, 0), 0x21);
}

#[test]
fn single_fields_can_be_set_while_time_runs() {
    let Rig { rtc, clock } = rig(MemorySizes::default());
    set(&rtc, 4, 0x05);
    set(&rtc, 2, 0xff);
    clock.pass(SECOND);
    assert_eq!(
        time(&rtc),
        [0x20, 0x23, 0x11, 0x14, 0x05, 0x59, 0x21],
        "nonsense becomes the nearest sense"
    );
}

#[test]
fn flags_tell_what_went_by_and_reading_clears_them() {
    let Rig { rtc, clock } = rig(MemorySizes::default());
    // Alarm at any hour and minute, second 22.
    for (index, value) in [(1, 0x22), (3, 0xff), (5, 0xff)] {
        set(&rtc, index, value);
    }
    get(&rtc, C);
    assert_eq!(get(&rtc, C), 0);
    clock.pass(SECOND);
    assert_eq!(get(&rtc, C), 0x50, "update, periodic; no alarm yet");
    clock.pass(SECOND);
    assert_eq!(get(&rtc, C), 0x70);
    clock.pass(Duration::from_millis(1));
    assert_eq!(get(&rtc, C), 0x40);
}

#[test]
fn without_a_line_interrupts_cannot_be_enabled() {
    let Rig { rtc, .. } = rig(MemorySizes::default());
    set(&rtc, B, 0x72);
    assert_eq!(get(&rtc, B), 0x02);
}

#[test]
fn memory_sizes_and_scratch_bytes() {
    let Rig { rtc, .. } = rig(MemorySizes {
        below_4g: 3 << 30,
        above_4g: 5 << 30,
    });
    let bytes = |indices: &[u8]| {
        indices
            .iter()
            .rev()
            .fold(0u64, |n, index| n << 8 | u64::from(get(&rtc, *index)))
    };
    assert_eq!(bytes(&[0x15, 0x16]), 640);
    assert_eq!(bytes(&[0x17, 0x18]), 0xffff);
    assert_eq!(bytes(&[0x34, 0x35]), ((3 << 30) - (16 << 20)) >> 16);
    assert_eq!(bytes(&[0x5b, 0x5c, 0x5d]), (5 << 30) >> 16);
    set(&rtc, 0x0f, 0x5a);
    assert_eq!(get(&rtc, 0x0f), 0x5a);
    set(&rtc, 0x0d, 0);
    assert_eq!(get(&rtc, 0x0d), 0x80);
}

#[test]
fn the_loop_waits_only_for_what_is_enabled_and_not_seen_yet() {
    let clock = Arc::new(TestClock(AtomicU64::new(START.as_nanos() as u64)));
    let (sender, rises) = channel();
    let (rtc, _loop) = Rtc::with_interrupt(
        clock.clone(),
        MemorySizes::default(),
        Arc::new(Line(Mutex::new(sender))),
    )
    .unwrap();
    assert_eq!(rtc.poll(), None);
    for (index, value) in [(1, 0x00), (3, 0x14), (5, 0x22)] {
        set(&rtc, index, value);
    }
    set(&rtc, B, 0x22);
    assert_eq!(rtc.poll(), Some(40 * SECOND), "the alarm, 22:14:00");
    set(&rtc, B, 0x32);
    assert_eq!(rtc.poll(), Some(SECOND), "the end of the update");
    set(&rtc, B, 0x72);
    assert_eq!(
        rtc.poll(),
        Some(Duration::from_nanos(976_562) - Duration::from_nanos(START.as_nanos() as u64 % 976_562))
    );
    set(&rtc, B, 0x22);
    clock.pass(40 * SECOND);
    assert_eq!(rtc.poll(), None, "the guest has not read register C");
    assert_eq!(rises.try_iter().count(), 1);
    assert_eq!(get(&rtc, C) & 0xa0, 0xa0);
    assert_eq!(rtc.poll(), Some(24 * 3600 * SECOND), "tomorrow");
    rtc.disable_interrupts();
    assert_eq!(get(&rtc, B), 0x02);
}

#[test]
fn interrupts_come_from_the_loop() {
    let (sender, rises) = channel();
    let line = Arc::new(Line(Mutex::new(sender)));
    let (rtc, device) = Rtc::with_interrupt(Arc::new(HostClock), MemorySizes::default(), line).unwrap();
    let running = DispatchLoop::spawn("rtc", || Ok::<_, String>(()), device, Arc::new(Reports::default())).unwrap();
    // Periodic, 1024 a second: each comes only after register C was read.
    set(&rtc, B, 0x42);
    for _ in 0..5 {
        rises.recv().unwrap();
        assert_eq!(get(&rtc, C) & 0xc0, 0xc0);
    }
    // The end of the update, within a second.
    set(&rtc, B, 0x12);
    // A last periodic edge may be under way still.
    loop {
        rises.recv().unwrap();
        if get(&rtc, C) & 0x90 == 0x90 {
            break;
        }
    }
    running.stop(60 * SECOND).unwrap();
    assert_eq!(get(&rtc, B), 0x02, "nothing can interrupt any more");
}

proptest! {
    /// Whatever is written, reads give sense: registers in their ranges, time that goes on.
    #[test]
    fn random_accesses_never_panic(
        ops in prop::collection::vec((0u64..4, prop::collection::vec(any::<u8>(), 1..=8), any::<bool>(), 0u64..200_000_000_000), 1..200)
    ) {
        let clock = Arc::new(TestClock(AtomicU64::new(START.as_nanos() as u64)));
        let (sender, _rises) = channel();
        let (rtc, _loop) =
            Rtc::with_interrupt(clock.clone(), MemorySizes::default(), Arc::new(Line(Mutex::new(sender)))).unwrap();
        for (offset, mut data, write, wait) in ops {
            if write { rtc.write(offset, &data) } else { rtc.read(offset, &mut data) }
            clock.pass(Duration::from_nanos(wait));
            if let Some(next) = rtc.poll() {
                prop_assert!(next > Duration::ZERO && next <= 24 * 3600 * SECOND);
            }
        }
        // Started again in a known mode, the registers hold a time.
        set(&rtc, A, 0x26);
        set(&rtc, B, 0x06);
        let [century, year, month, day, hour, minute, second] = time(&rtc);
        prop_assert!(century < 100 && year < 100 && (1..=12).contains(&month) && (1..=31).contains(&day));
        prop_assert!(hour < 24 && minute < 60 && second < 60);
    }

    /// Setting a time and reading it gives that time, in every mode.
    #[test]
    fn a_time_that_is_set_is_read_back(unix in 0u32.., mode in prop_oneof![Just(0u8), Just(2), Just(4), Just(6)]) {
        let Rig { rtc, clock } = rig(MemorySizes::default());
        let other = Rtc::new(Arc::new(TestClock(AtomicU64::new(u64::from(unix) * 1_000_000_000))), MemorySizes::default());
        set(&other, B, mode);
        set(&rtc, B, 0x80 | mode);
        let wanted = time(&other);
        for (index, value) in [CENTURY, 9, 8, 7, 4, 2, 0].into_iter().zip(wanted) {
            set(&rtc, index, value);
        }
        clock.pass(5 * SECOND);
        set(&rtc, B, mode);
        prop_assert_eq!(time(&rtc), wanted);
        prop_assert_eq!(get(&rtc, 6), get(&other, 6));
    }
}

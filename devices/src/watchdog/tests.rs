//! The watchdog as a driver and its machine see it; the driver does what Linux's `i6300esb` does.

use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::*;
use crate::dispatch::DeviceEvent;
use crate::dispatch::stepper::Stepper;

/// A clock that the test moves.
#[derive(Default)]
struct TestClock(AtomicU64);

impl TestClock {
    fn advance(&self, by: Duration) {
        let nanoseconds = u64::try_from(by.as_nanos()).unwrap();
        self.0.fetch_add(nanoseconds, Ordering::Relaxed);
    }
}

impl MonotonicClock for TestClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }
}

#[derive(Default)]
struct Actions(Mutex<Vec<WatchdogAction>>);

impl WatchdogSink for Actions {
    fn expired(&self, action: WatchdogAction) {
        lock(&self.0).push(action);
    }
}

const SECOND: Duration = Duration::from_secs(1);

fn device(caused_reset: bool) -> (Arc<Watchdog>, Arc<TestClock>) {
    let clock = Arc::new(TestClock::default());
    let actions = Arc::new(Actions::default());
    let (watchdog, _) = Watchdog::new(WatchdogAction::Reset, actions, clock.clone(), caused_reset).unwrap();
    (watchdog, clock)
}

/// What Linux's driver does to the registers.
impl Watchdog {
    fn reload_register(&self, value: u16) {
        self.write_bar(BAR, 0xc, &value.to_le_bytes());
    }

    fn unlock(&self) {
        self.reload_register(0x80);
        self.reload_register(0x86);
    }

    fn feed(&self) {
        self.unlock();
        self.reload_register(0x100);
    }

    fn set_heartbeat(&self, seconds: u32) {
        for timer in [0, 4] {
            self.unlock();
            self.write_bar(BAR, timer, &(seconds << 9).to_le_bytes());
        }
        self.feed();
    }

    fn init(&self, heartbeat: u32) {
        self.write_config(0x60, &3u16.to_le_bytes());
        self.write_config(0x68, &[0]);
        self.unlock();
        self.unlock();
        self.reload_register(0x300);
        self.set_heartbeat(heartbeat);
    }

    fn enable(&self, lock: u8) {
        self.feed();
        self.write_config(0x68, &[lock]);
    }

    fn register(&self, offset: u64) -> u32 {
        let mut bytes = [0xff; 4];
        self.read_bar(BAR, offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }
}

#[test]
fn a_guest_finds_an_intel_6300esb_with_one_page_of_memory() {
    let (watchdog, _) = device(false);
    let mut id = [0; 4];
    watchdog.read_config(0, &mut id);
    assert_eq!(id, [0x86, 0x80, 0xab, 0x25]);
    assert_eq!(watchdog.bars(), []);
    watchdog.place(0xc000_1000);
    let bar = Bar {
        index: 0,
        address: 0xc000_1000,
        size: 4096,
    };
    assert_eq!(watchdog.bars(), [bar]);
}

#[test]
fn it_expires_after_both_timers_unless_it_is_fed() {
    let (watchdog, clock) = device(false);
    watchdog.init(30);
    assert_eq!(watchdog.poll(), (false, None), "off until the driver enables it");
    watchdog.enable(2);
    for _ in 0..10 {
        clock.advance(25 * SECOND);
        assert!(!watchdog.poll().0);
        watchdog.feed();
    }
    // 30 * 1024 ticks of 983.04 us.
    let timeout = Duration::from_nanos(30 * 1024 * 983_040);
    assert_eq!(watchdog.poll(), (false, Some(clock.now() + timeout)));
    clock.advance(timeout - Duration::from_nanos(1));
    assert!(!watchdog.poll().0);
    clock.advance(Duration::from_nanos(1));
    assert_eq!(watchdog.poll(), (true, None));
    assert_eq!(watchdog.poll(), (false, None), "once");
    assert_eq!(watchdog.register(0xc), 0x200);
    watchdog.feed();
    assert_eq!(watchdog.poll(), (false, Some(clock.now() + timeout)));
}

#[test]
fn the_first_timer_shows_in_the_status_register() {
    let (watchdog, clock) = device(false);
    watchdog.init(2);
    watchdog.enable(2);
    assert_eq!(watchdog.register(8), 0);
    clock.advance(SECOND + SECOND / 100);
    assert_eq!(watchdog.register(8), 1);
    watchdog.write_bar(BAR, 8, &[1]);
    clock.advance(2 * SECOND);
    assert!(watchdog.poll().0);
    watchdog.write_bar(BAR, 8, &[1, 0, 0, 0]);
    assert_eq!(watchdog.register(8), 0);
}

#[test]
fn a_driver_learns_that_the_watchdog_reset_the_machine_and_can_forget_it() {
    let (watchdog, _) = device(true);
    assert_eq!(watchdog.register(0xc), 0x200);
    watchdog.init(30);
    assert_eq!(watchdog.register(0xc), 0);
}

#[test]
fn disabling_ends_the_countdown_unless_it_is_locked() {
    let (watchdog, _) = device(false);
    watchdog.init(30);
    watchdog.enable(2);
    watchdog.write_config(0x68, &[0]);
    assert_eq!(watchdog.poll(), (false, None));
    watchdog.enable(3);
    watchdog.write_config(0x68, &[0]);
    let mut lock = [0];
    watchdog.read_config(0x68, &mut lock);
    assert_eq!(lock, [3]);
    assert!(watchdog.poll().1.is_some());
}

#[test]
fn registers_are_locked_again_after_each_write() {
    let (watchdog, _) = device(false);
    watchdog.unlock();
    watchdog.write_bar(BAR, 0, &5u32.to_le_bytes());
    watchdog.write_bar(BAR, 4, &6u32.to_le_bytes());
    assert_eq!((watchdog.register(0), watchdog.register(4)), (5, 0xf_ffff));
    watchdog.reload_register(0x86);
    watchdog.write_bar(BAR, 0, &7u32.to_le_bytes());
    assert_eq!(watchdog.register(0), 5);
}

#[test]
fn free_running_and_output_off_never_act() {
    let (watchdog, clock) = device(false);
    watchdog.init(1);
    watchdog.enable(6);
    clock.advance(10 * SECOND);
    assert_eq!(watchdog.poll(), (false, None));
    assert_eq!(watchdog.register(8), 1);

    let (watchdog, clock) = device(false);
    watchdog.init(1);
    watchdog.write_config(0x60, &[0x23, 0]);
    watchdog.enable(2);
    clock.advance(10 * SECOND);
    assert_eq!(watchdog.poll(), (false, None));
    assert_eq!(watchdog.register(0xc), 0x200);
}

#[test]
fn time_stands_still_while_the_machine_is_paused() {
    let (watchdog, clock) = device(false);
    watchdog.init(30);
    watchdog.enable(2);
    clock.advance(20 * SECOND);
    watchdog.pause();
    clock.advance(1000 * SECOND);
    assert_eq!(watchdog.poll(), (false, None));
    watchdog.resume();
    clock.advance(10 * SECOND);
    assert!(!watchdog.poll().0);
    clock.advance(SECOND);
    assert!(watchdog.poll().0);
    // Neither does it go on twice.
    watchdog.resume();
    assert_eq!(watchdog.poll(), (false, None));
}

#[test]
fn feeding_does_not_wake_the_loop() {
    let actions = Arc::new(Actions::default());
    let (watchdog, timer) = Watchdog::new(WatchdogAction::Stop, actions, Arc::new(HostMonotonic), false).unwrap();
    let mut stepper = Stepper::start(timer).unwrap();
    watchdog.init(1000);
    watchdog.enable(2);
    stepper.settle();
    for _ in 0..100 {
        watchdog.feed();
    }
    assert_eq!(stepper.step(), 0);
}

#[test]
fn the_loop_reports_and_acts() {
    let actions = Arc::new(Actions::default());
    let (watchdog, timer) =
        Watchdog::new(WatchdogAction::Stop, actions.clone(), Arc::new(HostMonotonic), false).unwrap();
    let mut stepper = Stepper::start(timer).unwrap();
    stepper.settle();
    watchdog.init(0);
    watchdog.enable(2);
    let expired = DeviceEvent::WatchdogExpired {
        device: "device".into(),
    };
    loop {
        stepper.wait();
        let reports = stepper.reports.take();
        if !reports.is_empty() {
            assert_eq!(reports, [expired]);
            break;
        }
    }
    assert_eq!(*lock(&actions.0), [WatchdogAction::Stop]);
}

#[derive(Clone, Debug)]
enum Step {
    Bar(u64, Option<Vec<u8>>),
    Config(u16, Option<Vec<u8>>),
    Feed,
    Wait(u64),
    Pause(bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let data = || prop::option::of(prop::collection::vec(any::<u8>(), 1..=8));
    let step = prop_oneof![
        (0u64..20, data()).prop_map(|(at, data)| Step::Bar(at, data)),
        (0x58u16..0x70, data()).prop_map(|(at, data)| Step::Config(at, data)),
        Just(Step::Feed),
        (0u64..1 << 40).prop_map(Step::Wait),
        any::<bool>().prop_map(Step::Pause),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    /// Whatever a guest does: the loop never sleeps past the moment at which the watchdog has to act, and never spins.
    #[test]
    fn any_accesses_keep_the_loop_in_time(steps in steps()) {
        let (watchdog, clock) = device(false);
        for step in steps {
            match step {
                Step::Bar(at, Some(data)) => watchdog.write_bar(BAR, at, &data),
                Step::Bar(at, None) => watchdog.read_bar(BAR, at, &mut [0; 8]),
                Step::Config(at, Some(data)) => watchdog.write_config(at, &data),
                Step::Config(at, None) => watchdog.read_config(at, &mut [0; 8]),
                Step::Feed => watchdog.feed(),
                Step::Wait(nanoseconds) => clock.advance(Duration::from_nanos(nanoseconds)),
                Step::Pause(true) => watchdog.pause(),
                Step::Pause(false) => watchdog.resume(),
            }
            let state = lock(&watchdog.state);
            if let Some(wanted) = state.wanted() {
                prop_assert!(state.armed.is_some_and(|armed| armed <= wanted));
            }
            drop(state);
            if let (_, Some(next)) = watchdog.poll() {
                prop_assert!(next > clock.now());
            }
        }
    }
}

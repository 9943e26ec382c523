//! Tests of the balloon by a fake driver.

use std::sync::mpsc::{Receiver, channel};

use super::super::malformed::every_shape_rests_and_recovers;
use super::super::testing::{Buffer, MEMORY, Rig};
use super::stats::MOST_WAITERS;
use super::*;

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATS: u16 = 2;
const REPORTING: u16 = 4;
const MINUTE: Duration = Duration::from_secs(60);

type Answer = Receiver<Result<MemoryStats, StatsError>>;

fn balloon() -> (Balloon, BalloonHandle) {
    Balloon::new(BalloonConfig {
        deflate_on_oom: true,
        page_reporting: true,
    })
    .unwrap()
}

fn active() -> (Rig<Balloon>, BalloonHandle) {
    let (device, handle) = balloon();
    (Rig::active(device), handle)
}

fn list(numbers: impl IntoIterator<Item = u32>) -> Buffer {
    Buffer::Out(numbers.into_iter().flat_map(u32::to_le_bytes).collect())
}

fn violation(rig: &mut Rig<Balloon>, queue: u16, buffers: &[Buffer]) -> String {
    rig.add(queue, buffers);
    match rig.try_kick(queue) {
        Err(Fault::Violation(violation)) => violation.to_string(),
        other => panic!("{other:?}"),
    }
}

fn ask(handle: &BalloonHandle, timeout: Duration) -> Answer {
    let (sender, receiver) = channel();
    // A test may end before its answer comes.
    handle.request_stats(timeout, move |answer| drop(sender.send(answer)));
    receiver
}

fn entries(stats: &[(u16, u64)]) -> Buffer {
    let bytes = stats.iter().flat_map(|(tag, value)| {
        let mut entry = tag.to_le_bytes().to_vec();
        entry.extend(value.to_le_bytes());
        entry
    });
    Buffer::Out(bytes.collect())
}

fn changed(actual: u32, requested: u32) -> DeviceEvent {
    DeviceEvent::BalloonChanged {
        device: "device".into(),
        actual: u64::from(actual) * PAGE,
        requested: u64::from(requested) * PAGE,
    }
}

#[test]
fn inflated_pages_go_back_to_the_host_joined() {
    let (mut rig, handle) = active();
    // As Linux does: from high to low, not all of them neighbours.
    rig.request(INFLATE, &[list((512..768).rev()), list([900, 3000, 902, 901])]);
    assert_eq!(
        rig.bench.discarded(),
        [(512 * PAGE, 256 * PAGE), (900 * PAGE, 3 * PAGE), (3000 * PAGE, PAGE)]
    );
    assert_eq!(
        handle.stats(),
        BalloonStats {
            inflated: 260 * PAGE,
            ..BalloonStats::default()
        }
    );
    assert_eq!(rig.bench.interrupts(INFLATE), 1);
    rig.request(DEFLATE, &[list([900, 901])]);
    assert_eq!(rig.bench.discarded(), []);
}

#[test]
fn a_list_longer_than_a_turn_is_worked_off() {
    let (mut rig, handle) = active();
    // Three times all pages of memory above the rings and the list itself.
    let all: Vec<u32> = (2048..4096).collect();
    let used = rig.request(INFLATE, &[list(all.repeat(10)), list(all.repeat(10))]);
    assert_eq!(used.written, 0);
    assert_eq!(handle.stats().inflated, 20 * 2048 * PAGE);
}

#[test]
fn a_reset_ends_a_long_list() {
    let (mut rig, handle) = active();
    rig.add(INFLATE, &[list((2048..4096).collect::<Vec<u32>>().repeat(20))]);
    rig.call(|device, context| device.notify(INFLATE, context)).unwrap();
    let before = handle.stats().inflated;
    assert!(before > 0 && before < 20 * 2048 * PAGE);
    rig.reset();
    rig.activate(u64::MAX).unwrap();
    rig.settle().unwrap();
    assert_eq!(handle.stats().inflated, before);
    rig.add(DEFLATE, &[list((2048..4096).collect::<Vec<u32>>().repeat(20))]);
    rig.call(|device, context| device.notify(DEFLATE, context)).unwrap();
    rig.reset_queue(DEFLATE).unwrap();
    rig.settle().unwrap();
    assert!(rig.used(DEFLATE).is_none());
    rig.request(DEFLATE, &[list([2048])]);
}

#[test]
fn owner_and_guest_tell_each_other_sizes() {
    let (mut rig, handle) = active();
    handle.set_target(1000);
    handle.set_target(0x1_0002);
    rig.settle().unwrap();
    assert_eq!(rig.bench.config()[..4], [2, 0, 1, 0]);
    assert_eq!(rig.bench.config_changes(), 1);
    assert_eq!(rig.reports(), [changed(0, 0x1_0002)]);
    rig.write_config(ACTUAL, &300_u32.to_le_bytes()).unwrap();
    assert_eq!(
        handle.size(),
        BalloonSize {
            current: 300,
            requested: 0x1_0002
        }
    );
    // What the driver may not write it does not write.
    rig.write_config(NUM_PAGES, &[9; 4]).unwrap();
    assert_eq!(rig.bench.config()[..4], [2, 0, 1, 0]);
}

#[test]
fn many_changes_are_one_event_and_the_last_is_told() {
    let (mut rig, _) = active();
    for pages in 1..=100_u32 {
        rig.write_config(ACTUAL, &pages.to_le_bytes()).unwrap();
    }
    assert_eq!(rig.reports(), [changed(1, 0)]);
    // The next comes by itself, a second after the first.
    let mut reports = Vec::new();
    while reports.is_empty() {
        rig.wait().unwrap();
        reports = rig.reports();
    }
    assert_eq!(reports, [changed(100, 0)]);
    rig.settle().unwrap();
    assert_eq!(rig.reports(), []);
}

#[test]
fn a_driver_that_is_reset_has_lent_nothing() {
    let (mut rig, handle) = active();
    handle.set_target(50);
    rig.settle().unwrap();
    rig.write_config(ACTUAL, &50_u32.to_le_bytes()).unwrap();
    rig.write_config(POISON, &[1; 4]).unwrap();
    rig.reset();
    assert_eq!(
        handle.size(),
        BalloonSize {
            current: 0,
            requested: 50
        }
    );
    assert_eq!(rig.bench.config()[..4], 50_u32.to_le_bytes());
    assert_eq!(rig.bench.config()[4..], [0; 12]);
    handle.set_target(60);
    rig.settle().unwrap();
    rig.activate(u64::MAX).unwrap();
    assert_eq!(rig.bench.config()[..4], 60_u32.to_le_bytes());
}

#[test]
fn reported_pages_go_back_to_the_host() {
    let (mut rig, handle) = active();
    // The rig's buffers are next to each other, but begin and end anywhere.
    rig.request(REPORTING, &[Buffer::In(0x10_0000), Buffer::In(0x20_0000)]);
    let discarded = rig.bench.discarded();
    assert_eq!(discarded.len(), 1, "{discarded:?}");
    let (start, len) = discarded[0];
    assert!(start % PAGE == 0 && len % PAGE == 0);
    assert!((0x30_0000 - 2 * PAGE..=0x30_0000).contains(&len));
    assert_eq!(handle.stats().reported, len);
    rig.request(REPORTING, &[Buffer::In(100)]);
    assert_eq!(rig.bench.discarded(), []);
}

#[test]
fn poisoned_pages_are_left_to_the_guest() {
    let (device, handle) = balloon();
    let mut rig = Rig::active(device);
    rig.write_config(POISON, &[0xaa; 4]).unwrap();
    rig.request(REPORTING, &[Buffer::In(0x10_0000)]);
    assert_eq!(handle.stats().reported, 0);
    rig.request(INFLATE, &[list([3000])]);
    assert_eq!(handle.stats().inflated, PAGE, "what is lent is not expected back");
    rig.write_config(POISON, &[0; 4]).unwrap();
    rig.request(REPORTING, &[Buffer::In(0x10_0000)]);
    assert!(handle.stats().reported > 0);
    // A driver that did not accept the feature has no say.
    rig.reset();
    rig.activate(!F_PAGE_POISON).unwrap();
    rig.write_config(POISON, &[0xaa; 4]).unwrap();
    let before = handle.stats().reported;
    rig.request(REPORTING, &[Buffer::In(0x10_0000)]);
    assert!(handle.stats().reported > before);
}

#[test]
fn statistics_come_when_somebody_asks() {
    let (mut rig, handle) = active();
    rig.add(STATS, &[entries(&[(5, 1)])]);
    rig.kick(STATS);
    assert!(rig.used(STATS).is_none(), "nobody has asked");
    assert_eq!(handle.latest_stats().unwrap().get(5), Some(1), "told unasked");

    let (first, second) = (ask(&handle, MINUTE), ask(&handle, MINUTE));
    rig.settle().unwrap();
    assert_eq!(rig.used(STATS).unwrap().written, 0);
    assert_eq!(rig.bench.interrupts(STATS), 1);
    assert!(first.try_recv().is_err());
    rig.add(STATS, &[entries(&[(5, 1 << 30), (4, 77)]), entries(&[(6, 3)])]);
    rig.kick(STATS);
    let stats = first.try_recv().unwrap().unwrap();
    assert_eq!(
        (stats.get(5), stats.get(4), stats.get(6)),
        (Some(1 << 30), Some(77), Some(3))
    );
    assert_eq!(second.try_recv().unwrap().unwrap(), stats);
    assert_eq!(handle.latest_stats().unwrap(), stats);
    assert!(stats.age() < MINUTE);
    assert!(rig.used(STATS).is_none(), "the buffer is kept for the next time");

    let third = ask(&handle, MINUTE);
    rig.settle().unwrap();
    rig.used(STATS).unwrap();
    rig.add(STATS, &[entries(&[])]);
    rig.kick(STATS);
    assert_eq!(third.try_recv().unwrap().unwrap().stats, []);
}

#[test]
fn who_asks_before_the_first_buffer_is_answered_from_the_second() {
    let (mut rig, handle) = active();
    let answer = ask(&handle, MINUTE);
    rig.settle().unwrap();
    rig.add(STATS, &[entries(&[(5, 1)])]);
    rig.kick(STATS);
    assert!(answer.try_recv().is_err());
    rig.used(STATS).unwrap();
    rig.add(STATS, &[entries(&[(5, 2)])]);
    rig.kick(STATS);
    assert_eq!(answer.try_recv().unwrap().unwrap().get(5), Some(2));
}

#[test]
fn a_driver_that_does_not_answer_lets_callers_go() {
    let (mut rig, handle) = active();
    rig.add(STATS, &[entries(&[])]);
    rig.kick(STATS);
    let answer = ask(&handle, Duration::from_millis(1));
    let patient = ask(&handle, MINUTE);
    let result = loop {
        rig.wait().unwrap();
        if let Ok(result) = answer.try_recv() {
            break result;
        }
    };
    assert_eq!(result, Err(StatsError::TimedOut));
    rig.reset();
    assert_eq!(patient.try_recv().unwrap(), Err(StatsError::Reset));
    let early = ask(&handle, MINUTE);
    rig.settle().unwrap();
    assert_eq!(early.try_recv().unwrap(), Err(StatsError::NotSupported), "no driver");
    rig.activate(!F_STATS).unwrap();
    let without = ask(&handle, MINUTE);
    rig.settle().unwrap();
    assert_eq!(without.try_recv().unwrap(), Err(StatsError::NotSupported));
}

#[test]
fn so_many_may_ask_at_a_time() {
    let (_rig, handle) = active();
    let answers: Vec<_> = (0..=MOST_WAITERS).map(|_| ask(&handle, MINUTE)).collect();
    assert_eq!(answers[MOST_WAITERS].try_recv().unwrap(), Err(StatsError::Busy));
    assert!(answers[0].try_recv().is_err());
}

#[test]
fn a_balloon_that_is_gone_says_so() {
    let (mut rig, handle) = active();
    let waiting = ask(&handle, MINUTE);
    rig.settle().unwrap();
    let unseen = ask(&handle, MINUTE);
    drop(rig);
    let late = ask(&handle, MINUTE);
    for answer in [waiting, unseen, late] {
        assert_eq!(answer.try_recv().unwrap(), Err(StatsError::Gone));
    }
    handle.set_target(1);
}

#[test]
fn a_reset_of_the_statistics_queue_gives_the_buffer_up() {
    let (mut rig, handle) = active();
    rig.add(STATS, &[entries(&[])]);
    rig.kick(STATS);
    rig.reset_queue(STATS).unwrap();
    let answer = ask(&handle, MINUTE);
    rig.settle().unwrap();
    assert!(rig.used(STATS).is_none());
    rig.reset_queue(STATS).unwrap();
    assert_eq!(answer.try_recv().unwrap(), Err(StatsError::Reset));
    rig.add(STATS, &[entries(&[])]);
    rig.kick(STATS);
}

#[test]
fn what_is_not_a_list_of_pages_breaks_the_rules() {
    let end = (MEMORY / PAGE) as u32;
    for queue in [INFLATE, DEFLATE] {
        let (mut rig, handle) = active();
        for (buffer, what) in [
            (list([3000, end]), "page number 0x1000 is not in guest memory"),
            (list([u32::MAX]), "page number 0xffffffff is not in guest memory"),
            (
                Buffer::Out(vec![0; 7]),
                "a list of page numbers: 7 bytes, expected a multiple of 4",
            ),
            (
                Buffer::In(4),
                "a list of page numbers has a buffer for the device to write",
            ),
        ] {
            assert_eq!(violation(&mut rig, queue, &[buffer]), format!("queue {queue}: {what}"));
            assert_eq!(rig.bench.discarded(), []);
            rig.activate(u64::MAX).unwrap();
        }
        rig.request(queue, &[list([end - 1])]);
        rig.request(queue, &[list([])]);
        assert_eq!(handle.stats().inflated, if queue == INFLATE { PAGE } else { 0 });
    }
}

#[test]
fn buffers_that_go_the_wrong_way_break_the_rules() {
    let (mut rig, _) = active();
    assert_eq!(
        violation(&mut rig, REPORTING, &[list([3000])]),
        "queue 4: a report of free pages has a buffer for the device to read"
    );
    rig.activate(u64::MAX).unwrap();
    assert_eq!(
        violation(&mut rig, STATS, &[Buffer::In(10)]),
        "queue 2: statistics have a buffer for the device to write"
    );
    rig.activate(u64::MAX).unwrap();
    rig.add(STATS, &[entries(&[])]);
    assert_eq!(
        violation(&mut rig, STATS, &[entries(&[])]),
        "queue 2: a second buffer of statistics, of which there can be one at a time"
    );
}

#[test]
fn every_malformed_ring_rests_the_balloon_until_a_reset() {
    let (mut rig, _) = active();
    every_shape_rests_and_recovers(&mut rig, &[INFLATE, DEFLATE, STATS, 3, REPORTING], |rig| {
        rig.request(INFLATE, &[list([3000])]);
    });
}

#[test]
fn full_and_empty_rings_and_indices_that_wrap_around() {
    let (mut rig, handle) = active();
    for queue in 0..5 {
        rig.kick(queue);
    }
    for n in 0..1100_u32 {
        for _ in 0..60 {
            rig.add(DEFLATE, &[list([3000 + n % 16])]);
            rig.add(REPORTING, &[Buffer::In(16)]);
        }
        rig.kick(DEFLATE);
        rig.kick(REPORTING);
        assert_eq!(std::iter::from_fn(|| rig.used(DEFLATE)).count(), 60);
        assert_eq!(std::iter::from_fn(|| rig.used(REPORTING)).count(), 60);
    }
    assert_eq!(handle.stats(), BalloonStats::default());
}

/// A host that takes nothing back.
struct Refuses;

impl super::super::device::Reclaim for Refuses {
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[test]
fn a_host_that_refuses_is_reported_once_and_the_balloon_goes_on() {
    let (mut rig, handle) = active();
    for _ in 0..2 {
        rig.add(INFLATE, &[list([3000, 3001, 3005])]);
        rig.call(|device, context| {
            let mut context = Context {
                memory: context.memory,
                reclaim: &Refuses,
                queues: &mut *context.queues,
                features: context.features,
                transport: context.transport,
                watches: &mut *context.watches,
            };
            device.notify(INFLATE, &mut context)
        })
        .unwrap();
        assert!(rig.used(INFLATE).is_some());
    }
    let reports = rig.reports();
    assert!(
        matches!(
            &reports[..],
            [DeviceEvent::IoError {
                operation: "discard",
                ..
            }]
        ),
        "{reports:?}"
    );
    assert_eq!(
        handle.stats(),
        BalloonStats {
            refused: 6 * PAGE,
            ..BalloonStats::default()
        }
    );
}

#[test]
fn a_driver_finds_reporting_where_it_counts() {
    let all = F_STATS | F_REPORTING;
    let roles = |features| [0, 1, 2, 3, 4, 5].map(|queue| Role::of(queue, features));
    use Role::*;
    assert_eq!(roles(all), [Inflate, Deflate, Stats, Reporting, Reporting, None]);
    assert_eq!(
        roles(F_REPORTING),
        [Inflate, Deflate, Reporting, Reporting, Reporting, None]
    );
    assert_eq!(roles(F_STATS), [Inflate, Deflate, Stats, None, None, None]);
    let (device, _) = Balloon::new(BalloonConfig::default()).unwrap();
    assert_eq!((device.features(), device.queue_sizes().len()), (F_STATS, 3));
    let (mut rig, handle) = active();
    rig.request(3, &[Buffer::In(0x10_0000)]);
    assert!(handle.stats().reported > 0);
}

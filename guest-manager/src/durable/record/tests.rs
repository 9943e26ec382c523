//! Records that are written and read again.

use std::{fs::File, io::Read, os::fd::AsRawFd};

use sepal_schema::{
    config::{self, OnReset},
    facet::{CallRate, Range, Rights},
    report::{Reason, Rung},
};

use super::*;

fn record(now: Instant) -> Record {
    Record {
        name: "web".into(),
        uuid: [7; 16],
        generation: 3,
        descriptor: Some(GuestDescriptor {
            cpus: 2,
            memory_mib: 64,
            kernel: "embedded".into(),
            cmdline: "quiet".into(),
            devices: vec!["serial".into()],
        }),
        layers: Vec::new(),
        phase: Phase::Running,
        detached: true,
        lease_tokens: vec![[1; 32], [2; 32]],
        lease_ends: Some(now + Duration::from_secs(30)),
        uid: 1000,
        gid: 100,
        trusted: true,
        counted: Counted {
            failures: 1,
            waits: 2,
            restarts: 4,
        },
        short_runs: 3,
        shares: vec![Kept {
            id: 9,
            parent: 8,
            thing: Thing::Console(2),
            digest: [3; 32],
            bounds: Bounds {
                rate: Some(CallRate {
                    per_second: 2,
                    burst: 5,
                }),
                balloon_pages: Some(Range { min: 1, max: 9 }),
                vsock_ports: vec![7],
                ..Bounds::only(Rights::ALL)
            },
            expires: Some(now + Duration::from_secs(60)),
            terms: Terms {
                once: true,
                uid: Some(5),
                label: "for the tests".into(),
            },
            redeemed: 0,
            shared_by_uid: 1000,
        }],
        crashes: Vec::new(),
        stop: Some(StopReport {
            reason: Reason::Crash,
            detail: "it crashed".into(),
            error: None,
            uptime_ns: 5,
            time_ns: 6,
            about: "vcpu1".into(),
            rung: Rung::None,
            component: None,
        }),
        cid: 77,
        pins: vec![Pin {
            vcpu: 0,
            cpus: vec![1, 5],
        }],
        share: Share {
            weight: 50,
            percent: 150,
        },
        started_ns: 12345,
        agent_ready: true,
        held: true,
        paused: true,
        balloon_taken: 4096,
        balloon_by_hand: true,
        origin: Configuration::of(&GuestConfig::default()).ok(),
        stop_wanted: Some(StopCause::Hangup(Duration::from_secs(5))),
        again: Some(Again::Panicked),
        asked: true,
        over: Some(Over {
            end: End {
                ending: Ending {
                    gave_up: true,
                    about: "vcpu0".into(),
                    ..Ending::new(Reason::Crash, "it crashed again")
                },
                uptime_ns: 99,
            },
            follows: Some(Follow {
                hold: true,
                begins: now + Duration::from_secs(50),
                by_itself: true,
            }),
        }),
        heard: 11,
        sequence: 12,
        notes: vec!["What it writes is kept in memory.".into()],
        broken: vec![("rng".into(), "a bug".into())],
    }
}

#[test]
fn a_record_survives_with_its_files() {
    let (moment, now) = (Moment::now(), Instant::now());
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, name).unwrap();
        File::open(path).unwrap().into()
    };
    let config = GuestConfig {
        name: "web".into(),
        memory_mib: 64,
        kernel: config::File::Fd(file("kernel")),
        initrd: config::File::Fd(file("initrd")),
        on_reset: OnReset::Restart,
        durable: true,
        ..GuestConfig::default()
    };
    let kit = Kit::new(config).unwrap();
    let record = record(now);
    let bytes = record.write(&kit, (moment, now)).unwrap();
    let fds = kit.fds.iter().map(|fd| fd.try_clone().unwrap()).collect();
    let (read, config) = Record::read(&bytes, fds, (moment, now)).unwrap();
    assert_eq!(read, record);
    assert!(config.durable && config.on_reset == OnReset::Restart && config.memory_mib() == 64);
    for (given, content) in [(config.kernel, "kernel"), (config.initrd, "initrd")] {
        let config::File::Fd(fd) = given else {
            panic!("no descriptor")
        };
        let mut text = String::new();
        File::from(fd).read_to_string(&mut text).unwrap();
        assert_eq!(text, content);
    }
    // A minute later by both clocks the share has expired, and not before.
    let later = (
        Moment {
            monotonic_ns: moment.monotonic_ns + 61_000_000_000,
            ..moment
        },
        now + Duration::from_secs(61),
    );
    let fds = kit.fds.iter().map(|fd| fd.try_clone().unwrap()).collect();
    let (read, _) = Record::read(&bytes, fds, later).unwrap();
    assert_eq!(read.shares[0].expires, Some(later.1));
}

#[test]
fn what_is_no_record_is_an_error() {
    let (moment, now) = (Moment::now(), Instant::now());
    let kit = Kit::new(GuestConfig {
        kernel: config::File::Fd(File::open("/dev/null").unwrap().into()),
        ..GuestConfig::default()
    });
    let bytes = record(now).write(&kit.unwrap(), (moment, now)).unwrap();
    // Without the kernel's descriptor.
    assert!(Record::read(&bytes, Vec::new(), (moment, now)).is_err());
    for length in [0, 1, 7, bytes.len() / 2] {
        assert!(Record::read(&bytes[..length], Vec::new(), (moment, now)).is_err());
    }
}

#[test]
fn descriptors_are_taken_once() {
    let null: OwnedFd = File::open("/dev/null").unwrap().into();
    let number = null.as_raw_fd();
    let fds = Descriptors::new(vec![null]);
    assert_eq!(fds.take(0).unwrap().as_raw_fd(), number);
    assert!(fds.take(0).is_err() && fds.take(1).is_err() && fds.take(u32::MAX).is_err());
}

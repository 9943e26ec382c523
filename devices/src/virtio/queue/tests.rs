//! Rings by the rules, rings that break them, and a model of both.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;
use crate::virtio::device::{Context, DeviceKind, Fault, VirtioDevice};
use crate::virtio::feature;
use crate::virtio::testing::{Buffer, MEMORY, Rig};

/// Copies what it reads into what it may write, in the order of the requests. Holds requests back while `hold` is set.
#[derive(Default)]
struct Echo {
    /// Entries of its queue; 0: eight.
    size: u16,
    hold: bool,
    held: Vec<Chain>,
}

impl VirtioDevice for Echo {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Other(63)
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![if self.size == 0 { 8 } else { self.size }]
    }
    fn notify(&mut self, index: u16, context: &mut Context<'_>) -> Result<(), Fault> {
        let memory = context.memory;
        let Some(queue) = context.queue(index) else {
            return Ok(());
        };
        while let Some(chain) = queue.pop()? {
            if self.hold {
                self.held.push(chain);
                continue;
            }
            let mut writer = chain.writer(memory);
            let bytes = chain.reader(memory).read_to_end(writer.left());
            writer.write(&bytes).unwrap();
            let written = writer.written();
            queue.push(chain, written)?;
        }
        Ok(context.interrupt(index)?)
    }
    fn reset(&mut self, _: &mut Context<'_>) {
        self.held.clear();
    }
}

/// What a request that breaks a rule is answered with.
fn violation(rig: &mut Rig<Echo>) -> Violation {
    match rig.try_kick(0) {
        Err(Fault::Violation(violation)) => violation,
        other => panic!("{other:?}"),
    }
}

/// A device whose only descriptor is this one, with index 0.
fn with_descriptor(address: u64, len: u32, flags: u16, next: u16) -> Rig<Echo> {
    let mut rig = Rig::active(Echo::default());
    rig.write_descriptor(0, 0, address, len, flags, next);
    rig.make_available(0, 0);
    rig
}

#[test]
fn requests_are_echoed_over_many_wraps() {
    let mut rig = Rig::active(Echo::default());
    for n in 0..200_000u32 {
        let bytes = n.to_le_bytes();
        let used = rig.request(
            0,
            &[
                Buffer::Out(bytes[..1].to_vec()),
                Buffer::Out(bytes[1..].to_vec()),
                Buffer::In(8),
            ],
        );
        assert_eq!((used.written, &used.bytes[..4]), (4, &bytes[..]));
    }
}

#[test]
fn chains_given_back_in_another_order_keep_their_heads() {
    let mut rig = Rig::active(Echo::default());
    rig.device.hold = true;
    let heads: Vec<u16> = (0..4)
        .map(|_| rig.add(0, &[Buffer::Out(vec![1]), Buffer::In(1)]))
        .collect();
    rig.kick(0);
    assert!(rig.used(0).is_none());
    rig.call(|device, context| {
        let queue = context.queue(0).unwrap();
        assert_eq!(queue.in_flight(), 4);
        for chain in device.held.drain(..).rev() {
            queue.push(chain, 0).unwrap();
        }
        assert_eq!(queue.in_flight(), 0);
    });
    let back: Vec<u16> = std::iter::from_fn(|| rig.used(0)).map(|used| used.head).collect();
    assert_eq!(back, heads.into_iter().rev().collect::<Vec<_>>());
}

#[test]
fn chains_given_back_together_are_seen_together() {
    let mut rig = Rig::active(Echo {
        hold: true,
        ..Echo::default()
    });
    let used_index = GuestAddress(rig.drivers[0].setup.used + 2);
    let (memory, done) = (rig.memory.clone(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        // A driver that looks all the time.
        let looking = scope.spawn(|| {
            let mut seen = Vec::new();
            while !done.load(Ordering::Acquire) {
                let index: u16 = memory.load(used_index, Ordering::Acquire).unwrap();
                if seen.last() != Some(&index) {
                    seen.push(index);
                }
            }
            seen
        });
        for _ in 0..2000 {
            for _ in 0..4 {
                rig.add(0, &[Buffer::In(16)]);
            }
            rig.kick(0);
            rig.call(|device, context| {
                let queue = context.queue(0).unwrap();
                device.held.drain(..).try_for_each(|chain| queue.stage(chain, 16))?;
                queue.publish()
            })
            .unwrap();
            assert_eq!((0..4).filter_map(|_| rig.used(0)).count(), 4);
        }
        done.store(true, Ordering::Release);
        let seen = looking.join().unwrap();
        assert!(seen.iter().all(|index| index.is_multiple_of(4)), "{seen:?}");
    });
}

#[test]
fn chains_taken_together_are_those_taken_one_by_one() {
    let mut rig = Rig::active(Echo::default());
    let heads: Vec<u16> = (0..5)
        .map(|n| {
            rig.add(
                0,
                &[if n % 2 == 0 {
                    Buffer::Out(vec![1])
                } else {
                    Buffer::In(1)
                }],
            )
        })
        .collect();
    // And a sixth that lies outside of memory.
    rig.write_descriptor(0, 7, MEMORY, 1, 0, 0);
    rig.make_available(0, 7);
    rig.call(|_, context| {
        let queue = context.queue(0).unwrap();
        let mut chains = Vec::new();
        queue.pop_some(0, &mut chains).unwrap();
        queue.pop_some(2, &mut chains).unwrap();
        assert_eq!((chains.len(), queue.in_flight(), queue.known()), (2, 2, 4));
        let broken = queue.pop_some(u16::MAX, &mut chains).unwrap_err();
        assert!(matches!(broken, Violation::Address { .. }), "{broken:?}");
        let taken: Vec<u16> = chains.iter().map(Chain::head).collect();
        assert_eq!(taken, heads, "those before the broken one");
    });
}

#[test]
fn chains_given_back_are_seen_once_they_are_published() {
    let mut rig = Rig::active(Echo {
        hold: true,
        ..Echo::default()
    });
    for told in [false, true] {
        for _ in 0..3 {
            rig.add(0, &[Buffer::In(4)]);
        }
        rig.kick(0);
        rig.call(|device, context| {
            let queue = context.queue(0).unwrap();
            device.held.drain(..).for_each(|chain| queue.stage(chain, 4).unwrap());
            assert_eq!(queue.in_flight(), 0);
        });
        assert!(rig.used(0).is_none());
        rig.call(|_, context| {
            let queue = context.queue(0).unwrap();
            if told {
                queue.needs_interrupt().map(drop)
            } else {
                queue.publish()
            }
        })
        .unwrap();
        assert_eq!(std::iter::from_fn(|| rig.used(0)).count(), 3);
    }
}

#[test]
fn a_chain_that_was_seen_is_taken_even_if_the_driver_takes_it_back() {
    for features in [u64::MAX, !feature::EVENT_IDX] {
        let mut rig = Rig::new(Echo::default());
        rig.activate(features).unwrap();
        let wait = |rig: &mut Rig<Echo>| rig.call(|_, context| context.queue(0).unwrap().wait_for_doorbell());
        let take = |rig: &mut Rig<Echo>| rig.call(|_, context| context.queue(0).unwrap().pop());
        assert_eq!(wait(&mut rig), Ok(false));
        let head = rig.add(0, &[Buffer::In(1)]);
        assert_eq!(wait(&mut rig), Ok(true));
        // Otherwise a driver that does this at the right times keeps a device looking without end.
        rig.set_available_index(0, 0);
        assert_eq!(take(&mut rig).unwrap().map(|chain| chain.head()), Some(head));
        let behind = Violation::AvailableIndex {
            queue: 0,
            index: 0,
            ahead: u16::MAX,
            size: 8,
        };
        assert_eq!(take(&mut rig), Err(behind.clone()));
        assert_eq!(wait(&mut rig), Err(behind));
    }
}

#[test]
fn a_chain_put_back_comes_again() {
    let mut rig = Rig::active(Echo::default());
    let head = rig.add(0, &[Buffer::Out(vec![1])]);
    rig.call(|_, context| {
        let queue = context.queue(0).unwrap();
        for _ in 0..3 {
            let chain = queue.pop().unwrap().unwrap();
            assert_eq!(chain.head(), head);
            queue.unpop(chain);
            assert_eq!((queue.in_flight(), queue.available().unwrap()), (0, 1));
        }
    });
}

#[test]
fn indirect_tables_hold_longer_chains_than_the_ring() {
    let mut rig = Rig::active(Echo::default());
    let (table, data) = (rig.allocate(16 * 8), rig.allocate(64));
    rig.memory.write_slice(b"indirect", GuestAddress(data)).unwrap();
    for n in 0..4u16 {
        rig.write_raw_descriptor(table + 16 * u64::from(n), data + 2 * u64::from(n), 2, NEXT, n + 1);
    }
    rig.write_raw_descriptor(table + 64, data + 32, 8, WRITE, 0);
    rig.write_descriptor(0, 3, table, 16 * 5, INDIRECT, 0);
    rig.make_available(0, 3);
    rig.kick(0);
    assert_eq!(rig.used(0).unwrap().written, 8);
    let mut copy = [0; 8];
    rig.memory.read_slice(&mut copy, GuestAddress(data + 32)).unwrap();
    assert_eq!(&copy, b"indirect");
}

#[test]
fn every_broken_ring_is_named() {
    let at = 0x20_0000;
    let outside = |address, len| Violation::Address { queue: 0, address, len };
    assert_eq!(violation(&mut with_descriptor(MEMORY, 1, 0, 0)), outside(MEMORY, 1));
    assert_eq!(
        violation(&mut with_descriptor(MEMORY - 1, 2, WRITE, 0)),
        outside(MEMORY - 1, 2)
    );
    assert_eq!(
        violation(&mut with_descriptor(u64::MAX, u32::MAX, 0, 0)),
        outside(u64::MAX, u32::MAX.into())
    );
    assert_eq!(
        violation(&mut with_descriptor(at, 1, NEXT, 8)),
        Violation::DescriptorIndex {
            queue: 0,
            index: 8,
            size: 8
        }
    );
    assert_eq!(
        violation(&mut with_descriptor(at, 1, NEXT, 0)),
        Violation::ChainLength {
            queue: 0,
            head: 0,
            most: 8
        }
    );
    let misuse = |reason| Violation::Indirect {
        queue: 0,
        head: 0,
        reason,
    };
    for (len, flags, reason) in [
        (0, INDIRECT, "is not a whole number of descriptors long"),
        (17, INDIRECT, "is not a whole number of descriptors long"),
        (16, INDIRECT | NEXT, "is followed by a further descriptor"),
    ] {
        assert_eq!(violation(&mut with_descriptor(at, len, flags, 1)), misuse(reason));
    }
    let mut nested = with_descriptor(at, 16, INDIRECT, 0);
    nested.write_raw_descriptor(at, at, 16, INDIRECT, 0);
    assert_eq!(violation(&mut nested), misuse("is itself in an indirect table"));
    let mut elsewhere = with_descriptor(MEMORY, 16, INDIRECT, 0);
    assert_eq!(violation(&mut elsewhere), outside(MEMORY, 16));
    let mut beyond = with_descriptor(at, 16, INDIRECT, 0);
    beyond.write_raw_descriptor(at, at, 1, NEXT, 1);
    assert_eq!(
        violation(&mut beyond),
        Violation::DescriptorIndex {
            queue: 0,
            index: 1,
            size: 1
        }
    );

    let mut order = with_descriptor(at, 1, WRITE | NEXT, 1);
    order.write_descriptor(0, 1, at, 1, 0, 0);
    assert_eq!(violation(&mut order), Violation::Order { queue: 0, head: 0 });

    let mut head = Rig::active(Echo::default());
    head.make_available(0, 8);
    assert_eq!(
        violation(&mut head),
        Violation::DescriptorIndex {
            queue: 0,
            index: 8,
            size: 8
        }
    );

    let mut ahead = Rig::active(Echo::default());
    ahead.set_available_index(0, 9);
    assert_eq!(
        violation(&mut ahead),
        Violation::AvailableIndex {
            queue: 0,
            index: 9,
            ahead: 9,
            size: 8
        }
    );
}

#[test]
fn a_table_may_not_make_a_chain_longer_than_its_ring() {
    let mut rig = Rig::active(Echo::default());
    let table = rig.allocate(16 * 9);
    for n in 0..9u16 {
        let flags = if n < 8 { NEXT } else { 0 };
        rig.write_raw_descriptor(table + 16 * u64::from(n), 0x1000, 1, flags, n + 1);
    }
    rig.write_descriptor(0, 0, table, 16 * 9, INDIRECT, 0);
    rig.make_available(0, 0);
    assert_eq!(
        violation(&mut rig),
        Violation::ChainLength {
            queue: 0,
            head: 0,
            most: 8
        }
    );
}

#[test]
fn a_chain_may_not_have_more_bytes_than_its_length_can_say() {
    let mut rig = Rig::active(Echo {
        size: 256,
        ..Echo::default()
    });
    let table = rig.allocate(16 * 300);
    for n in 0..300u16 {
        let flags = if n < 299 { NEXT } else { 0 };
        rig.write_raw_descriptor(table + 16 * u64::from(n), 0, MEMORY as u32, flags, n + 1);
    }
    rig.write_descriptor(0, 0, table, 16 * 300, INDIRECT, 0);
    rig.make_available(0, 0);
    assert_eq!(violation(&mut rig), Violation::ChainBytes { queue: 0, head: 0 });
}

#[test]
fn one_chain_made_available_twice_is_found_by_its_number() {
    let mut rig = Rig::active(Echo {
        hold: true,
        ..Echo::default()
    });
    for _ in 0..8 {
        rig.write_descriptor(0, 0, 0x20_0000, 1, 0, 0);
        rig.make_available(0, 0);
    }
    rig.kick(0);
    rig.make_available(0, 0);
    assert!(matches!(
        violation(&mut rig),
        Violation::AvailableIndex { ahead: 1, size: 8, .. }
    ));
    assert!(rig.device.held.is_empty() && !rig.is_active());
    rig.device.hold = false;
    rig.activate(u64::MAX).unwrap();
    assert_eq!(rig.request(0, &[Buffer::Out(vec![7]), Buffer::In(1)]).bytes, [7]);
}

#[test]
fn wrong_set_ups_are_refused() {
    let rig = Rig::new(Echo::default());
    let good = rig.drivers[0].setup;
    let refused = |change: &dyn Fn(&mut QueueSetup), word: &str| {
        let mut setup = good;
        change(&mut setup);
        match Virtqueue::new(3, setup, feature::VERSION_1, rig.memory.clone()) {
            Err(error) => assert!(
                error.to_string().starts_with("queue 3: ") && error.to_string().contains(word),
                "{error}"
            ),
            Ok(_) => panic!("{setup:?} was taken"),
        }
    };
    refused(&|s| s.size = 0, "size");
    refused(&|s| s.size = 12, "size");
    refused(&|s| s.descriptors += 8, "aligned");
    refused(&|s| s.available += 1, "aligned");
    refused(&|s| s.used += 2, "aligned");
    refused(&|s| s.descriptors = MEMORY, "descriptor table");
    refused(&|s| s.available = MEMORY - 8, "available ring");
    refused(&|s| s.used = !3, "used ring");
}

#[test]
fn a_driver_that_wants_no_interrupt_gets_none() {
    let mut rig = Rig::new(Echo::default());
    rig.activate(feature::INDIRECT_DESC).unwrap();
    rig.request(0, &[Buffer::Out(vec![1])]);
    assert_eq!(rig.bench.interrupts(0), 1);
    rig.memory
        .write_slice(
            &NO_INTERRUPT.to_le_bytes(),
            GuestAddress(rig.drivers[0].setup.available),
        )
        .unwrap();
    rig.request(0, &[Buffer::Out(vec![1])]);
    assert_eq!(rig.bench.interrupts(0), 0);
    // Nothing new to tell of.
    rig.kick(0);
    assert_eq!(rig.bench.interrupts(0), 0);
}

#[test]
fn indirect_tables_need_their_feature() {
    let mut rig = Rig::new(Echo::default());
    rig.activate(0).unwrap();
    rig.write_descriptor(0, 0, 0x20_0000, 16, INDIRECT, 0);
    rig.make_available(0, 0);
    assert!(matches!(violation(&mut rig), Violation::Indirect { .. }));
}

#[test]
fn with_event_idx_an_interrupt_comes_for_the_index_asked_for() {
    let mut rig = Rig::active(Echo::default());
    for _ in 0..3 {
        rig.add(0, &[Buffer::Out(vec![1])]);
    }
    // The driver wants to be told of the third.
    let setup = rig.drivers[0].setup;
    let used_event = GuestAddress(setup.available + 4 + 2 * u64::from(setup.size));
    rig.memory.write_slice(&2u16.to_le_bytes(), used_event).unwrap();
    rig.call(|_, context| {
        for n in 0..3 {
            let queue = context.queue(0).unwrap();
            let chain = queue.pop().unwrap().unwrap();
            queue.push(chain, 0).unwrap();
            assert_eq!(queue.needs_interrupt().unwrap(), n == 2, "chain {n}");
        }
    });
}

proptest! {
    /// Whatever the descriptors say, a queue ends: in chains whose buffers lie in memory and whose readable ones come first, or in a violation.
    #[test]
    fn any_table_is_walked_to_an_end(
        table in prop::collection::vec((0u64..MEMORY + 0x1000, prop_oneof![0u32..0x100, any::<u32>()], 0u16..8, 0u16..10), 8),
        heads in prop::collection::vec(0u16..9, 0..8),
        indirect in prop::collection::vec((0x10_0000u64..0x10_0080, 0u32..0x40, 0u16..8, 0u16..5), 4),
    ) {
        let mut rig = Rig::active(Echo::default());
        for (n, &(address, len, flags, next)) in (0..).zip(&table) {
            rig.write_descriptor(0, n, address, len, flags, next);
        }
        for (n, &(address, len, flags, next)) in (0..).zip(&indirect) {
            rig.write_raw_descriptor(0x10_0000 + 16 * n, address, len, flags, next);
        }
        for &head in &heads {
            rig.make_available(0, head);
        }
        rig.call(|_, context| {
            let memory = context.memory;
            let queue = context.queue(0).unwrap();
            for _ in 0..=heads.len() {
                match queue.pop() {
                    Err(_) | Ok(None) => return Ok(()),
                    Ok(Some(chain)) => {
                        let segments = chain.readable().iter().chain(chain.writable());
                        let sum: u64 = segments.clone().map(|s| u64::from(s.len)).sum();
                        prop_assert_eq!(sum, u64::from(chain.readable_bytes()) + u64::from(chain.writable_bytes()));
                        for segment in segments {
                            prop_assert!(segment.len == 0 || memory.check_range(GuestAddress(segment.address), segment.len as usize));
                        }
                        let slices = chain.reader(memory).slices(chain.readable_bytes() as usize).unwrap();
                        prop_assert_eq!(slices.iter().map(|s| s.len()).sum::<usize>(), chain.readable_bytes() as usize);
                    }
                }
            }
            Err(TestCaseError::fail("more chains than were made available"))
        })?;
    }

    /// A cursor reads what a copy of the same segments holds, however it is asked, and never past the end.
    #[test]
    fn a_reader_is_a_queue_of_bytes(
        sizes in prop::collection::vec(0usize..40, 1..6),
        steps in prop::collection::vec((0u8..4, 0usize..50), 1..30),
    ) {
        let mut rig = Rig::active(Echo { hold: true, ..Echo::default() });
        let mut next = 0u8;
        let buffers: Vec<Buffer> = sizes.iter().map(|&size| Buffer::Out((0..size).map(|_| { next = next.wrapping_add(7); next }).collect())).collect();
        let mut model: VecDeque<u8> = buffers.iter().flat_map(|b| match b { Buffer::Out(bytes) => bytes.clone(), Buffer::In(_) => vec![] }).collect();
        rig.add(0, &buffers);
        rig.kick(0);
        let memory = rig.memory.clone();
        let mut reader = rig.device.held[0].reader(&memory);
        for (step, len) in steps {
            prop_assert_eq!(reader.left(), model.len());
            let fits = len <= model.len();
            let expected: Vec<u8> = model.iter().take(len).copied().collect();
            let got: Option<Vec<u8>> = match step {
                0 => { let mut bytes = vec![0; len]; reader.read(&mut bytes).ok().map(|()| bytes) }
                1 => reader.skip(len).ok().map(|()| expected.clone()),
                2 => reader.split_at(len).ok().map(|mut head| { let bytes = head.read_to_end(usize::MAX); assert_eq!(head.left(), 0); bytes }),
                _ => reader.slices(len).ok().map(|slices| slices.iter().flat_map(|s| { let mut bytes = vec![0; s.len()]; s.copy_to(&mut bytes[..]); bytes }).collect()),
            };
            prop_assert_eq!(got.is_some(), fits);
            if let Some(got) = got {
                prop_assert_eq!(got, expected);
                model.drain(..len);
            }
        }
    }
}

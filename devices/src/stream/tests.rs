//! Tests of the host's end of a stream.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::*;

/// What may be done to a ring.
#[derive(Clone, Debug)]
enum Op {
    Push(u8),
    Extend(Vec<u8>),
    Take(usize),
    Consume(usize),
    Clear,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => any::<u8>().prop_map(Op::Push),
        4 => prop::collection::vec(any::<u8>(), 0..30).prop_map(Op::Extend),
        2 => (0usize..8).prop_map(Op::Take),
        2 => (0usize..8).prop_map(Op::Consume),
        1 => Just(Op::Clear),
    ]
}

proptest! {
    #[test]
    fn the_ring_keeps_the_newest_bytes_in_order(
        capacity in 0usize..20,
        room in any::<bool>(),
        ops in prop::collection::vec(op(), 0..200),
    ) {
        let mut ring = if room { OutputRing::with_room(capacity) } else { OutputRing::new(capacity) };
        let (mut model, mut dropped) = (Vec::new(), 0);
        for op in ops {
            match op {
                Op::Push(byte) => {
                    ring.push(byte);
                    model.push(byte);
                }
                Op::Extend(bytes) => {
                    ring.extend(&bytes);
                    model.extend(bytes);
                }
                Op::Take(most) => {
                    let mut taken = vec![0; most];
                    let n = ring.take(&mut taken);
                    prop_assert_eq!(&taken[..n], &model.drain(..most.min(model.len())).collect::<Vec<_>>()[..]);
                }
                Op::Consume(n) => {
                    let n = n.min(ring.front().len());
                    prop_assert_eq!(ring.front()[..n].to_vec(), model.drain(..n).collect::<Vec<_>>());
                    ring.consume(n);
                }
                Op::Clear => prop_assert_eq!(ring.clear(), std::mem::take(&mut model).len()),
            }
            let excess = model.len().saturating_sub(capacity);
            model.drain(..excess);
            dropped += excess as u64;
            prop_assert_eq!(ring.dropped(), dropped);
            prop_assert_eq!(ring.len(), model.len());
            prop_assert_eq!(ring.is_empty(), ring.front().is_empty());
        }
    }
}

#[test]
fn an_emptied_ring_gives_its_memory_back() {
    let mut ring = OutputRing::new(1 << 20);
    ring.extend(&vec![0; 1 << 20]);
    ring.consume(1 << 20);
    assert!(ring.bytes.capacity() <= KEPT_ROOM);
}

#[test]
fn a_host_that_closes_is_drained_and_then_gone() {
    let (mut host, end) = UnixStream::pair().unwrap();
    let mut end = HostEnd::new(end.into()).unwrap();
    assert_eq!(end.watch_for(true, false), Some(Watch::Modify(EventSet::IN)));
    assert_eq!(end.watch_for(true, false), None);
    assert_eq!(end.write(b"out"), Wrote::Bytes(3));
    let mut got = [0; 3];
    host.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"out");
    let mut buffer = [0; 8];
    assert_eq!(end.read(&mut buffer), 0);
    assert!(end.can_read(), "nothing for now");
    host.write_all(b"in").unwrap();
    drop(host);
    end.hang_up();
    assert_eq!(end.life(), Life::Draining);
    assert_eq!(end.read(&mut buffer), 2);
    assert_eq!(end.read(&mut buffer), 0);
    assert!(!end.can_read());
    assert_eq!(end.write(b"out"), Wrote::Closed);
    assert_eq!(end.watch_for(true, true), None, "its owner has ended watching");
    assert_eq!(end.life(), Life::Gone);
}

#[test]
fn an_end_that_can_do_nothing_is_not_watched_any_more() {
    let (host, end) = UnixStream::pair().unwrap();
    let mut end = HostEnd::new(end.into()).unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(end.read(&mut [0; 8]), 0);
    assert!(!end.can_read());
    assert_eq!(end.watch_for(true, true), Some(Watch::Modify(EventSet::OUT)));
    assert!(end.close_output());
    assert!(!end.close_output());
    assert_eq!(end.watch_for(true, true), Some(Watch::Remove));
    assert_eq!(end.watch_for(true, true), None);
}

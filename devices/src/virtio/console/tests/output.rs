//! Output: hosts that read, that read slowly, and that do not.

use super::*;

#[test]
fn output_arrives_at_the_host_in_order() {
    let mut bench = Bench::open(2);
    bench.send(1, b"hello ");
    bench.send(0, b"console");
    bench.rig.request(
        3 + 2,
        &[Buffer::Out(b"from ".to_vec()), Buffer::Out(b"port 1".to_vec())],
    );
    assert_eq!(read_now(&mut bench.hosts[0]), b"console");
    assert_eq!(read_now(&mut bench.hosts[1]), b"hello from port 1");
    assert_eq!(bench.handle.stats(1).unwrap().from_guest, 17);
    assert!(bench.rig.bench.interrupts(transmit_queue(1)) > 0);
}

#[test]
fn bulk_output_is_whole_while_the_host_reads() {
    let mut bench = Bench::open(2);
    let sent = pattern(8 << 20);
    let mut received = Vec::new();
    for block in sent.chunks(32 * 1024) {
        bench.send(1, block);
        received.extend(read_now(&mut bench.hosts[1]));
        bench.rig.settle().unwrap();
    }
    received.extend(read_now(&mut bench.hosts[1]));
    assert!(received == sent);
    assert_eq!(bench.handle.stats(1).unwrap().dropped, 0);
}

#[test]
fn a_host_that_does_not_read_costs_old_output_only() {
    let mut bench = Bench::open(1);
    let sent = pattern(4 << 20);
    // Each comes back at once, although nobody reads.
    sent.chunks(100_000).for_each(|block| bench.send(0, block));
    let received = bench.drain(0);
    let dropped = bench.handle.stats(0).unwrap().dropped as usize;
    assert!(dropped > 0);
    assert_eq!(received.len() + dropped, sent.len());
    let newest = &received[received.len() - OUTPUT_CAPACITY..];
    assert!(newest == &sent[sent.len() - OUTPUT_CAPACITY..]);
    let oldest = &received[..received.len() - OUTPUT_CAPACITY];
    assert!(oldest == &sent[..oldest.len()]);
    bench.send(0, b"and on it goes");
    assert_eq!(read_now(&mut bench.hosts[0]), b"and on it goes");
}

#[test]
fn a_plain_port_waits_for_a_host_that_reads() {
    let mut bench = Bench::open(2);
    let sent = pattern(8 << 20);
    let mut host = bench.hosts.pop().unwrap();
    host.set_nonblocking(false).unwrap();
    let total = sent.len();
    let reader = std::thread::spawn(move || {
        let mut received = vec![0; total];
        host.read_exact(&mut received).unwrap();
        received
    });
    // The driver is far ahead of the reader, and sleeps until its buffers come back.
    for block in sent.chunks(256 * 1024) {
        bench.send(1, block);
    }
    // What is left goes out as the reader takes it.
    while !reader.is_finished() {
        bench.rig.settle().unwrap();
        std::thread::yield_now();
    }
    assert!(reader.join().unwrap() == sent);
    assert_eq!(bench.handle.stats(1).unwrap().dropped, 0);
}

#[test]
fn a_plain_port_does_not_wait_for_a_host_that_has_stopped() {
    let mut bench = Bench::open(2);
    let sent = pattern(4 << 20);
    // The first that finds the host full waits for its patience, all others go on at once.
    sent.chunks(100_000).for_each(|block| bench.send(1, block));
    let received = bench.drain(1);
    let dropped = bench.handle.stats(1).unwrap().dropped as usize;
    assert!(dropped > 0);
    assert_eq!(received.len() + dropped, sent.len());
    bench.send(1, b"and on it goes");
    assert_eq!(bench.drain(1), b"and on it goes");
}

#[test]
fn output_that_is_held_back_ends_with_the_host_or_the_driver() {
    let mut bench = Bench::open(2);
    bench.rig.add(5, &[Buffer::Out(vec![b'x'; 1 << 20])]);
    bench.rig.kick(5);
    assert!(bench.rig.used(5).is_none(), "held back");
    bench.hosts.pop();
    bench.rig.settle().unwrap();
    assert!(bench.rig.used(5).is_some(), "discarded");
    assert_eq!(bench.rig.reports().len(), 1);

    let mut bench = Bench::open(2);
    bench.rig.add(5, &[Buffer::Out(vec![b'x'; 1 << 20])]);
    bench.rig.kick(5);
    bench.rig.reset();
    assert!(bench.drain(1).iter().all(|byte| *byte == b'x'));
    bench.rig.activate(u64::MAX).unwrap();
    bench.set_up();
    bench.send(1, b"new");
    assert_eq!(bench.drain(1), b"new");
}

#[test]
fn one_chain_larger_than_a_turn_comes_out_whole() {
    let mut bench = Bench::open(1);
    let sent = pattern(3 << 20);
    bench.rig.add(1, &[Buffer::Out(sent.clone())]);
    let mut received = Vec::new();
    while bench.rig.used(1).is_none() {
        bench.rig.call(|device, context| device.notify(1, context)).unwrap();
        received.extend(read_now(&mut bench.hosts[0]));
    }
    received.extend(bench.drain(0));
    let dropped = bench.handle.stats(0).unwrap().dropped as usize;
    assert_eq!(received.len() + dropped, sent.len());
    assert!(received[received.len() - 1000..] == sent[sent.len() - 1000..]);
}

//! Bytes, descriptors and connections that are of no use.

use std::{fs::File, os::fd::AsFd, path::Path};

use crate::{
    raw::{Raw, bootstrap, call},
    scene::under,
};

/// Connections at a time in attacks that need many; the manager takes 1024.
const MANY: usize = 1000;

#[test]
fn bytes_that_are_no_messages() {
    under(|socket| {
        for bytes in [
            &b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"[..],
            &[0xff; 4096],
            // One segment of no words: a message without a root.
            &[0; 8],
            // A root pointer that leads out of the segment.
            &[0, 0, 0, 0, 1, 0, 0, 0, 0xfc, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff, 0xff],
        ] {
            let mut raw = Raw::connect(socket);
            raw.send(bytes);
            raw.closed();
        }
    });
}

#[test]
fn sizes_that_lie() {
    under(|socket| {
        for (segments, words) in [
            (0, u32::MAX),
            (u32::MAX, 1),
            (0, 1 << 28),
            (511, 1 << 20),
            (0, 16 * 1024 + 1),
        ] {
            let mut raw = Raw::connect(socket);
            let mut header: Vec<u8> = [segments, words].map(u32::to_le_bytes).concat();
            header.resize(4096, 0xff);
            raw.send(&header);
            raw.closed();
        }
    });
}

#[test]
fn messages_that_stop_halfway() {
    under(|socket| {
        // The largest message that is taken, all but its last byte, again and again.
        let mut most = [0, 16 * 1024_u32].map(u32::to_le_bytes).concat();
        most.resize(8 + 16 * 1024 * 8 - 1, 0);
        let waiting: Vec<Raw> = (0..100)
            .map(|_| {
                let mut raw = Raw::connect(socket);
                assert!(raw.send(&most));
                raw
            })
            .collect();
        let mut few: Vec<Raw> = (0..100).map(|_| Raw::connect(socket)).collect();
        for raw in &mut few {
            assert!(raw.send(&bootstrap()[..5]));
        }
        drop((waiting, few));
    });
}

#[test]
fn descriptors_that_nobody_asked_for() {
    under(|socket| {
        let null = File::open("/dev/null").unwrap();
        // With messages that do not name them: they go with their messages.
        let mut raw = Raw::connect(socket);
        assert!(raw.send(&bootstrap()));
        for question in 1..=200 {
            assert!(raw.send_with(&call(question, 0), &[null.as_fd(); 3]));
        }
        raw.read_byte();
        // In the middle of one that does not come to its end: past 64 that wait, the connection is closed.
        let mut raw = Raw::connect(socket);
        assert!(raw.send(&bootstrap()[..8]));
        for _ in 0..65 {
            raw.send_with(&[0], &[null.as_fd()]);
        }
        raw.closed();
        let mut raw = Raw::connect(socket);
        raw.send_with(&bootstrap(), &[null.as_fd(); 250]);
        raw.closed();
    });
}

#[test]
fn a_thousand_connections() {
    under(|socket| {
        let mut crowd: Vec<Raw> = (0..MANY).map(|_| connect(socket)).collect();
        // All of them are served, the last like the first.
        for raw in &mut crowd {
            assert!(raw.send(&[bootstrap(), call(1, 0)].concat()));
        }
        for raw in &mut crowd {
            raw.read_byte();
        }
    });
}

#[test]
fn more_connections_than_there_may_be() {
    under(|socket| {
        let mut crowd: Vec<Raw> = (0..1100).map(|_| connect(socket)).collect();
        let refused = crowd.split_off(MANY);
        // The first thousand hold, and of those that are too many each is told so at once.
        let refused = refused.into_iter().rev().take(50);
        for mut raw in refused {
            assert!(raw.closed().is_empty());
        }
        for raw in &mut crowd {
            assert!(raw.send(&bootstrap()));
            raw.read_byte();
        }
    });
}

fn connect(socket: &Path) -> Raw {
    Raw::connect(socket)
}

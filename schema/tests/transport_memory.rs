//! What hostile peers can make a server allocate, counted by the allocator.
//!
//! One test, since everything in this process counts.
#![allow(clippy::unwrap_used, reason = "a failed test panics")]

mod support;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    os::unix::net::UnixStream,
    sync::atomic::{AtomicUsize, Ordering},
};

use capnp::traits::HasTypeId;
use sepal_schema::transport::Limits;

use support::*;

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn add(size: usize) {
    let live = LIVE.fetch_add(size, Ordering::Relaxed) + size;
    PEAK.fetch_max(live, Ordering::Relaxed);
}

// SAFETY: every call is passed on to the system's allocator unchanged; counting does not touch the memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: the caller keeps the contract of `alloc`, which is the same here.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `pointer` came from `alloc` above with this layout, so from the system's allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const PING: u16 = 0;
const HANG: u16 = 1;
const BLOB: u16 = 11;

/// Lets `attack` loose on a server, and returns by how many bytes memory grew at most, and by how many it has grown when
/// the attack is over but for its connections.
fn growth(connections: usize, attack: impl FnOnce(&mut [UnixStream])) -> (usize, usize) {
    let (mut ours, theirs): (Vec<_>, Vec<_>) = (0..connections).map(|_| UnixStream::pair().unwrap()).unzip();
    let server = ServerThread::start(theirs, Limits::default());
    // All of them are set up once they have answered.
    for socket in &mut ours {
        raw::write(socket, &raw::bootstrap(0));
        assert_eq!(
            raw::read(socket),
            raw::Said::Return {
                question: 0,
                failed: false
            }
        );
    }
    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    attack(&mut ours);
    let peak = PEAK.load(Ordering::Relaxed).saturating_sub(before);
    let after = LIVE.load(Ordering::Relaxed).saturating_sub(before);
    drop(ours);
    server.join();
    (peak, after)
}

#[test]
fn memory_stays_bounded_whatever_peers_do() {
    let interface = probe::Client::TYPE_ID;
    let mib = 1 << 20;

    let (peak, _) = growth(400, |sockets| {
        // As much as a message may have is announced on every connection: 50 MiB, of which nothing comes.
        for socket in sockets.iter_mut() {
            raw::write(socket, &[0u32, 16 * 1024].map(u32::to_le_bytes).concat());
        }
        // Behind what the others sent: those have been read when this is answered, or will be with as little.
        let last = sockets.len() - 1;
        raw::write(&mut sockets[last], &vec![0; 128 * 1024]);
        raw::last_words(&mut sockets[last]);
    });
    assert!(peak < 12 * mib, "{peak} bytes for what was only announced");

    let (peak, _) = growth(1, |sockets| {
        // Calls that never end, with parameters as large as they may be.
        let socket = &mut sockets[0];
        let call = |question| {
            raw::encode(|message| {
                let mut call = message.init_call();
                call.set_question_id(question);
                call.set_interface_id(interface);
                call.set_method_id(HANG);
                call.reborrow()
                    .init_params()
                    .get_content()
                    .initn_as::<capnp::data::Builder<'_>>(100_000);
                call.init_target().init_promised_answer().set_question_id(0);
            })
        };
        let mut question = 1;
        while raw::write(socket, &call(question)) {
            question += 1;
        }
    });
    assert!(peak < 40 * mib, "{peak} bytes for calls in flight");

    let (peak, _) = growth(1, |sockets| {
        // Asks for much and reads none of it.
        let socket = &mut sockets[0];
        let blob = |question| {
            raw::encode(|message| {
                let mut call = message.init_call();
                call.set_question_id(question);
                call.set_interface_id(interface);
                call.set_method_id(BLOB);
                let content = call.reborrow().init_params().get_content();
                content.init_as::<probe::blob_params::Builder<'_>>().set_size(100_000);
                call.init_target().init_promised_answer().set_question_id(0);
            })
        };
        let mut question = 1;
        while raw::write(socket, &blob(question)) {
            question += 1;
        }
    });
    assert!(peak < 24 * mib, "{peak} bytes for replies that nobody reads");

    let (peak, _) = growth(1, |sockets| {
        // Calls that never end, each with as many capabilities as it may have.
        let socket = &mut sockets[0];
        let call = |question: u32| {
            raw::encode(|message| {
                let mut call = message.init_call();
                call.set_question_id(question);
                call.set_interface_id(interface);
                call.set_method_id(HANG);
                let mut table = call.reborrow().init_params().init_cap_table(256);
                for index in 0..256 {
                    table.reborrow().get(index).set_sender_hosted(question * 256 + index);
                }
                call.init_target().init_promised_answer().set_question_id(0);
            })
        };
        let mut question = 1;
        while raw::write(socket, &call(question)) {
            question += 1;
        }
    });
    assert!(peak < 40 * mib, "{peak} bytes for capabilities of calls in flight");

    let (peak, after) = growth(1, |sockets| {
        let socket = &mut sockets[0];
        for _ in 0..4_000 {
            raw::write(socket, &raw::call(1, 0, interface, PING));
            assert_eq!(
                raw::read(socket),
                raw::Said::Return {
                    question: 1,
                    failed: false
                }
            );
            raw::write(socket, &raw::call(2, 0, interface, HANG));
            raw::write(socket, &raw::finish(2));
            assert_eq!(
                raw::read(socket),
                raw::Said::Return {
                    question: 2,
                    failed: true
                }
            );
        }
    });
    assert!(
        peak < mib && after < mib / 4,
        "{peak} bytes, and {after} for good, for calls that have ended"
    );
}

//! Peers that break the protocol in every way: each ends its own connection, with a reason, and nobody else notices.

#![allow(clippy::unwrap_used, reason = "a failed test panics")]

mod support;

use std::{io::Write, os::fd::AsFd, os::unix::net::UnixStream, pin::pin, thread};

use capnp::traits::HasTypeId;
use futures::future::{join_all, select};
use proptest::prelude::*;
use sepal_schema::transport::{EndReason, Limit, Limits, Reactor, connect};

use support::{raw::Said, *};

const PING: u16 = 0;
const HANG: u16 = 1;
const GIVE_FD: u16 = 5;
const CHILD: u16 = 8;

fn interface() -> u64 {
    probe::Client::TYPE_ID
}

/// Lets `attack` loose on a server, beside a client that is served all the while. Returns why the attacker's connection
/// ended, and what the server said last on it.
fn attack(limits: Limits, attack: impl FnOnce(&mut UnixStream) + Send) -> (EndReason, Option<String>) {
    let (mut attacker, theirs) = UnixStream::pair().unwrap();
    let (good, theirs_good) = UnixStream::pair().unwrap();
    let server = ServerThread::start(vec![theirs, theirs_good], limits);
    let words = thread::scope(|scope| {
        let attacking = scope.spawn(move || {
            attack(&mut attacker);
            raw::last_words(&mut attacker)
        });
        let mut reactor = Reactor::single_threaded().unwrap();
        let handle = reactor.handle();
        let (probe, connection) = connect::<probe::Client>(&handle, good, Limits::default()).unwrap();
        reactor
            .run_until(async {
                let mut n = 0;
                while n < 100 || !attacking.is_finished() {
                    assert_eq!(ping(&probe, n).await.unwrap(), n + 1, "another client is served");
                    n += 1;
                }
            })
            .unwrap();
        drop(connection);
        attacking.join().unwrap()
    });
    let mut reasons = server.join();
    assert_eq!(reasons.pop(), Some(EndReason::ClosedByPeer));
    (reasons.remove(0), words)
}

#[track_caller]
fn assert_limit((reason, words): &(EndReason, Option<String>), limits: &Limits, which: Limit) {
    let expected = EndReason::LimitExceeded {
        which,
        allowed: which.allowed(limits),
    };
    assert_eq!(reason, &expected);
    if let Some(words) = words {
        assert_eq!(words, &expected.to_string());
    }
}

#[test]
fn a_flood_of_calls_ends_at_the_limit() {
    let limits = Limits::default();
    let result = attack(limits, |socket| {
        raw::write(socket, &raw::bootstrap(0));
        for question in 1..5000 {
            if !raw::write(socket, &raw::call(question, 0, interface(), HANG)) {
                break;
            }
        }
    });
    assert_limit(&result, &limits, Limit::Calls);
}

#[test]
fn calls_that_are_given_up_at_once_are_not_piled_up() {
    let (reason, words) = attack(
        Limits {
            calls: 8,
            ..Limits::default()
        },
        |socket| {
            raw::write(socket, &raw::bootstrap(0));
            assert_eq!(
                raw::read(socket),
                Said::Return {
                    question: 0,
                    failed: false
                }
            );
            for _ in 0..3000 {
                // The same number again and again: the other side is done with it once it has answered.
                socket.write_all(&raw::call(1, 0, interface(), HANG)).unwrap();
                socket.write_all(&raw::finish(1)).unwrap();
                assert_eq!(
                    raw::read(socket),
                    Said::Return {
                        question: 1,
                        failed: true
                    }
                );
            }
            socket.shutdown(std::net::Shutdown::Write).unwrap();
        },
    );
    assert_eq!((reason, words), (EndReason::ClosedByPeer, None));
}

#[test]
fn results_that_are_never_finished_end_at_the_limit() {
    for (limits, which) in [
        (
            Limits {
                answers: 100,
                ..Limits::default()
            },
            Limit::Answers,
        ),
        (
            Limits {
                exports: 100,
                ..Limits::default()
            },
            Limit::Exports,
        ),
        (
            Limits {
                held_bytes: 10_000,
                ..Limits::default()
            },
            Limit::HeldBytes,
        ),
    ] {
        let result = attack(limits, |socket| {
            raw::write(socket, &raw::bootstrap(0));
            for question in 1..10_000 {
                if !raw::write(socket, &raw::call(question, 0, interface(), CHILD)) || raw::read(socket) == Said::End {
                    break;
                }
            }
        });
        assert_limit(&result, &limits, which);
    }
}

#[test]
fn a_peer_that_never_reads_ends_at_the_limit() {
    let limits = Limits {
        unsent_bytes: 100_000,
        ..Limits::default()
    };
    let result = attack(limits, |socket| {
        raw::write(socket, &raw::bootstrap(0));
        // Each is answered, so that no more than a few are in flight but for the queue.
        let mut question = 1;
        while raw::write(socket, &raw::call(question, 0, interface(), PING)) {
            question += 1;
        }
        // Its last words are lost on a peer that does not read.
        raw::drain(socket);
    });
    let (reason, _) = &result;
    let of = |which: Limit| EndReason::LimitExceeded {
        which,
        allowed: which.allowed(&limits),
    };
    assert!([of(Limit::UnsentBytes), of(Limit::Calls)].contains(reason), "{reason}");
}

#[test]
fn a_message_cut_off_in_its_middle_is_an_error() {
    let whole = raw::bootstrap(0);
    for length in 1..whole.len() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = ServerThread::start(vec![theirs], Limits::default());
        (&ours).write_all(&whole[..length]).unwrap();
        drop(ours);
        let reason = EndReason::Protocol("the stream ended within a message".into());
        assert_eq!(server.join(), [reason]);
    }
}

#[test]
fn headers_that_lie_are_refused_before_anything_is_reserved() {
    let limits = Limits::default();
    let words = |numbers: &[u32]| numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
    for (header, which) in [
        (words(&[u32::MAX, 1]), Limit::Segments),
        (words(&[512, 0]), Limit::Segments),
        (words(&[0, u32::MAX]), Limit::MessageWords),
        (words(&[0, 16 * 1024 + 1]), Limit::MessageWords),
        (words(&[2, 16 * 1024, 1, 0]), Limit::MessageWords),
    ] {
        let result = attack(limits, |socket| {
            raw::write(socket, &header);
        });
        assert_limit(&result, &limits, which);
    }
}

#[test]
fn descriptors_that_nobody_asked_for_end_at_the_limit_or_are_closed() {
    let limits = Limits {
        unclaimed_fds: 64,
        ..Limits::default()
    };
    let fd = memfd();
    let result = attack(limits, |socket| {
        raw::write(socket, &raw::bootstrap(0));
        let call = raw::call(1, 0, interface(), PING);
        raw::send_with_fds(socket, &call, &vec![fd.as_fd(); 65]);
    });
    assert_limit(&result, &limits, Limit::UnclaimedFds);

    // From a peer that may send none, not even one is taken.
    let none = Limits {
        unclaimed_fds: 0,
        ..limits
    };
    let (reason, _) = attack(none, |socket| {
        raw::write(socket, &raw::bootstrap(0));
        let call = raw::call(1, 0, interface(), PING);
        raw::send_with_fds(socket, &call, &[fd.as_fd()]);
    });
    assert!(
        matches!(&reason, EndReason::Io(_, words) if words.contains("may not send file descriptors")),
        "{reason:?}"
    );

    // Many, but never many at once: each is closed with the message that it came with.
    let (reason, _) = attack(limits, |socket| {
        raw::write(socket, &raw::bootstrap(0));
        assert_eq!(
            raw::read(socket),
            Said::Return {
                question: 0,
                failed: false
            }
        );
        for question in 1..100 {
            let call = raw::call(question, 0, interface(), PING);
            raw::send_with_fds(socket, &call, &[fd.as_fd(); 60]);
            assert!(matches!(raw::read(socket), Said::Return { .. }));
        }
        socket.shutdown(std::net::Shutdown::Write).unwrap();
    });
    assert_eq!(reason, EndReason::ClosedByPeer);

    // With bytes that never become a message, one by one.
    let result = attack(limits, |socket| {
        let call = raw::call(1, 0, interface(), PING);
        for byte in &call[..70] {
            raw::send_with_fds(socket, &[*byte], &[fd.as_fd()]);
        }
    });
    assert_limit(&result, &limits, Limit::UnclaimedFds);
}

#[test]
fn descriptors_that_the_peer_drops_are_gone() {
    let (reason, _) = attack(Limits::default(), |socket| {
        raw::write(socket, &raw::bootstrap(0));
        for question in 1..500 {
            // Read without room for descriptors, so the kernel closes them.
            raw::write(socket, &raw::call(question, 0, interface(), GIVE_FD));
            assert!(matches!(raw::read(socket), Said::Return { .. }));
        }
        socket.shutdown(std::net::Shutdown::Write).unwrap();
    });
    assert_eq!(reason, EndReason::ClosedByPeer);
}

#[test]
fn too_many_capabilities_in_a_message_are_refused() {
    let limits = Limits::default();
    let result = attack(limits, |socket| {
        raw::write(socket, &raw::bootstrap(0));
        let call = raw::encode(|message| {
            let mut call = message.init_call();
            call.set_question_id(1);
            call.reborrow().init_params().init_cap_table(257);
            call.init_target().init_promised_answer().set_question_id(0);
        });
        raw::write(socket, &call);
    });
    assert_limit(&result, &limits, Limit::MessageCapabilities);
}

#[test]
fn what_no_sound_peer_says_ends_the_connection() {
    type Build = fn(capnp_rpc::rpc_capnp::message::Builder<'_>);
    let wrong: [(&str, Build); 6] = [
        ("a return that nobody waits for", |message| {
            message.init_return().set_answer_id(77)
        }),
        ("a release of what was never given", |message| {
            message.init_release().set_id(77)
        }),
        ("a call of what is not there", |message| {
            let mut call = message.init_call();
            call.set_question_id(1);
            call.init_target().set_imported_cap(77);
        }),
        ("an embargo that was never lifted", |message| {
            message.init_disembargo().init_context().set_receiver_loopback(77);
        }),
        ("a question that is in use", |message| {
            message.init_bootstrap().set_question_id(0)
        }),
        ("unimplemented", |message| {
            message.init_unimplemented().init_bootstrap();
        }),
    ];
    for (what, build) in wrong {
        let (reason, words) = attack(Limits::default(), |socket| {
            raw::write(socket, &raw::bootstrap(0));
            raw::write(socket, &raw::encode(build));
        });
        assert!(matches!(reason, EndReason::Protocol(_)), "{what}: {reason}");
        let Some(words) = words else {
            panic!("{what}: the reason is told")
        };
        assert!(reason.to_string().ends_with(&words), "{what}: {reason}: {words}");
    }
}

#[test]
fn a_peers_last_words_are_short_and_plain() {
    let (reason, _) = attack(Limits::default(), |socket| {
        let words = "\x1b[2J".to_owned() + &"é".repeat(10_000);
        raw::write(socket, &raw::encode(|message| message.init_abort().set_reason(&words)));
    });
    let EndReason::Aborted(words) = reason else {
        panic!("{reason}")
    };
    assert!(words.starts_with(" [2Jéé") && words.len() <= 512, "{words}");
}

#[test]
fn a_client_is_as_safe_from_a_server() {
    for which in [Limit::Answers, Limit::MessageWords] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || {
            assert_eq!(raw::read(&mut theirs), Said::Other);
            let mut writer = theirs.try_clone().unwrap();
            let writing = thread::spawn(move || {
                if which == Limit::MessageWords {
                    raw::write(&mut writer, &[0, 0, 0, 0]);
                    raw::write(&mut writer, &[0xff; 4]);
                } else {
                    // Asks for the client's own bootstrap, which it does not serve, and never finishes with it.
                    for question in 0..5000 {
                        if !raw::write(&mut writer, &raw::bootstrap(question)) {
                            break;
                        }
                    }
                }
            });
            let words = raw::last_words(&mut theirs);
            writing.join().unwrap();
            words
        });
        let mut reactor = Reactor::single_threaded().unwrap();
        let handle = reactor.handle();
        let limits = Limits {
            calls: 5000,
            answers: 2000,
            ..Limits::default()
        };
        let (probe, connection) = connect::<probe::Client>(&handle, ours, limits).unwrap();
        let reason = reactor.run_until(async {
            let error = ping(&probe, 1).await.unwrap_err();
            let reason = connection.await;
            assert_eq!(error.extra, reason.to_string());
            reason
        });
        let expected = EndReason::LimitExceeded {
            which,
            allowed: which.allowed(&limits),
        };
        assert_eq!(reason.unwrap(), expected);
        assert_eq!(server.join().unwrap(), Some(expected.to_string()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Messages that are well framed and then anything: the server survives, and ends the connection or serves on.
    #[test]
    fn arbitrary_messages_do_no_harm(
        messages in prop::collection::vec(
            prop::collection::vec(prop_oneof![3 => 0u64..12, 1 => any::<u64>(), 2 => (0u64..40).prop_map(|n| n << 32 | n << 2)], 1..20),
            1..8,
        ),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>()), 0..6),
    ) {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let server = ServerThread::start(vec![theirs], Limits::default());
        // Sound messages with a few bytes of their content changed, and sheer noise.
        let mut sound = vec![
            raw::bootstrap(0),
            raw::call(1, 0, interface(), PING),
            raw::call(2, 0, interface(), CHILD),
            raw::finish(1),
            raw::finish(0),
        ];
        for (message, at, value) in edits {
            let count = sound.len();
            let message = &mut sound[message.index(count)];
            let length = message.len() - 8;
            message[8 + at.index(length)] = value;
        }
        for bytes in sound {
            raw::write(&mut ours, &bytes);
        }
        for words in messages {
            raw::write(&mut ours, &[0u32, words.len() as u32].map(u32::to_le_bytes).concat());
            raw::write(&mut ours, &words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>());
        }
        let _ = ours.shutdown(std::net::Shutdown::Write);
        raw::drain(&mut ours);
        let reasons = server.join();
        prop_assert_ne!(&reasons, &[EndReason::Internal]);
    }
}

#[test]
fn a_client_that_floods_takes_turns_with_another() {
    let (flood, theirs_flood) = UnixStream::pair().unwrap();
    let (good, theirs_good) = UnixStream::pair().unwrap();
    let server = ServerThread::start(vec![theirs_flood, theirs_good], Limits::default());
    let mut reactor = Reactor::single_threaded().unwrap();
    let handle = reactor.handle();
    let (flooding, flood) = connect::<probe::Client>(&handle, flood, Limits::default()).unwrap();
    let (probe, good) = connect::<probe::Client>(&handle, good, Limits::default()).unwrap();
    reactor
        .run_until(async {
            let flood = async {
                loop {
                    for answer in join_all((0..500).map(|n| ping(&flooding, n))).await {
                        answer.unwrap();
                    }
                }
            };
            let served = async {
                for n in 0..50 {
                    assert_eq!(ping(&probe, n).await.unwrap(), n + 1);
                }
            };
            select(pin!(flood), pin!(served)).await;
        })
        .unwrap();
    drop((flood, good));
    drop(reactor);
    assert_eq!(server.join(), [EndReason::ClosedByPeer, EndReason::ClosedByPeer]);
}

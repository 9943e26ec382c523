//! The transport as its users see it: calls, capabilities, streams and descriptors between a client and a server.

#![allow(clippy::unwrap_used, reason = "a failed test panics")]

mod support;

use std::{
    future::poll_fn,
    io::Read,
    os::{fd::OwnedFd, unix::net::UnixStream},
    rc::Rc,
    task::Poll,
};

use futures::{
    FutureExt,
    future::{join, join_all},
};
use sepal_schema::transport::{
    Connection, EndReason, FdError, Handle, Limits, PeerCredentials, Reactor, connect,
    connection::{connect_plain, serve_plain},
    guard,
};

use support::*;

/// A client and a server on one event loop, where the test sees what the server holds.
struct Pair {
    probe: probe::Client,
    client: Connection,
    server: Connection,
    counts: Counts,
}

impl Pair {
    fn new(handle: &Handle, limits: Limits) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let counts = Counts::default();
        let server = serve_probe(handle, theirs, limits, &counts);
        let (probe, client) = connect(handle, ours, limits).unwrap();
        Self {
            probe,
            client,
            server,
            counts,
        }
    }
}

/// Runs a test on an event loop.
fn on_loop<F: Future>(test: impl FnOnce(Handle) -> F) -> F::Output {
    let mut reactor = Reactor::single_threaded().unwrap();
    let handle = reactor.handle();
    reactor.run_until(test(handle)).unwrap()
}

/// Goes round the loop until `condition` holds. Both ends are on it, so there is nothing else to wait for.
#[track_caller]
fn until(mut condition: impl FnMut() -> bool) -> impl Future<Output = ()> {
    let caller = std::panic::Location::caller();
    let mut rounds = 0;
    poll_fn(move |cx| {
        if condition() {
            return Poll::Ready(());
        }
        rounds += 1;
        assert!(rounds < 1_000_000, "{caller}: this does not come to be");
        cx.waker().wake_by_ref();
        Poll::Pending
    })
}

#[test]
fn calls_are_answered_and_the_end_is_told() {
    let ((), reason) = with_server(Limits::default(), |_, probe, _| {
        async move {
            assert_eq!(ping(&probe, 1).await.unwrap(), 2);
            let answers = join_all((0..900).map(|n| ping(&probe, n))).await;
            for (n, answer) in answers.into_iter().enumerate() {
                assert_eq!(answer.unwrap(), n as u64 + 1);
            }
        }
        .boxed_local()
    });
    assert_eq!(reason, EndReason::ClosedByPeer);
}

#[test]
fn thousands_of_descriptors_arrive_each_with_its_message() {
    with_server(Limits::default(), |_, probe, connection| {
        async move {
            let table = connection.fds();
            for round in 0..100 {
                let calls = (0..40).map(|n| {
                    let (probe, table) = (&probe, &table);
                    async move {
                        let count = (round + n) % 4;
                        let mut request = probe.take_fds_request();
                        let mut numbers = request.get().init_numbers(count);
                        let mut expected = Vec::new();
                        for index in 0..count {
                            let fd = memfd();
                            expected.push(inode(&fd));
                            numbers.set(index, table.send(fd).unwrap());
                        }
                        let response = request.send().promise.await.unwrap();
                        let inodes: Vec<u64> = response.get().unwrap().get_inodes().unwrap().iter().collect();
                        assert_eq!(inodes, expected);
                    }
                });
                let replies = (0..20).map(|_| async {
                    let response = probe.give_fd_request().send().promise.await.unwrap();
                    let response = response.get().unwrap();
                    let fd = table.take(response.get_number()).unwrap();
                    assert_eq!(inode(&fd), response.get_inode());
                    assert_eq!(
                        table.take(response.get_number()).unwrap_err(),
                        FdError::Missing(response.get_number())
                    );
                });
                join(join_all(calls), join_all(replies)).await;
            }
            assert_eq!(table.unclaimed(), 0);
        }
        .boxed_local()
    });
}

#[test]
fn a_message_takes_more_descriptors_than_one_system_call_does() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit {
        current: limit.maximum,
        ..limit
    };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
    let limits = Limits {
        unclaimed_fds: 1024,
        ..Limits::default()
    };
    with_server(limits, |_, probe, connection| {
        async move {
            let (table, fd) = (connection.fds(), memfd());
            let mut request = probe.take_fds_request();
            let mut numbers = request.get().init_numbers(600);
            for index in 0..600 {
                numbers.set(index, table.send(fd.try_clone().unwrap()).unwrap());
            }
            let response = request.send().promise.await.unwrap();
            let inodes = response.get().unwrap().get_inodes().unwrap();
            assert_eq!(inodes.len(), 600);
            assert!(inodes.iter().all(|other| other == inode(&fd)));
        }
        .boxed_local()
    });
}

/// A descriptor and what ends when all copies of it are closed.
fn watched() -> (OwnedFd, UnixStream) {
    let (sent, watch) = UnixStream::pair().unwrap();
    (sent.into(), watch)
}

/// Waits until all copies of the watched descriptor are closed.
async fn closed(handle: &Handle, watch: UnixStream) {
    let watch = handle.register(watch).unwrap();
    let count = watch
        .io(sepal_schema::transport::reactor::Direction::Read, |mut fd| {
            fd.read(&mut [0])
        })
        .await;
    assert_eq!(count.unwrap(), 0);
}

#[test]
fn descriptors_that_nobody_takes_are_closed() {
    on_loop(|handle| async move {
        let Pair {
            probe, client, server, ..
        } = Pair::new(&handle, Limits::default());
        let table = client.fds();

        // Many times more than may be unclaimed, each ignored by the method that it is for.
        for _ in 0..200 {
            let (fd, watch) = watched();
            let mut request = probe.ignore_request();
            request.get().init_numbers(1).set(0, table.send(fd).unwrap());
            request.send().promise.await.unwrap();
            closed(&handle, watch).await;
        }

        // For a request that is dropped: goes with the next message, and is closed with it.
        let (fd, watch) = watched();
        table.send(fd).unwrap();
        drop(probe.ignore_request());
        ping(&probe, 1).await.unwrap();
        closed(&handle, watch).await;
        assert_eq!(server.fds().unclaimed(), 0);

        // In a response that is dropped.
        drop(probe.give_fd_request().send().promise.await.unwrap());
        assert_eq!(table.unclaimed(), 0);

        // Queued when the connection ends, and offered after it.
        let (fd, watch) = watched();
        table.send(fd).unwrap();
        client.disconnect();
        client.ended().await;
        closed(&handle, watch).await;
        let (fd, watch) = watched();
        assert_eq!(table.send(fd), Err(FdError::Disconnected));
        closed(&handle, watch).await;
        assert_eq!(table.take(0).unwrap_err(), FdError::Disconnected);
    });
}

#[test]
fn a_thousand_calls_each_way_at_once_do_not_lock_up() {
    for limits in [
        Limits::default(),
        Limits {
            calls: 1002,
            ..Limits::default()
        },
    ] {
        with_server(limits, |handle, probe, _| {
            async move {
                let mine: probe::Client = guard::new_client(Probe::new(&handle, &Counts::default()));
                let mut request = probe.call_back_request();
                request.get().set_probe(mine);
                request.get().set_count(1000);
                let theirs = request.send().promise;
                let ours = join_all((0..1000).map(|n| ping(&probe, n)));
                let (sum, answers) = join(theirs, ours).await;
                assert_eq!(sum.unwrap().get().unwrap().get_sum(), (1..=1000).sum());
                assert!(answers.into_iter().all(|answer| answer.is_ok()));
            }
            .boxed_local()
        });
    }
}

#[test]
fn a_stream_arrives_whole_and_in_order_with_what_follows() {
    with_server(Limits::default(), |_, probe, _| {
        async move {
            for _ in 0..500 {
                let mut request = probe.write_request();
                request.get().init_data(60_000);
                request.send().await.unwrap();
            }
            // Not awaited: arrives after all the writes nevertheless.
            let total = probe.total_request().send().promise.await.unwrap();
            assert_eq!(total.get().unwrap().get_bytes(), 500 * 60_000);
        }
        .boxed_local()
    });
}

#[test]
fn calls_go_to_a_capability_that_is_not_there_yet() {
    with_server(Limits::default(), |_, probe, _| {
        async move {
            let child = probe.child_request().send().pipeline.get_probe();
            let grandchild = child.slow_child_request().send().pipeline.get_probe();
            let (x, y) = join(ping(&grandchild, 1), ping(&child, 2)).await;
            assert_eq!((x.unwrap(), y.unwrap()), (2, 3));
        }
        .boxed_local()
    });
}

#[test]
fn a_call_on_a_result_is_answered_though_nothing_else_of_the_result_is_held() {
    with_server(Limits::default(), |_, probe, _| {
        async move {
            for x in 0..200 {
                let pong = {
                    let child = probe.slow_child_request().send().pipeline.get_probe();
                    let grandchild = child.slow_child_request().send().pipeline.get_probe();
                    let mut request = grandchild.ping_request();
                    request.get().set_x(x);
                    request.send().promise
                };
                assert_eq!(pong.await.unwrap().get().unwrap().get_y(), x + 1);
            }
        }
        .boxed_local()
    });
}

#[test]
fn a_call_that_is_dropped_ends_the_method_and_leaves_nothing_behind() {
    on_loop(|handle| async move {
        let Pair {
            probe,
            client: _client,
            server,
            counts,
        } = Pair::new(
            &handle,
            Limits {
                calls: 8,
                ..Limits::default()
            },
        );
        // Far more than may be in flight: each is forgotten on both sides.
        for n in 0..5000 {
            let mut call = probe.hang_request().send().promise;
            if n % 2 == 0 {
                assert!((&mut call).now_or_never().is_none());
                until(|| counts.hanging.get() == 1).await;
            }
            drop(call);
            if n % 4 == 0 {
                assert_eq!(ping(&probe, 1).await.unwrap(), 2);
            }
            until(|| counts.hanging.get() == 0).await;
        }
        assert!(counts.hung.get() >= 2500);
        // The same for a call on a capability that is not there yet, and for one that is never begun.
        for _ in 0..100 {
            let child = probe.slow_child_request().send().pipeline.get_probe();
            drop(child.hang_request().send());
            drop(child);
            assert_eq!(ping(&probe, 1).await.unwrap(), 2);
        }
        assert_eq!(counts.hanging.get(), 0);
        until(|| counts.probes.get() == 1).await;
        drop(server);
    });
}

#[test]
fn giving_up_reaches_through_whoever_passed_the_capability_on() {
    on_loop(|handle| async move {
        let behind = Pair::new(
            &handle,
            Limits {
                calls: 8,
                ..Limits::default()
            },
        );
        let forwarded = guard::forward(behind.probe.clone());
        let (ours, theirs) = UnixStream::pair().unwrap();
        let bootstrap = capnp::capability::Client::new(capnp::capability::FromClientHook::into_client_hook(forwarded));
        let limits = Limits {
            calls: 8,
            ..Limits::default()
        };
        let _front = sepal_schema::transport::serve(&handle, theirs, limits, bootstrap).unwrap();
        let (probe, _client) = connect::<probe::Client>(&handle, ours, limits).unwrap();
        assert_eq!(ping(&probe, 1).await.unwrap(), 2);
        for _ in 0..100 {
            let call = probe.hang_request().send().promise;
            until(|| behind.counts.hanging.get() == 1).await;
            drop(call);
            until(|| behind.counts.hanging.get() == 0).await;
        }
        assert_eq!(ping(&probe, 1).await.unwrap(), 2);
    });
}

#[test]
fn a_panic_stays_in_its_method() {
    std::panic::set_hook(Box::new(|_| ()));
    with_server(Limits::default(), |_, probe, _| {
        async move {
            let hanging = probe.hang_request().send().promise;
            for _ in 0..3 {
                let error = probe.panic_now_request().send().promise.await.err().unwrap();
                assert!(error.extra.contains("internal error in probe.@2"), "{error}");
                let error = probe.panic_later_request().send().promise.await.err().unwrap();
                assert!(error.extra.contains("internal error in probe.@3"), "{error}");
                assert_eq!(error.kind, capnp::ErrorKind::Failed);
            }
            assert_eq!(ping(&probe, 1).await.unwrap(), 2);
            assert!(hanging.now_or_never().is_none(), "another call goes on");
        }
        .boxed_local()
    });
    // The same without a connection in between.
    on_loop(|handle| async move {
        let probe: probe::Client = guard::new_client(Probe::new(&handle, &Counts::default()));
        let error = probe.panic_later_request().send().promise.await.err().unwrap();
        assert_eq!(error.extra, "internal error in probe.@3");
        assert_eq!(ping(&probe, 1).await.unwrap(), 2);
    });
    let _ = std::panic::take_hook();
}

#[test]
fn nothing_is_left_of_a_connection_that_has_ended() {
    for who in ["client drops", "server drops", "client disconnects", "loop is dropped"] {
        let mut reactor = Reactor::single_threaded().unwrap();
        let handle = reactor.handle();
        let mine = Counts::default();
        let (counts, held) = reactor
            .run_until(async {
                let Pair {
                    probe,
                    client,
                    server,
                    counts,
                } = Pair::new(&handle, Limits::default());
                let child = probe.child_request().send().promise.await.unwrap();
                let child = child.get().unwrap().get_probe().unwrap();
                // A circle through the connection: the server's object holds the client's, which holds the server's.
                let callback = Probe::new(&handle, &mine);
                let callback: probe::Client = guard::new_client(callback);
                let mut keep = callback.keep_request();
                keep.get().set_probe(child.clone());
                keep.send().promise.await.unwrap();
                for target in [&probe, &child] {
                    let mut keep = target.keep_request();
                    keep.get().set_probe(callback.clone());
                    keep.send().promise.await.unwrap();
                }
                drop(callback);
                let hanging = child.hang_request().send().promise;
                until(|| counts.hanging.get() == 1).await;
                assert_eq!((counts.probes.get(), mine.probes.get()), (2, 1));
                let (server_end, client_end) = (server.ended(), client.ended());
                match who {
                    "client drops" => drop(client),
                    "server drops" => drop(server),
                    "client disconnects" => client.disconnect(),
                    // Neither is driven any more.
                    _ => return (counts, (probe, child, Some((client, server)))),
                }
                let reasons = join(client_end, server_end).await;
                let expected = if who == "server drops" {
                    (EndReason::ClosedByPeer, EndReason::ClosedHere)
                } else {
                    (EndReason::ClosedHere, EndReason::ClosedByPeer)
                };
                assert_eq!(reasons, expected, "{who}");
                let error = hanging.await.err().unwrap();
                assert_eq!(error.kind, capnp::ErrorKind::Disconnected);
                assert_eq!(error.extra, reasons.0.to_string());
                let error = ping(&child, 1).await.unwrap_err();
                assert_eq!(error.extra, reasons.0.to_string());
                // Although the client still holds capabilities of the connection.
                assert_eq!(
                    (counts.probes.get(), counts.hanging.get(), mine.probes.get()),
                    (0, 0, 0),
                    "{who}"
                );
                (counts, (probe, child, None))
            })
            .unwrap();
        drop(reactor);
        assert_eq!(
            (counts.probes.get(), counts.hanging.get(), mine.probes.get()),
            (0, 0, 0),
            "{who}"
        );
        drop(held);
    }
}

#[test]
fn a_connection_that_is_detached_goes_on() {
    on_loop(|handle| async move {
        let Pair {
            probe, client, server, ..
        } = Pair::new(&handle, Limits::default());
        client.detach();
        assert_eq!(ping(&probe, 1).await.unwrap(), 2);
        drop(server);
        until(|| ping(&probe, 1).now_or_never().is_some()).await;
    });
}

#[test]
fn a_plain_stream_carries_calls_but_no_descriptors() {
    on_loop(|handle| async move {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (ours, theirs) = (handle.register(ours).unwrap(), handle.register(theirs).unwrap());
        let (ours, theirs) = (Rc::new(ours), Rc::new(theirs));
        let counts = Counts::default();
        let server: probe::Client = guard::new_client(Probe::new(&handle, &counts));
        let server = capnp::capability::Client::new(capnp::capability::FromClientHook::into_client_hook(server));
        let (reader, writer) = (Shared(theirs.clone()), Shared(theirs));
        let serving = serve_plain(&handle, reader, writer, Limits::default(), server);
        let (reader, writer) = (Shared(ours.clone()), Shared(ours));
        let (probe, connection) = connect_plain::<probe::Client>(&handle, reader, writer, Limits::default());
        assert_eq!(ping(&probe, 1).await.unwrap(), 2);
        assert_eq!(connection.peer(), None);
        let table = connection.fds();
        assert!(!table.can_carry());
        assert_eq!(table.send(memfd()), Err(FdError::NotCarried));
        assert_eq!(table.take(0).unwrap_err(), FdError::NotCarried);
        drop(connection);
        assert_eq!(serving.await, EndReason::ClosedByPeer);
        assert_eq!(counts.probes.get(), 0);
    });
}

/// One descriptor as two halves.
struct Shared(Rc<sepal_schema::transport::AsyncFd<UnixStream>>);

impl futures::AsyncRead for Shared {
    fn poll_read(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<std::io::Result<usize>> {
        std::pin::Pin::new(&mut &*self.0).poll_read(cx, buffer)
    }
}

impl futures::AsyncWrite for Shared {
    fn poll_write(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        std::pin::Pin::new(&mut &*self.0).poll_write(cx, bytes)
    }

    fn poll_flush(self: std::pin::Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut &*self.0).poll_flush(cx)
    }

    fn poll_close(self: std::pin::Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut &*self.0).poll_close(cx)
    }
}

#[test]
fn the_peer_is_who_made_the_socket() {
    on_loop(|handle| async move {
        let pair = Pair::new(&handle, Limits::default());
        let expected = PeerCredentials {
            pid: Some(std::process::id()),
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        };
        assert_eq!(pair.client.peer(), Some(expected));
        assert_eq!(pair.server.peer(), Some(expected));
    });
}

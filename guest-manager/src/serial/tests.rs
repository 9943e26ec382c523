//! The port with real sockets on an event loop.

use std::{
    future::Future,
    io::{Read, Write},
    net::Shutdown,
};

use futures::join;
use sepal_schema::transport::Reactor;

use super::*;

fn run<F: Future>(test: impl FnOnce(Handle) -> F) -> F::Output {
    let mut reactor = Reactor::new().unwrap();
    let test = test(reactor.handle());
    reactor.run_until(test).unwrap()
}

fn open(port: &Rc<Port>, handle: &Handle) -> Result<OwnedFd, Error> {
    let both = Ways {
        output: true,
        input: true,
    };
    port.open(handle, 0, both, futures::future::pending())
}

#[test]
fn output_is_read_by_many_and_input_reaches_the_guest() {
    run(async |handle| {
        let port = Port::new(1024);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let _wire = port.attach(&handle, ours).unwrap();
        let (one, two) = (port.read(0, 0, true), port.read(0, 3, true));
        let print = async { theirs.write_all(b"hello").unwrap() };
        let (one, two, ()) = join!(one, two, print);
        assert_eq!((&one.bytes[..], &two.bytes[..]), (&b"hello"[..], &b"hel"[..]));
        port.write(b"ls\r").await.unwrap();
        let theirs = handle.register(theirs).unwrap();
        let mut typed = [0; 8];
        let count = receive(&theirs, &mut typed).await.unwrap();
        assert_eq!(&typed[..count], b"ls\r");
    });
}

#[test]
fn the_end_comes_after_the_last_output() {
    run(async |handle| {
        let port = Port::new(1024);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let wire = port.attach(&handle, ours).unwrap();
        theirs.write_all(b"last words").unwrap();
        wire.finish();
        let piece = port.read(0, 0, true).await;
        assert_eq!((&piece.bytes[..], piece.ended), (&b"last words"[..], true));
        assert!(port.read(99, 0, true).await.ended);
        port.write(b"too late").await.unwrap();
    });
}

#[test]
fn a_write_waits_for_room_and_is_not_torn() {
    run(async |handle| {
        let port = Port::new(16);
        let full = vec![b'a'; MAX_INPUT];
        port.write(&full).await.unwrap();
        assert_eq!(port.write(&[0; MAX_INPUT + 1]).await.unwrap_err().kind, Kind::BadConfig);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (_wire, theirs) = (port.attach(&handle, ours).unwrap(), handle.register(theirs).unwrap());
        let read = async {
            let mut all = Vec::new();
            let mut buffer = vec![0; 4096];
            while all.len() < MAX_INPUT + 6 {
                let count = receive(&theirs, &mut buffer).await.unwrap();
                all.extend_from_slice(&buffer[..count]);
            }
            all
        };
        let (one, two, all) = join!(port.write(b"bbb"), port.write(b"ccc"), read);
        one.and(two).unwrap();
        assert_eq!(all[..MAX_INPUT], full);
        assert!([b"bbbccc", b"cccbbb"].contains(&&all[MAX_INPUT..].try_into().unwrap()));
    });
}

#[test]
fn a_stream_carries_both_ways_until_the_guest_ends() {
    run(async |handle| {
        let port = Port::new(1024);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let wire = port.attach(&handle, ours).unwrap();
        let guest = handle.register(theirs).unwrap();
        send(&guest, b"login: ").await.unwrap();
        let client = handle
            .register(UnixStream::from(open(&port, &handle).unwrap()))
            .unwrap();
        let mut buffer = [0; 64];
        let count = receive(&client, &mut buffer).await.unwrap();
        assert_eq!(&buffer[..count], b"login: ");
        send(&client, b"root").await.unwrap();
        // Nothing more to type, but still somebody who reads.
        client.shutdown(Shutdown::Write).unwrap();
        let count = receive(&guest, &mut buffer).await.unwrap();
        assert_eq!(&buffer[..count], b"root");
        send(&guest, b"bye").await.unwrap();
        let count = receive(&client, &mut buffer).await.unwrap();
        assert_eq!(&buffer[..count], b"bye");
        wire.finish();
        assert_eq!(receive(&client, &mut buffer).await.unwrap(), 0);
    });
}

#[test]
fn a_stream_whose_client_is_gone_makes_room_for_others() {
    run(async |handle| {
        let port = Port::new(1024);
        let mut streams: Vec<_> = (0..MAX_STREAMS).map(|_| open(&port, &handle).unwrap()).collect();
        assert_eq!(open(&port, &handle).unwrap_err().kind, Kind::NoResources);
        drop(streams.pop());
        while port.streams.get() == MAX_STREAMS {
            yield_now().await;
        }
        // One that has shut down first, so that its end was seen before it was gone.
        let half = UnixStream::from(open(&port, &handle).unwrap());
        half.shutdown(Shutdown::Write).unwrap();
        for _ in 0..10 {
            yield_now().await;
        }
        assert_eq!(port.streams.get(), MAX_STREAMS);
        drop(half);
        while port.streams.get() == MAX_STREAMS {
            yield_now().await;
        }
    });
}

#[test]
fn a_stream_that_is_not_read_loses_the_oldest_and_holds_nobody_up() {
    run(async |handle| {
        let port = Port::new(CHUNK);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let wire = port.attach(&handle, ours).unwrap();
        let mut client = UnixStream::from(open(&port, &handle).unwrap());
        let guest = handle.register(theirs).unwrap();
        let total = 4 * 1024 * 1024;
        let mut sent = 0;
        while sent < total {
            sent += send(&guest, &[b'x'; CHUNK]).await.unwrap();
        }
        send(&guest, b"end").await.unwrap();
        wire.finish();
        let mut all = Vec::new();
        // Closed by now or soon: the rest is in the socket's buffer, or comes while it is drained.
        handle
            .spawn_blocking(move || client.read_to_end(&mut all).map(|_| all))
            .await
            .map(|all| {
                let all = all.unwrap();
                assert!(all.len() < total && all.ends_with(b"end"), "{}", all.len());
            })
            .unwrap();
    });
}

//! What a capability opened ends with it: streams, listeners, subscriptions, programs.

use std::{io::Write, os::unix::net::UnixStream, rc::Rc};

use futures::{AsyncReadExt, AsyncWriteExt};
use sepal_guest_manager::changed::Changed;
use sepal_schema::{
    agent_capnp::{agent, process},
    bytes_capnp::byte_stream,
    config::Handles,
    error::{Error, Kind, Outcome, read_completion},
    facet::{Bounds, Right},
    facet_capnp::{facet, revoker},
    guest_capnp::{event_sink, observer, output, serial},
    transport::{AsyncFd, guard},
    vsock_capnp::{host_vsock_endpoint, vsock_acceptor},
};

use super::{
    launch,
    methods::{Part, cast, said},
    narrow, revoke,
};
use crate::{
    vsock::{Sink, Taker, connect, listen},
    world::{Caller, Launched, World, run},
};

async fn part(launched: &Launched, part: Part) -> (facet::Client, revoker::Client) {
    narrow(&part.of(&launched.guest), &Bounds::default()).await.unwrap()
}

async fn open(world: &World, caller: &Caller, of: &facet::Client) -> Result<AsyncFd<UnixStream>, Error> {
    let serial: serial::Client = cast(of.clone());
    let answer = serial.open_request().send().promise.await?;
    match answer.get()?.which().unwrap() {
        serial::open_result::Fd(fd) => {
            let fd = Handles::take(&caller.connection.fds(), fd?.get_number())?;
            Ok(world.handle.register(fd.into()).unwrap())
        }
        serial::open_result::Error(error) => Err(Error::read(error?)?),
    }
}

async fn ends(mut stream: &AsyncFd<UnixStream>) {
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"");
    assert!(stream.write_all(b"x").await.is_err());
}

#[test]
fn open_streams_of_ports_reach_their_end() {
    run(async |world| {
        let caller = world.caller();
        let launched = launch(&world, &caller, "web").await;
        for kind in [Part::Serial, Part::Console] {
            let (port, revoker) = part(&launched, kind).await;
            let stream = open(&world, &caller, &port).await.unwrap();
            let stays = open(&world, &caller, &kind.of(&launched.guest)).await.unwrap();
            let process = world.fake.last();
            let mut guest = match kind {
                Part::Serial => process.serial(),
                _ => process.consoles.borrow()[0].try_clone().unwrap(),
            };
            guest.write_all(b"login: ").unwrap();
            let mut bytes = [0; 7];
            (&stream).read_exact(&mut bytes).await.unwrap();
            assert_eq!(&bytes, b"login: ");
            // Typed, and not taken yet: no reason for another end.
            (&stream).write_all(b"root\n").await.unwrap();
            let waits = async {
                let output: output::Client = cast(port.clone());
                let mut call = output.read_request();
                call.get().set_position(7);
                let answer = call.send().promise.await.unwrap();
                Error::read(answer.get().unwrap().get_error().unwrap()).unwrap()
            };
            let (error, ()) = futures::join!(waits, revoke(&revoker));
            assert_eq!(error.kind, Kind::Revoked);
            ends(&stream).await;
            (&stays).read_exact(&mut bytes).await.unwrap();
            guest.write_all(b"more...").unwrap();
            (&stays).read_exact(&mut bytes).await.unwrap();
            assert_eq!(&bytes, b"more...");
        }
    });
}

#[test]
fn a_stream_ends_when_its_time_comes() {
    run(async |world| {
        let caller = world.caller();
        let launched = launch(&world, &caller, "web").await;
        let bounds = super::lasting(std::time::Duration::from_millis(20));
        let (serial, _) = narrow(&Part::Serial.of(&launched.guest), &bounds).await.unwrap();
        match open(&world, &caller, &serial).await {
            Ok(stream) => ends(&stream).await,
            // On a slow host it has come already.
            Err(error) => assert_eq!(error.kind, Kind::Revoked),
        }
    });
}

#[test]
fn a_stream_carries_only_what_is_permitted() {
    run(async |world| {
        let caller = world.caller();
        let launched = launch(&world, &caller, "web").await;
        let serial = Part::Serial.of(&launched.guest);
        let only = |right: Right| Bounds::only(right.into());
        let (reader, _) = narrow(&serial, &only(Right::Output)).await.unwrap();
        let (typist, revoker) = narrow(&serial, &only(Right::Input)).await.unwrap();
        let (neither, _) = narrow(&serial, &only(Right::Share)).await.unwrap();
        let error = open(&world, &caller, &neither).await.err().unwrap();
        assert_eq!((error.kind, &error.about[..]), (Kind::PermissionDenied, "output"));

        let (reads, types) = (
            open(&world, &caller, &reader).await.unwrap(),
            open(&world, &caller, &typist).await.unwrap(),
        );
        world.fake.last().print(b"login: ");
        let mut bytes = [0; 7];
        (&reads).read_exact(&mut bytes).await.unwrap();
        (&reads).write_all(b"discarded").await.unwrap();
        (&types).write_all(b"typed").await.unwrap();
        let guest = world.handle.register(world.fake.last().serial()).unwrap();
        let mut typed = [0; 5];
        (&guest).read_exact(&mut typed).await.unwrap();
        assert_eq!(&typed, b"typed");
        // Nothing of what was printed came to who may only type: the first to arrive is the end.
        revoke(&revoker).await;
        ends(&types).await;
        // And what was discarded never arrives, however long it had.
        let again = Part::Serial.of(&launched.guest);
        let types = open(&world, &caller, &again).await.unwrap();
        (&types).write_all(b"after").await.unwrap();
        (&guest).read_exact(&mut typed).await.unwrap();
        assert_eq!(&typed, b"after");
    });
}

/// Tells when it is dropped.
struct Witness(Rc<Changed<bool>>);

impl Drop for Witness {
    fn drop(&mut self) {
        self.0.change(|dropped| *dropped = true);
    }
}

impl event_sink::Server for Witness {
    async fn event(self: Rc<Self>, _: event_sink::EventParams) -> Result<(), capnp::Error> {
        Ok(())
    }
}

impl vsock_acceptor::Server for Witness {}
impl byte_stream::Server for Witness {}

fn witness() -> (Witness, Rc<Changed<bool>>) {
    let dropped = Rc::new(Changed::default());
    (Witness(dropped.clone()), dropped)
}

async fn is_dropped(dropped: &Changed<bool>) {
    dropped.until(|dropped| dropped.then_some(())).await;
}

#[test]
fn a_subscriber_is_let_go_of() {
    run(async |world| {
        let caller = world.caller();
        let launched = launch(&world, &caller, "web").await;
        let (facet, revoker) = part(&launched, Part::Observer).await;
        let observer: observer::Client = cast(facet);
        let (sink, dropped) = witness();
        let mut call = observer.subscribe_request();
        call.get().set_sink(guard::new_client(sink));
        let answer = call.send().promise.await.unwrap();
        let Ok(observer::subscribe_result::Subscription(subscription)) = answer.get().unwrap().which() else {
            panic!("no subscription")
        };
        let _subscription = subscription.unwrap();
        revoke(&revoker).await;
        is_dropped(&dropped).await;
    });
}

#[test]
fn connections_and_listeners_of_a_socket_device_end() {
    run(async |world| {
        let caller = world.caller();
        // Without an agent: connections are the test's.
        let config = crate::vsock::with_vsock(Default::default());
        let launched = caller.launch_config(config, false).await.unwrap();
        let (facet, revoker) = part(&launched, Part::Vsock).await;
        let endpoint: host_vsock_endpoint::Client = cast(facet);
        let other: host_vsock_endpoint::Client = cast(Part::Vsock.of(&launched.guest));
        let sockets = world.fake.last().sockets.clone();

        let stream = connect(&world, &caller, &endpoint, 22).await.unwrap();
        let (_, guest) = sockets.next(&world).await;
        crate::vsock::talk(&stream, &guest).await;
        let stream = connect(&world, &caller, &endpoint, 22).await.unwrap();
        let (_, guest) = sockets.next(&world).await;
        let stays = connect(&world, &caller, &other, 22).await.unwrap();
        let (_, guest_stays) = sockets.next(&world).await;

        let (sink, dropped) = witness();
        let mut call = endpoint.connect_stream_request();
        call.get().set_port(22);
        call.get().set_from_guest(guard::new_client(sink));
        let answer = call.send().promise.await.unwrap();
        let to_guest = answer.get().unwrap().outcome().unwrap().get_to_guest().unwrap();
        let (_, guest_of_stream) = sockets.next(&world).await;

        let taker = Taker::default();
        let _listener = listen(&endpoint, 52, taker.clone()).await.unwrap();
        let open = async {
            let (_, _, connection) = taker.next().await;
            let answer = connection.open_request().send().promise.await.unwrap();
            let Ok(host_vsock_endpoint::stream_result::Fd(fd)) = answer.get().unwrap().which() else {
                panic!("no socket")
            };
            let fd = Handles::take(&caller.connection.fds(), fd.unwrap().get_number()).unwrap();
            world.handle.register(UnixStream::from(fd)).unwrap()
        };
        let (guest_of_accepted, accepted) = futures::join!(sockets.connect(&world, 52), open);
        let guest_of_accepted = guest_of_accepted.unwrap();
        // One that is offered, and not opened before the end.
        let offer = async { taker.next().await.2 };
        let asks = sockets.connect(&world, 52);
        let take_back = async {
            let offered = offer.await;
            revoke(&revoker).await;
            let answer = offered.open_request().send().promise.await.unwrap();
            let Ok(host_vsock_endpoint::stream_result::Error(error)) = answer.get().unwrap().which() else {
                panic!("it was opened")
            };
            Error::read(error.unwrap()).unwrap()
        };
        let (refused, error) = futures::join!(asks, take_back);
        assert!(refused.is_none() && error.kind == Kind::Revoked, "{error}");

        for end in [&stream, &accepted, &guest, &guest_of_accepted, &guest_of_stream] {
            ends(end).await;
        }
        is_dropped(&dropped).await;
        stream_is_revoked(&to_guest).await;
        sockets.nobody_listens().await;
        crate::vsock::talk(&stays, &guest_stays).await;
    });
}

async fn stream_is_revoked(stream: &byte_stream::Client) {
    let answer = stream.end_request().send().promise.await.unwrap();
    assert_eq!(read_completion(answer.get().unwrap()).unwrap_err().kind, Kind::Revoked);
    let mut call = stream.write_request();
    call.get().set_bytes(b"x");
    let error = call.hook.send().promise.await.err().unwrap();
    assert_eq!(said(&error).kind, Kind::Revoked);
}

/// Runs a shell command in the "guest", which is here.
async fn exec(of: &facet::Client, command: &str, stdout: byte_stream::Client) -> process::Client {
    let agent: agent::Client = cast(of.clone());
    let mut call = agent.exec_request();
    let mut arguments = call.get().init_command().init_arguments(3);
    for (i, argument) in ["sh", "-c", command].into_iter().enumerate() {
        arguments.set(u32::try_from(i).unwrap(), argument);
    }
    call.get().set_stdout(stdout);
    let answer = call.send().promise.await.unwrap();
    answer.get().unwrap().outcome().unwrap().get_process().unwrap()
}

#[test]
fn programs_are_killed_and_files_break_off() {
    run(async |world| {
        let caller = world.caller();
        let launched = launch(&world, &caller, "web").await;
        let (agent, revoker) = part(&launched, Part::Agent).await;
        let sink = Sink::default();
        // The file is removed when the shell is gone: never, if it is killed.
        let process = exec(&agent, "echo $$; exec sleep 1000", guard::new_client(sink.clone())).await;
        let line = |(bytes, _): &mut (Vec<u8>, bool)| bytes.ends_with(b"\n").then(|| bytes.clone());
        let pid = String::from_utf8(sink.0.until(line).await).unwrap();
        let stdin = process.stdin_request().send().promise.await.unwrap();
        let stdin = stdin.get().unwrap().get_stdin().unwrap();

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("half");
        let client: agent::Client = cast(agent.clone());
        let mut call = client.put_file_request();
        call.get().set_path(path.to_str().unwrap());
        let answer = call.send().promise.await.unwrap();
        let file = answer.get().unwrap().outcome().unwrap().get_sink().unwrap();
        let mut call = file.write_request();
        call.get().set_bytes(b"half of it");
        call.send().await.unwrap();

        let wait = async {
            let answer = process.wait_request().send().promise.await.unwrap();
            match answer.get().unwrap().which().unwrap() {
                process::wait_result::Error(error) => Error::read(error.unwrap()).unwrap(),
                _ => panic!("it is over"),
            }
        };
        let (error, ()) = futures::join!(wait, revoke(&revoker));
        assert_eq!(error.kind, Kind::Revoked);
        // Readiness of a process descriptor is the end of the process, whoever reaps it.
        if let Some(pid) = rustix::process::Pid::from_raw(pid.trim().parse().unwrap())
            && let Ok(fd) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())
        {
            let ended = world.handle.register(fd).unwrap();
            ended.readable().await;
        }
        for stream in [&stdin, &file] {
            stream_is_revoked(stream).await;
        }
        let signalled = process.signal_request().send().promise.await.unwrap();
        let resized = process.resize_request().send().promise.await.unwrap();
        for answer in [signalled.get().unwrap(), resized.get().unwrap()] {
            assert_eq!(read_completion(answer).unwrap_err().kind, Kind::Revoked);
        }
        let error = process.stdin_request().send().promise.await.err().unwrap();
        assert_eq!(said(&error).kind, Kind::Revoked);
        assert!(!path.exists());
        // Others go on.
        let sink = Sink::default();
        let process = exec(
            &Part::Agent.of(&launched.guest),
            "echo on",
            guard::new_client(sink.clone()),
        )
        .await;
        let answer = process.wait_request().send().promise.await.unwrap();
        assert!(matches!(
            answer.get().unwrap().which(),
            Ok(process::wait_result::Exited(0))
        ));
        assert_eq!(sink.0.look(|(bytes, _)| bytes.clone()), b"on\n");
    });
}

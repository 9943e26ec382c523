//! A guest's socket device through the manager: sockets, streams, listeners, and the Unix socket for other monitors' clients.

use std::{
    cell::RefCell,
    collections::HashMap,
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    rc::Rc,
};

use futures::{AsyncReadExt, AsyncWriteExt};
use sepal_guest_manager::changed::Changed;
use sepal_schema::{
    bytes_capnp::byte_stream,
    config::{
        GuestConfig, Handles,
        device::{Listener, Vsock},
    },
    error::{Error, Kind, Outcome, write_completion},
    guest_capnp::guest,
    transport::{AsyncFd, FdTable, guard},
    vsock_capnp::{
        host_vsock_endpoint::{self, stream_result},
        vsock_acceptor, vsock_connection, vsock_listener,
    },
};

use crate::world::{Caller, World, kill, named, run};

type Reply = Result<(), capnp::Error>;

/// A port of the fake guest on which nobody listens.
const CLOSED: u32 = 8;
/// Stands for any port.
const ANY: u32 = u32::MAX;

/// The guest behind the fake component.
#[derive(Default)]
pub(crate) struct Sockets {
    fds: RefCell<Option<FdTable>>,
    /// Its ends of the connections that the host has made, with their ports.
    connected: Changed<Vec<(u32, UnixStream)>>,
    listeners: Changed<HashMap<u32, vsock_acceptor::Client>>,
}

impl Sockets {
    /// The descriptors of the component's connection.
    pub(crate) fn set_fds(&self, fds: FdTable) {
        *self.fds.borrow_mut() = Some(fds);
    }

    fn send(&self, socket: UnixStream) -> u32 {
        Handles::send(self.fds.borrow().as_ref().unwrap(), socket.into()).unwrap()
    }

    /// As [`Sockets::next`], for a guest that blocks.
    pub(crate) async fn next_raw(&self) -> (u32, UnixStream) {
        self.connected.until(Vec::pop).await
    }

    /// Waits until nobody offers a port any more.
    pub(crate) async fn nobody_listens(&self) {
        self.listeners.until(|all| all.is_empty().then_some(())).await;
    }

    /// The guest's end of the next connection of the host.
    pub(crate) async fn next(&self, world: &World) -> (u32, AsyncFd<UnixStream>) {
        let (port, socket) = self.connected.until(Vec::pop).await;
        (port, world.handle.register(socket).unwrap())
    }

    /// The guest connects to a port of the host: its end, once it has been accepted; none if it is refused.
    pub(crate) async fn connect(&self, world: &World, port: u32) -> Option<AsyncFd<UnixStream>> {
        let acceptor = self
            .listeners
            .look(|all| all.get(&port).or_else(|| all.get(&ANY)).cloned())?;
        let offered = Rc::new(Changed::new(Offered::Waits));
        let connection = Connection {
            sockets: self.fds.borrow().clone().unwrap(),
            offered: offered.clone(),
        };
        let mut call = acceptor.accept_request();
        call.get().set_port(port);
        call.get().set_source_port(5000);
        call.get().set_connection(guard::new_client(connection));
        // A component may be content with having asked.
        drop(call.send());
        let answer = |offered: &mut Offered| match std::mem::replace(offered, Offered::Waits) {
            Offered::Waits => None,
            Offered::Refused => Some(None),
            Offered::Granted(socket) => Some(Some(socket)),
        };
        let socket = offered.until(answer).await?;
        Some(world.handle.register(socket).unwrap())
    }
}

/// What becomes of a connection that the guest asks for.
enum Offered {
    Waits,
    Refused,
    Granted(UnixStream),
}

struct Connection {
    sockets: FdTable,
    offered: Rc<Changed<Offered>>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.offered.change(|offered| {
            if let Offered::Waits = offered {
                *offered = Offered::Refused;
            }
        });
    }
}

impl vsock_connection::Server for Connection {
    async fn open(
        self: Rc<Self>,
        _: vsock_connection::OpenParams,
        mut results: vsock_connection::OpenResults,
    ) -> Reply {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let number = Handles::send(&self.sockets, theirs.into()).unwrap();
        results.get().init_fd().set_number(number);
        self.offered.change(|offered| *offered = Offered::Granted(ours));
        Ok(())
    }
}

/// The fake component's capability.
pub(crate) struct Endpoint(pub(crate) Rc<Sockets>);

struct Listening(Rc<Sockets>, u32);

impl vsock_listener::Server for Listening {}

impl Drop for Listening {
    fn drop(&mut self) {
        drop(self.0.listeners.change(|all| all.remove(&self.1)));
    }
}

impl sepal_schema::facet_capnp::facet::Server for Endpoint {}

impl host_vsock_endpoint::Server for Endpoint {
    async fn listen(
        self: Rc<Self>,
        params: host_vsock_endpoint::ListenParams,
        mut results: host_vsock_endpoint::ListenResults,
    ) -> Reply {
        let params = params.get()?;
        let (port, acceptor) = (params.get_port(), params.get_acceptor()?);
        if self.0.listeners.look(|all| all.contains_key(&port)) {
            let error = Error::new(Kind::AlreadyBound, "somebody listens there").about("port");
            error.write(results.get().init_error());
            return Ok(());
        }
        self.0.listeners.change(|all| all.insert(port, acceptor));
        let listening = Listening(self.0.clone(), port);
        results.get().set_listener(guard::new_client(listening));
        Ok(())
    }

    async fn connect(
        self: Rc<Self>,
        params: host_vsock_endpoint::ConnectParams,
        mut results: host_vsock_endpoint::ConnectResults,
    ) -> Reply {
        let port = params.get()?.get_port();
        if port == CLOSED {
            Error::new(Kind::ConnectionRefused, "nobody listens").write(results.get().init_error());
            return Ok(());
        }
        let (ours, theirs) = UnixStream::pair().unwrap();
        let number = self.0.send(theirs);
        results.get().init_fd().set_number(number);
        self.0.connected.change(|all| all.push((port, ours)));
        Ok(())
    }
}

/// A client that takes what the guest asks for.
#[derive(Clone, Default)]
pub(crate) struct Taker(Rc<Changed<Vec<(u32, u32, vsock_connection::Client)>>>);

impl Taker {
    pub(crate) async fn next(&self) -> (u32, u32, vsock_connection::Client) {
        self.0.until(Vec::pop).await
    }
}

impl vsock_acceptor::Server for Taker {
    async fn accept(self: Rc<Self>, params: vsock_acceptor::AcceptParams, _: vsock_acceptor::AcceptResults) -> Reply {
        let params = params.get()?;
        let asked = (params.get_port(), params.get_source_port(), params.get_connection()?);
        self.0.change(|all| all.push(asked));
        Ok(())
    }
}

/// A client that opens a connection before it answers.
struct Opener {
    fds: FdTable,
    opened: Rc<Changed<Vec<UnixStream>>>,
}

impl vsock_acceptor::Server for Opener {
    async fn accept(self: Rc<Self>, params: vsock_acceptor::AcceptParams, _: vsock_acceptor::AcceptResults) -> Reply {
        let connection = params.get()?.get_connection()?;
        let answer = connection.open_request().send().promise.await?;
        let stream_result::Fd(fd) = answer.get()?.which()? else {
            panic!("no socket")
        };
        let fd = Handles::take(&self.fds, fd?.get_number()).unwrap();
        self.opened.change(|all| all.push(fd.into()));
        Ok(())
    }
}

/// Remembers what it is given.
#[derive(Clone, Default)]
pub(crate) struct Sink(pub(crate) Rc<Changed<(Vec<u8>, bool)>>);

impl byte_stream::Server for Sink {
    async fn write(self: Rc<Self>, params: byte_stream::WriteParams) -> Reply {
        let bytes = params.get()?.get_bytes()?.to_vec();
        self.0.change(|(all, _)| all.extend(bytes));
        Ok(())
    }

    async fn end(self: Rc<Self>, _: byte_stream::EndParams, mut results: byte_stream::EndResults) -> Reply {
        self.0.change(|(_, ended)| *ended = true);
        write_completion(&Ok(()), results.get());
        Ok(())
    }
}

pub(crate) fn with_vsock(vsock: Vsock) -> GuestConfig {
    GuestConfig {
        vsock: Some(vsock),
        ..named("web")
    }
}

/// A context id that no other test has.
fn cid(test: u32) -> u32 {
    0x6000_0000 + (std::process::id() << 4) + test
}

pub(crate) async fn endpoint(guest: &guest::Client) -> Result<host_vsock_endpoint::Client, Error> {
    let answer = guest.host_vsock_endpoint_request().send().promise.await?;
    Ok(answer.get()?.outcome()?.get_endpoint()?)
}

pub(crate) fn socket(
    world: &World,
    caller: &Caller,
    answer: stream_result::Reader<'_>,
) -> Result<AsyncFd<UnixStream>, Error> {
    match answer.which().unwrap() {
        stream_result::Fd(fd) => {
            let fd = Handles::take(&caller.connection.fds(), fd?.get_number())?;
            Ok(world.handle.register(fd.into()).unwrap())
        }
        stream_result::Error(error) => Err(Error::read(error?)?),
    }
}

pub(crate) async fn connect(
    world: &World,
    caller: &Caller,
    endpoint: &host_vsock_endpoint::Client,
    port: u32,
) -> Result<AsyncFd<UnixStream>, Error> {
    let mut call = endpoint.connect_request();
    call.get().set_port(port);
    let answer = call.send().promise.await?;
    socket(world, caller, answer.get()?)
}

pub(crate) async fn listen(
    endpoint: &host_vsock_endpoint::Client,
    port: u32,
    acceptor: impl vsock_acceptor::Server + 'static,
) -> Result<vsock_listener::Client, Error> {
    let mut call = endpoint.listen_request();
    call.get().set_port(port);
    call.get().set_acceptor(guard::new_client(acceptor));
    let answer = call.send().promise.await?;
    Ok(answer.get()?.outcome()?.get_listener()?)
}

/// That bytes go both ways, and the ends too.
pub(crate) async fn talk(mut one: &AsyncFd<UnixStream>, mut other: &AsyncFd<UnixStream>) {
    let mut bytes = Vec::new();
    one.write_all(b"question").await.unwrap();
    one.get_ref().shutdown(Shutdown::Write).unwrap();
    other.read_to_end(&mut bytes).await.unwrap();
    assert_eq!(bytes, b"question");
    bytes.clear();
    other.write_all(b"answer").await.unwrap();
    other.get_ref().shutdown(Shutdown::Write).unwrap();
    one.read_to_end(&mut bytes).await.unwrap();
    assert_eq!(bytes, b"answer");
}

#[test]
fn a_client_connects_to_ports_of_the_guest() {
    run(async |world| {
        let caller = world.caller();
        let vsock = Vsock {
            cid: cid(1),
            ..Vsock::default()
        };
        let launched = caller.launch_config(with_vsock(vsock), false).await.unwrap();
        let endpoint = endpoint(&launched.guest).await.unwrap();
        let address = endpoint.address_request().send().promise.await.unwrap();
        assert_eq!(address.get().unwrap().get_cid(), cid(1));
        let socket = connect(&world, &caller, &endpoint, 22).await.unwrap();
        let (port, guest) = world.fake.last().sockets.next(&world).await;
        assert_eq!(port, 22);
        talk(&socket, &guest).await;
        let refused = connect(&world, &caller, &endpoint, CLOSED).await.err().unwrap();
        assert_eq!(refused.kind, Kind::ConnectionRefused);
        kill(&launched.guest).await.unwrap();
        let ended = connect(&world, &caller, &endpoint, 22).await.err().unwrap();
        assert_eq!(ended.kind, Kind::NotRunning);
    });
}

#[test]
fn a_client_without_descriptors_gets_streams() {
    run(async |world| {
        let caller = world.caller();
        let launched = caller.launch_config(with_vsock(Vsock::default()), false).await.unwrap();
        let endpoint = endpoint(&launched.guest).await.unwrap();
        let sink = Sink::default();
        let mut call = endpoint.connect_stream_request();
        call.get().set_port(22);
        call.get().set_from_guest(guard::new_client(sink.clone()));
        let answer = call.send().promise.await.unwrap();
        let to_guest = answer.get().unwrap().outcome().unwrap().get_to_guest().unwrap();
        let (_, guest) = world.fake.last().sockets.next(&world).await;
        let mut call = to_guest.write_request();
        call.get().set_bytes(b"question");
        call.send().await.unwrap();
        to_guest.end_request().send().promise.await.unwrap();
        let mut bytes = Vec::new();
        (&guest).read_to_end(&mut bytes).await.unwrap();
        assert_eq!(bytes, b"question");
        (&guest).write_all(b"answer").await.unwrap();
        drop(guest);
        let all = sink.0.until(|(all, ended)| ended.then(|| all.clone())).await;
        assert_eq!(all, b"answer");
    });
}

#[test]
fn a_client_listens_and_opens_each_connection_once() {
    run(async |world| {
        let caller = world.caller();
        let launched = caller.launch_config(with_vsock(Vsock::default()), false).await.unwrap();
        let endpoint = endpoint(&launched.guest).await.unwrap();
        let sockets = world.fake.last().sockets.clone();
        let taker = Taker::default();
        let listener = listen(&endpoint, 52, taker.clone()).await.unwrap();
        let taken = listen(&endpoint, 52, taker.clone()).await.err().unwrap();
        assert_eq!((taken.kind, &taken.about[..]), (Kind::AlreadyBound, "port"));
        let open = async {
            let (port, source, connection) = taker.next().await;
            assert_eq!((port, source), (52, 5000));
            let answer = connection.open_request().send().promise.await.unwrap();
            let socket = socket(&world, &caller, answer.get().unwrap()).unwrap();
            let again = connection.open_request().send().promise.await.unwrap();
            let again = self::socket(&world, &caller, again.get().unwrap()).err().unwrap();
            assert_eq!(again.kind, Kind::BadConfig);
            socket
        };
        let (guest, socket) = futures::join!(sockets.connect(&world, 52), open);
        talk(&guest.unwrap(), &socket).await;
        // Dropped unopened, it is refused.
        let refuse = async { drop(taker.next().await) };
        let (guest, ()) = futures::join!(sockets.connect(&world, 52), refuse);
        assert!(guest.is_none());
        drop(listener);
        sockets.listeners.until(|all| all.is_empty().then_some(())).await;
        listen(&endpoint, 52, taker.clone()).await.unwrap();
    });
}

#[test]
fn a_client_may_open_a_connection_before_it_answers() {
    run(async |world| {
        let caller = world.caller();
        let launched = caller.launch_config(with_vsock(Vsock::default()), false).await.unwrap();
        let endpoint = endpoint(&launched.guest).await.unwrap();
        let opened = Rc::new(Changed::default());
        let opener = Opener {
            fds: caller.connection.fds(),
            opened: opened.clone(),
        };
        let _listener = listen(&endpoint, 52, opener).await.unwrap();
        let sockets = world.fake.last().sockets.clone();
        let (guest, socket) = futures::join!(sockets.connect(&world, 52), opened.until(Vec::pop));
        talk(&guest.unwrap(), &world.handle.register(socket).unwrap()).await;
    });
}

#[test]
fn a_configuration_may_name_who_listens_from_the_start() {
    run(async |world| {
        let caller = world.caller();
        let taker = Taker::default();
        let listener = Listener {
            port: 99,
            acceptor: guard::new_client(taker.clone()),
        };
        let vsock = Vsock {
            listeners: vec![listener],
            ..Vsock::default()
        };
        let launched = caller.launch_config(with_vsock(vsock), false).await.unwrap();
        let sockets = world.fake.last().sockets.clone();
        let open = async {
            let (_, _, connection) = taker.next().await;
            let answer = connection.open_request().send().promise.await.unwrap();
            socket(&world, &caller, answer.get().unwrap()).unwrap()
        };
        let (guest, socket) = futures::join!(sockets.connect(&world, 99), open);
        talk(&guest.unwrap(), &socket).await;
        kill(&launched.guest).await.unwrap();
    });
}

#[test]
fn clients_of_other_monitors_find_a_unix_socket() {
    run(async |world| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v.sock");
        let vsock = || Vsock {
            socket_path: path.to_str().unwrap().to_owned(),
            ..Vsock::default()
        };
        let stranger = world.caller_as(false);
        let refused = stranger.launch_config(with_vsock(vsock()), false).await.err().unwrap();
        assert_eq!(
            (refused.kind, &refused.about[..]),
            (Kind::PermissionDenied, "vsock.socketPath")
        );
        let caller = world.caller();
        let launched = caller.launch_config(with_vsock(vsock()), false).await.unwrap();
        let client = world.handle.register(UnixStream::connect(&path).unwrap()).unwrap();
        (&client).write_all(b"CONNECT 22\n").await.unwrap();
        let (port, guest) = world.fake.last().sockets.next(&world).await;
        assert_eq!(port, 22);
        let mut ok = [0; 14];
        (&client).read_exact(&mut ok).await.unwrap();
        assert!(ok.starts_with(b"OK ") && ok.ends_with(b"\n"), "{ok:?}");
        talk(&client, &guest).await;
        // And what the guest connects to is beside it.
        let host = UnixListener::bind(folder.path().join("v.sock_52")).unwrap();
        let host = world.handle.register(host).unwrap();
        let sockets = world.fake.last().sockets.clone();
        let (guest, host) = futures::join!(sockets.connect(&world, 52), host.accept());
        let host = world.handle.register(host.unwrap()).unwrap();
        talk(&guest.unwrap(), &host).await;
        assert!(sockets.connect(&world, 53).await.is_none());
        let waiting = world.handle.register(UnixStream::connect(&path).unwrap()).unwrap();
        kill(&launched.guest).await.unwrap();
        // Whoever is connected is let go after the path.
        assert_eq!((&waiting).read(&mut [0]).await.unwrap(), 0);
        assert!(!path.exists());
    });
}

#[test]
fn a_guest_without_the_device_says_so() {
    run(async |world| {
        let caller = world.caller();
        let launched = caller.launch("web").await.unwrap();
        let missing = endpoint(&launched.guest).await.err().unwrap();
        assert_eq!(missing.kind, Kind::DeviceNotPresent);
    });
}

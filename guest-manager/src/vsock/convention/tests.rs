//! The convention with real sockets: clients, a guest that echoes, and hosts behind `<path>_<port>`.

use std::{cell::RefCell, net::Shutdown};

use futures::{AsyncReadExt, AsyncWriteExt};
use sepal_schema::{error::Kind, transport::Reactor};

use super::*;

/// A guest: on port 7 it echoes, port 8 refuses, and of the others it shows its ends.
struct Guest {
    handle: Handle,
    ends: RefCell<Vec<(u32, UnixStream)>>,
}

impl Endpoint for Guest {
    fn connect(&self, port: u32) -> LocalBoxFuture<'static, Result<UnixStream, Error>> {
        if port == 8 {
            let refused = Error::new(Kind::ConnectionRefused, "nobody listens");
            return Box::pin(async move { Err(refused) });
        }
        let (ours, theirs) = UnixStream::pair().unwrap();
        if port == 7 {
            let ours = self.handle.register(ours).unwrap();
            self.handle.spawn(async move {
                let mut bytes = vec![0; 65536];
                while let Ok(count @ 1..) = (&ours).read(&mut bytes).await {
                    (&ours).write_all(&bytes[..count]).await.unwrap();
                }
                ours.shutdown(Shutdown::Write).unwrap();
            });
        } else {
            self.ends.borrow_mut().push((port, ours));
        }
        Box::pin(async move { Ok(theirs) })
    }
}

/// A connection that the guest asks for, and its end.
struct Asked(UnixStream);

impl Incoming for Asked {
    fn open(self: Box<Self>) -> LocalBoxFuture<'static, Result<UnixStream, Error>> {
        Box::pin(async move { Ok(self.0) })
    }
}

struct World {
    handle: Handle,
    folder: tempfile::TempDir,
    guest: Rc<Guest>,
    convention: Convention,
}

impl World {
    fn path(&self) -> PathBuf {
        self.folder.path().join("v.sock")
    }

    fn client(&self) -> AsyncFd<UnixStream> {
        self.handle.register(UnixStream::connect(self.path()).unwrap()).unwrap()
    }

    /// Waits until there are so many connections.
    async fn open(&self, count: usize) {
        let open = |open: &mut Open| (open.len() == count).then_some(());
        self.convention.shared.open.until(open).await;
    }
}

fn run<F: Future>(line_within: Duration, test: impl FnOnce(World) -> F) -> F::Output {
    let mut reactor = Reactor::new().unwrap();
    let handle = reactor.handle();
    let folder = tempfile::tempdir().unwrap();
    let guest = Rc::new(Guest {
        handle: handle.clone(),
        ends: RefCell::default(),
    });
    let path = folder.path().join("v.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let convention = Convention::new(&handle, listener, &path, guest.clone(), line_within).unwrap();
    let world = World {
        handle,
        folder,
        guest,
        convention,
    };
    reactor.run_until(test(world)).unwrap()
}

async fn read_to_end(mut socket: &AsyncFd<UnixStream>) -> Vec<u8> {
    let mut bytes = Vec::new();
    // A connection that is reset has said all that it will.
    let _ = socket.read_to_end(&mut bytes).await;
    bytes
}

async fn read_line(mut socket: &AsyncFd<UnixStream>) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while socket.read(&mut byte).await.unwrap() == 1 {
        if byte == *b"\n" {
            break;
        }
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

#[test]
fn a_client_asks_for_a_port_and_talks_to_it() {
    run(LINE_WITHIN, async |world| {
        for part in [1, 3, 100] {
            let client = world.client();
            // The guest's first bytes may come with the line, and the line in pieces.
            for piece in b"CONNECT 7\nhello".chunks(part) {
                (&client).write_all(piece).await.unwrap();
                crate::serial::yield_now().await;
            }
            let answer = read_line(&client).await;
            let number = answer.strip_prefix("OK ").unwrap();
            assert!(number.parse::<u32>().unwrap() >= FIRST_NUMBER, "{answer}");
            (&client).write_all(b" world").await.unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            assert_eq!(read_to_end(&client).await, b"hello world");
        }
        world.open(0).await;
    });
}

#[test]
fn many_bytes_go_both_ways_at_once() {
    const TOTAL: usize = 3 << 20;
    run(LINE_WITHIN, async |world| {
        let client = world.client();
        (&client).write_all(b"CONNECT 7\n").await.unwrap();
        read_line(&client).await;
        let bytes: Vec<u8> = (0..TOTAL).map(|n| (n * 7 + n / 255) as u8).collect();
        let write = async {
            (&client).write_all(&bytes).await.unwrap();
            client.shutdown(Shutdown::Write).unwrap();
        };
        let (read, ()) = futures::join!(read_to_end(&client), write);
        assert!(read == bytes);
    });
}

#[test]
fn what_is_no_request_is_closed_without_a_word() {
    run(LINE_WITHIN, async |world| {
        for line in [
            "CONNECT\n",
            "CONNECT 99999999999\n",
            "GET / HTTP/1.1\r\n",
            "\n",
            "CONNECT 8\n",
            "CONNECT                                  7\n",
            "0123456789012345678901234567890123456789",
        ] {
            let client = world.client();
            (&client).write_all(line.as_bytes()).await.unwrap();
            assert_eq!(read_to_end(&client).await, b"", "{line:?}");
        }
        let client = world.client();
        (&client).write_all(b"CONN").await.unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_to_end(&client).await, b"");
        world.open(0).await;
        assert!(world.guest.ends.borrow().is_empty());
    });
}

#[test]
fn a_client_that_takes_too_long_is_closed() {
    run(Duration::from_millis(1), async |world| {
        let silent = world.client();
        assert_eq!(read_to_end(&silent).await, b"");
    });
}

#[test]
fn only_so_many_are_served_and_the_others_wait() {
    run(Duration::from_secs(3600), async |world| {
        let silent: Vec<_> = (0..MAX_CONNECTIONS).map(|_| world.client()).collect();
        world.open(MAX_CONNECTIONS).await;
        let waiting = world.client();
        (&waiting).write_all(b"CONNECT 7\nx").await.unwrap();
        waiting.shutdown(Shutdown::Write).unwrap();
        // The guest's side counts as well.
        let (ours, theirs) = UnixStream::pair().unwrap();
        world.convention.incoming(9, Box::new(Asked(theirs)));
        assert_eq!(read_to_end(&world.handle.register(ours).unwrap()).await, b"");
        drop(silent);
        assert!(read_to_end(&waiting).await.ends_with(b"\nx"));
    });
}

#[test]
fn a_side_that_closes_ends_the_other() {
    run(LINE_WITHIN, async |world| {
        // The guest closes; the client neither sends nor closes.
        let client = world.client();
        (&client).write_all(b"CONNECT 9\n").await.unwrap();
        read_line(&client).await;
        let (port, guest) = world.guest.ends.borrow_mut().pop().unwrap();
        assert_eq!(port, 9);
        drop(guest);
        assert_eq!(read_to_end(&client).await, b"");
        world.open(0).await;
        assert!((&client).write_all(b"x").await.is_err());
        // The client closes.
        let client = world.client();
        (&client).write_all(b"CONNECT 9\nlast").await.unwrap();
        read_line(&client).await;
        let (_, guest) = world.guest.ends.borrow_mut().pop().unwrap();
        drop(client);
        let guest = world.handle.register(guest).unwrap();
        assert_eq!(read_to_end(&guest).await, b"last");
        world.open(0).await;
    });
}

#[test]
fn the_guest_reaches_whoever_listens_beside_the_socket() {
    run(LINE_WITHIN, async |world| {
        let listener = UnixListener::bind(world.folder.path().join("v.sock_52")).unwrap();
        let listener = world.handle.register(listener).unwrap();
        let (guest, theirs) = UnixStream::pair().unwrap();
        world.convention.incoming(52, Box::new(Asked(theirs)));
        let guest = world.handle.register(guest).unwrap();
        let host = world.handle.register(listener.accept().await.unwrap()).unwrap();
        (&guest).write_all(b"from the guest").await.unwrap();
        guest.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_to_end(&host).await, b"from the guest");
        (&host).write_all(b"from the host").await.unwrap();
        drop(host);
        assert_eq!(read_to_end(&guest).await, b"from the host");
        world.open(0).await;
        // Nobody listens for this one: the connection is dropped unopened.
        let (guest, theirs) = UnixStream::pair().unwrap();
        world.convention.incoming(53, Box::new(Asked(theirs)));
        assert_eq!(read_to_end(&world.handle.register(guest).unwrap()).await, b"");
    });
}

#[test]
fn its_end_is_the_end_of_its_connections() {
    run(LINE_WITHIN, async |world| {
        let client = world.client();
        (&client).write_all(b"CONNECT 9\n").await.unwrap();
        read_line(&client).await;
        let (_, guest) = world.guest.ends.borrow_mut().pop().unwrap();
        drop(world.convention);
        assert_eq!(read_to_end(&client).await, b"");
        assert_eq!(read_to_end(&world.handle.register(guest).unwrap()).await, b"");
    });
}

//! A guest's serial port in the manager: the history of its output, the queue of its input, and the streams that clients have open.
//!
//! ```text
//!   component --socket--> history (ring) ---> readers, each with a position; streams
//!                             '--- of a guest that goes on without its manager the bytes are in the mirror, first of all
//!   component <--socket-- input (64 KiB) <--- writers wait for room;         streams
//! ```
//!
//! Nothing here ever holds up the guest: its output is always read, and who does not keep up loses the oldest.

mod mirror;

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    io,
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::net::UnixStream},
    pin::pin,
    rc::Rc,
};

use futures::future::select;
use rustix::net::{RecvFlags, SendFlags};
use sepal_schema::{
    error::{Error, Kind},
    transport::{
        AsyncFd, Handle,
        reactor::{Direction, Task},
    },
};

use self::mirror::Mirror;
use crate::{
    changed::Changed,
    history::{History, Piece},
};

/// Input that may wait for the guest's side, in bytes; also the most that one write takes.
pub const MAX_INPUT: usize = 64 * 1024;
/// Streams of one guest that may be open at a time.
pub const MAX_STREAMS: usize = 16;
/// How many of them are kept for those who may type: who may only look shall not use them up.
const FOR_TYPING: usize = 4;
/// What is read at a time.
const CHUNK: usize = 16 * 1024;
/// Most bytes that are taken from the socket of a guest that has ended: more than a socket buffer holds (net.core.rmem_max).
const MAX_REST: usize = 4 * 1024 * 1024;

/// The port.
#[derive(Debug)]
pub struct Port {
    history: Changed<History>,
    /// What is kept of the history for the next manager, of a guest that goes on without this one.
    mirror: Mirror,
    input: Changed<Input>,
    streams: Cell<usize>,
}

#[derive(Debug, Default)]
struct Input {
    queue: VecDeque<u8>,
    /// The guest has ended: what is typed is discarded.
    closed: bool,
}

impl Port {
    /// A port that remembers the last `capacity` bytes of output.
    pub fn new(capacity: usize) -> Rc<Self> {
        Rc::new(Self {
            history: Changed::new(History::new(capacity)),
            mirror: Mirror::default(),
            input: Changed::default(),
            streams: Cell::new(0),
        })
    }

    /// What is kept of the output for the next manager, which it is from now on.
    pub(crate) fn mirror(&self) -> io::Result<OwnedFd> {
        let (descriptor, ring) = self.mirror.descriptor(self.history.look(History::capacity))?;
        self.history.change(|history| history.keep_elsewhere(ring));
        Ok(descriptor)
    }

    /// Goes on where an earlier manager stopped reading, whose descriptor this is.
    pub(crate) fn restore(&self, ring: OwnedFd) -> io::Result<()> {
        let history = self.mirror.restore(ring, self.history.look(History::capacity))?;
        self.history.change(|known| *known = history);
        Ok(())
    }

    /// Takes output out of the component's socket, and returns how much.
    fn take(&self, socket: &UnixStream, room: &mut [MaybeUninit<u8>]) -> io::Result<usize> {
        self.mirror.take(socket, room, |bytes, is_kept| {
            self.history.change(|history| {
                if !is_kept {
                    history.keep_here();
                }
                history.push(bytes);
            });
        })
    }

    /// Reads output; see [`History::read`]. With `wait`, not before there is a byte or the end.
    pub async fn read(&self, position: u64, most: usize, wait: bool) -> Piece {
        let ready = |history: &mut History| {
            let piece = history.read(position, most);
            (!wait || !piece.bytes.is_empty() || piece.ended).then_some(piece)
        };
        self.history.until(ready).await
    }

    /// Position after the last byte.
    pub fn end(&self) -> u64 {
        self.history.look(History::end)
    }

    /// The last bytes of output, at most `most`, as far as they are kept.
    pub fn tail(&self, most: usize) -> Vec<u8> {
        self.history
            .look(|history| history.read(history.end().saturating_sub(most as u64), most).bytes)
    }

    /// Bytes of output that are no longer kept.
    pub fn lost(&self) -> u64 {
        self.history.look(History::start)
    }

    /// Queues input, all of it together, when there is room. Discarded after the guest has ended.
    ///
    /// # Errors
    /// `BAD_CONFIG` for more than [`MAX_INPUT`] bytes.
    pub async fn write(&self, bytes: &[u8]) -> Result<(), Error> {
        if bytes.len() > MAX_INPUT {
            let message = format!(
                "{} bytes were written at once; at most {MAX_INPUT} are allowed",
                bytes.len()
            );
            return Err(Error::new(Kind::BadConfig, message).about("bytes"));
        }
        let room = |input: &mut Input| (input.closed || input.queue.len() + bytes.len() <= MAX_INPUT).then_some(());
        self.input.until(room).await;
        self.input.change(|input| {
            if !input.closed {
                input.queue.extend(bytes);
            }
        });
        Ok(())
    }

    /// The guest has ended: no more output comes, input is discarded, streams end.
    pub fn close(&self) {
        self.input.change(|input| {
            input.closed = true;
            input.queue = VecDeque::new();
        });
        self.history.change(History::finish);
    }

    /// Connects the component's side.
    ///
    /// # Errors
    /// The socket cannot be put on the event loop.
    pub fn attach(self: &Rc<Self>, handle: &Handle, socket: UnixStream) -> io::Result<Wire> {
        self.mirror.attach(&socket)?;
        let socket = Rc::new(handle.register(socket)?);
        let (port, from) = (self.clone(), socket.clone());
        let output = handle.spawn_owned(async move {
            // Room only while there is something: most guests are silent most of the time, and there are many.
            let mut take = |socket: &UnixStream| {
                let mut room = [const { MaybeUninit::uninit() }; CHUNK];
                port.take(socket, &mut room)
            };
            while let Ok(1..) = from.io(Direction::Read, &mut take).await {
                yield_now().await;
            }
        });
        let (port, to) = (self.clone(), socket.clone());
        let input = handle.spawn_owned(async move {
            loop {
                let next = port.input.until(|input| {
                    let (front, _) = input.queue.as_slices();
                    (!front.is_empty()).then(|| front[..front.len().min(CHUNK)].to_vec())
                });
                let next = next.await;
                let Ok(sent) = send(&to, &next).await else { return };
                port.input.change(|input| {
                    let sent = sent.min(input.queue.len());
                    input.queue.drain(..sent);
                });
            }
        });
        Ok(Wire {
            port: self.clone(),
            socket,
            tasks: RefCell::new(Some([output, input])),
        })
    }

    /// Opens a stream for a client: output from `position` on, and input. It ends with `ended`, too.
    ///
    /// # Errors
    /// `NO_RESOURCES` when too many are open, or no socket is to be had.
    pub fn open(
        self: &Rc<Self>,
        handle: &Handle,
        position: u64,
        ways: Ways,
        ended: impl Future<Output = ()> + 'static,
    ) -> Result<OwnedFd, Error> {
        let most = match ways.input {
            true => MAX_STREAMS,
            false => MAX_STREAMS - FOR_TYPING,
        };
        if self.streams.get() >= most {
            let message = format!("{most} streams of this serial port are open; no more are allowed");
            return Err(Error::new(Kind::NoResources, message));
        }
        let made = UnixStream::pair().and_then(|(ours, theirs)| Ok((handle.register(ours)?, theirs)));
        let (ours, theirs) = made.map_err(|error| Error::new(Kind::NoResources, format!("no stream: {error}")))?;
        let (open, handle) = (Open::new(self.clone()), handle.clone());
        handle.clone().spawn(async move {
            let output = pin!(open.0.feed(&ours, position, ways.output));
            let input = pin!(open.0.listen(&handle, &ours, ways.input));
            select(pin!(ended), select(output, input)).await;
            hang_up(&ours);
        });
        Ok(theirs.into())
    }

    /// Output to a stream, until the guest has ended or the client is gone; without `output` only the end.
    async fn feed(&self, stream: &AsyncFd<UnixStream>, mut position: u64, output: bool) {
        if !output {
            return self.history.until(|history| history.ended().then_some(())).await;
        }
        loop {
            let piece = self.read(position, CHUNK, true).await;
            position = piece.position + piece.bytes.len() as u64;
            let mut rest = &piece.bytes[..];
            while !rest.is_empty() {
                match send(stream, rest).await {
                    Ok(sent) => rest = &rest[sent..],
                    Err(_) => return,
                }
            }
            if piece.ended {
                return;
            }
            yield_now().await;
        }
    }

    /// Input from a stream, until the client has closed it for good; a client that only has nothing more to type still wants output.
    async fn listen(&self, handle: &Handle, stream: &AsyncFd<UnixStream>, input: bool) {
        let mut buffer = vec![0; CHUNK];
        while let Ok(count @ 1..) = receive(stream, &mut buffer).await {
            if input {
                // Shorter than what would be refused.
                let _ = self.write(&buffer[..count]).await;
            }
            yield_now().await;
        }
        closed(handle, stream).await;
    }
}

/// What goes through a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ways {
    /// What the guest prints arrives.
    pub output: bool,
    /// What is written is typed; else it is discarded.
    pub input: bool,
}

/// Counts a stream as open.
struct Open(Rc<Port>);

impl Open {
    fn new(port: Rc<Port>) -> Self {
        port.streams.set(port.streams.get() + 1);
        Self(port)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get() - 1);
    }
}

/// The connection of a port with its component. Dropping it breaks the connection, and keeps the port open.
pub struct Wire {
    port: Rc<Port>,
    socket: Rc<AsyncFd<UnixStream>>,
    tasks: RefCell<Option<[Task; 2]>>,
}

impl Wire {
    /// The guest has ended: takes what it wrote before, and closes the port.
    pub fn finish(&self) {
        self.end_run();
        self.port.close();
    }

    /// A run of the guest has ended, and another is to follow: takes what it wrote before. The port stays open.
    pub fn end_run(&self) {
        drop(self.tasks.take());
        let mut room = [const { MaybeUninit::uninit() }; CHUNK];
        for _ in 0..MAX_REST / CHUNK {
            if !matches!(self.port.take(self.socket.get_ref(), &mut room), Ok(1..)) {
                break;
            }
        }
    }
}

pub(crate) async fn receive(socket: &AsyncFd<UnixStream>, buffer: &mut [u8]) -> io::Result<usize> {
    let receive = |socket: &UnixStream| Ok(rustix::net::recv(socket, &mut *buffer, RecvFlags::DONTWAIT)?.1);
    socket.io(Direction::Read, receive).await
}

pub(crate) async fn send(socket: &AsyncFd<UnixStream>, bytes: &[u8]) -> io::Result<usize> {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    socket
        .io(Direction::Write, |socket| Ok(rustix::net::send(socket, bytes, flags)?))
        .await
}

/// Ends a stream both ways, whoever else has a descriptor of it: the peer reads an end of file, not that what it sent was never read.
pub(crate) fn hang_up(socket: &AsyncFd<UnixStream>) {
    // Fails only if the peer is gone already.
    let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
    let mut rest = [0; CHUNK];
    for _ in 0..MAX_REST / CHUNK {
        if !matches!(rustix::net::recv(socket, &mut rest, RecvFlags::DONTWAIT), Ok((_, 1..))) {
            return;
        }
    }
}

/// Waits until the other end is closed both ways; that it has ended one way is known already.
async fn closed(handle: &Handle, socket: &AsyncFd<UnixStream>) {
    // On a registration of its own, whose readiness to write means nothing to whoever writes.
    let Ok(watched) = socket.get_ref().try_clone().and_then(|copy| handle.register(copy)) else {
        return;
    };
    // Sending nothing fails once there is nobody to receive it (unix(7): EPIPE).
    while rustix::net::send(&watched, &[], SendFlags::DONTWAIT | SendFlags::NOSIGNAL).is_ok() {
        watched.exhausted(Direction::Write);
        watched.writable().await;
    }
}

/// Lets the other tasks of the loop go on: a guest that never stops printing must not have it for itself.
pub(crate) async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return std::task::Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        std::task::Poll::Pending
    })
    .await;
}

#[cfg(test)]
mod tests;

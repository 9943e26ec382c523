//! The owner's side of the socket device: listens on ports of the host and connects to ports of the guest, from any thread, without waiting.
//!
//! ```text
//!   connect(port, reply) --.                                              .--> reply(Ok(socket) | Err)
//!                          +--> mailbox --eventfd--> the device's thread --+
//!   Incoming::accept ------'                                              '--> sink(Incoming), for each request of the guest
//!   listen(port, sink) ----> table of listeners <--- looked up by the device's thread
//! ```
//!
//! Sockets are made here, not on the device's thread; each that is handed out is one end of a pair whose other end the device has, so that it
//! ends with the connection.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use vmm_sys_util::eventfd::EventFd;

use crate::interrupt::lock;

/// Ports on which the host listens at a time, at most.
pub const MAX_LISTENERS: usize = 64;
/// Connects that may wait for the device's thread to see them.
const MAX_UNSEEN: usize = 1024;
/// Listens on every port that has no listener of its own (VMADDR_PORT_ANY, which is no port).
pub const ANY_PORT: u32 = u32::MAX;

/// Why the host cannot listen on a port.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// Somebody listens there.
    #[error("somebody listens on port {0} of the host already")]
    AlreadyBound(u32),
    /// There are too many listeners.
    #[error("there are {MAX_LISTENERS} listeners; no more are allowed")]
    NoResources,
    /// The device is gone.
    #[error("the socket device is gone")]
    Gone,
}

/// Why there is no connection to a port of the guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Nobody listens there, or the guest cannot have another connection.
    #[error("the guest refused a connection to its port {0}")]
    Refused(u32),
    /// There are too many connections, or the host gives no socket.
    #[error("no connection to port {port} of the guest: {reason}")]
    NoResources {
        /// The port of the guest.
        port: u32,
        /// What is lacking.
        reason: String,
    },
    /// The guest did not answer in time.
    #[error("the guest did not answer a connection to its port {0} in time")]
    TimedOut(u32),
    /// The guest has no driver for the device, or its driver went away meanwhile.
    #[error("no connection to port {0} of the guest: the guest has no driver for its socket device")]
    NotReady(u32),
    /// The device is gone.
    #[error("no connection to port {0} of the guest: the socket device is gone")]
    Gone(u32),
}

/// Why a request of the guest cannot be granted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AcceptError {
    /// The guest gave up, was answered too late, or ended.
    #[error("the guest does not wait for the connection any more")]
    Gone,
    /// The host gives no socket; the guest is refused.
    #[error("no socket for the connection: {0}")]
    NoResources(#[from] io::Error),
}

/// Takes the requests of the guest for a port: is called on the device's thread, and must not block.
pub type Sink = dyn Fn(Incoming) + Send + Sync;

/// Somebody who listens.
pub(super) struct Listening {
    id: u64,
    backlog: u32,
    /// Requests that were handed out and not answered; also those that the guest has given up, since somebody still holds them.
    waiting: AtomicU32,
    sink: Box<Sink>,
}

/// A request of the guest that waits; ended by dropping it.
pub(super) struct Offer(Arc<AtomicBool>);

impl Drop for Offer {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

type Answer = dyn FnOnce(Result<OwnedFd, ConnectError>) + Send;

/// Is called exactly once.
pub(super) struct Reply {
    port: u32,
    call: Option<Box<Answer>>,
}

impl Reply {
    pub(super) fn send(mut self, result: Result<OwnedFd, ConnectError>) {
        if let Some(call) = self.call.take() {
            call(result);
        }
    }

    pub(super) fn port(&self) -> u32 {
        self.port
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(call) = self.call.take() {
            call(Err(ConnectError::Gone(self.port)));
        }
    }
}

/// The ends of a connection's socket, ours first.
pub(super) struct Pair {
    pub(super) ours: OwnedFd,
    pub(super) theirs: OwnedFd,
}

impl Pair {
    fn new() -> io::Result<Self> {
        let pair = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let (ours, theirs) = pair?;
        Ok(Self { ours, theirs })
    }
}

/// What the device's thread is to do.
pub(super) enum Message {
    Connect { pair: Pair, reply: Reply },
    Accept { id: u64, ours: OwnedFd },
    Refuse { id: u64 },
    TransportReset,
}

#[derive(Default)]
struct State {
    listeners: HashMap<u32, Arc<Listening>>,
    last_listener: u64,
    mail: VecDeque<Message>,
    closed: bool,
}

/// What the handle shares with the device.
pub(super) struct Shared {
    state: Mutex<State>,
    bell: EventFd,
    cid: u64,
}

impl Shared {
    pub(super) fn new(cid: u64, bell: EventFd) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            bell,
            cid,
        })
    }

    pub(super) fn bell(&self) -> &EventFd {
        &self.bell
    }

    /// Gives the message back if the device is gone.
    fn post(&self, message: Message) -> Result<(), Message> {
        let mut state = lock(&self.state);
        if state.closed {
            return Err(message);
        }
        let first = state.mail.is_empty();
        state.mail.push_back(message);
        drop(state);
        if first {
            // Fails only when the counter is full, and then the device has been told.
            let _ = self.bell.write(1);
        }
        Ok(())
    }

    /// All that was posted since the last call.
    pub(super) fn take(&self) -> VecDeque<Message> {
        // A counter that is 0 says the same as the mailbox will.
        let _ = self.bell.read();
        std::mem::take(&mut lock(&self.state).mail)
    }

    /// The device is gone: nothing is taken any more.
    pub(super) fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        let rest = (std::mem::take(&mut state.mail), std::mem::take(&mut state.listeners));
        drop(state);
        // Replies are called, and sinks dropped, outside of the lock.
        drop(rest);
    }

    /// Who takes a request for `port`, if anybody does and has not too many to answer already.
    pub(super) fn listener(&self, port: u32) -> Option<Arc<Listening>> {
        let state = lock(&self.state);
        let listening = state.listeners.get(&port).or_else(|| state.listeners.get(&ANY_PORT))?;
        (listening.waiting.load(Ordering::Relaxed) < listening.backlog).then(|| listening.clone())
    }
}

impl Listening {
    /// Gives the guest's request to the listener. What is returned ends it.
    pub(super) fn offer(
        self: Arc<Self>,
        shared: &Arc<Shared>,
        id: u64,
        port: u32,
        peer_port: u32,
    ) -> (Offer, Incoming) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let open = Arc::new(AtomicBool::new(true));
        let incoming = Incoming {
            peer_cid: shared.cid,
            peer_port,
            port,
            request: Some(Request {
                id,
                shared: shared.clone(),
                open: open.clone(),
                listening: self,
            }),
        };
        (Offer(open), incoming)
    }

    pub(super) fn call(&self, incoming: Incoming) {
        (self.sink)(incoming);
    }
}

struct Request {
    id: u64,
    shared: Arc<Shared>,
    open: Arc<AtomicBool>,
    listening: Arc<Listening>,
}

impl Request {
    fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// Answers it.
    fn answer(&self, message: Message) -> Result<(), Message> {
        self.listening.waiting.fetch_sub(1, Ordering::Relaxed);
        self.shared.post(message)
    }
}

/// A connection that the guest asks for. Dropping it refuses.
pub struct Incoming {
    /// Context id of the guest.
    pub peer_cid: u64,
    /// The guest's port.
    pub peer_port: u32,
    /// The port of the host that the guest wants.
    pub port: u32,
    request: Option<Request>,
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming")
            .field("peer_cid", &self.peer_cid)
            .field("peer_port", &self.peer_port)
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}

impl Incoming {
    /// Grants it: one end of a Unix stream socket, whose other end is the connection. The guest hears of it soon; should it have given up
    /// meanwhile, the socket reads as ended.
    ///
    /// # Errors
    ///
    /// The guest does not wait any more, or the host gives no socket.
    pub fn accept(mut self) -> Result<OwnedFd, AcceptError> {
        if !self.is_wanted() {
            return Err(AcceptError::Gone);
        }
        let Pair { ours, theirs } = Pair::new()?;
        let Some(request) = self.request.take() else {
            return Err(AcceptError::Gone);
        };
        match request.answer(Message::Accept { id: request.id, ours }) {
            Ok(()) => Ok(theirs),
            Err(_) => Err(AcceptError::Gone),
        }
    }

    /// Whether the guest still waits.
    pub fn is_wanted(&self) -> bool {
        self.request.as_ref().is_some_and(Request::is_open)
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some(request) = self.request.take() {
            // A device that is gone needs no refusal, and one that has ended the request knows of none.
            drop(request.answer(Message::Refuse { id: request.id }));
        }
    }
}

/// A port of the host that is offered to the guest. Dropping it gives the port up; connections that were asked for before go on.
pub struct Listener {
    port: u32,
    id: u64,
    shared: Arc<Shared>,
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener")
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}

impl Listener {
    /// The port; [`ANY_PORT`] for all that nobody else listens on.
    pub fn port(&self) -> u32 {
        self.port
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        if state
            .listeners
            .get(&self.port)
            .is_some_and(|listening| listening.id == self.id)
        {
            let listening = state.listeners.remove(&self.port);
            drop(state);
            // The sink is dropped outside of the lock.
            drop(listening);
        }
    }
}

/// See the module's head.
#[derive(Clone)]
pub struct VsockHandle(pub(super) Arc<Shared>);

impl fmt::Debug for VsockHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VsockHandle")
            .field("cid", &self.0.cid)
            .finish_non_exhaustive()
    }
}

impl VsockHandle {
    /// The guest's context id.
    pub fn cid(&self) -> u64 {
        self.0.cid
    }

    /// Listens on `port` of the host: `sink` is called for each connection that the guest asks for, on the device's thread, and must not
    /// block. At most `backlog` of them wait for an answer at a time, each for the time that the device was made with; more are refused.
    /// [`ANY_PORT`] stands for every port that has no listener of its own.
    ///
    /// # Errors
    ///
    /// Somebody listens there, there are [`MAX_LISTENERS`], or the device is gone.
    pub fn listen(
        &self,
        port: u32,
        backlog: u32,
        sink: impl Fn(Incoming) + Send + Sync + 'static,
    ) -> Result<Listener, ListenError> {
        let mut state = lock(&self.0.state);
        if state.closed {
            return Err(ListenError::Gone);
        }
        if state.listeners.contains_key(&port) {
            return Err(ListenError::AlreadyBound(port));
        }
        if state.listeners.len() >= MAX_LISTENERS {
            return Err(ListenError::NoResources);
        }
        state.last_listener += 1;
        let id = state.last_listener;
        let listening = Listening {
            id,
            backlog,
            waiting: AtomicU32::new(0),
            sink: Box::new(sink),
        };
        state.listeners.insert(port, Arc::new(listening));
        Ok(Listener {
            port,
            id,
            shared: self.0.clone(),
        })
    }

    /// Connects to `port` of the guest. `reply` is called exactly once, on the device's thread or, if it can be told at once, on this one; it
    /// must not block. It gets one end of a Unix stream socket, whose other end is the connection.
    pub fn connect(&self, port: u32, reply: impl FnOnce(Result<OwnedFd, ConnectError>) + Send + 'static) {
        let reply = Reply {
            port,
            call: Some(Box::new(reply)),
        };
        let no_resources = |reason: String| Err(ConnectError::NoResources { port, reason });
        if lock(&self.0.state).mail.len() >= MAX_UNSEEN {
            return reply.send(no_resources("too many wait already".into()));
        }
        match Pair::new() {
            // Given back, it is dropped, and the reply says that the device is gone.
            Ok(pair) => drop(self.0.post(Message::Connect { pair, reply })),
            Err(error) => reply.send(no_resources(error.to_string())),
        }
    }

    /// Ends all connections and tells the guest that they are gone, without a word to each (virtio 5.10.6.7): for a guest that goes on
    /// elsewhere than where its connections were.
    pub fn transport_reset(&self) {
        // A device that is gone has no connections.
        drop(self.0.post(Message::TransportReset));
    }
}

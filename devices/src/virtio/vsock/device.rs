//! The device itself: takes the guest's packets, gives it those of the host, and keeps sockets, deadlines and rings together.
//!
//! ```text
//!   transmit queue --pop--> packet --> Connection::receive --> Stream::write --> host's socket
//!        ^  stalled while too many resets wait                     |
//!        |                                                         v  turn
//!   receive queue <--push-- fill <-- resets, then connections in turn: Connection::due --> Stream::read
//!        ^                   ^
//!        '-- spare chains    '-- mailbox (connect, accept, refuse), sockets' events, deadlines
//! ```
//!
//! Each call does a bounded share of work and rings its own doorbell for the rest. Buffers that were taken and not needed stay with the
//! device for the next packet.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::connection::{Connection, Ended, State};
use super::handle::{ConnectError, Message, Shared, VsockHandle};
use super::packet::{FIRST_GUEST_CID, HOST_CID, Header, LAST_GUEST_CID, Op, STREAM};
use super::stream::{Stream, WATCHED};
use super::table::{Ports, Table, Waiting};
use crate::alarm::Alarm;
use crate::dispatch::DeviceError;
use crate::virtio::chain::Chain;
use crate::virtio::device::{ConfigLayout, Context, DeviceKind, Fault, VirtioDevice};
use crate::virtio::violation::Violation;

/// Queue in which the guest gets packets.
pub const RECEIVE: u16 = 0;
/// Queue in which it sends them.
pub const TRANSMIT: u16 = 1;
/// Queue in which it gets events.
pub const EVENTS: u16 = 2;

/// VIRTIO_VSOCK_F_STREAM: stream sockets.
const F_STREAM: u64 = 1 << 0;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: u32 = 0;

const QUEUE_SIZES: [u16; 3] = [256, 256, 8];
/// Room for the guests' bytes that is shared out among the first connections.
const SHARED_ROOM: u64 = 16 << 20;

const BELL: u32 = 0;
const TIMER: u32 = 1;
/// Tokens of the connections' sockets begin here.
const FIRST_STREAM: u32 = 1 << SLOT_BITS;
/// Connections that may be configured at most.
pub const MAX_CONNECTIONS: u32 = 1 << SLOT_BITS;
const SLOT_BITS: u32 = 16;

/// Token of the socket of the connection that has this [`Entry::id`](super::table::Entry::id): its slot, and some bits of what tells it from
/// those that had the slot before, of which an event may still be under way.
pub(super) fn token(id: u64) -> u32 {
    let (number, slot) = ((id >> 32) as u32, id as u32 % MAX_CONNECTIONS);
    FIRST_STREAM + ((number % (1 << 14)) << SLOT_BITS) + slot
}

/// How a socket device is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VsockConfig {
    /// The guest's context id: 3 to 2^32 - 2.
    pub cid: u64,
    /// Connections at a time, those included that were asked for and those that end: 1 to 65536.
    pub max_connections: u32,
    /// How long the guest may take to answer a request of the host.
    pub connect_timeout: Duration,
    /// How long a listener may take to answer a request of the guest.
    pub accept_timeout: Duration,
    /// How long the guest may take to confirm that a connection is closed.
    pub close_timeout: Duration,
}

impl VsockConfig {
    /// The defaults: 1024 connections; 2 s for the guest to answer (Linux's own VSOCK_DEFAULT_CONNECT_TIMEOUT), 10 s for a listener, and 8 s for
    /// the end (Linux's VSOCK_CLOSE_TIMEOUT).
    pub fn new(cid: u64) -> Self {
        Self {
            cid,
            max_connections: 1024,
            connect_timeout: Duration::from_secs(2),
            accept_timeout: Duration::from_secs(10),
            close_timeout: Duration::from_secs(8),
        }
    }
}

/// Why there is no socket device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VsockError {
    /// The context id is reserved.
    #[error("vsock: a guest cannot have the context id {0}; it has to be from {FIRST_GUEST_CID} to {LAST_GUEST_CID}")]
    Cid(u64),
    /// The number of connections is out of range.
    #[error("vsock: {0} connections; there have to be 1 to {MAX_CONNECTIONS}")]
    Connections(u32),
    /// The host gives no eventfd or timer.
    #[error("vsock: no resources: {0}")]
    Host(#[from] io::Error),
}

/// A socket device. See the module's head.
pub struct Vsock {
    pub(super) config: VsockConfig,
    pub(super) shared: Arc<Shared>,
    pub(super) table: Table,
    /// Answers to packets that belong to no connection, and ends of connections that are forgotten already.
    pub(super) resets: VecDeque<Header>,
    /// Taken from the receive queue, and not needed yet.
    pub(super) spare: VecDeque<Chain>,
    /// Packets of the guest are left where they are until there are fewer resets.
    pub(super) stalled: bool,
    event_due: bool,
    timer: Alarm,
}

impl Vsock {
    /// A device, and the handle by which its owner connects and listens.
    ///
    /// # Errors
    ///
    /// [`VsockError`].
    pub fn new(config: VsockConfig) -> Result<(Self, VsockHandle), VsockError> {
        if !(FIRST_GUEST_CID..=LAST_GUEST_CID).contains(&config.cid) {
            return Err(VsockError::Cid(config.cid));
        }
        if !(1..=MAX_CONNECTIONS).contains(&config.max_connections) {
            return Err(VsockError::Connections(config.max_connections));
        }
        let timer = Alarm::new()?;
        let shared = Shared::new(config.cid, EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let device = Self {
            config,
            shared: shared.clone(),
            table: Table::new(config.max_connections, SHARED_ROOM),
            resets: VecDeque::new(),
            spare: VecDeque::new(),
            stalled: false,
            event_due: false,
            timer,
        };
        Ok((device, VsockHandle(shared)))
    }

    pub(super) fn header(&self, ports: Ports, op: Op) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.config.cid,
            src_port: ports.host,
            dst_port: ports.guest,
            kind: STREAM,
            op: op as u16,
            ..Header::default()
        }
    }

    /// The guest granted the host's request.
    pub(super) fn established(&mut self, slot: u32, context: &mut Context<'_>) {
        self.deadline(slot, None, context);
        let Some(entry) = self.table.get(slot) else { return };
        if let Waiting::Host { pair, reply } = std::mem::replace(&mut entry.waiting, Waiting::None) {
            match self.open(slot, pair.ours, context) {
                Ok(()) => reply.send(Ok(pair.theirs)),
                Err(error) => {
                    let port = reply.port();
                    let reason = error.to_string();
                    reply.send(Err(ConnectError::NoResources { port, reason }));
                }
            }
        }
    }

    /// Gives the connection its socket; it is reset if that cannot be watched.
    fn open(&mut self, slot: u32, socket: OwnedFd, context: &mut Context<'_>) -> Result<(), DeviceError> {
        let stream = Stream::new(socket);
        let Some(id) = self.table.get(slot).map(|entry| entry.id()) else {
            return Ok(());
        };
        let watched = context.watch(&stream, token(id), WATCHED);
        match watched {
            Ok(()) => {
                if let Some(entry) = self.table.get(slot) {
                    entry.stream = Some(stream);
                }
            }
            Err(_) => self.reset_connection(slot, ConnectError::Refused, context),
        }
        watched
    }

    /// Tells the connection what became of its socket.
    pub(super) fn settle(&mut self, slot: u32) {
        let Some(entry) = self.table.get(slot) else { return };
        let Some(stream) = &mut entry.stream else { return };
        if stream.broken() {
            entry.connection.host_ends(Ended {
                receiving: true,
                sending: false,
            });
        }
        // Nobody reads what the host sends any more, and so nobody would find its end.
        if stream.hung_up() && entry.connection.guest_ended().receiving {
            entry.connection.host_ends(Ended::BOTH);
        }
    }

    /// The guest knows nothing of the connection any more, or will not once it has its reset. What it sent before still goes to the host.
    pub(super) fn gone(&mut self, slot: u32, why: fn(u32) -> ConnectError, context: &mut Context<'_>) {
        self.table.detach(slot);
        let Some(entry) = self.table.get(slot) else { return };
        if let Waiting::Host { reply, .. } = std::mem::replace(&mut entry.waiting, Waiting::None) {
            let port = reply.port();
            reply.send(Err(why(port)));
        }
        if let Some(stream) = &mut entry.stream {
            stream.end();
            stream.refuse_input();
            if !stream.drained() {
                return;
            }
        }
        self.forget(slot, context);
    }

    /// Forgets the connection, and closes its socket.
    fn forget(&mut self, slot: u32, context: &mut Context<'_>) {
        if let Some(stream) = self.table.remove(slot).and_then(|entry| entry.stream) {
            // It was watched; an epoll forgets what is closed, in any case.
            let _ = context.unwatch(&stream);
        }
    }

    /// Ends the connection by a reset of ours.
    pub(super) fn reset_connection(&mut self, slot: u32, why: fn(u32) -> ConnectError, context: &mut Context<'_>) {
        if let Some(entry) = self.table.get(slot)
            && entry.connection.known_to_guest()
            && let Some(ports) = entry.ports()
        {
            self.resets.push_back(self.header(ports, Op::Reset));
        }
        self.gone(slot, why, context);
    }

    /// Sets the connection's deadline, `within` from now on.
    pub(super) fn deadline(&mut self, slot: u32, within: Option<Duration>, context: &Context<'_>) {
        let deadline = within.and_then(|within| Instant::now().checked_add(within));
        if self.table.set_deadline(slot, deadline) {
            self.arm(context);
        }
    }

    /// Sets the timer for the first deadline.
    fn arm(&mut self, context: &Context<'_>) {
        let Some(first) = self.table.first_deadline() else {
            return;
        };
        if let Err(error) = self.timer.set(Some(first)) {
            tracing::warn!(device = context.name(), "the timer cannot be set: {error}");
        }
    }

    fn expire(&mut self, context: &mut Context<'_>) {
        // Only to clear it; the deadlines say what is due.
        self.timer.rang();
        let now = Instant::now();
        while let Some(slot) = self.table.expired(now) {
            self.reset_connection(slot, ConnectError::TimedOut, context);
        }
        self.arm(context);
    }

    fn mail(&mut self, context: &mut Context<'_>) {
        for message in self.shared.take() {
            match message {
                Message::Connect { pair, reply } => {
                    let port = reply.port();
                    if !context.active() {
                        reply.send(Err(ConnectError::NotReady(port)));
                        continue;
                    }
                    let ports = Ports {
                        host: self.table.own_port(port),
                        guest: port,
                    };
                    let waiting = Waiting::Host { pair, reply };
                    match self.table.insert(ports, waiting, Connection::request) {
                        Ok(slot) => {
                            self.deadline(slot, Some(self.config.connect_timeout), context);
                            self.table.wake(slot);
                        }
                        Err(Waiting::Host { reply, .. }) => {
                            let reason =
                                format!("the device has {} connections; no more are allowed", self.table.len());
                            reply.send(Err(ConnectError::NoResources { port, reason }));
                        }
                        Err(_) => {}
                    }
                }
                Message::Accept { id, ours } => {
                    let Some(slot) = self.table.slot_of(id) else { continue };
                    let Some(entry) = self.table.get(slot) else { continue };
                    if !entry.connection.accept() {
                        continue;
                    }
                    entry.waiting = Waiting::None;
                    self.deadline(slot, None, context);
                    if self.open(slot, ours, context).is_ok() {
                        self.table.wake(slot);
                    }
                }
                Message::Refuse { id } => {
                    if let Some(slot) = self.table.slot_of(id)
                        && let Some(entry) = self.table.get(slot)
                        && entry.connection.state() == State::Offered
                    {
                        self.reset_connection(slot, ConnectError::Refused, context);
                    }
                }
                Message::TransportReset => {
                    self.end_all(context);
                    self.event_due = true;
                }
            }
        }
    }

    /// All connections end, without a word to the guest.
    fn end_all(&mut self, context: &mut Context<'_>) {
        for slot in self.table.slots() {
            self.gone(slot, ConnectError::NotReady, context);
        }
        self.resets.clear();
    }

    /// An event of the socket that is watched with `watched`.
    fn stream_event(&mut self, watched: u32, events: EventSet, context: &mut Context<'_>) {
        let slot = watched % MAX_CONNECTIONS;
        let Some(entry) = self.table.get(slot) else { return };
        if token(entry.id()) != watched {
            return;
        }
        let Some(stream) = &mut entry.stream else { return };
        stream.event(events);
        let gone = stream.flush();
        entry.connection.forwarded(gone as u32);
        if entry.ports().is_some() {
            self.settle(slot);
            self.table.wake(slot);
        } else if entry.stream.as_ref().is_some_and(Stream::drained) {
            self.forget(slot, context);
        }
    }

    /// Tells the guest that its connections are gone, if it has a buffer for that.
    fn event(&mut self, context: &mut Context<'_>) -> Result<(), Violation> {
        if !self.event_due {
            return Ok(());
        }
        let memory = context.memory;
        let Some(ring) = context.queue(EVENTS) else {
            return Ok(());
        };
        let Some(chain) = ring.pop()? else {
            // The doorbell tells of the next.
            return Ok(());
        };
        let event = TRANSPORT_RESET.to_le_bytes();
        if chain.writer(memory).write(&event).is_err() {
            return Err(Violation::Length {
                queue: EVENTS,
                what: "a buffer for events",
                got: chain.writable_bytes().into(),
                expected: "at least 4",
            });
        }
        ring.push(chain, event.len() as u32)?;
        self.event_due = false;
        context.interrupt(EVENTS)
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn config(&self) -> ConfigLayout {
        ConfigLayout {
            bytes: self.config.cid.to_le_bytes().to_vec(),
            writable: Vec::new(),
        }
    }

    fn start(&mut self, context: &mut Context<'_>) -> Result<(), DeviceError> {
        context.watch(self.shared.bell(), BELL, EventSet::IN)?;
        context.watch(&self.timer, TIMER, EventSet::IN)
    }

    fn notify(&mut self, queue: u16, context: &mut Context<'_>) -> Result<(), Fault> {
        match queue {
            TRANSMIT => self.transmit(context)?,
            EVENTS => self.event(context)?,
            // One buffer in hand, so that a ring that is wrong is found when it is made and not when it is needed.
            _ if self.spare.is_empty() => {
                let buffer = self.buffer(context)?;
                self.spare.extend(buffer);
            }
            _ => {}
        }
        Ok(self.fill(context)?)
    }

    fn ready(&mut self, token: u32, events: EventSet, context: &mut Context<'_>) -> Result<(), Fault> {
        match token {
            BELL => self.mail(context),
            TIMER => self.expire(context),
            _ => self.stream_event(token, events, context),
        }
        if context.active() {
            self.event(context)?;
            self.fill(context)?;
        }
        Ok(())
    }

    fn reset_queue(&mut self, queue: u16, _: &mut Context<'_>) {
        if queue == RECEIVE {
            self.spare.clear();
        }
    }

    fn reset(&mut self, context: &mut Context<'_>) {
        self.spare.clear();
        self.end_all(context);
        (self.event_due, self.stalled) = (false, false);
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.shared.close();
    }
}

//! The network that capnp-rpc runs on: one connection, its queue, its limits, its end.
//!
//! ```text
//!   Link --bytes--> Decoder --message--> inspect --> receive_incoming_message --> RpcSystem
//!                                          |  Ledger, FdGroup, Cancellations          |
//!   Link <--bytes-- Outbox <----------- OutgoingMessage::send <-----------------------+
//! ```
//!
//! Reading never waits for writing: two peers that each wait for the other's replies cannot lock up. What that costs is
//! bounded by the [`Limits`]; past one, reading fails with the reason, which makes the RPC system drop all that it holds
//! and break every capability that led here. The first reason stays.
//!
//! Writing waits while whole messages are there to be handled, so replies leave some together in one call; not all of a long
//! batch, or the peer would have nothing to do meanwhile, and neither would this side when the peer handles them.

pub(super) mod cancel;
mod inspect;
mod outbox;

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::poll_fn,
    ops::Range,
    os::fd::OwnedFd,
    rc::Rc,
    task::{Context, Poll, Waker, ready},
};

use capnp::{
    any_pointer,
    capability::Promise,
    message::{Builder, HeapAllocator, Reader, ReaderOptions},
    serialize::OwnedSegments,
};
use capnp_rpc::rpc_twoparty_capnp::Side;

use self::{
    cancel::{Cancellations, Token},
    inspect::Content,
    outbox::Outbox,
};
use super::{
    fd_stream::{FdGroup, FdTable, Link},
    frame::Decoder,
    ledger::{Finish, Ledger},
    limits::{EndReason, Limit, Limits},
};

type Message = Builder<HeapAllocator>;

/// What a capability of a received message counts for in [`Limits::held_bytes`], in bytes: about what the RPC system keeps for it.
const CAPABILITY_BYTES: usize = 1024;

/// Words that a message begins with, whatever the RPC system asks for: 8 KiB for each call, which would have to be zeroed. A
/// call with few parameters fits; others get more as they grow.
const FIRST_SEGMENT_WORDS: u32 = 64;

struct Inbound {
    decoder: Decoder,
    /// Descriptors that came with a range of the stream.
    groups: VecDeque<(Range<u64>, Rc<FdGroup>)>,
    cancellations: Cancellations<IncomingMessage>,
}

/// One connection, shared by the RPC system's side and ours.
pub(super) struct Wire {
    limits: Limits,
    side: Side,
    table: FdTable,
    link: RefCell<Option<Box<dyn Link>>>,
    inbound: RefCell<Inbound>,
    outbox: RefCell<Outbox>,
    ledger: RefCell<Ledger>,
    held_bytes: Rc<Cell<usize>>,
    /// Why it ended; the first reason stays.
    end: RefCell<Option<EndReason>>,
    /// The RPC system has let go of the connection: what is in the outbox is all that will be.
    shut: Cell<bool>,
    /// The peer takes no more bytes.
    deaf: Cell<bool>,
    /// Whole messages wait to be handled, which may add to the outbox.
    busy: Cell<bool>,
    receiver: RefCell<Option<Waker>>,
    writer: RefCell<Option<Waker>>,
    closer: RefCell<Option<Waker>>,
}

fn wake(slot: &RefCell<Option<Waker>>) {
    if let Some(waker) = slot.take() {
        waker.wake();
    }
}

impl Wire {
    pub(super) fn new(link: Box<dyn Link>, carries_fds: bool, side: Side, limits: Limits) -> Rc<Self> {
        Rc::new(Self {
            limits,
            side,
            table: FdTable::new(carries_fds),
            link: RefCell::new(Some(link)),
            inbound: RefCell::new(Inbound {
                decoder: Decoder::new(&limits),
                groups: VecDeque::new(),
                cancellations: Cancellations::default(),
            }),
            outbox: RefCell::default(),
            ledger: RefCell::new(Ledger::new(limits)),
            held_bytes: Rc::default(),
            end: RefCell::default(),
            shut: Cell::new(false),
            deaf: Cell::new(false),
            busy: Cell::new(false),
            receiver: RefCell::default(),
            writer: RefCell::default(),
            closer: RefCell::default(),
        })
    }

    pub(super) fn table(&self) -> &FdTable {
        &self.table
    }

    /// Ends the connection for `reason`, unless it has ended already.
    pub(super) fn end(&self, reason: EndReason) {
        self.end.borrow_mut().get_or_insert(reason);
        wake(&self.receiver);
        wake(&self.writer);
        wake(&self.closer);
    }

    pub(super) fn reason(&self) -> Option<EndReason> {
        self.end.borrow().clone()
    }

    /// Resolves once the connection has a reason to end.
    pub(super) async fn ending(&self) {
        poll_fn(|cx| {
            if self.end.borrow().is_some() {
                return Poll::Ready(());
            }
            *self.closer.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Gives up everything that the connection holds.
    pub(super) fn close(&self) {
        self.shut.set(true);
        self.deaf.set(true);
        self.outbox.borrow_mut().clear();
        let cancellations = std::mem::take(&mut self.inbound.borrow_mut().cancellations);
        drop(cancellations);
        self.inbound.borrow_mut().groups.clear();
        self.table.close();
        let link = self.link.take();
        drop(link);
    }

    fn exceeded(&self, which: Limit) -> EndReason {
        EndReason::LimitExceeded {
            which,
            allowed: which.allowed(&self.limits),
        }
    }

    fn error(&self) -> capnp::Error {
        let reason = self.end.borrow();
        capnp::Error::disconnected(reason.as_ref().unwrap_or(&EndReason::ClosedHere).to_string())
    }

    fn poll_receive(&self, cx: &mut Context<'_>) -> Poll<capnp::Result<IncomingMessage>> {
        let result = self.try_receive(cx);
        let Poll::Ready(result) = result else {
            *self.receiver.borrow_mut() = Some(cx.waker().clone());
            return Poll::Pending;
        };
        Poll::Ready(result.map_err(|reason| {
            self.end(reason);
            self.error()
        }))
    }

    fn try_receive(&self, cx: &mut Context<'_>) -> Poll<Result<IncomingMessage, EndReason>> {
        loop {
            if let Some(reason) = self.reason() {
                return Poll::Ready(Err(reason));
            }
            if let Some(finish) = self.inbound.borrow_mut().cancellations.next_due(cx) {
                return Poll::Ready(Ok(finish));
            }
            let frame = self.inbound.borrow_mut().decoder.next();
            if let Some(frame) = frame.map_err(|limit| self.exceeded(limit))? {
                if let Some(message) = self.inspect(frame.segments, frame.range)? {
                    // Stays until there is nothing more, where the writer is woken.
                    if self.inbound.borrow().decoder.has_message() {
                        self.busy.set(true);
                    }
                    return Poll::Ready(Ok(message));
                }
                continue;
            }
            if self.busy.replace(false) {
                wake(&self.writer);
            }
            ready!(self.poll_fill(cx))?;
        }
    }

    /// Reads some bytes.
    fn poll_fill(&self, cx: &mut Context<'_>) -> Poll<Result<(), EndReason>> {
        let mut link = self.link.borrow_mut();
        let Some(link) = link.as_mut() else {
            return Poll::Ready(Err(EndReason::ClosedHere));
        };
        let mut inbound = self.inbound.borrow_mut();
        let mut fds: Vec<OwnedFd> = Vec::new();
        let count = match link.poll_receive(cx, inbound.decoder.space(), &mut fds) {
            // The peer takes no replies any more, and has sent nothing further.
            Poll::Pending if self.deaf.get() => return Poll::Ready(Err(EndReason::ClosedByPeer)),
            Poll::Pending => {
                inbound.decoder.rest();
                return Poll::Pending;
            }
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error.into())),
            Poll::Ready(Ok(count)) => count,
        };
        if count == 0 {
            return Poll::Ready(Err(if inbound.decoder.is_between_messages() {
                EndReason::ClosedByPeer
            } else {
                EndReason::Protocol("the stream ended within a message".into())
            }));
        }
        let range = inbound.decoder.filled(count);
        if !fds.is_empty() {
            let group = Rc::new(self.table.receive(&mut fds));
            inbound.groups.push_back((range, group));
            if self.table.unclaimed() > self.limits.unclaimed_fds {
                return Poll::Ready(Err(self.exceeded(Limit::UnclaimedFds)));
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Counts a message, and gives back what the RPC system shall see of it now.
    fn inspect(&self, segments: OwnedSegments, range: Range<u64>) -> Result<Option<IncomingMessage>, EndReason> {
        let bytes = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        let mut inbound = self.inbound.borrow_mut();
        let mut ledger = self.ledger.borrow_mut();
        let mut message = IncomingMessage {
            reader: Reader::new(segments, reader_options(&self.limits)),
            _fds: take_groups(&mut inbound.groups, &range),
            held: Held::new(&self.held_bytes, bytes),
            token: None,
        };
        let which = inspect::inspect(&message.reader).map_err(|error| EndReason::Protocol(error.to_string()))?;
        if let Content::Call { capabilities, .. } | Content::Return { capabilities } = which {
            message.held.add(self.count_capabilities(capabilities)?);
        }
        if self.held_bytes.get() + ledger.retained_bytes() > self.limits.held_bytes {
            return Err(self.exceeded(Limit::HeldBytes));
        }
        match which {
            Content::Call { question, on, .. } => {
                ledger.call(question).map_err(|limit| self.exceeded(limit))?;
                message.token = Some(inbound.cancellations.call(question, on));
            }
            Content::Bootstrap { question } => ledger.call(question).map_err(|limit| self.exceeded(limit))?,
            Content::Finish { question, release } => {
                if ledger.finish(question, release) == Finish::GivesUp {
                    return Ok(inbound.cancellations.give_up(question, message));
                }
            }
            Content::Release { id, count } => ledger.release(id, count),
            Content::Abort(reason) => return Err(EndReason::Aborted(reason)),
            Content::Return { .. } | Content::Other => (),
        }
        Ok(Some(message))
    }

    /// What the capabilities of one message cost, in bytes.
    fn count_capabilities(&self, count: u32) -> Result<usize, EndReason> {
        if count as usize > self.limits.message_capabilities {
            return Err(self.exceeded(Limit::MessageCapabilities));
        }
        Ok(count as usize * CAPABILITY_BYTES)
    }

    /// Puts a message into the queue.
    fn enqueue(&self, message: &Message) {
        if self.shut.get() || self.deaf.get() || self.link.borrow().is_none() {
            return;
        }
        // After the end comes only the message that tells the peer why, where it is not plain to see.
        if let Some(reason) = self.end.borrow().as_ref()
            && !(reason.is_worth_telling() && inspect::is_abort(message))
        {
            return;
        }
        let fds = self.table.take_queued();
        let mut outbox = self.outbox.borrow_mut();
        let bytes = message.size_in_words() * 8;
        if outbox.unsent() + bytes > self.limits.unsent_bytes {
            outbox.clear();
            drop(outbox);
            self.deaf.set(true);
            self.end(self.exceeded(Limit::UnsentBytes));
            return;
        }
        let end = outbox.push(message, fds);
        let write = !self.busy.get() || outbox.is_worth_writing();
        drop(outbox);
        if let Err(limit) = self.account(message, end, bytes) {
            self.end(self.exceeded(limit));
        }
        // Else the writer is woken when there is nothing more to handle.
        if write {
            wake(&self.writer);
        }
    }

    /// Counts what a message of ours makes us hold.
    fn account(&self, message: &Message, end: u64, bytes: usize) -> Result<(), Limit> {
        let mut ledger = self.ledger.borrow_mut();
        let mut exports = Vec::new();
        let returned = inspect::exported(message, &mut exports);
        let mut result = Ok(());
        for &id in &exports {
            result = result.and(ledger.export(id));
        }
        if let Ok(Some((question, needs_finish))) = returned {
            ledger.returned(question, exports, needs_finish, end, bytes);
            if self.inbound.borrow_mut().cancellations.returned(question) {
                wake(&self.receiver);
            }
        }
        result
    }

    /// Writes until all is written and nothing more will come.
    pub(super) fn poll_drive(&self, cx: &mut Context<'_>) -> Poll<()> {
        *self.writer.borrow_mut() = Some(cx.waker().clone());
        loop {
            let mut outbox = self.outbox.borrow_mut();
            let mut link = self.link.borrow_mut();
            let (Some(link), false) = (link.as_mut(), self.deaf.get()) else {
                return if self.shut.get() {
                    Poll::Ready(())
                } else {
                    Poll::Pending
                };
            };
            let result = if outbox.unsent() == 0 {
                let flushed = link.poll_flush(cx);
                if let Poll::Ready(Ok(())) = flushed {
                    if self.shut.get() {
                        link.end();
                        return Poll::Ready(());
                    }
                    return Poll::Pending;
                }
                flushed
            } else if self.busy.get() && !self.shut.get() && !outbox.is_worth_writing() {
                return Poll::Pending;
            } else {
                outbox.poll_write(cx, link.as_mut())
            };
            match result {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(())) => self.ledger.borrow_mut().written(outbox.written()),
                Poll::Ready(Err(error)) => {
                    // The peer may have said why before it closed: what it sent is read first.
                    outbox.clear();
                    self.deaf.set(true);
                    drop(outbox);
                    match EndReason::from(error) {
                        EndReason::ClosedByPeer => wake(&self.receiver),
                        reason => self.end(reason),
                    }
                }
            }
        }
    }
}

fn reader_options(limits: &Limits) -> ReaderOptions {
    let mut options = ReaderOptions::new();
    options
        .traversal_limit_in_words(Some(limits.traversal_words))
        .nesting_limit(32);
    options
}

/// The descriptor groups that may belong to the message in `range`: those whose bytes overlap it.
fn take_groups(groups: &mut VecDeque<(Range<u64>, Rc<FdGroup>)>, range: &Range<u64>) -> Vec<Rc<FdGroup>> {
    let mut taken = Vec::new();
    while let Some((bytes, group)) = groups.front() {
        if bytes.start >= range.end {
            break;
        }
        taken.push(group.clone());
        if bytes.end > range.end {
            break;
        }
        groups.pop_front();
    }
    taken
}

/// Counts bytes while it lives.
struct Held {
    total: Rc<Cell<usize>>,
    bytes: usize,
}

impl Held {
    fn new(total: &Rc<Cell<usize>>, bytes: usize) -> Self {
        total.set(total.get() + bytes);
        Self {
            total: total.clone(),
            bytes,
        }
    }
}

impl Held {
    fn add(&mut self, bytes: usize) {
        self.total.set(self.total.get() + bytes);
        self.bytes += bytes;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.total.set(self.total.get() - self.bytes);
    }
}

/// A message in the hands of the RPC system. Dropped, it closes the descriptors that came with it and nobody took.
struct IncomingMessage {
    reader: Reader<OwnedSegments>,
    _fds: Vec<Rc<FdGroup>>,
    held: Held,
    token: Option<Rc<Token>>,
}

impl capnp_rpc::IncomingMessage for IncomingMessage {
    fn get_body(&self) -> capnp::Result<any_pointer::Reader<'_>> {
        if let Some(token) = &self.token {
            Token::touch(token);
        }
        self.reader.get_root()
    }
}

struct OutgoingMessage {
    message: Message,
    wire: Rc<Wire>,
}

impl capnp_rpc::OutgoingMessage for OutgoingMessage {
    fn get_body(&mut self) -> capnp::Result<any_pointer::Builder<'_>> {
        self.message.get_root()
    }

    fn get_body_as_reader(&self) -> capnp::Result<any_pointer::Reader<'_>> {
        self.message.get_root_as_reader()
    }

    fn send(self: Box<Self>) -> (Promise<(), capnp::Error>, Rc<Message>) {
        let Self { message, wire } = *self;
        wire.enqueue(&message);
        (Promise::ok(()), Rc::new(message))
    }

    fn take(self: Box<Self>) -> Message {
        self.message
    }

    fn size_in_words(&self) -> usize {
        self.message.size_in_words()
    }
}

struct Connection(Rc<Wire>);

impl capnp_rpc::Connection<Side> for Connection {
    fn get_peer_vat_id(&self) -> Side {
        match self.0.side {
            Side::Client => Side::Server,
            Side::Server => Side::Client,
        }
    }

    fn new_outgoing_message(&mut self, first_segment_words: u32) -> Box<dyn capnp_rpc::OutgoingMessage> {
        let allocator = HeapAllocator::new().first_segment_words(first_segment_words.min(FIRST_SEGMENT_WORDS));
        Box::new(OutgoingMessage {
            message: Builder::new(allocator),
            wire: self.0.clone(),
        })
    }

    fn receive_incoming_message(&mut self) -> Promise<Option<Box<dyn capnp_rpc::IncomingMessage>>, capnp::Error> {
        let wire = self.0.clone();
        Promise::from_future(async move {
            let message = poll_fn(|cx| wire.poll_receive(cx)).await?;
            Ok(Some(Box::new(message) as Box<dyn capnp_rpc::IncomingMessage>))
        })
    }

    fn shutdown(&mut self, result: capnp::Result<()>) -> Promise<(), capnp::Error> {
        self.0.end(match result {
            Ok(()) => EndReason::ClosedHere,
            // Ours are recorded before they get here, so this is what the RPC system found wrong.
            Err(error) => EndReason::Protocol(error.extra),
        });
        self.0.shut.set(true);
        Promise::ok(())
    }
}

/// The network of one connection.
pub(super) struct Network {
    wire: Rc<Wire>,
    accepted: bool,
}

impl Network {
    pub(super) fn new(wire: Rc<Wire>) -> Self {
        Self { wire, accepted: false }
    }
}

impl capnp_rpc::VatNetwork<Side> for Network {
    fn connect(&mut self, host: Side) -> Option<Box<dyn capnp_rpc::Connection<Side>>> {
        (host != self.wire.side).then(|| Box::new(Connection(self.wire.clone())) as _)
    }

    fn accept(&mut self) -> Promise<Box<dyn capnp_rpc::Connection<Side>>, capnp::Error> {
        if std::mem::replace(&mut self.accepted, true) {
            return Promise::from_future(std::future::pending());
        }
        Promise::ok(Box::new(Connection(self.wire.clone())))
    }

    fn drive_until_shutdown(&mut self) -> Promise<(), capnp::Error> {
        let wire = self.wire.clone();
        Promise::from_future(async move {
            poll_fn(|cx| wire.poll_drive(cx)).await;
            Ok(())
        })
    }
}

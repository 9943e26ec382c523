//! Tells the guest manager what happens, and the manager after it what the one before may not have heard.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use capnp::{any_pointer, capability::Request, message::TypedBuilder, traits::HasTypeId};
use sepal_schema::{
    guest_capnp::{event, event_sink},
    lifecycle_capnp::backends,
    report::now_ns,
    transport::{FdTable, Handle},
};

use super::journal::Journal;
use crate::lifecycle::Generation;

/// What the guest manager lends to a guest.
pub(super) struct Lent {
    /// Told what happens.
    pub(super) events: Option<event_sink::Client>,
    /// Asked for other processes behind vhost-user devices.
    pub(super) backends: Option<backends::Client>,
    /// The descriptors that travel with the messages.
    pub(super) fds: FdTable,
}

type Message = TypedBuilder<event::Owned>;

/// The number of `EventSink.event` (guest.capnp).
const EVENT: u16 = 0;

/// Tells what happens to one guest.
pub(super) struct Teller {
    generation: Generation,
    spawner: Handle,
    host: RefCell<Lent>,
    /// Of a guest that may outlive its manager.
    journal: Option<RefCell<Journal<Message>>>,
    /// Which manager is told, counted.
    listener: Cell<u64>,
}

impl Teller {
    /// Tells whoever is in `host`. What a `durable` guest tells is kept until it was heard.
    pub(super) fn new(generation: Generation, host: Lent, durable: bool, spawner: Handle) -> Rc<Self> {
        Rc::new(Self {
            generation,
            spawner,
            host: RefCell::new(host),
            journal: durable.then(RefCell::default),
            listener: Cell::new(0),
        })
    }

    /// Tells of an event. Its time and generation are filled in, and its number where it is kept: by that the next manager knows what the one before has heard.
    pub(super) fn tell(self: &Rc<Self>, fill: impl FnOnce(event::Builder<'_>)) {
        if self.journal.is_none() && self.host.borrow().events.is_none() {
            return;
        }
        let mut message = Message::new_default();
        let mut event = message.init_root();
        event.set_time_ns(now_ns());
        event.set_generation(self.generation);
        let number = self.journal.as_ref().map(|journal| journal.borrow().next());
        event.set_sequence(number.map_or(0, |number| number + 1));
        fill(event);
        self.send(&message, number);
        if let Some(journal) = &self.journal {
            journal.borrow_mut().push(message);
        }
    }

    /// Tells another manager from now on, first what may not have been heard. Returns how much of that was not kept.
    pub(super) fn attach(self: &Rc<Self>, host: Lent) -> u64 {
        self.host.replace(host);
        self.listener.set(self.listener.get() + 1);
        let Some(journal) = &self.journal else { return 0 };
        for (number, message) in journal.borrow().kept() {
            self.send(message, Some(number));
        }
        journal.borrow_mut().take_missed()
    }

    /// Who may be asked for another process behind a vhost-user device, and by which table its socket comes.
    pub(super) fn backends(&self) -> Option<(backends::Client, FdTable)> {
        let host = self.host.borrow();
        Some((host.backends.clone()?, host.fds.clone()))
    }

    fn send(self: &Rc<Self>, message: &Message, number: Option<u64>) {
        let Some(events) = self.host.borrow().events.clone() else {
            return;
        };
        // As `event_request`, but the answer of a streaming call would only say that more may be sent, not that this was heard.
        let mut request: Request<event_sink::event_params::Owned, any_pointer::Owned> =
            events.client.new_call(event_sink::Client::TYPE_ID, EVENT, None);
        let mut params = request.get();
        if let Err(error) = message.get_root_as_reader().and_then(|event| params.set_event(event)) {
            return tracing::error!("an event cannot be told: {error}");
        }
        let answer = request.send().promise;
        let (teller, listener) = (Rc::downgrade(self), self.listener.get());
        self.spawner.spawn(async move {
            // Events are few. A manager that cannot be reached any more is about to end this process, or to be followed by another.
            let heard = answer.await.is_ok();
            if let (true, Some(number), Some(teller)) = (heard, number, teller.upgrade())
                && teller.listener.get() == listener
                && let Some(journal) = &teller.journal
            {
                journal.borrow_mut().heard(number);
            }
        });
    }
}

//! The connections of a socket device: by number (slot), by their ports, in the order of their turns, and by deadline.
//!
//! A connection whose guest is done with it ([`Table::detach`]) has no ports any more, which may be used again, and stays only until the host
//! has taken what was sent before.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Instant;

use super::connection::Connection;
use super::credit::Windows;
use super::handle::{Offer, Pair, Reply};
use super::stream::Stream;

/// The ports of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// The first port of the host that is used for connections which it asks for. Linux has its own from 2^31 on, other monitors from here.
const FIRST_OWN_PORT: u32 = 1 << 30;
/// How many there are.
const OWN_PORTS: u32 = 1 << 30;

/// Who waits for a connection to come about.
pub(super) enum Waiting {
    /// Nobody any more.
    None,
    /// The host asked: its socket pair, and whom to tell.
    Host { pair: Pair, reply: Reply },
    /// The guest asked. Held until the offer is answered or void.
    Guest { _offer: Offer },
}

/// A connection with all that belongs to it.
pub(super) struct Entry {
    id: u64,
    ports: Option<Ports>,
    window: u32,
    queued: bool,
    deadline: Option<Instant>,
    pub(super) connection: Connection,
    pub(super) waiting: Waiting,
    /// There from the moment that both sides agreed.
    pub(super) stream: Option<Stream>,
}

impl Entry {
    /// Tells it from every other connection that was ever there.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// Its ports; `None` if the guest is done with it.
    pub(super) fn ports(&self) -> Option<Ports> {
        self.ports
    }

    /// Whether the host may have something to be read.
    pub(super) fn host_has(&self) -> bool {
        self.stream.as_ref().is_some_and(Stream::readable)
    }
}

/// See the module's head.
pub(super) struct Table {
    slots: Vec<Option<Entry>>,
    free: Vec<u32>,
    by_ports: HashMap<Ports, u32>,
    turns: VecDeque<u32>,
    deadlines: BTreeSet<(Instant, u32)>,
    windows: Windows,
    made: u32,
    next_port: u32,
}

impl Table {
    /// Room for so many connections, with so many bytes of room besides the least that each has.
    pub(super) fn new(most: u32, extra: u64) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            by_ports: HashMap::new(),
            turns: VecDeque::new(),
            deadlines: BTreeSet::new(),
            windows: Windows::new(most, extra),
            made: 0,
            next_port: 0,
        }
    }

    /// Adds what `make` makes for the room that it gets; `None` if there is no place, or the ports are in use.
    pub(super) fn insert(
        &mut self,
        ports: Ports,
        waiting: Waiting,
        make: impl FnOnce(u32) -> Connection,
    ) -> Result<u32, Waiting> {
        if self.by_ports.contains_key(&ports) {
            return Err(waiting);
        }
        let Some(window) = self.windows.take() else {
            return Err(waiting);
        };
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            // There are at most as many slots as connections are allowed, which is a u32.
            (self.slots.len() - 1) as u32
        });
        self.made = self.made.wrapping_add(1);
        self.by_ports.insert(ports, slot);
        self.slots[slot as usize] = Some(Entry {
            id: u64::from(self.made) << 32 | u64::from(slot),
            ports: Some(ports),
            window,
            queued: false,
            deadline: None,
            connection: make(window),
            waiting,
            stream: None,
        });
        Ok(slot)
    }

    /// A port of the host that no connection to the guest's port `guest` uses.
    pub(super) fn own_port(&mut self, guest: u32) -> u32 {
        // There are more ports than connections, so this ends.
        loop {
            let host = FIRST_OWN_PORT + self.next_port;
            self.next_port = (self.next_port + 1) % OWN_PORTS;
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    pub(super) fn get(&mut self, slot: u32) -> Option<&mut Entry> {
        self.slots.get_mut(slot as usize)?.as_mut()
    }

    /// The slot of the connection that had this [`Entry::id`], if it is still there.
    pub(super) fn slot_of(&mut self, id: u64) -> Option<u32> {
        let slot = id as u32;
        (self.get(slot)?.id == id).then_some(slot)
    }

    pub(super) fn find(&self, ports: Ports) -> Option<u32> {
        self.by_ports.get(&ports).copied()
    }

    /// Connections that there are.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Slots of all connections.
    pub(super) fn slots(&self) -> Vec<u32> {
        (0..)
            .zip(&self.slots)
            .filter_map(|(slot, entry)| entry.is_some().then_some(slot))
            .collect()
    }

    /// Gives the connection a turn, after the others, if a packet is due.
    pub(super) fn wake(&mut self, slot: u32) {
        let Some(Some(entry)) = self.slots.get_mut(slot as usize) else {
            return;
        };
        let due = entry.ports.is_some() && entry.connection.due(entry.host_has()).is_some();
        if due && !entry.queued {
            entry.queued = true;
            self.turns.push_back(slot);
        }
    }

    /// The connection whose turn it is.
    pub(super) fn next_turn(&mut self) -> Option<u32> {
        loop {
            let slot = self.turns.pop_front()?;
            if let Some(entry) = self.get(slot)
                && std::mem::take(&mut entry.queued)
            {
                return Some(slot);
            }
        }
    }

    pub(super) fn has_turns(&self) -> bool {
        !self.turns.is_empty()
    }

    /// Sets or takes away the deadline; true if it is now the first of all.
    pub(super) fn set_deadline(&mut self, slot: u32, deadline: Option<Instant>) -> bool {
        let Some(Some(entry)) = self.slots.get_mut(slot as usize) else {
            return false;
        };
        if let Some(old) = std::mem::replace(&mut entry.deadline, deadline) {
            self.deadlines.remove(&(old, slot));
        }
        let Some(deadline) = deadline else { return false };
        self.deadlines.insert((deadline, slot));
        self.first_deadline() == Some(deadline)
    }

    pub(super) fn first_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|&(deadline, _)| deadline)
    }

    /// A connection whose deadline is over; it has none any more.
    pub(super) fn expired(&mut self, now: Instant) -> Option<u32> {
        let &(deadline, slot) = self.deadlines.first()?;
        if deadline > now {
            return None;
        }
        self.deadlines.pop_first();
        if let Some(entry) = self.get(slot) {
            entry.deadline = None;
        }
        Some(slot)
    }

    /// The guest is done with the connection: its ports are free, and nothing is due any more.
    pub(super) fn detach(&mut self, slot: u32) {
        self.set_deadline(slot, None);
        if let Some(Some(entry)) = self.slots.get_mut(slot as usize)
            && let Some(ports) = entry.ports.take()
        {
            self.by_ports.remove(&ports);
        }
    }

    /// Forgets the connection.
    pub(super) fn remove(&mut self, slot: u32) -> Option<Entry> {
        self.detach(slot);
        let entry = self.slots.get_mut(slot as usize)?.take()?;
        if entry.queued {
            // So that each slot is among the turns once at most.
            self.turns.retain(|&other| other != slot);
        }
        self.windows.give_back(entry.window);
        self.free.push(slot);
        Some(entry)
    }
}

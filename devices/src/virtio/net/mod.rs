//! Network device (virtio 5.1), over a tap device or a stream socket.
//!
//! ```text
//!   driver                                   this device                               host
//!   receive queue  <--- receive::Receiver <--- rate limit <--------.
//!   transmit queue ---> transmit::transmit --> rate limit, flow --> backend::Backend: tap (zero copy, offloads) or stream socket
//!   control queue  ---> control::parse: pairs, MAC, offloads
//!                                            link, counters <-----> handle::NetHandle (owner)
//! ```
//!
//! - A turn moves at most 64 frames or 1 MiB; the driver is interrupted once a turn. The host's descriptors are watched edge-triggered, so nothing
//!   wakes the loop while the driver has no buffers, and a queue that had its turn rings itself.
//! - While the device rests or its link is down, what comes from the host is dropped.
//! - A host that takes nothing makes the driver wait for a second (`flow`), then its frames are dropped until the host takes some again.
//! - With fewer active pairs than the tap has queues, what comes at the others goes to the active ones.
//!
//! System calls: `readv`, `writev` and `ioctl(TUNSETOFFLOAD)` on a tap, `recvfrom` and `sendto` on a socket, `read` and `write` on eventfds,
//! `timerfd_settime` and `read` on timerfds; to make one also `ioctl(TUNGETIFF, TUNSETVNETHDRSZ, TUNSETOFFLOAD, FIONBIO)`, `getsockopt`,
//! `eventfd2`, `timerfd_create`.

use std::io;
use std::iter::StepBy;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use event_manager::EventSet;

use super::chain::Chain;
use super::device::{ConfigLayout, Context, DeviceKind, Fault, VirtioDevice};
use super::violation::Violation;
use crate::alarm::Alarm;
use crate::dispatch::{DeviceError, DeviceEvent};
use crate::rate::RateLimit;

mod backend;
mod config;
mod control;
mod features;
mod flow;
mod handle;
mod header;
mod limit;
mod receive;
#[cfg(test)]
mod tests;
mod transmit;

pub use backend::stream::StreamError;
pub use backend::tap::TapError;
pub use config::{NetBackend, NetConfig, NetError};
pub use control::is_unicast;
pub use handle::{NetBackendKind, NetCounters, NetHandle, NetInfo, NetStats};

use backend::stream::Stream;
use backend::tap::Tap;
use backend::{Backend, Received, Sent};
use control::Command;
use flow::Flow;
use handle::Shared;
use limit::Limit;
use receive::{Receiver, SPILL, Source, Trouble};
use transmit::Sink;

/// The most pairs of queues.
pub const MAX_QUEUE_PAIRS: usize = 8;
/// The smallest MTU, in bytes (virtio 5.1.4.1).
pub const MIN_MTU: u16 = 68;
/// The largest MTU, in bytes: what IPv4 over Ethernet can use, rounded to words.
pub const MAX_MTU: u16 = 65520;
/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;
/// Commands of one turn.
const TURN_COMMANDS: usize = 64;
/// Frames that are dropped in one turn while nobody wants them.
const TURN_DISCARDS: usize = 256;

/// VIRTIO_NET_S_LINK_UP.
const LINK_UP: u16 = 1;
/// Offset of the link's status in the configuration space, after the MAC address.
const STATUS_OFFSET: usize = 6;

// Tokens. Ports are numbered from 0.
const WAKE: u32 = 100;
const FLOW_TIMER: u32 = 101;
const RECEIVE_LIMIT: u32 = 102;
const SEND_LIMIT: u32 = 103;

/// One of the host's descriptors.
#[derive(Default)]
struct Port {
    /// There may be frames that were not read.
    readable: bool,
    /// Nothing more comes after them.
    hung_up: bool,
    /// What becomes of frames that the driver sends by it.
    flow: Flow,
}

/// A network device (see the module's head).
pub struct Net {
    backend: Box<dyn Backend>,
    ports: Vec<Port>,
    /// One a pair of queues.
    receivers: Vec<Receiver>,
    features: u64,
    mac: [u8; 6],
    mtu: u16,
    /// Pairs that the driver uses.
    active_pairs: usize,
    link_up: bool,
    receive_limit: Limit,
    send_limit: Limit,
    flow_timer: Alarm,
    spill: Vec<u8>,
    /// Room for the chains of a batch.
    batch: Vec<Chain>,
    shared: Arc<Shared>,
}

impl Net {
    /// A device as `config` says, and its owner's side.
    ///
    /// # Errors
    ///
    /// [`NetError`] says what is wrong with the configuration.
    pub fn new(config: NetConfig) -> Result<(Self, NetHandle), NetError> {
        if !is_unicast(config.mac) {
            return Err(NetError::Mac);
        }
        if !(MIN_MTU..=MAX_MTU).contains(&config.mtu) {
            return Err(NetError::Mtu(config.mtu));
        }
        let (backend, kind): (Box<dyn Backend>, _) = match config.backend {
            NetBackend::Tap(queues) if !(1..=MAX_QUEUE_PAIRS).contains(&queues.len()) => {
                return Err(NetError::Queues(queues.len()));
            }
            NetBackend::Tap(queues) => (Box::new(Tap::new(queues, config.offloads)?), NetBackendKind::Tap),
            #[cfg(any(test, feature = "testing"))]
            NetBackend::Packets(queues) => {
                let packets = backend::packets::Packets::new(queues);
                (Box::new(packets), NetBackendKind::Tap)
            }
            NetBackend::Stream(socket) => (Box::new(Stream::new(socket)?), NetBackendKind::Stream),
        };
        let pairs = backend.ports().len();
        let info = NetInfo {
            mac: config.mac,
            mtu: config.mtu,
            // At most `MAX_QUEUE_PAIRS`.
            queue_pairs: pairs as u16,
            link_up: config.link_up,
            backend: kind,
        };
        let shared = Arc::new(Shared::new(info).map_err(NetError::Resources)?);
        let handle = NetHandle {
            shared: Arc::clone(&shared),
        };
        let limit = |limit: &RateLimit| Limit::new(limit).map_err(NetError::Resources);
        let net = Self {
            features: features::ALWAYS | backend.features() | if pairs > 1 { features::MQ } else { 0 },
            backend,
            ports: (0..pairs).map(|_| Port::default()).collect(),
            receivers: (0..pairs).map(|_| Receiver::default()).collect(),
            mac: config.mac,
            mtu: config.mtu,
            active_pairs: 1,
            link_up: config.link_up,
            receive_limit: limit(&config.receive_limit)?,
            send_limit: limit(&config.send_limit)?,
            flow_timer: Alarm::new().map_err(NetError::Resources)?,
            spill: vec![0; SPILL],
            batch: Vec::new(),
            shared,
        };
        Ok((net, handle))
    }

    /// Index of the control queue: it follows the pairs that the driver knows of (virtio 5.1.2).
    fn control_queue(&self, context: &Context<'_>) -> u16 {
        let pairs = if context.accepted(features::MQ) {
            self.ports.len()
        } else {
            1
        };
        2 * pairs as u16
    }

    /// The ports whose frames go to the receive queue of pair `pair`.
    fn ports_of(&self, pair: usize) -> StepBy<Range<usize>> {
        (pair..self.ports.len()).step_by(self.active_pairs)
    }

    /// Moves what came from the host to the receive queue of pair `pair`, for one turn.
    fn receive(&mut self, pair: usize, context: &mut Context<'_>) -> Result<(), Fault> {
        if !self.link_up || !context.active() {
            return self.discard(context);
        }
        let index = 2 * pair as u16;
        for port in self.ports_of(pair) {
            if !self.ports[port].readable || self.receive_limit.waiting {
                continue;
            }
            let (memory, accepted) = (context.memory, context.features);
            let Some(queue) = context.queue(index) else {
                return Ok(());
            };
            let mut source = Source {
                backend: &mut *self.backend,
                port,
                accepted,
                mtu: self.mtu,
                limit: &mut self.receive_limit,
                spill: &mut self.spill,
                counters: &self.shared.received,
            };
            let end = self.receivers[pair].deliver(memory, queue, &mut source);
            let end = end.map_err(fault)?;
            context.interrupt(index)?;
            match end {
                receive::End::Drained => self.ports[port].readable = false,
                receive::End::Turn => context.ring(index),
                receive::End::NoRoom if self.ports[port].hung_up => {
                    return self.lost("its other end was closed".into(), context);
                }
                receive::End::NoRoom | receive::End::Limited => return Ok(()),
                receive::End::Lost(reason) => return self.lost(reason, context),
            }
        }
        Ok(())
    }

    /// Moves what the driver sends by pair `pair` to the host, for one turn.
    fn transmit(&mut self, pair: usize, context: &mut Context<'_>) -> Result<(), Fault> {
        let index = 2 * pair as u16 + 1;
        let (memory, accepted) = (context.memory, context.features);
        let Some(queue) = context.queue(index) else {
            return Ok(());
        };
        if self.send_limit.waiting && self.link_up {
            return Ok(());
        }
        let was = self.ports[pair].flow;
        let mut sink = Sink {
            backend: &mut *self.backend,
            port: pair,
            accepted,
            flow: &mut self.ports[pair].flow,
            link_up: self.link_up,
            limit: &mut self.send_limit,
            counters: &self.shared.sent,
            batch: &mut self.batch,
        };
        let end = transmit::transmit(memory, queue, &mut sink).map_err(fault)?;
        context.interrupt(index)?;
        match end {
            transmit::End::Drained | transmit::End::Limited => {}
            transmit::End::Turn => context.ring(index),
            transmit::End::Full => {
                if was == Flow::Open {
                    self.watch_port(pair, context).map_err(Fault::Host)?;
                    self.set_flow_timer().map_err(|error| Fault::Host(error.into()))?;
                }
            }
            transmit::End::Lost(reason) => return self.lost(reason, context),
        }
        Ok(())
    }

    /// Watches a port for what its flow waits for.
    fn watch_port(&self, port: usize, context: &mut Context<'_>) -> Result<(), DeviceError> {
        let mut events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        if self.ports[port].flow != Flow::Open {
            events |= EventSet::OUT;
        }
        context.rewatch(&self.backend.ports()[port], port as u32, events)
    }

    /// Sets the timer to the first of the flows' deadlines.
    fn set_flow_timer(&mut self) -> io::Result<()> {
        let Some(first) = self.ports.iter().filter_map(|port| port.flow.deadline()).min() else {
            return Ok(());
        };
        self.flow_timer.set(Some(first))
    }

    /// Brings out what is staged for a port that has room again; then the driver's next frames.
    fn flush(&mut self, port: usize, context: &mut Context<'_>) -> Result<(), Fault> {
        match self.backend.flush(port) {
            Sent::Full => Ok(()),
            Sent::Lost(reason) => self.lost(reason, context),
            Sent::Done | Sent::Refused(_) => {
                self.ports[port].flow.room();
                self.watch_port(port, context).map_err(Fault::Host)?;
                self.transmit(port, context)
            }
        }
    }

    /// Drops what comes from the host while nobody wants it.
    fn discard(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        let mut left = TURN_DISCARDS;
        for port in 0..self.ports.len() {
            while self.ports[port].readable {
                if left == 0 {
                    self.shared.wake();
                    return Ok(());
                }
                left -= 1;
                match self.backend.discard(port) {
                    Received::Frame { .. } => self.shared.received.dropped(),
                    Received::Bad => self.shared.received.error(),
                    Received::Nothing => self.ports[port].readable = false,
                    Received::Lost(reason) => return self.lost(reason, context),
                }
            }
        }
        Ok(())
    }

    /// The host's side is gone: the link is down for good.
    fn lost(&mut self, reason: String, context: &mut Context<'_>) -> Result<(), Fault> {
        if self.shared.is_lost() {
            return Ok(());
        }
        self.shared.set_lost();
        for (port, fd) in self.ports.iter_mut().zip(self.backend.ports()) {
            // What is left there is of no use to anybody; and a descriptor whose watch cannot be ended has none.
            let _ = context.unwatch(fd);
            *port = Port::default();
        }
        context.report(DeviceEvent::BackendLost {
            device: context.name().to_owned(),
            reason,
        });
        self.follow_link(context)
    }

    /// Does what a changed link asks for.
    fn follow_link(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        self.link_up = self.shared.link_up();
        context.update_config(STATUS_OFFSET, &self.status().to_le_bytes());
        if !self.link_up {
            self.receivers
                .iter_mut()
                .for_each(|receiver| receiver.drop_parked(&self.shared.received));
        }
        self.serve(context)
    }

    /// Looks after all queues.
    fn serve(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        for pair in 0..self.active_pairs {
            self.receive(pair, context)?;
            self.transmit(pair, context)?;
        }
        Ok(())
    }

    fn status(&self) -> u16 {
        if self.link_up { LINK_UP } else { 0 }
    }

    /// Carries out the commands of the control queue, for one turn.
    fn control(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        let index = self.control_queue(context);
        let accepted = context.features;
        for _ in 0..TURN_COMMANDS {
            let memory = context.memory;
            let Some(queue) = context.queue(index) else {
                return Ok(());
            };
            let Some(chain) = queue.pop()? else {
                if queue.wait_for_doorbell()? {
                    continue;
                }
                context.interrupt(index)?;
                return Ok(());
            };
            let (readable, writable) = (chain.readable_bytes(), chain.writable_bytes());
            if readable < 2 || writable < 1 {
                return Err(Fault::Violation(Violation::Length {
                    queue: index,
                    what: "a command, or room for its answer",
                    got: readable.min(writable).into(),
                    expected: "class and command of 1 byte each, and 1 byte for the answer",
                }));
            }
            let bytes = chain.reader(memory).read_to_end(control::MAX_COMMAND);
            // At most `MAX_QUEUE_PAIRS`.
            let pairs = self.ports.len() as u16;
            let done = match control::parse(&bytes, readable as usize, accepted, pairs) {
                Some(command) => self.obey(command, context)?,
                None => false,
            };
            let answer = if done { control::OK } else { control::ERROR };
            // There is room for it.
            let _ = chain.writer(memory).write(&[answer]);
            if let Some(queue) = context.queue(index) {
                queue.push(chain, 1)?;
            }
        }
        context.interrupt(index)?;
        context.ring(index);
        Ok(())
    }

    /// Carries out `command`; false if the host cannot.
    fn obey(&mut self, command: Command, context: &mut Context<'_>) -> Result<bool, Fault> {
        match command {
            Command::Filter => {}
            Command::SetMac(mac) => {
                context.update_config(0, &mac);
                self.shared.set_mac(mac);
            }
            Command::SetPairs(pairs) => {
                self.active_pairs = pairs.into();
                for receiver in &mut self.receivers[self.active_pairs..] {
                    receiver.drop_parked(&self.shared.received);
                }
                self.serve(context)?;
            }
            Command::SetOffloads(offloads) => return self.set_offloads(offloads, context),
        }
        Ok(true)
    }

    fn set_offloads(&mut self, features: u64, context: &mut Context<'_>) -> Result<bool, Fault> {
        if self.shared.is_lost() {
            return Ok(false);
        }
        match self.backend.set_offloads(features) {
            Ok(()) => Ok(true),
            Err(error) => {
                self.lost(format!("the tap's offloads cannot be set: {error}"), context)?;
                Ok(false)
            }
        }
    }
}

fn fault(trouble: Trouble) -> Fault {
    match trouble {
        Trouble::Violation(violation) => Fault::Violation(violation),
        Trouble::Timer(error) => Fault::Host(format!("the timer of a rate limit cannot be set: {error}").into()),
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2 * self.ports.len() + 1]
    }

    fn config(&self) -> ConfigLayout {
        let mut bytes = self.mac.to_vec();
        for field in [self.status(), self.ports.len() as u16, self.mtu] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        ConfigLayout {
            bytes,
            writable: Vec::new(),
        }
    }

    fn start(&mut self, context: &mut Context<'_>) -> Result<(), DeviceError> {
        for (token, port) in (0..).zip(self.backend.ports()) {
            context.watch(port, token, EventSet::IN | EventSet::EDGE_TRIGGERED)?;
        }
        context.watch(&self.shared.wake, WAKE, EventSet::IN)?;
        context.watch(&self.flow_timer, FLOW_TIMER, EventSet::IN)?;
        for (limit, token) in [(&self.receive_limit, RECEIVE_LIMIT), (&self.send_limit, SEND_LIMIT)] {
            if let Some(timer) = &limit.timer {
                context.watch(timer, token, EventSet::IN)?;
            }
        }
        Ok(())
    }

    fn activate(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        let accepted = context.features;
        self.set_offloads(accepted, context).map(drop)
    }

    fn notify(&mut self, queue: u16, context: &mut Context<'_>) -> Result<(), Fault> {
        let pair = usize::from(queue / 2);
        if queue == self.control_queue(context) {
            self.control(context)
        } else if pair >= self.active_pairs {
            // The driver did not say that it uses this pair, or the queue is none.
            Ok(())
        } else if queue.is_multiple_of(2) {
            // The driver's buffers are looked at even if no frame is known to wait: it does not have to ring for each of them then.
            if !self.shared.is_lost() {
                self.ports_of(pair).for_each(|port| self.ports[port].readable = true);
            }
            self.receive(pair, context)
        } else {
            self.transmit(pair, context)
        }
    }

    fn ready(&mut self, token: u32, events: EventSet, context: &mut Context<'_>) -> Result<(), Fault> {
        match token {
            WAKE => {
                // EAGAIN: it was read already.
                let _ = self.shared.wake.read();
                self.follow_link(context)
            }
            FLOW_TIMER => {
                self.flow_timer.rang();
                let now = Instant::now();
                for pair in 0..self.ports.len() {
                    if self.ports[pair].flow.pass(now) {
                        self.transmit(pair, context)?;
                    }
                }
                self.set_flow_timer().map_err(|error| Fault::Host(error.into()))
            }
            RECEIVE_LIMIT => {
                self.receive_limit.expired();
                (0..self.active_pairs).try_for_each(|pair| self.receive(pair, context))
            }
            SEND_LIMIT => {
                self.send_limit.expired();
                (0..self.active_pairs).try_for_each(|pair| self.transmit(pair, context))
            }
            port => {
                let port = port as usize;
                let Some(state) = self.ports.get_mut(port) else {
                    return Ok(());
                };
                // Errors and hang-ups are found by reading, as far as the driver has room for what came before.
                state.readable |= events != EventSet::OUT;
                state.hung_up |= events.intersects(EventSet::HANG_UP | EventSet::ERROR);
                if events.contains(EventSet::OUT) && state.flow != Flow::Open {
                    self.flush(port, context)?;
                }
                self.receive(port % self.active_pairs, context)
            }
        }
    }

    fn reset_queue(&mut self, queue: u16, context: &mut Context<'_>) {
        if queue != self.control_queue(context)
            && queue.is_multiple_of(2)
            && let Some(receiver) = self.receivers.get_mut(usize::from(queue / 2))
        {
            *receiver = Receiver::default();
        }
    }

    fn reset(&mut self, context: &mut Context<'_>) {
        self.receivers.fill_with(Receiver::default);
        self.active_pairs = 1;
        if !self.shared.is_lost() {
            // A tap that is gone tells so when it is read.
            let _ = self.backend.set_offloads(0);
        }
        self.shared.set_mac(self.mac);
        context.update_config(0, &self.mac);
        // Frames that wait for the driver's buffers are of no use to the next one.
        self.shared.wake();
    }
}

//! The device on its loop.
//!
//! ```text
//!              connect (its maker's thread)
//!                 |
//!                 v      activate: features, memory, [inflight], rings      all confirmed
//!     .------ [serving: nothing under way] --------------------------> [starting] -------> serving
//!     |           ^    ^                                                    |
//!     |           |    '---- reset: GET_VRING_BASE for each ring, waited for|
//!     |  greeted, |                                                         |  died, broke the protocol, out of time:
//!     |  started  |         reconnect                                       |  BackendLost
//!     |      [greeting] <---------------- [lost] <--------------------------+
//!     |           '--------------------------^------------------------------'
//!     '---------------------------------------'
//! ```
//!
//! Whether the driver is there ([`Context::active`]) is apart from that: a back end that comes back while the device rests is told of no rings.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use event_manager::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::connection::{Answer, Connection, Lost};
use super::greeting::{Greeting, Settled};
use super::message::{Inflight, Reply, Request, protocol};
use super::settings::{BadSettings, ConfigSource, Settings, config_layout};
use crate::alarm::Alarm;
use crate::dispatch::{DeviceError, DeviceEvent, HANG_GRACE};
use crate::interrupt::lock;
use crate::virtio::device::{ConfigLayout, Context, DeviceKind, Fault, VirtioDevice};

use rings::{Ring, memory_table, new_eventfd};

mod rings;

/// How long a back end has for the greeting of [`VhostUser::connect`].
pub const GREETING: Duration = Duration::from_secs(5);
/// How long a back end has to answer what nobody waits for.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How long a back end has to let go of the rings: short enough that a loop which is asked to stop meanwhile does not count as hung.
pub const QUIESCE: Duration = HANG_GRACE.saturating_sub(Duration::from_millis(250));

/// Tokens of the watched descriptors; the calls follow, by queue.
const SOCKET: u32 = 0;
const DOORBELL: u32 = 1;
const TIMER: u32 = 2;
const FIRST_CALL: u32 = 16;

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// It cannot be made.
    #[error(transparent)]
    Settings(#[from] BadSettings),
    /// The host has no more descriptors.
    #[error("no resources for a device in another process: {0}")]
    Host(#[from] io::Error),
    /// The back end does not do its part.
    #[error(transparent)]
    BackEnd(#[from] Lost),
}

/// What the device and its handle share.
struct Shared {
    next: Mutex<Option<OwnedFd>>,
    doorbell: EventFd,
    connected: AtomicBool,
}

/// The owner's side of a [`VhostUser`].
#[derive(Clone)]
pub struct VhostUserHandle(Arc<Shared>);

impl VhostUserHandle {
    /// Gives the device another back end: `socket` is a Unix stream that is connected to it. Returns at once; [`DeviceEvent::BackendRestored`] or
    /// [`DeviceEvent::BackendLost`] tells what came of it. One that still serves the device makes way. Of several that are given before the
    /// device looks, the last one counts.
    pub fn reconnect(&self, socket: OwnedFd) {
        *lock(&self.0.next) = Some(socket);
        // Fails only with a full counter, and then the loop has been told.
        let _ = self.0.doorbell.write(1);
    }

    /// Whether a back end serves the device.
    pub fn is_connected(&self) -> bool {
        self.0.connected.load(Ordering::Acquire)
    }
}

/// What is under way with a back end that is there.
enum Phase {
    /// Nothing.
    Serving,
    /// It introduces itself.
    Greeting(Box<Greeting>),
    /// It makes a place for what it has under way; then the rings follow.
    Placing,
    /// It is told of memory and rings.
    Starting,
}

/// A virtio device that another process serves (see the head of the [module](super)).
pub struct VhostUser {
    settings: Settings,
    layout: ConfigLayout,
    settled: Settled,
    connection: Option<Connection>,
    phase: Phase,
    rings: Vec<Ring>,
    inflight: Option<(Inflight, OwnedFd)>,
    /// A back end was lost, and its successor has not been reported.
    bereft: bool,
    /// Set while the back end has something to answer.
    timer: Alarm,
    /// The socket is watched for room to send, too.
    watched_for_room: bool,
    shared: Arc<Shared>,
}

impl VhostUser {
    /// Greets the back end at the other end of `socket`, a connected Unix stream, and makes a device of it. Blocks, at most for [`GREETING`].
    ///
    /// # Errors
    ///
    /// The settings are wrong, the host has no descriptors, or the back end does not do its part.
    pub fn connect(socket: OwnedFd, settings: Settings) -> Result<(Self, VhostUserHandle), ConnectError> {
        settings.check()?;
        let layout = match &settings.config {
            ConfigSource::Given(layout) => layout.clone(),
            ConfigSource::BackEnd => config_layout(settings.kind),
        };
        let shared = Arc::new(Shared {
            next: Mutex::new(None),
            doorbell: new_eventfd()?,
            connected: AtomicBool::new(true),
        });
        let timer = Alarm::new()?;
        let mut device = Self {
            rings: settings.queue_sizes.iter().map(|_| Ring::default()).collect(),
            settled: Settled {
                features: 0,
                has_protocol: false,
                protocol: 0,
                config: None,
            },
            connection: None,
            phase: Phase::Serving,
            inflight: None,
            bereft: false,
            timer,
            watched_for_room: false,
            shared: Arc::clone(&shared),
            layout,
            settings,
        };
        device.greet_and_wait(socket)?;
        if let Some(bytes) = device.settled.config.take() {
            device.layout.bytes = bytes;
        } else if device.settings.config == ConfigSource::BackEnd {
            device.layout = ConfigLayout::default();
        }
        Ok((device, VhostUserHandle(shared)))
    }

    fn greet_and_wait(&mut self, socket: OwnedFd) -> Result<(), Lost> {
        let deadline = Instant::now() + GREETING;
        let mut connection = Connection::new(socket);
        let mut greeting = Greeting::new(self.rings.len(), self.config_len(), None);
        for request in greeting.begin() {
            connection.send(&request, Vec::new());
        }
        loop {
            for answer in connection.progress()? {
                for request in greeting.take(answer.reply)? {
                    connection.send(&request, Vec::new());
                }
            }
            if let Some(settled) = greeting.done()
                && connection.is_idle()
            {
                self.settled = settled.clone();
                break;
            }
            connection.wait(deadline, GREETING)?;
        }
        if self.settled.uses(protocol::REPLY_ACK) {
            connection.ask_to_confirm();
        }
        self.connection = Some(connection);
        Ok(())
    }

    /// Bytes of configuration to ask a back end for.
    fn config_len(&self) -> usize {
        match self.settings.config {
            ConfigSource::Given(_) => 0,
            ConfigSource::BackEnd => config_layout(self.settings.kind).bytes.len(),
        }
    }

    /// Does `action` with the back end, if there is one; if that fails, there is none any more.
    fn attempt(
        &mut self,
        context: &mut Context<'_>,
        action: impl FnOnce(&mut Self, &mut Context<'_>) -> Result<(), Lost>,
    ) {
        if self.connection.is_none() {
            return;
        }
        if let Err(lost) = action(self, context).and_then(|()| self.advance(context)) {
            self.lose(&lost, context);
        }
    }

    /// Sends what can be sent, and follows what comes back.
    fn advance(&mut self, context: &mut Context<'_>) -> Result<(), Lost> {
        loop {
            let Some(connection) = &mut self.connection else {
                return Ok(());
            };
            let answers = connection.progress()?;
            let settled = connection.is_idle();
            let nothing = answers.is_empty();
            for answer in answers {
                self.follow(answer, context)?;
            }
            if nothing {
                if settled && matches!(self.phase, Phase::Starting) {
                    self.begin_serving(context);
                }
                break;
            }
        }
        self.give_time();
        self.watch_for_room(context)
    }

    /// Follows a reply.
    fn follow(&mut self, answer: Answer, context: &mut Context<'_>) -> Result<(), Lost> {
        match (&mut self.phase, answer.reply) {
            (_, Reply::Done) => Ok(()),
            (Phase::Greeting(greeting), reply) => {
                let requests = greeting.take(reply)?;
                let settled = greeting.done().cloned();
                self.send_all(requests);
                match settled {
                    Some(settled) => self.greeted(settled, context),
                    None => Ok(()),
                }
            }
            (Phase::Placing, Reply::Inflight(inflight)) => {
                let Some(place) = answer.descriptor else {
                    return Err(io::Error::other("no descriptor for what is under way").into());
                };
                self.inflight = Some((inflight, place));
                self.start_rings(context)
            }
            // What a reset asked before it gave up.
            _ => Ok(()),
        }
    }

    fn send_all(&mut self, requests: Vec<Request>) {
        if let Some(connection) = &mut self.connection {
            for request in &requests {
                connection.send(request, Vec::new());
            }
        }
    }

    fn send(&mut self, request: &Request, descriptors: Vec<OwnedFd>) {
        if let Some(connection) = &mut self.connection {
            connection.send(request, descriptors);
        }
    }

    /// Another back end is ready to take over.
    fn greeted(&mut self, mut settled: Settled, context: &mut Context<'_>) -> Result<(), Lost> {
        if settled.uses(protocol::REPLY_ACK)
            && let Some(connection) = &mut self.connection
        {
            connection.ask_to_confirm();
        }
        if let Some(bytes) = settled.config.take() {
            context.update_config(0, &bytes);
        }
        self.settled = settled;
        if context.active() {
            return self.start(context);
        }
        self.begin_serving(context);
        Ok(())
    }

    fn begin_serving(&mut self, context: &mut Context<'_>) {
        self.phase = Phase::Serving;
        self.shared.connected.store(true, Ordering::Release);
        if std::mem::take(&mut self.bereft) {
            context.report(DeviceEvent::BackendRestored {
                device: context.name().into(),
            });
        }
    }

    /// There is no back end any more.
    fn lose(&mut self, lost: &Lost, context: &mut Context<'_>) {
        let Some(connection) = self.connection.take() else {
            return;
        };
        // It is watched for as long as it is open.
        let _ = context.unwatch(&connection);
        drop(connection);
        self.watched_for_room = false;
        self.give_time();
        self.phase = Phase::Serving;
        for ring in &mut self.rings {
            ring.started = false;
        }
        self.bereft = true;
        self.shared.connected.store(false, Ordering::Release);
        context.report(DeviceEvent::BackendLost {
            device: context.name().into(),
            reason: lost.to_string(),
        });
    }

    /// Turns to the next back end, if there is one.
    fn take_over(&mut self, context: &mut Context<'_>) {
        let Some(socket) = lock(&self.shared.next).take() else {
            return;
        };
        if self.connection.is_some() {
            let lost = self.quiesce(&self.started(), QUIESCE).err().unwrap_or(Lost::Replaced);
            self.lose(&lost, context);
        }
        let connection = Connection::new(socket);
        if let Err(error) = context.watch(&connection, SOCKET, EventSet::IN) {
            context.report(DeviceEvent::BackendLost {
                device: context.name().into(),
                reason: error.to_string(),
            });
            return;
        }
        let greeting = Greeting::new(self.rings.len(), self.config_len(), Some(self.settled.clone()));
        self.connection = Some(connection);
        self.send_all(greeting.begin());
        self.phase = Phase::Greeting(Box::new(greeting));
        self.attempt(context, |_, _| Ok(()));
    }

    fn watch_for_room(&mut self, context: &mut Context<'_>) -> Result<(), Lost> {
        let Some(connection) = &self.connection else {
            return Ok(());
        };
        let wanted = connection.wants_to_send();
        if wanted != self.watched_for_room {
            let events = if wanted {
                EventSet::IN | EventSet::OUT
            } else {
                EventSet::IN
            };
            context.rewatch(connection, SOCKET, events).map_err(io::Error::other)?;
            self.watched_for_room = wanted;
        }
        Ok(())
    }

    /// Gives the back end its time from when it has something to answer until it has answered everything.
    fn give_time(&mut self) {
        let wanted = self.connection.as_ref().is_some_and(|connection| !connection.is_idle());
        if wanted != self.timer.is_set() {
            // Cannot fail with a time like this.
            let _ = self.timer.set(wanted.then(|| Instant::now() + PATIENCE));
        }
    }

    fn look_at_time(&mut self, context: &mut Context<'_>) {
        if !self.timer.rang() {
            return;
        }
        if let Some(connection) = &self.connection
            && !connection.is_idle()
        {
            let lost = connection.late(PATIENCE);
            self.lose(&lost, context);
        }
    }
}

impl VirtioDevice for VhostUser {
    fn kind(&self) -> DeviceKind {
        self.settings.kind
    }

    fn features(&self) -> u64 {
        self.settled.offered()
    }

    fn transport_features(&self) -> u64 {
        self.settled.offered_transport()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.settings.queue_sizes.clone()
    }

    fn config(&self) -> ConfigLayout {
        self.layout.clone()
    }

    fn start(&mut self, context: &mut Context<'_>) -> Result<(), DeviceError> {
        memory_table(context.memory)?;
        context.watch(&self.shared.doorbell, DOORBELL, EventSet::IN)?;
        context.watch(&self.timer, TIMER, EventSet::IN)?;
        if let Some(connection) = &self.connection {
            context.watch(connection, SOCKET, EventSet::IN)?;
        }
        Ok(())
    }

    fn activate(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        // One that introduces itself is started when it has.
        if matches!(self.phase, Phase::Serving) {
            self.attempt(context, Self::start);
        }
        Ok(())
    }

    fn notify(&mut self, queue: u16, context: &mut Context<'_>) -> Result<(), Fault> {
        let started = self.rings.get(usize::from(queue)).map(|ring| ring.started);
        match started {
            Some(true) => self.ring(queue),
            // Enabled after the others.
            Some(false) if matches!(self.phase, Phase::Serving | Phase::Starting) => {
                self.attempt(context, |device, context| device.start_ring(queue, context));
            }
            _ => {}
        }
        Ok(())
    }

    fn ready(&mut self, token: u32, _: EventSet, context: &mut Context<'_>) -> Result<(), Fault> {
        match token {
            SOCKET => self.attempt(context, |_, _| Ok(())),
            DOORBELL => {
                let _ = self.shared.doorbell.read();
                self.take_over(context);
            }
            TIMER => self.look_at_time(context),
            _ => {
                let queue = token.checked_sub(FIRST_CALL).and_then(|n| u16::try_from(n).ok());
                let ring = queue.and_then(|queue| Some((queue, self.rings.get(usize::from(queue))?)));
                if let Some((queue, Ring { call: Some(call), .. })) = ring
                    && call.read().is_ok()
                    && context.queue(queue).is_some()
                {
                    context.interrupt_now(queue);
                }
            }
        }
        Ok(())
    }

    fn config_written(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        if !self.settled.uses(protocol::CONFIG) {
            return Ok(());
        }
        for range in self.layout.writable.clone() {
            let mut bytes = vec![0; range.len()];
            context.read_config(range.start, &mut bytes);
            let request = Request::SetConfig {
                offset: range.start,
                bytes,
            };
            self.attempt(context, |device, _| {
                device.send(&request, Vec::new());
                Ok(())
            });
        }
        Ok(())
    }

    fn reset_queue(&mut self, queue: u16, context: &mut Context<'_>) {
        let Some(ring) = self.rings.get(usize::from(queue)) else {
            return;
        };
        if ring.started
            && let Err(lost) = self.quiesce(&[queue], QUIESCE)
        {
            self.lose(&lost, context);
        }
        self.rings[usize::from(queue)].served = false;
        // What was confirmed meanwhile may have been the last of a start.
        self.attempt(context, |_, _| Ok(()));
    }

    fn reset(&mut self, context: &mut Context<'_>) {
        let greeting = matches!(self.phase, Phase::Greeting(_));
        if !greeting && let Err(lost) = self.let_go() {
            self.lose(&lost, context);
        }
        for ring in &mut self.rings {
            ring.served = false;
        }
        self.inflight = None;
        if !greeting && self.connection.is_some() {
            self.begin_serving(context);
        }
        self.give_time();
    }

    fn stop(&mut self, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now());
        if !matches!(self.phase, Phase::Greeting(_))
            && let Err(lost) = self.quiesce(&self.started(), left)
        {
            tracing::warn!(%lost, "a device in another process did not stop");
        }
    }
}

#[cfg(test)]
mod tests;

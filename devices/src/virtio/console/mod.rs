//! Console device (virtio 5.3) with up to 32 ports, each a stream between the driver and a host end.
//!
//! ```text
//!   driver                                     the device's thread                                      host end
//!   transmitq(n) --copy, give back--> write --------------------------------------------------------> socket
//!                                       '- host takes no more --> [ring of 256 KiB, drops its oldest] ---^ when writable
//!   receiveq(n) <--deliver-- [at most 64 KiB the driver had no room for] <---------------- read ------ socket
//!                            reads only while the guest has the port open and gives buffers
//!   control queues <--> control::Control: which ports there are, their names and sizes, who has them open
//! ```
//!
//! A host end that does not read costs old output, which is counted, and not the guest's time. Of consoles, for whose driver Linux spins, output is
//! never held back; the drivers of plain ports sleep, so theirs is, for [`PATIENCE`] after the host end last took something: then bulk data
//! arrives whole, however fast the guest is, and a host end that has stopped reading delays the guest once. Input is never lost: until the guest opens the port and gives buffers, it waits in the socket, and so does its writer. Without VIRTIO_CONSOLE_F_MULTIPORT there
//! is port 0 only, which is open as soon as the driver is ready.
//!
//! A reset of the device leaves both streams as they are: output that waits still goes out, input waits for the next driver.
//!
//! System calls of its thread beside those of [`dispatch`](crate::dispatch): `read`, `write` and `close` on the host ends, `timerfd_settime`,
//! `ppoll` on stop.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use event_manager::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{ConfigLayout, Context, DeviceKind, Fault, VirtioDevice};
use super::violation::Violation;
use crate::alarm::Alarm;
use crate::dispatch::{DeviceError, DeviceEvent};
use crate::interrupt::lock;
use crate::stream::{HostEnd, Watch};

use control::{Control, HEADER, Known, Size};
use port::{CHUNK, Counters, Port, transmit_queue};

pub use port::{OUTPUT_CAPACITY, PATIENCE};

mod control;
mod port;

/// Most ports of a console.
pub const MOST_PORTS: usize = 32;

/// Longest name of a port, in bytes.
pub const LONGEST_NAME: usize = 64;

/// VIRTIO_CONSOLE_F_SIZE: the configuration space has the size of port 0.
const F_SIZE: u64 = 1 << 0;
/// VIRTIO_CONSOLE_F_MULTIPORT: control queues, and ports beyond port 0.
const F_MULTIPORT: u64 = 1 << 1;

/// Queues of the control messages (virtio 5.3.2).
const CONTROL_TO_DRIVER: u16 = 2;
const CONTROL_FROM_DRIVER: u16 = 3;

/// Entries of each queue. Linux keeps a page in each entry of the receive queues.
const QUEUE_SIZE: u16 = 64;

/// Control messages taken before the loop looks at its other events.
const MESSAGES_A_TURN: usize = 64;

/// Tokens of the owner's doorbell and of the timer; a port's is its number and the first.
const OWNER: u32 = 0;
const ALARM: u32 = 1;
const FIRST_PORT: u32 = 2;

/// How one port is to be.
#[derive(Debug, Default)]
pub struct PortConfig {
    /// What the guest finds it by, at most [`LONGEST_NAME`] bytes; empty: nothing but its number.
    pub name: String,
    /// Its host end, a stream socket or pipe whose other end belongs to somebody else. Made nonblocking. Without one, output is discarded,
    /// and the guest is told that nobody is there.
    pub host: Option<OwnedFd>,
}

/// How a console is to be.
#[derive(Debug, Default)]
pub struct ConsoleConfig {
    /// Its ports, 1 to [`MOST_PORTS`].
    pub ports: Vec<PortConfig>,
    /// How many of them, from the first, are consoles (hvc0, hvc1... in Linux); the others are plain ports. Port 0 always is one, as it is for
    /// drivers that know no other.
    pub consoles: usize,
}

/// What a port has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortStats {
    /// Bytes that the guest sent.
    pub from_guest: u64,
    /// Bytes that the guest received.
    pub to_guest: u64,
    /// Bytes of output that were lost because the host end did not take them in time.
    pub dropped: u64,
    /// The guest has it open.
    pub guest_open: bool,
    /// The host end is there and not closed.
    pub host_open: bool,
}

/// The console has no such port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the console has no port {port}: there are {ports}")]
pub struct NoSuchPort {
    /// The port asked for.
    pub port: usize,
    /// How many there are.
    pub ports: usize,
}

/// What device and owner share.
#[derive(Debug)]
struct Shared {
    bell: EventFd,
    /// Sizes that the owner asked for and the device has not seen yet.
    sizes: Mutex<Vec<Option<Size>>>,
    ports: Vec<Arc<Counters>>,
}

/// The console's owner's side.
#[derive(Clone, Debug)]
pub struct ConsoleHandle(Arc<Shared>);

impl ConsoleHandle {
    /// How many ports there are.
    pub fn ports(&self) -> usize {
        self.0.ports.len()
    }

    /// The terminal at the host end of `port` has another size; a guest that takes the port for a console is told. The last one counts.
    ///
    /// # Errors
    ///
    /// There is no such port.
    pub fn resize(&self, port: usize, cols: u16, rows: u16) -> Result<(), NoSuchPort> {
        match lock(&self.0.sizes).get_mut(port) {
            Some(size) => *size = Some(Size { cols, rows }),
            None => return Err(self.none(port)),
        }
        // Fails only with a full counter, and then the device has been told.
        let _ = self.0.bell.write(1);
        Ok(())
    }

    /// What `port` has done so far.
    ///
    /// # Errors
    ///
    /// There is no such port.
    pub fn stats(&self, port: usize) -> Result<PortStats, NoSuchPort> {
        let counters = self.0.ports.get(port).ok_or_else(|| self.none(port))?;
        Ok(PortStats {
            from_guest: counters.from_guest.load(Ordering::Relaxed),
            to_guest: counters.to_guest.load(Ordering::Relaxed),
            dropped: counters.dropped.load(Ordering::Relaxed),
            guest_open: counters.guest_open.load(Ordering::Relaxed),
            host_open: counters.host_open.load(Ordering::Relaxed),
        })
    }

    fn none(&self, port: usize) -> NoSuchPort {
        NoSuchPort {
            port,
            ports: self.ports(),
        }
    }
}

/// What a queue is for (virtio 5.3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Input(usize),
    Output(usize),
    ToDriver,
    FromDriver,
}

impl Role {
    fn of(queue: u16) -> Self {
        let port = usize::from(queue / 2).saturating_sub(1);
        match queue {
            CONTROL_TO_DRIVER => Self::ToDriver,
            CONTROL_FROM_DRIVER => Self::FromDriver,
            _ if queue.is_multiple_of(2) => Self::Input(port),
            _ => Self::Output(port),
        }
    }
}

/// Token of a port's host end.
fn token(port: usize) -> u32 {
    // At most 32 ports.
    FIRST_PORT + port as u32
}

/// The device.
pub struct Console {
    ports: Vec<Port>,
    control: Control,
    shared: Arc<Shared>,
    /// Goes off when output need not be held back any longer.
    alarm: Alarm,
    /// What is being moved.
    chunk: Box<[u8; CHUNK]>,
}

impl Console {
    /// A device and its owner's side.
    ///
    /// # Errors
    ///
    /// No ports or too many, a name that is too long, a host end that is not open, or the host gives no eventfd or timerfd.
    pub fn new(config: ConsoleConfig) -> io::Result<(Self, ConsoleHandle)> {
        let wrong = |what: String| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        let count = config.ports.len();
        if count == 0 || count > MOST_PORTS {
            return wrong(format!("a console of {count} ports; there can be 1 to {MOST_PORTS}"));
        }
        let mut ports = Vec::with_capacity(count);
        let mut known = Vec::with_capacity(count);
        let mut all_counters = Vec::with_capacity(count);
        for (index, PortConfig { name, host }) in config.ports.into_iter().enumerate() {
            if name.len() > LONGEST_NAME {
                return wrong(format!(
                    "the name of console port {index} is longer than {LONGEST_NAME} bytes"
                ));
            }
            let counters = Arc::new(Counters::default());
            let host = host.map(HostEnd::new).transpose()?;
            let console = index < config.consoles.max(1);
            known.push(Known {
                name,
                console,
                host_open: host.is_some(),
            });
            ports.push(Port::new(index, console, host, Arc::clone(&counters)));
            all_counters.push(counters);
        }
        let shared = Arc::new(Shared {
            bell: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            sizes: Mutex::new(vec![None; count]),
            ports: all_counters,
        });
        let device = Self {
            ports,
            control: Control::new(known),
            shared: Arc::clone(&shared),
            alarm: Alarm::new()?,
            chunk: Box::new([0; CHUNK]),
        };
        Ok((device, ConsoleHandle(shared)))
    }

    /// Whether the guest wants the port's input.
    fn wants(&self, port: usize, context: &Context<'_>) -> bool {
        if context.accepted(F_MULTIPORT) {
            self.control.is_open(port)
        } else {
            context.active() && port == 0
        }
    }

    fn input(&mut self, index: usize, context: &mut Context<'_>) -> Result<(), Fault> {
        let wants = self.wants(index, context);
        match self.ports.get_mut(index) {
            Some(port) => port.pump_input(wants, &mut self.chunk, context),
            None => Ok(()),
        }
    }

    fn output(&mut self, index: usize, context: &mut Context<'_>) -> Result<(), Fault> {
        match self.ports.get_mut(index) {
            Some(port) => port.pump_output(&mut self.chunk, context),
            None => Ok(()),
        }
    }

    /// Works out what follows for a port's host end; to be called after everything that was done with it.
    fn settle(&mut self, index: usize, context: &mut Context<'_>) -> Result<(), DeviceError> {
        let wants = self.wants(index, context);
        let Some(port) = self.ports.get_mut(index) else {
            return Ok(());
        };
        if port.take_closed() {
            self.control.host_closed(index);
            let device = format!("{} port {index}", context.name());
            context.report(DeviceEvent::HostClosed { device });
        }
        let change = port.watch_change(wants);
        match (change, port.host()) {
            (Some(Watch::Modify(events)), Some(host)) => context.rewatch(host, token(index), events)?,
            (Some(Watch::Remove), Some(host)) => context.unwatch(host)?,
            _ => {}
        }
        let next = self.ports.iter().filter_map(Port::held_until).min();
        Ok(self.alarm.set(next)?)
    }

    /// Goes on with output that was held back, of ports where that is over.
    fn let_go(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        for index in 0..self.ports.len() {
            if self.ports[index].let_go() {
                self.output(index, context)?;
                self.settle(index, context).map_err(Fault::Host)?;
            }
        }
        Ok(())
    }

    /// Takes what the driver says.
    fn hear(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        for _ in 0..MESSAGES_A_TURN {
            let Some(queue) = context.queue(CONTROL_FROM_DRIVER) else {
                return Ok(());
            };
            let Some(chain) = queue.pop()? else {
                if queue.wait_for_doorbell()? {
                    continue;
                }
                return Ok(context.interrupt(CONTROL_FROM_DRIVER)?);
            };
            if !chain.writable().is_empty() {
                return Err(Fault::Violation(Violation::Direction {
                    queue: CONTROL_FROM_DRIVER,
                    what: "a control message has a buffer for the device to write",
                }));
            }
            let mut message = [0; HEADER];
            let read = chain.reader(queue.memory()).read(&mut message);
            read.map_err(|_| Violation::Length {
                queue: CONTROL_FROM_DRIVER,
                what: "a control message",
                got: chain.readable_bytes().into(),
                expected: "at least 8",
            })?;
            queue.push(chain, 0)?;
            let changed = self.control.received(message).map_err(|reason| Violation::Device {
                queue: CONTROL_FROM_DRIVER,
                reason,
            })?;
            if let Some(port) = changed {
                let open = self.control.is_open(port);
                self.shared.ports[port].guest_open.store(open, Ordering::Relaxed);
                self.input(port, context)?;
                self.settle(port, context).map_err(Fault::Host)?;
            }
        }
        context.interrupt(CONTROL_FROM_DRIVER)?;
        context.ring(CONTROL_FROM_DRIVER);
        Ok(())
    }

    /// Tells the driver what is due, as far as it has room.
    fn tell(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        while self.control.is_due() {
            let Some(queue) = context.queue(CONTROL_TO_DRIVER) else {
                return Ok(());
            };
            let Some(chain) = queue.pop()? else {
                if queue.wait_for_doorbell()? {
                    continue;
                }
                break;
            };
            if !chain.readable().is_empty() {
                return Err(Fault::Violation(Violation::Direction {
                    queue: CONTROL_TO_DRIVER,
                    what: "a buffer for control messages is for the device to read",
                }));
            }
            let message = self.control.next().unwrap_or_default();
            let written = chain.writer(queue.memory()).write(&message);
            written.map_err(|_| Violation::Length {
                queue: CONTROL_TO_DRIVER,
                what: "a buffer for a control message",
                got: chain.writable_bytes().into(),
                expected: "8 and what follows, at most 72",
            })?;
            // At most 72 bytes.
            queue.push(chain, message.len() as u32)?;
        }
        Ok(context.interrupt(CONTROL_TO_DRIVER)?)
    }

    /// Takes over the sizes that the owner asked for.
    fn take_sizes(&mut self, context: &Context<'_>) {
        // Nonblocking; all that it can say is that somebody rang.
        let _ = self.shared.bell.read();
        let sizes: Vec<_> = lock(&self.shared.sizes).iter_mut().map(Option::take).collect();
        for (index, size) in sizes.into_iter().enumerate() {
            let Some(size) = size else { continue };
            if self.control.resize(index, size) && index == 0 {
                context.update_config(0, &size.bytes());
            }
        }
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Console
    }

    fn features(&self) -> u64 {
        F_SIZE | F_MULTIPORT
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(transmit_queue(self.ports.len() - 1).max(CONTROL_FROM_DRIVER)) + 1]
    }

    fn config(&self) -> ConfigLayout {
        // cols, rows (unknown), max_nr_ports, emerg_wr (which is not offered).
        let mut bytes = vec![0; 12];
        bytes[4] = self.ports.len() as u8;
        ConfigLayout {
            bytes,
            writable: Vec::new(),
        }
    }

    fn start(&mut self, context: &mut Context<'_>) -> Result<(), DeviceError> {
        context.watch(&self.shared.bell, OWNER, EventSet::IN)?;
        context.watch(&self.alarm, ALARM, EventSet::IN)?;
        for (index, port) in self.ports.iter().enumerate() {
            if let Some(host) = port.host() {
                context
                    .watch(host, token(index), EventSet::empty())
                    .map_err(|e| format!("the host end of port {index} cannot be watched: {e}"))?;
            }
        }
        Ok(())
    }

    fn notify(&mut self, queue: u16, context: &mut Context<'_>) -> Result<(), Fault> {
        let multiport = context.accepted(F_MULTIPORT);
        match Role::of(queue) {
            Role::Input(port) => {
                self.input(port, context)?;
                self.settle(port, context).map_err(Fault::Host)?;
            }
            Role::Output(port) => {
                self.output(port, context)?;
                self.settle(port, context).map_err(Fault::Host)?;
            }
            Role::FromDriver if multiport => self.hear(context)?,
            Role::ToDriver | Role::FromDriver => {}
        }
        self.tell(context)
    }

    fn ready(&mut self, token: u32, events: EventSet, context: &mut Context<'_>) -> Result<(), Fault> {
        if token == OWNER {
            self.take_sizes(context);
            return self.tell(context);
        }
        if token == ALARM {
            self.alarm.rang();
            return self.let_go(context);
        }
        let index = (token - FIRST_PORT) as usize;
        // An earlier event of the same turn may have ended the watch.
        if self.ports.get(index).is_none_or(|port| port.watched().is_none()) {
            return Ok(());
        }
        if events.contains(EventSet::OUT) {
            self.ports[index].flush();
        }
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            if let Some(host) = self.ports[index].host() {
                context.unwatch(host).map_err(Fault::Host)?;
            }
            self.ports[index].hang_up();
        }
        self.input(index, context)?;
        self.settle(index, context).map_err(Fault::Host)?;
        self.let_go(context)?;
        self.tell(context)
    }

    fn reset_queue(&mut self, queue: u16, context: &mut Context<'_>) {
        let (Role::Input(index) | Role::Output(index)) = Role::of(queue) else {
            return;
        };
        if let Some(port) = self.ports.get_mut(index) {
            match Role::of(queue) {
                Role::Input(_) => port.starve(),
                _ => port.give_up_output(),
            }
        }
        // Fails only for a descriptor that is not watched, and `settle` knows which are.
        let _ = self.settle(index, context);
    }

    fn reset(&mut self, context: &mut Context<'_>) {
        self.control.reset();
        for index in 0..self.ports.len() {
            self.ports[index].starve();
            self.ports[index].give_up_output();
            self.shared.ports[index].guest_open.store(false, Ordering::Relaxed);
            // As above.
            let _ = self.settle(index, context);
        }
    }

    fn stop(&mut self, deadline: Instant) {
        for port in &mut self.ports {
            port.stop(deadline);
        }
    }
}

#[cfg(test)]
mod tests;

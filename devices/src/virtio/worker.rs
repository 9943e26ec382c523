//! A virtio device on its dispatch loop: follows the orders that the driver's register writes left in the link, hands the device its doorbells and its
//! own descriptors' events, and keeps a driver that breaks the rules from doing more.
//!
//! ```text
//!   mailbox: reset ------> device.reset, queues dropped, link.reset_done
//!            stop -------> as a broken rule
//!            activate ---> Virtqueue::new for each queue, device.activate, notify for each
//!            queue reset -> device.reset_queue, queue dropped, link.queue_reset_done
//!   bell n ------------> device.notify(n)               Fault::Violation -> device.reset, link.broken, NeedsReset
//!   device's own fd ---> device.ready(token)            Fault::Host, panic -> quarantine: device dropped, link.dead
//! ```

use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use event_manager::EventSet;
use vm_memory::GuestMemoryMmap;

use super::device::{Context, FIRST_TRANSPORT_TOKEN, Fault, Reclaim, VirtioDevice, WatchList};
use super::link::{Activation, Link, Orders, QueueOrder};
use super::queue::Virtqueue;
use crate::dispatch::{DeviceError, DeviceEvent, DispatchDevice, Watches};

/// Token of the mailbox; bells follow, by queue.
const MAILBOX: u32 = FIRST_TRANSPORT_TOKEN;
const FIRST_BELL: u32 = FIRST_TRANSPORT_TOKEN + 1;

/// Why a device stops that may not reach memory any more.
const LOST_BUS: &str = "the driver took bus mastering away while the device was in use";

/// See the module's head.
pub struct VirtioWorker {
    link: Arc<Link>,
    /// `None` once it is quarantined.
    device: Option<Box<dyn VirtioDevice>>,
    memory: GuestMemoryMmap,
    reclaim: Arc<dyn Reclaim>,
    queues: Vec<Option<Virtqueue>>,
    /// Queues whose bell is watched.
    watched: Vec<bool>,
    features: u64,
    active: bool,
    /// A rule was broken, and the device has not been started since.
    broken: bool,
}

impl VirtioWorker {
    pub(super) fn new(
        link: Arc<Link>,
        device: Box<dyn VirtioDevice>,
        memory: GuestMemoryMmap,
        reclaim: Arc<dyn Reclaim>,
    ) -> Self {
        let queues = usize::from(link.queue_count());
        Self {
            link,
            device: Some(device),
            memory,
            reclaim,
            queues: (0..queues).map(|_| None).collect(),
            watched: vec![false; queues],
            features: 0,
            active: false,
            broken: false,
        }
    }

    /// Calls the device with its context; `None` if the device is gone.
    fn call<R>(
        &mut self,
        watches: &mut Watches<'_, '_>,
        call: impl FnOnce(&mut dyn VirtioDevice, &mut Context<'_>) -> R,
    ) -> Option<R> {
        let device = self.device.as_deref_mut()?;
        let mut context = Context {
            memory: &self.memory,
            reclaim: &*self.reclaim,
            queues: &mut self.queues,
            features: self.features,
            transport: &*self.link,
            watches: &mut List(watches),
        };
        Some(call(device, &mut context))
    }

    /// Calls the device; a broken rule stops it until its driver's reset.
    fn guarded(
        &mut self,
        watches: &mut Watches<'_, '_>,
        call: impl FnOnce(&mut dyn VirtioDevice, &mut Context<'_>) -> Result<(), Fault>,
    ) -> Result<(), DeviceError> {
        match self.call(watches, call) {
            None | Some(Ok(())) => Ok(()),
            Some(Err(fault)) => self.fault(fault, watches),
        }
    }

    fn fault(&mut self, fault: Fault, watches: &mut Watches<'_, '_>) -> Result<(), DeviceError> {
        let violation = match fault {
            Fault::Violation(violation) => violation,
            Fault::Host(error) => return Err(error),
        };
        self.give_up(violation.to_string(), watches);
        Ok(())
    }

    /// Nothing more happens until the driver resets the device.
    fn give_up(&mut self, reason: String, watches: &mut Watches<'_, '_>) {
        self.rest(watches);
        self.broken = true;
        self.link.broken();
        watches.report(DeviceEvent::NeedsReset {
            device: watches.device().to_owned(),
            reason,
        });
    }

    /// Quiesces the device: when this returns, nothing of it touches guest memory.
    fn rest(&mut self, watches: &mut Watches<'_, '_>) {
        if self.active {
            self.call(watches, |device, context| device.reset(context));
        }
        self.active = false;
        self.features = 0;
        self.queues.fill_with(|| None);
        self.link.take_back();
    }

    fn obey(&mut self, watches: &mut Watches<'_, '_>) -> Result<(), DeviceError> {
        let Orders {
            reset,
            stop,
            activate,
            queues,
            config_written,
        } = self.link.take_orders();
        if reset {
            self.rest(watches);
            self.link.reset_done();
        }
        if stop {
            self.give_up(LOST_BUS.to_owned(), watches);
        }
        if let Some(activation) = activate {
            self.activate(activation, watches)?;
        }
        for (index, order) in queues {
            match order {
                QueueOrder::Reset => self.reset_queue(index, watches),
                QueueOrder::Enable(setup) if self.active => {
                    match Virtqueue::new(index, setup, self.features, self.memory.clone()) {
                        Ok(queue) => self.start_queue(index, queue, watches)?,
                        Err(violation) => self.fault(violation.into(), watches)?,
                    }
                }
                QueueOrder::Enable(_) => {}
            }
        }
        if config_written {
            self.guarded(watches, |device, context| device.config_written(context))?;
        }
        self.follow_bells(watches)
    }

    fn activate(&mut self, activation: Activation, watches: &mut Watches<'_, '_>) -> Result<(), DeviceError> {
        let Activation { features, queues } = activation;
        let made: Result<Vec<_>, _> = (0..)
            .zip(queues)
            .map(|(index, setup)| {
                let make = |setup| Virtqueue::new(index, setup, features, self.memory.clone());
                setup.map(make).transpose()
            })
            .collect();
        match made {
            Ok(queues) => self.queues = queues,
            // The device has not heard of any of this yet.
            Err(violation) => return self.fault(violation.into(), watches),
        }
        self.active = true;
        self.features = features;
        self.guarded(watches, |device, context| device.activate(context))?;
        for index in 0..self.link.queue_count() {
            self.notify(index, watches)?;
        }
        if self.active && std::mem::take(&mut self.broken) {
            watches.report(DeviceEvent::Recovered {
                device: watches.device().to_owned(),
            });
        }
        Ok(())
    }

    fn start_queue(&mut self, index: u16, queue: Virtqueue, watches: &mut Watches<'_, '_>) -> Result<(), DeviceError> {
        if let Some(place) = self.queues.get_mut(usize::from(index)) {
            *place = Some(queue);
        }
        self.notify(index, watches)
    }

    fn reset_queue(&mut self, index: u16, watches: &mut Watches<'_, '_>) {
        if self.queues.get(usize::from(index)).is_some_and(Option::is_some) {
            self.call(watches, |device, context| device.reset_queue(index, context));
            self.queues[usize::from(index)] = None;
        }
        self.link.queue_reset_done(index);
    }

    /// Tells the device of a doorbell; a queue that is not enabled has none.
    fn notify(&mut self, index: u16, watches: &mut Watches<'_, '_>) -> Result<(), DeviceError> {
        if self.queues.get(usize::from(index)).is_some_and(Option::is_some) {
            self.guarded(watches, |device, context| device.notify(index, context))?;
        }
        Ok(())
    }

    /// Watches the bells of the enabled queues, but for those that another process listens to.
    fn follow_bells(&mut self, watches: &mut Watches<'_, '_>) -> Result<(), DeviceError> {
        for (index, token) in (0..self.link.queue_count()).zip(FIRST_BELL..) {
            let n = usize::from(index);
            let Some(bell) = self.link.bell(index) else { continue };
            let wanted = self.queues[n].is_some() && !self.link.is_lent(index);
            if wanted && !self.watched[n] {
                // Edge-triggered: each ring is an event, though nobody ever reads the counter.
                watches.add(bell, token, EventSet::IN | EventSet::EDGE_TRIGGERED)?;
            } else if !wanted && self.watched[n] {
                watches.remove(bell)?;
            }
            self.watched[n] = wanted;
        }
        Ok(())
    }
}

impl DispatchDevice for VirtioWorker {
    fn start(&mut self, watches: &mut Watches<'_, '_>) -> Result<(), DeviceError> {
        watches.add(self.link.mailbox(), MAILBOX, EventSet::IN)?;
        self.call(watches, |device, context| device.start(context))
            .unwrap_or(Ok(()))
    }

    fn ready(&mut self, token: u32, events: EventSet, watches: &mut Watches<'_, '_>) -> Result<(), DeviceError> {
        if token == MAILBOX {
            return self.obey(watches);
        }
        if let Some(index) = token.checked_sub(FIRST_BELL) {
            return match u16::try_from(index) {
                Ok(index) => self.notify(index, watches),
                Err(_) => Ok(()),
            };
        }
        self.guarded(watches, |device, context| device.ready(token, events, context))?;
        if self.link.lending_changed() {
            self.follow_bells(watches)?;
        }
        Ok(())
    }

    fn stop(&mut self, deadline: Instant) {
        if let Some(device) = &mut self.device {
            device.stop(deadline);
        }
    }

    /// The device is dropped before its registers say that it is gone, since after that a driver takes its memory back.
    fn quarantine(&mut self) {
        let device = self.device.take();
        // It panicked before; what it says now makes no difference.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(device)));
        self.queues.fill_with(|| None);
        self.link.dead();
    }
}

/// The loop's watches, as a device uses them.
struct List<'x, 'a, 'b>(&'x mut Watches<'a, 'b>);

impl WatchList for List<'_, '_, '_> {
    fn add(&mut self, fd: RawFd, token: u32, events: EventSet) -> Result<(), DeviceError> {
        self.0.add(&fd, token, events)
    }

    fn modify(&mut self, fd: RawFd, token: u32, events: EventSet) -> Result<(), DeviceError> {
        self.0.modify(&fd, token, events)
    }

    fn remove(&mut self, fd: RawFd) -> Result<(), DeviceError> {
        self.0.remove(&fd)
    }

    fn device(&self) -> &str {
        self.0.device()
    }

    fn report(&self, event: DeviceEvent) {
        self.0.report(event);
    }
}

//! The registers through which a driver sets a device up (virtio 3.1, 4.1.4.3), without effects.
//!
//! ```text
//!         DRIVER_OK, bus master                status 0
//!   Resting ---------------> Active --------------------------> Resetting
//!    ^  ^                      |                                    |
//!    |  |  status 0            | a rule was broken, or bus          | the loop has quiesced the device
//!    |  |                      | mastering was taken away: the      |
//!    |  '------------ Broken <-' loop has quiesced the device       |
//!    '--------------------------------------------------------------'
//!
//!   any ---- the loop is gone ----> Dead: status 0 works at once, DRIVER_OK gives DEVICE_NEEDS_RESET
//! ```
//!
//! Without bus mastering (PCI 6.2.2) an active device is known to the loop only when it gets that.
//!
//! What the device's loop is to do is left in [`Orders`], of which each kind is there at most once: a driver cannot fill a queue with them.

use crate::virtio::queue::QueueSetup;
use crate::virtio::{feature, status};

/// "No vector" (virtio 4.1.4.3, VIRTIO_MSI_NO_VECTOR).
pub(in crate::virtio) const NO_VECTOR: u16 = 0xffff;
/// Bytes of the common configuration structure with `queue_reset` (virtio 4.1.4.3).
pub(in crate::virtio) const COMMON_BYTES: usize = 0x3c;

/// Offsets in the structure.
mod field {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(super) const DEVICE_FEATURE: u64 = 0x04;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(super) const DRIVER_FEATURE: u64 = 0x0c;
    pub(super) const CONFIG_VECTOR: u64 = 0x10;
    pub(super) const NUM_QUEUES: u64 = 0x12;
    pub(super) const STATUS: u64 = 0x14;
    pub(super) const CONFIG_GENERATION: u64 = 0x15;
    pub(super) const QUEUE_SELECT: u64 = 0x16;
    pub(super) const QUEUE_SIZE: u64 = 0x18;
    pub(super) const QUEUE_VECTOR: u64 = 0x1a;
    pub(super) const QUEUE_ENABLE: u64 = 0x1c;
    pub(super) const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub(super) const QUEUE_DESC: u64 = 0x20;
    pub(super) const QUEUE_DRIVER: u64 = 0x28;
    pub(super) const QUEUE_DEVICE: u64 = 0x30;
    pub(super) const QUEUE_RESET: u64 = 0x3a;
}

/// Bits of the status register that a driver can set.
const DRIVER_BITS: u8 = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK | status::FAILED;

/// Where a device is between its driver and its loop; drawn in the module's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Resting,
    Active,
    Resetting,
    Broken,
    Dead,
}

/// What the loop is to do with one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::virtio) enum QueueOrder {
    /// It was enabled again after a reset.
    Enable(QueueSetup),
    /// It is to be given up.
    Reset,
}

/// What an active device works with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::virtio) struct Activation {
    /// What the driver accepted.
    pub(in crate::virtio) features: u64,
    /// The queues that it enabled.
    pub(in crate::virtio) queues: Vec<Option<QueueSetup>>,
}

/// What the loop is to do, in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::virtio) struct Orders {
    /// Quiesce the device, then tell by [`Registers::reset_done`].
    pub(in crate::virtio) reset: bool,
    /// The device may not reach memory any more: quiesce it, then tell by [`Registers::broken`].
    pub(in crate::virtio) stop: bool,
    /// Start the device.
    pub(in crate::virtio) activate: Option<Activation>,
    /// Change queues of an active device.
    pub(in crate::virtio) queues: Vec<(u16, QueueOrder)>,
    /// Look at the configuration that the driver wrote.
    pub(in crate::virtio) config_written: bool,
}

/// What follows from a register access.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Effect {
    /// There are orders for the loop.
    pub(super) ring: bool,
    /// The driver is to be told of a changed configuration (or status).
    pub(super) config_interrupt: bool,
    /// A queue was enabled: it needs a doorbell.
    pub(super) enabled: Option<u16>,
    /// Vectors may have changed.
    pub(super) vectors: bool,
    /// All registers are as after power-on.
    pub(super) reset: bool,
}

/// One queue's registers.
#[derive(Clone, Debug)]
pub(super) struct QueueRegisters {
    max: u16,
    setup: QueueSetup,
    pub(super) vector: u16,
    enabled: bool,
    resetting: bool,
    order: Option<QueueOrder>,
}

impl QueueRegisters {
    fn new(max: u16) -> Self {
        Self {
            max,
            setup: QueueSetup {
                size: max,
                ..QueueSetup::default()
            },
            vector: NO_VECTOR,
            enabled: false,
            resetting: false,
            order: None,
        }
    }

    fn reset(&mut self) {
        *self = Self::new(self.max);
    }
}

/// The registers; see the module's head.
#[derive(Debug)]
pub(super) struct Registers {
    offered: u64,
    vectors: u16,
    device_feature_select: u32,
    driver_feature_select: u32,
    accepted: u64,
    status: u8,
    pub(super) config_vector: u16,
    queue_select: u16,
    pub(super) queues: Vec<QueueRegisters>,
    phase: Phase,
    bus_master: bool,
    /// The loop has not yet seen that the device is to be activated.
    activate: bool,
    reset: bool,
    config_written: bool,
}

impl Registers {
    /// The registers of a device that offers the features `offered`, has queues of at most these sizes, and can use `vectors` vectors.
    pub(super) fn new(offered: u64, queue_sizes: &[u16], vectors: u16) -> Self {
        Self {
            offered,
            vectors,
            device_feature_select: 0,
            driver_feature_select: 0,
            accepted: 0,
            status: 0,
            config_vector: NO_VECTOR,
            queue_select: 0,
            queues: queue_sizes.iter().map(|&max| QueueRegisters::new(max)).collect(),
            phase: Phase::Resting,
            bus_master: false,
            activate: false,
            reset: false,
            config_written: false,
        }
    }

    /// The device may reach memory by itself, or may not any more: it is activated when it may, and has to stop when it may not. A loop that did not
    /// look in between notices nothing of a short while without.
    pub(super) fn set_bus_master(&mut self, bus_master: bool) -> Effect {
        let changed = std::mem::replace(&mut self.bus_master, bus_master) != bus_master;
        Effect {
            ring: changed && self.phase == Phase::Active,
            ..Effect::default()
        }
    }

    /// Whether the driver is ready, so that it may be told of changes.
    pub(super) fn driver_ok(&self) -> bool {
        self.status & status::DRIVER_OK != 0 && self.phase != Phase::Resetting
    }

    /// The structure as the driver reads it now.
    pub(super) fn image(&self, config_generation: u8) -> [u8; COMMON_BYTES] {
        let mut image = [0; COMMON_BYTES];
        let mut put = |at: u64, bytes: &[u8]| {
            let at = at as usize;
            image[at..at + bytes.len()].copy_from_slice(bytes);
        };
        let window = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        put(field::DEVICE_FEATURE_SELECT, &self.device_feature_select.to_le_bytes());
        let offered = window(self.offered, self.device_feature_select);
        put(field::DEVICE_FEATURE, &offered.to_le_bytes());
        put(field::DRIVER_FEATURE_SELECT, &self.driver_feature_select.to_le_bytes());
        let accepted = window(self.accepted, self.driver_feature_select);
        put(field::DRIVER_FEATURE, &accepted.to_le_bytes());
        put(field::CONFIG_VECTOR, &self.config_vector.to_le_bytes());
        // At most as many as a u16 counts: their indices are u16.
        put(field::NUM_QUEUES, &(self.queues.len() as u16).to_le_bytes());
        put(field::STATUS, &[self.status]);
        put(field::CONFIG_GENERATION, &[config_generation]);
        put(field::QUEUE_SELECT, &self.queue_select.to_le_bytes());
        // A queue that does not exist has size 0 (virtio 4.1.5.1.3).
        let Some(queue) = self.queues.get(usize::from(self.queue_select)) else {
            return image;
        };
        put(field::QUEUE_SIZE, &queue.setup.size.to_le_bytes());
        put(field::QUEUE_VECTOR, &queue.vector.to_le_bytes());
        put(field::QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
        put(field::QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
        put(field::QUEUE_DESC, &queue.setup.descriptors.to_le_bytes());
        put(field::QUEUE_DRIVER, &queue.setup.available.to_le_bytes());
        put(field::QUEUE_DEVICE, &queue.setup.used.to_le_bytes());
        put(field::QUEUE_RESET, &u16::from(queue.resetting).to_le_bytes());
        image
    }

    /// Takes a write to the structure. A driver writes whole fields (virtio 4.1.3.1), 64-bit ones also by halves; all else is dropped.
    pub(super) fn write(&mut self, at: u64, data: &[u8]) -> Effect {
        match *data {
            [byte] if at == field::STATUS => self.write_status(byte),
            [a, b] => self.write_half(at, u16::from_le_bytes([a, b])),
            [a, b, c, d] => {
                self.write_word(at, u32::from_le_bytes([a, b, c, d]));
                Effect::default()
            }
            [a, b, c, d, e, f, g, h] if at.is_multiple_of(8) && at >= field::QUEUE_DESC => {
                self.write_word(at, u32::from_le_bytes([a, b, c, d]));
                self.write_word(at + 4, u32::from_le_bytes([e, f, g, h]));
                Effect::default()
            }
            _ => Effect::default(),
        }
    }

    fn write_word(&mut self, at: u64, value: u32) {
        match at {
            field::DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            field::DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            // What was agreed on stays so (virtio 3.1.1).
            field::DRIVER_FEATURE if self.status & status::FEATURES_OK == 0 => {
                let shift = match self.driver_feature_select {
                    0 => 0,
                    1 => 32,
                    // Bits that nobody offers: remembered as one that nobody may accept.
                    _ if value == 0 => return,
                    _ => {
                        self.accepted |= 1 << 63;
                        return;
                    }
                };
                self.accepted = self.accepted & !(0xffff_ffff << shift) | u64::from(value) << shift;
            }
            _ => self.write_address(at, value),
        }
    }

    fn write_address(&mut self, at: u64, value: u32) {
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return;
        };
        if queue.enabled || queue.resetting {
            return;
        }
        let place = match at & !7 {
            field::QUEUE_DESC => &mut queue.setup.descriptors,
            field::QUEUE_DRIVER => &mut queue.setup.available,
            field::QUEUE_DEVICE => &mut queue.setup.used,
            _ => return,
        };
        match at & 7 {
            0 => *place = *place & !0xffff_ffff | u64::from(value),
            4 => *place = *place & 0xffff_ffff | u64::from(value) << 32,
            _ => {}
        }
    }

    fn write_half(&mut self, at: u64, value: u16) -> Effect {
        // A vector that does not exist reads back as none (virtio 4.1.5.1.2).
        let vector = if value < self.vectors { value } else { NO_VECTOR };
        let changed = Effect {
            vectors: true,
            ..Effect::default()
        };
        match at {
            field::QUEUE_SELECT => self.queue_select = value,
            field::CONFIG_VECTOR => {
                self.config_vector = vector;
                return changed;
            }
            _ => {
                let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
                    return Effect::default();
                };
                match (at, value) {
                    (field::QUEUE_VECTOR, _) => {
                        queue.vector = vector;
                        return changed;
                    }
                    (field::QUEUE_SIZE, size)
                        if !queue.enabled && !queue.resetting && size.is_power_of_two() && size <= queue.max =>
                    {
                        queue.setup.size = size;
                    }
                    (field::QUEUE_ENABLE, 1) => return self.enable_queue(),
                    (field::QUEUE_RESET, 1) => return self.reset_queue(),
                    _ => {}
                }
            }
        }
        Effect::default()
    }

    fn enable_queue(&mut self) -> Effect {
        let index = self.queue_select;
        let (phase, ring_reset) = (self.phase, self.accepted & feature::RING_RESET != 0);
        let Some(queue) = self.queues.get_mut(usize::from(index)) else {
            return Effect::default();
        };
        if queue.enabled || queue.resetting {
            return Effect::default();
        }
        match phase {
            Phase::Active if ring_reset => queue.order = Some(QueueOrder::Enable(queue.setup)),
            // Without the feature, queues are enabled before DRIVER_OK (virtio 3.1.1).
            Phase::Active | Phase::Resetting => return Effect::default(),
            Phase::Resting | Phase::Broken | Phase::Dead => {}
        }
        queue.enabled = true;
        Effect {
            enabled: Some(index),
            ring: phase == Phase::Active,
            ..Effect::default()
        }
    }

    fn reset_queue(&mut self) -> Effect {
        let (phase, ring_reset) = (self.phase, self.accepted & feature::RING_RESET != 0);
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return Effect::default();
        };
        if !ring_reset || !queue.enabled || queue.resetting || phase == Phase::Resetting {
            return Effect::default();
        }
        if phase != Phase::Active {
            queue.reset();
            return Effect {
                vectors: true,
                ..Effect::default()
            };
        }
        queue.resetting = true;
        queue.order = Some(QueueOrder::Reset);
        Effect {
            ring: true,
            ..Effect::default()
        }
    }

    fn write_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            return self.request_reset();
        }
        if self.phase == Phase::Resetting {
            return Effect::default();
        }
        // Bits are only ever added until a reset (virtio 2.1.1).
        let mut new = value & DRIVER_BITS & !self.status;
        if new & status::FEATURES_OK != 0 && !self.features_are_fine() {
            new &= !status::FEATURES_OK;
        }
        if new & status::DRIVER_OK != 0 && (self.status | new) & status::FEATURES_OK == 0 {
            new &= !status::DRIVER_OK;
        }
        self.status |= new;
        if new & status::DRIVER_OK == 0 {
            return Effect::default();
        }
        match self.phase {
            Phase::Resting => {
                self.phase = Phase::Active;
                self.activate = true;
                Effect {
                    ring: true,
                    ..Effect::default()
                }
            }
            Phase::Dead => {
                self.status |= status::DEVICE_NEEDS_RESET;
                Effect {
                    config_interrupt: true,
                    ..Effect::default()
                }
            }
            // Those have DRIVER_OK already.
            Phase::Active | Phase::Resetting | Phase::Broken => Effect::default(),
        }
    }

    fn features_are_fine(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & feature::VERSION_1 != 0
    }

    fn request_reset(&mut self) -> Effect {
        match self.phase {
            Phase::Active => {
                self.phase = Phase::Resetting;
                self.activate = false;
                self.reset = true;
                self.queues.iter_mut().for_each(|queue| queue.order = None);
                Effect {
                    ring: true,
                    ..Effect::default()
                }
            }
            Phase::Resetting => Effect::default(),
            Phase::Resting | Phase::Broken => self.power_on(Phase::Resting),
            Phase::Dead => self.power_on(Phase::Dead),
        }
    }

    fn power_on(&mut self, phase: Phase) -> Effect {
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.accepted = 0;
        self.status = 0;
        self.config_vector = NO_VECTOR;
        self.queue_select = 0;
        self.queues.iter_mut().for_each(QueueRegisters::reset);
        self.phase = phase;
        self.activate = false;
        self.reset = false;
        Effect {
            vectors: true,
            reset: true,
            ..Effect::default()
        }
    }

    /// The driver wrote to the configuration.
    pub(super) fn config_was_written(&mut self) -> Effect {
        self.config_written = self.phase != Phase::Dead;
        Effect {
            ring: self.config_written,
            ..Effect::default()
        }
    }

    /// Takes what the loop is to do.
    pub(super) fn take_orders(&mut self) -> Orders {
        let stop = self.phase == Phase::Active && !self.bus_master && !self.activate;
        let may_start = self.bus_master && std::mem::take(&mut self.activate);
        let activate = may_start.then(|| Activation {
            features: self.accepted,
            queues: self
                .queues
                .iter_mut()
                .map(|queue| {
                    // The queue is new to the loop, however often it was enabled.
                    if let Some(QueueOrder::Enable(_)) = queue.order {
                        queue.order = None;
                    }
                    (queue.enabled && !queue.resetting).then_some(queue.setup)
                })
                .collect(),
        });
        let orders = (0..).zip(&mut self.queues);
        Orders {
            // Stays until it is done.
            reset: self.reset,
            stop,
            activate,
            queues: orders
                .filter_map(|(index, queue)| Some((index, queue.order.take()?)))
                .collect(),
            config_written: std::mem::take(&mut self.config_written),
        }
    }

    /// The loop has quiesced the device.
    pub(super) fn reset_done(&mut self) -> Effect {
        if self.phase == Phase::Resetting {
            self.power_on(Phase::Resting)
        } else {
            Effect::default()
        }
    }

    /// The loop has given a queue up.
    pub(super) fn queue_reset_done(&mut self, index: u16) -> Effect {
        match self.queues.get_mut(usize::from(index)) {
            Some(queue) if queue.resetting => queue.reset(),
            _ => return Effect::default(),
        }
        Effect {
            vectors: true,
            ..Effect::default()
        }
    }

    /// The driver broke a rule, and the loop has quiesced the device.
    pub(super) fn broken(&mut self) -> Effect {
        match self.phase {
            Phase::Active => {
                self.phase = Phase::Broken;
                self.give_up()
            }
            // The driver is about to reset it anyway, or has.
            Phase::Resting | Phase::Resetting | Phase::Broken | Phase::Dead => Effect::default(),
        }
    }

    /// The loop is gone.
    pub(super) fn dead(&mut self) -> Effect {
        let before = std::mem::replace(&mut self.phase, Phase::Dead);
        match before {
            Phase::Active => self.give_up(),
            Phase::Resetting => self.power_on(Phase::Dead),
            Phase::Resting | Phase::Broken | Phase::Dead => Effect::default(),
        }
    }

    fn give_up(&mut self) -> Effect {
        self.activate = false;
        self.status |= status::DEVICE_NEEDS_RESET;
        for queue in &mut self.queues {
            queue.order = None;
            if queue.resetting {
                queue.reset();
            }
        }
        Effect {
            config_interrupt: true,
            vectors: true,
            ..Effect::default()
        }
    }

    #[cfg(test)]
    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    #[cfg(test)]
    pub(super) fn status(&self) -> u8 {
        self.status
    }
}

#[cfg(test)]
mod tests;

//! virtio over PCI (virtio 4.1): the function that a driver sees, for any [`VirtioDevice`].
//!
//! ```text
//!   BAR 0, 32 KiB, 64 bits wide             configuration space
//!   0x0000  common configuration            virtio capabilities for each of these, and one that reaches them without the BAR
//!   0x1000  ISR status                      MSI-X capability
//!   0x2000  device configuration
//!   0x3000  doorbells, 4 bytes a queue  ->  ioeventfds, which move with the BAR
//!   0x4000  MSI-X table
//!   0x5000  MSI-X pending bits
//! ```
//!
//! Without bus mastering (PCI 6.2.2) the device sends no message, and starts only when it gets that; one that it is taken from while it works has
//! to be reset, since requests are under way that cannot be finished any more.
//!
//! [`connect`] makes the two halves: [`VirtioPci`] goes on the bus, [`VirtioWorker`] into a dispatch loop.

use std::io;
use std::sync::{Arc, Mutex};

use vm_memory::GuestMemoryMmap;

use super::device::{Reclaim, Transport as _, VirtioDevice};
use super::link::Link;
use super::queue::MAX_SIZE;
use super::worker::VirtioWorker;
use crate::interrupt::{InterruptLine, lock};
use crate::pci::config_space::{BarWidth, ConfigError, ConfigSpace, Identity};
use crate::pci::function::{Doorbells, MsiVectors};
use crate::pci::msix::{PENDING_BYTES, TABLE_BYTES};
use crate::pci::{Bar, PciFunction};

/// The virtio vendor (virtio 4.1.2).
const VENDOR: u16 = 0x1af4;
/// Device ids are this plus the device's number (virtio 4.1.2.1).
const DEVICE_BASE: u16 = 0x1040;
/// The largest number of a device for which there is an id.
const MAX_NUMBER: u16 = 0x3f;
/// Not a transitional device (virtio 4.1.2.1).
const REVISION: u8 = 1;
/// Any subsystem id from 0x40 on marks a device that is not transitional (virtio 4.1.2.1).
const SUBSYSTEM: u16 = 0x40;

/// The BAR that everything lies in.
const BAR: u8 = 0;
/// Its bytes.
pub const BAR_BYTES: u64 = 0x8000;
/// Most queues of a device: their doorbells fill a page.
pub const MAX_QUEUES: usize = 1024;

const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
/// Bytes between the starts of the structures.
const PART: u64 = 0x1000;
/// Bytes a doorbell (notify_off_multiplier).
const NOTIFY_MULTIPLIER: u32 = 4;

/// Vendor-specific capability.
const CAPABILITY: u8 = 0x09;
/// Types of capability (virtio 4.1.4).
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI: u8 = 5;
/// Where a capability has its BAR, offset, length, and what follows them.
const CAP_BAR: u16 = 4;
const CAP_OFFSET: u16 = 8;
const CAP_LENGTH: u16 = 12;
const CAP_DATA: u16 = 16;

/// What a device needs of its wiring.
#[derive(Clone)]
pub struct Wiring {
    /// Guest memory.
    pub memory: GuestMemoryMmap,
    /// Gives pages of it back.
    pub reclaim: Arc<dyn Reclaim>,
    /// Ways for its messages.
    pub vectors: Arc<dyn MsiVectors>,
    /// Where its queues are rung for.
    pub doorbells: Arc<dyn Doorbells>,
    /// Its interrupt pin, for drivers without MSI-X.
    pub line: Arc<dyn InterruptLine>,
}

/// Why a device cannot be connected.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// PCI has no id for the device's number (virtio 4.1.2).
    #[error("a device of number {0}: PCI has ids up to {MAX_NUMBER}")]
    Number(u16),
    /// The device has more queues than there are doorbells.
    #[error("{0} queues are too many: {MAX_QUEUES} are possible")]
    Queues(usize),
    /// A queue's size is not possible (virtio 2.7).
    #[error("queue {queue}: a size of {size}; it has to be a power of two up to {MAX_SIZE}")]
    QueueSize {
        /// The queue's index.
        queue: usize,
        /// What the device wants.
        size: u16,
    },
    /// The device's configuration does not fit.
    #[error("{0} bytes of configuration are too many: {PART} are possible")]
    Config(usize),
    /// Its capabilities do not fit.
    #[error(transparent)]
    Space(#[from] ConfigError),
    /// The host has no more descriptors.
    #[error("no resources: {0}")]
    Host(#[from] io::Error),
}

/// Makes a function whose pin is `interrupt_pin` (1 to 4), and the worker that runs its device.
///
/// # Errors
///
/// [`ConnectError`].
pub fn connect(
    device: Box<dyn VirtioDevice>,
    wiring: Wiring,
    interrupt_pin: u8,
) -> Result<(Arc<VirtioPci>, VirtioWorker), ConnectError> {
    let kind = device.kind();
    if kind.id() > MAX_NUMBER {
        return Err(ConnectError::Number(kind.id()));
    }
    let sizes = device.queue_sizes();
    let queues = sizes.len();
    if queues > MAX_QUEUES {
        return Err(ConnectError::Queues(queues));
    }
    let impossible = |size: &u16| !size.is_power_of_two() || *size > MAX_SIZE;
    if let Some(queue) = sizes.iter().position(impossible) {
        let size = sizes[queue];
        return Err(ConnectError::QueueSize { queue, size });
    }
    let link = Arc::new(Link::new(&*device, wiring.vectors, wiring.line)?);
    let config = link.config_len();
    if config as u64 > PART {
        return Err(ConnectError::Config(config));
    }
    let mut space = ConfigSpace::new(&Identity {
        vendor: VENDOR,
        device: DEVICE_BASE + kind.id(),
        revision: REVISION,
        class: kind.pci_class(),
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM + kind.id(),
        interrupt_pin,
    });
    space.add_bar(BAR, BarWidth::Bits64, BAR_BYTES)?;
    let msix = link
        .msix()
        .add_capability(&mut space, BAR, TABLE as u32, PENDING as u32)?;
    let bells = NOTIFY_MULTIPLIER * queues.max(1) as u32;
    add(&mut space, CAP_COMMON, COMMON, PART as u32, &[])?;
    add(&mut space, CAP_NOTIFY, NOTIFY, bells, &NOTIFY_MULTIPLIER.to_le_bytes())?;
    add(&mut space, CAP_ISR, ISR, 1, &[])?;
    if config > 0 {
        add(&mut space, CAP_DEVICE, DEVICE, config as u32, &[])?;
    }
    let window = add_window(&mut space)?;
    let function = Arc::new(VirtioPci {
        link: Arc::clone(&link),
        space: Mutex::new(space),
        msix,
        window,
        doorbells: wiring.doorbells,
        bells: Mutex::new(Bells {
            base: None,
            attached: vec![false; queues],
        }),
    });
    let worker = VirtioWorker::new(link, device, wiring.memory, wiring.reclaim);
    Ok((function, worker))
}

/// Adds a capability that says where a structure lies (virtio 4.1.4).
fn add(space: &mut ConfigSpace, kind: u8, offset: u64, len: u32, more: &[u8]) -> Result<u16, ConfigError> {
    let mut body = vec![(CAP_DATA + more.len() as u16) as u8, kind, BAR, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend(len.to_le_bytes());
    body.extend(more);
    space.add_capability(CAPABILITY, &body, &[])
}

/// Adds the capability that reaches BARs through configuration space (virtio 4.1.4.9).
fn add_window(space: &mut ConfigSpace) -> Result<u16, ConfigError> {
    let mut body = vec![0; usize::from(CAP_DATA + 4 - 2)];
    body[0] = (CAP_DATA + 4) as u8;
    body[1] = CAP_PCI;
    let mut writable = vec![0xff; body.len()];
    // Length, type, and what lies between the BAR's number and the offset.
    for at in [0, 1, 3, 4, 5] {
        writable[at] = 0;
    }
    space.add_capability(CAPABILITY, &body, &writable)
}

/// Which bells ring without anybody's help.
struct Bells {
    /// Where the BAR answers.
    base: Option<u64>,
    attached: Vec<bool>,
}

/// The function on the bus (see the module's head).
pub struct VirtioPci {
    link: Arc<Link>,
    space: Mutex<ConfigSpace>,
    /// Offset of the MSI-X capability.
    msix: u16,
    /// Offset of the capability that reaches BARs.
    window: u16,
    doorbells: Arc<dyn Doorbells>,
    /// Held while doorbells are attached: never taken by the device's thread.
    bells: Mutex<Bells>,
}

impl VirtioPci {
    /// Puts the BAR at `address` and lets it answer, as firmware would.
    pub fn place(&self, address: u64) {
        let mut space = lock(&self.space);
        space.place_bar(BAR, address);
        space.enable_memory();
    }

    fn attach(&self, bells: &mut Bells, queue: u16) {
        let (Some(base), Some(bell)) = (bells.base, self.link.bell(queue)) else {
            return;
        };
        if let Some(attached) = bells.attached.get_mut(usize::from(queue))
            && !*attached
        {
            match self.doorbells.attach(doorbell(base, queue), bell) {
                Ok(()) => *attached = true,
                // Its writes come here, and ring the bell all the same.
                Err(error) => tracing::debug!(%error, queue, "a doorbell takes the long way"),
            }
        }
    }

    /// The BAR's structures; what lies between them reads as 0.
    fn read_part(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let within = offset % PART;
        match offset - within {
            COMMON => self.link.read_common(within, data),
            ISR if within == 0 => data[0] = self.link.read_isr(),
            DEVICE => self.link.read_device_config(within, data),
            TABLE if within < TABLE_BYTES => self.link.msix().read_table(within, data),
            PENDING if within < PENDING_BYTES => self.link.msix().read_pending(within, data),
            _ => {}
        }
    }

    fn write_part(&self, offset: u64, data: &[u8]) {
        let within = offset % PART;
        match offset - within {
            COMMON => {
                if let Some(queue) = self.link.write_common(within, data) {
                    self.attach(&mut lock(&self.bells), queue);
                }
            }
            DEVICE => self.link.write_device_config(within, data),
            NOTIFY => {
                // A page of doorbells has 1024 of them.
                self.link.ring((within / u64::from(NOTIFY_MULTIPLIER)) as u16);
            }
            TABLE if within < TABLE_BYTES => self.link.msix().write_table(within, data),
            _ => {}
        }
    }

    /// What an access to the window's data means: an offset in the BAR and a length, if they make sense (virtio 4.1.4.9).
    fn window_target(&self, space: &ConfigSpace) -> Option<(u64, usize)> {
        let mut bar = [0];
        space.read(self.window + CAP_BAR, &mut bar);
        let offset = u64::from(space.word(self.window + CAP_OFFSET));
        let length = space.word(self.window + CAP_LENGTH);
        let fits = matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length.into()) && offset < BAR_BYTES;
        (bar == [BAR] && fits).then_some((offset, length as usize))
    }

    /// Whether an access meets the window's data.
    fn meets_window(&self, offset: u16, len: usize) -> bool {
        let data = self.window + CAP_DATA;
        offset < data + 4 && usize::from(offset) + len > usize::from(data)
    }
}

fn doorbell(base: u64, queue: u16) -> u64 {
    base + NOTIFY + u64::from(NOTIFY_MULTIPLIER) * u64::from(queue)
}

impl PciFunction for VirtioPci {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        if self.meets_window(offset, data.len()) {
            let target = self.window_target(&lock(&self.space));
            if let Some((at, len)) = target {
                let mut bytes = [0; 4];
                self.read_part(at, &mut bytes[..len]);
                lock(&self.space).set(self.window + CAP_DATA, &bytes);
            }
        }
        let mut space = lock(&self.space);
        space.set_interrupt_status(self.link.pin_pending());
        space.read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let target = {
            let mut space = lock(&self.space);
            space.write(offset, data);
            self.link.msix().follow_control(&space, self.msix);
            self.link.allow_pin(space.pin_enabled());
            self.link.set_bus_master(space.bus_master());
            let target = self
                .window_target(&space)
                .filter(|_| self.meets_window(offset, data.len()));
            target.map(|(at, len)| (at, len, space.word(self.window + CAP_DATA)))
        };
        if let Some((at, len, value)) = target {
            self.write_part(at, &value.to_le_bytes()[..len]);
        }
    }

    fn bars(&self) -> Vec<Bar> {
        let space = lock(&self.space);
        let bars = space.bars();
        bars.filter_map(|(index, size, address)| {
            let address = address?;
            Some(Bar { index, address, size })
        })
        .collect()
    }

    fn bar_moved(&self, _: u8, address: Option<u64>) {
        let mut bells = lock(&self.bells);
        let Bells { base, attached } = &mut *bells;
        if let Some(base) = *base {
            for (queue, attached) in (0..).zip(attached) {
                if std::mem::take(attached)
                    && let Some(bell) = self.link.bell(queue)
                {
                    self.doorbells.detach(doorbell(base, queue), bell);
                }
            }
        }
        *base = address;
        for queue in 0..self.link.queue_count() {
            self.attach(&mut bells, queue);
        }
    }

    fn read_bar(&self, _: u8, offset: u64, data: &mut [u8]) {
        self.read_part(offset, data);
    }

    fn write_bar(&self, _: u8, offset: u64, data: &[u8]) {
        self.write_part(offset, data);
    }
}

impl Drop for VirtioPci {
    /// The doorbells' addresses may be somebody else's soon.
    fn drop(&mut self) {
        self.bar_moved(BAR, None);
    }
}

#[cfg(test)]
mod tests;

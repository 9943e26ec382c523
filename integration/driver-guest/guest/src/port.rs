//! A device's transport: the crate's `PciTransport`, with doorbells that cost one access instead of three, and what tests need beyond
//! it: interrupt vectors, queue reset, the raw registers.

use alloc::format;
use alloc::vec::Vec;

use virtio_drivers::transport::pci::PciTransport;
use virtio_drivers::transport::pci::bus::{ConfigurationAccess, DeviceFunction};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{PhysAddr, Result};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::bus::{self, Access};
use crate::ensure;
use crate::guest::{Failure, Guest};
use crate::heap::Identity;

/// Capability of the vendor's own, whose fourth byte is the structure's type (virtio 4.1.4).
const VENDOR: u8 = 9;
const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
/// Offsets in the common configuration structure (virtio 4.1.4.3).
const CONFIG_VECTOR: u64 = 0x10;
const QUEUES: u64 = 0x12;
const STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFFSET: u64 = 0x1e;
const QUEUE_DESCRIPTORS: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;
const QUEUE_RESET: u64 = 0x3a;
/// The feature of all devices that are not of before virtio 1.0.
const VERSION_1: u64 = 1 << 32;
/// The device wants to be reset after an error (virtio 2.1).
pub(crate) const NEEDS_RESET: u8 = 64;

/// A device's registers, by address.
#[derive(Clone, Copy)]
pub(crate) struct Registers {
    common: u64,
    notify: u64,
    multiplier: u64,
}

impl Registers {
    fn find(config: Access, function: DeviceFunction) -> Option<Self> {
        let mut root = config.root();
        let bars = bus::bars(&mut root, function);
        let (mut common, mut notify) = (None, None);
        for capability in root.capabilities(function).filter(|capability| capability.id == VENDOR) {
            let word = |index: u8| config.read_word(function, capability.offset + 4 * index);
            let Some(bar) = bars.iter().find(|bar| u32::from(bar.index) == word(1) & 0xff) else {
                continue;
            };
            let address = bar.address + u64::from(word(2));
            match (capability.private_header >> 8) as u8 {
                COMMON => common = common.or(Some(address)),
                NOTIFY => notify = notify.or(Some((address, u64::from(word(4))))),
                _ => {}
            }
        }
        let (notify, multiplier) = notify?;
        Some(Self {
            common: common?,
            notify,
            multiplier,
        })
    }

    fn read16(&self, offset: u64) -> u16 {
        // SAFETY: a register in the device's BAR, mapped by `open`.
        unsafe { ((self.common + offset) as *const u16).read_volatile() }
    }

    fn write16(&self, offset: u64, value: u16) {
        // SAFETY: as read16.
        unsafe { ((self.common + offset) as *mut u16).write_volatile(value) }
    }

    fn write32(&self, offset: u64, value: u32) {
        // SAFETY: as read16.
        unsafe { ((self.common + offset) as *mut u32).write_volatile(value) }
    }

    /// How many queues the device has.
    pub(crate) fn queue_count(&self) -> u16 {
        self.read16(QUEUES)
    }

    /// The device status byte.
    pub(crate) fn status(&self) -> u8 {
        // SAFETY: as read16.
        unsafe { ((self.common + STATUS) as *const u8).read_volatile() }
    }

    /// Resets a queue and waits until the device has (virtio 2.6.1); false if it does not within a second.
    pub(crate) fn reset_queue(&self, guest: &mut Guest, queue: u16) -> bool {
        self.write16(QUEUE_SELECT, queue);
        self.write16(QUEUE_RESET, 1);
        guest.within(1000, || self.read16(QUEUE_RESET) == 0) && self.read16(QUEUE_ENABLE) == 0
    }

    /// Has configuration changes signalled by an entry of the MSI-X table; false if the device has no room for that.
    pub(crate) fn set_config_vector(&self, vector: u16) -> bool {
        self.write16(CONFIG_VECTOR, vector);
        self.read16(CONFIG_VECTOR) == vector
    }
}

/// The transport.
pub(crate) struct Port {
    inner: PciTransport,
    pub(crate) registers: Registers,
    doorbells: Vec<u64>,
    /// Entry of the MSI-X table that the queues set from now on use.
    pub(crate) queue_vector: Option<u16>,
}

impl Port {
    /// The device of this kind with this number, counted from 0 in the order of the bus.
    pub(crate) fn open(guest: &mut Guest, kind: DeviceType, number: usize) -> core::result::Result<Self, Failure> {
        let found = guest
            .devices
            .iter()
            .filter(|found| found.kind == kind)
            .nth(number)
            .copied();
        let Some(found) = found else {
            return Err(Failure(format!("there is no {kind:?} device {number}")));
        };
        Self::open_function(guest, found.function)
    }

    /// The device at this place on the bus.
    pub(crate) fn open_function(guest: &mut Guest, function: DeviceFunction) -> core::result::Result<Self, Failure> {
        let mut root = guest.config.root();
        for bar in bus::bars(&mut root, function) {
            let mapped = guest.mapper.map(bar.address >> 30, &guest.memory);
            ensure!(mapped, "its BAR at {:#x} cannot be mapped", bar.address);
        }
        let registers = Registers::find(guest.config, function);
        let registers = registers.ok_or_else(|| Failure(format!("{function} has no virtio registers")))?;
        Ok(Self {
            inner: PciTransport::new::<Identity, _>(&mut root, function)?,
            registers,
            doorbells: Vec::new(),
            queue_vector: None,
        })
    }
}

impl Port {
    /// Takes the device to the point where its queues are set up: with all features of `required` (and version 1), and those of `wanted`
    /// that it has. Returns what was agreed on; `finish_init` comes after the queues.
    pub(crate) fn negotiate(&mut self, required: u64, wanted: u64) -> core::result::Result<u64, Failure> {
        let required = required | VERSION_1;
        self.set_status(DeviceStatus::empty());
        self.set_status(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER);
        let offered = self.read_device_features();
        ensure!(
            offered & required == required,
            "it offers the features {offered:#x} and not all of {required:#x}"
        );
        let agreed = offered & (required | wanted);
        self.write_driver_features(agreed);
        self.set_status(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER | DeviceStatus::FEATURES_OK);
        ensure!(
            self.get_status().contains(DeviceStatus::FEATURES_OK),
            "it refuses the features {agreed:#x}"
        );
        Ok(agreed)
    }

    /// A 64-bit field of the device's configuration.
    pub(crate) fn config64(&self, offset: usize) -> Result<u64> {
        self.inner.read_consistent(|| {
            let low: u64 = self.inner.read_config_space::<u32>(offset)?.into();
            let high: u64 = self.inner.read_config_space::<u32>(offset + 4)?.into();
            Ok(low | high << 32)
        })
    }
}

impl Transport for Port {
    fn device_type(&self) -> DeviceType {
        self.inner.device_type()
    }

    fn read_device_features(&mut self) -> u64 {
        self.inner.read_device_features()
    }

    fn write_driver_features(&mut self, features: u64) {
        self.inner.write_driver_features(features);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.inner.max_queue_size(queue)
    }

    /// One access; the crate's own selects the queue and reads where its doorbell is each time.
    fn notify(&mut self, queue: u16) {
        match self.doorbells.get(usize::from(queue)) {
            // SAFETY: the doorbell's register in the device's BAR.
            Some(&doorbell) if doorbell != 0 => unsafe { (doorbell as *mut u16).write_volatile(queue) },
            _ => self.inner.notify(queue),
        }
    }

    fn get_status(&self) -> DeviceStatus {
        self.inner.get_status()
    }

    /// One bit after the other (virtio 3.1.1): there are devices that take no two at once.
    fn set_status(&mut self, status: DeviceStatus) {
        if status == DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER {
            self.inner.set_status(DeviceStatus::ACKNOWLEDGE);
        }
        self.inner.set_status(status);
    }

    fn set_guest_page_size(&mut self, size: u32) {
        self.inner.set_guest_page_size(size);
    }

    fn requires_legacy_layout(&self) -> bool {
        self.inner.requires_legacy_layout()
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        let registers = self.registers;
        if let Some(vector) = self.queue_vector {
            registers.write16(QUEUE_SELECT, queue);
            registers.write16(QUEUE_VECTOR, vector);
        }
        registers.write16(QUEUE_SELECT, queue);
        registers.write16(QUEUE_SIZE, size as u16);
        // In halves: a 64-bit field is accessed as two of 32 bits (virtio 4.1.3.1), which the crate does not keep to.
        let areas = [
            (QUEUE_DESCRIPTORS, descriptors),
            (QUEUE_DRIVER, driver_area),
            (QUEUE_DEVICE, device_area),
        ];
        for (offset, address) in areas {
            registers.write32(offset, address as u32);
            registers.write32(offset + 4, (address >> 32) as u32);
        }
        registers.write16(QUEUE_ENABLE, 1);
        let offset = u64::from(registers.read16(QUEUE_NOTIFY_OFFSET)) * registers.multiplier;
        let index = usize::from(queue);
        if self.doorbells.len() <= index {
            self.doorbells.resize(index + 1, 0);
        }
        self.doorbells[index] = registers.notify + offset;
    }

    fn queue_unset(&mut self, queue: u16) {
        self.inner.queue_unset(queue);
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.inner.queue_used(queue)
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        self.inner.ack_interrupt()
    }

    fn read_config_generation(&self) -> u32 {
        self.inner.read_config_generation()
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T> {
        self.inner.read_config_space(offset)
    }

    fn write_config_space<T: IntoBytes + Immutable>(&mut self, offset: usize, value: T) -> Result<()> {
        self.inner.write_config_space(offset, value)
    }
}

//! Interrupts as a driver uses them: MSI-X with an entry for the queue, masks, pending bits; the pin with the ISR register and the command register.

use alloc::boxed::Box;
use alloc::format;
use alloc::vec;

use virtio_drivers::device::blk::SECTOR_SIZE;
use virtio_drivers::transport::pci::bus::{Command, ConfigurationAccess, DeviceFunction, Status};
use virtio_drivers::transport::{DeviceType, InterruptStatus, Transport};
use zerocopy::IntoBytes;

use crate::arguments::Arguments;
use crate::block::{Header, READ, RawDisk};
use crate::guest::{Failure, Guest, Outcome};
use crate::{bus, cpu, ensure, machine};

/// Capability ID, and its message control's bits (PCI 3.0, 6.8.2).
const CAPABILITY: u8 = 0x11;
const ENABLE: u32 = 1 << 31;
const MASK_ALL: u32 = 1 << 30;
/// Bit of an entry's vector control.
const MASKED: u32 = 1;
/// Bits that interrupts set (cpu.rs): the messages use a vector that nothing else does, the timer ends waiting.
const MESSAGE: u32 = cpu::HELLO;
const PATIENCE_NS: u32 = 2_000_000_000;
/// How long to look for an interrupt that must not come.
const SILENCE_NS: u32 = 50_000_000;

/// A function's MSI-X capability.
struct Messages {
    config: bus::Access,
    function: DeviceFunction,
    offset: u8,
    table: u64,
    pending: u64,
    entries: u32,
}

impl Messages {
    fn find(guest: &mut Guest, function: DeviceFunction) -> Result<Self, Failure> {
        let config = guest.config;
        let mut root = config.root();
        let bars = bus::bars(&mut root, function);
        let capability = root
            .capabilities(function)
            .find(|capability| capability.id == CAPABILITY);
        let Some(capability) = capability else {
            return Err(Failure("it has no MSI-X".into()));
        };
        let place = |offset: u8| {
            let word = config.read_word(function, capability.offset + offset);
            let bar = bars.iter().find(|bar| u32::from(bar.index) == word & 7)?;
            Some(bar.address + u64::from(word & !7))
        };
        let (Some(table), Some(pending)) = (place(4), place(8)) else {
            return Err(Failure("its MSI-X table is in no BAR".into()));
        };
        Ok(Self {
            config,
            function,
            offset: capability.offset,
            table,
            pending,
            entries: u32::from(capability.private_header & 0x7ff) + 1,
        })
    }

    /// Sets the bits above the capability's header.
    fn control(&mut self, bits: u32) {
        let header = self.config.read_word(self.function, self.offset) & 0x3fff_ffff;
        self.config.write_word(self.function, self.offset, header | bits);
    }

    fn write(&self, entry: u64, word: u64, value: u32) {
        // SAFETY: a register of the table in the device's BAR.
        unsafe { ((self.table + entry * 16 + word * 4) as *mut u32).write_volatile(value) }
    }

    fn is_pending(&self, entry: u64) -> bool {
        // SAFETY: the pending bits in the device's BAR.
        let bits = unsafe { ((self.pending + entry / 64 * 8) as *const u64).read_volatile() };
        bits >> (entry % 64) & 1 != 0
    }
}

/// Waits in hlt for the message; false if the time is over first.
fn came(nanoseconds: u32) -> bool {
    machine::set_timer(nanoseconds);
    loop {
        let bits = cpu::take_pending();
        if bits & MESSAGE != 0 {
            machine::set_timer(0);
            return true;
        }
        if bits & cpu::TIMER != 0 {
            return false;
        }
        cpu::idle();
    }
}

/// The place of the N-th block device.
fn block_function(guest: &Guest, number: usize) -> Result<DeviceFunction, Failure> {
    let mut disks = guest.devices.iter().filter(|found| found.kind == DeviceType::Block);
    match disks.nth(number) {
        Some(found) => Ok(found.function),
        None => Err(Failure("there is no such block device".into())),
    }
}

/// `msix[@N]`: reads of the N-th block device that complete by message: unmasked, with the entry masked (which leaves a pending bit, and a
/// message once it is unmasked), and with the whole function masked. Reports the time from the doorbell to the handler.
pub(crate) fn msix(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let function = block_function(guest, arguments.device)?;
    let mut messages = Messages::find(guest, function)?;
    ensure!(messages.entries >= 2, "{} entries", messages.entries);
    let last = u64::from(messages.entries - 1);
    let vector = cpu::FIRST_VECTOR + MESSAGE.trailing_zeros();
    messages.control(ENABLE);
    messages.write(last, 0, cpu::LAPIC | machine::own_apic_id() << 12);
    messages.write(last, 1, 0);
    messages.write(last, 2, vector);
    messages.write(last, 3, 0);
    let mut disk = RawDisk::open(guest, arguments.device, 0, 0, Some(last as u16))?;
    ensure!(
        disk.port.registers.set_config_vector(0),
        "it takes no vector for its configuration"
    );
    cpu::take_pending();

    let start = guest.now();
    let mut read = Read::begin(&mut disk)?;
    ensure!(came(PATIENCE_NS), "no interrupt");
    let micros = (guest.now() - start) / 1000;
    read.finish(guest, &mut disk)?;

    messages.write(last, 3, MASKED);
    read = Read::begin(&mut disk)?;
    read.finish(guest, &mut disk)?;
    ensure!(!came(SILENCE_NS), "an interrupt from a masked entry");
    ensure!(messages.is_pending(last), "no pending bit");
    messages.write(last, 3, 0);
    ensure!(came(PATIENCE_NS), "no interrupt after unmasking");
    ensure!(!messages.is_pending(last), "the pending bit stays");

    messages.control(ENABLE | MASK_ALL);
    read = Read::begin(&mut disk)?;
    read.finish(guest, &mut disk)?;
    ensure!(!came(SILENCE_NS), "an interrupt from a masked function");
    messages.control(ENABLE);
    ensure!(came(PATIENCE_NS), "no interrupt after unmasking the function");
    messages.control(0);
    Ok(format!("entries={} us={micros}", messages.entries))
}

/// Makes a pin of the IOAPIC send the message's vector to this CPU, or nothing. By edges: the handler at CPL 0 knows no device that it could ask to let
/// go of its pin, so a level would come again for ever.
fn route_pin(pin: u32, open: bool) {
    let (index, data) = (cpu::IOAPIC, cpu::IOAPIC + 0x10);
    let masked = if open { 0 } else { 1 << 16 };
    cpu::mmio_write(&[
        [index, 0x11 + 2 * pin],
        [data, machine::own_apic_id() << 24],
        [index, 0x10 + 2 * pin],
        [data, masked | (cpu::FIRST_VECTOR + MESSAGE.trailing_zeros())],
    ]);
}

/// `intx[@N]:GSI`: reads of the N-th block device without MSI-X, that complete by its interrupt pin, which is pin GSI of the IOAPIC: the pin rises with
/// the first one, stays up until the ISR register is read, and is silent while the command register forbids it.
pub(crate) fn intx(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let pin = arguments.number(0, 0)?;
    let function = block_function(guest, arguments.device)?;
    let mut root = guest.config.root();
    Messages::find(guest, function)?.control(0);
    let mut disk = RawDisk::open(guest, arguments.device, 0, 0, None)?;
    disk.queue.set_dev_notify(true);
    route_pin(pin, true);
    cpu::take_pending();
    let told = |status: Status| status.contains(Status::INTERRUPT_STATUS);

    let mut read = Read::begin(&mut disk)?;
    ensure!(came(PATIENCE_NS), "no interrupt");
    ensure!(told(root.get_status_command(function).0), "no interrupt status");
    read.finish(guest, &mut disk)?;

    // Up already, so it does not rise again.
    read = Read::begin(&mut disk)?;
    read.finish(guest, &mut disk)?;
    ensure!(
        !came(SILENCE_NS),
        "the pin was let go of before the ISR register was read"
    );
    let isr = disk.port.ack_interrupt();
    ensure!(
        isr == InterruptStatus::QUEUE_INTERRUPT,
        "{:#x} in the ISR register",
        isr.bits()
    );
    let isr = disk.port.ack_interrupt();
    ensure!(
        isr.is_empty(),
        "{:#x} in the ISR register after it was read",
        isr.bits()
    );
    ensure!(!told(root.get_status_command(function).0), "the interrupt status stays");
    read = Read::begin(&mut disk)?;
    ensure!(came(PATIENCE_NS), "no interrupt after the ISR register was read");
    read.finish(guest, &mut disk)?;
    disk.port.ack_interrupt();

    let command = root.get_status_command(function).1;
    root.set_command(function, command | Command::INTERRUPT_DISABLE);
    read = Read::begin(&mut disk)?;
    read.finish(guest, &mut disk)?;
    ensure!(!came(SILENCE_NS), "an interrupt that the command register forbids");
    ensure!(
        told(root.get_status_command(function).0),
        "no interrupt status of a pin that is forbidden"
    );
    root.set_command(function, command);
    ensure!(came(PATIENCE_NS), "no interrupt after it was allowed again");
    disk.port.ack_interrupt();
    route_pin(pin, false);
    Ok(alloc::string::String::new())
}

/// A read of the first sector under way.
struct Read {
    header: Box<Header>,
    data: alloc::vec::Vec<u8>,
    status: Box<[u8; 1]>,
    token: u16,
}

impl Read {
    fn begin(disk: &mut RawDisk) -> Result<Self, Failure> {
        let header = Box::new(Header {
            kind: READ,
            reserved: 0,
            sector: 0,
        });
        let (mut data, mut status) = (vec![0; SECTOR_SIZE], Box::new([0xff]));
        // SAFETY: the buffers are on the heap and live until `finish`; moving their owners does not move them.
        let token = unsafe {
            disk.queue
                .add(&[header.as_bytes()], &mut [&mut data, status.as_mut_slice()])
        }?;
        disk.port.notify(0);
        Ok(Self {
            header,
            data,
            status,
            token,
        })
    }

    fn finish(mut self, guest: &mut Guest, disk: &mut RawDisk) -> Result<(), Failure> {
        ensure!(guest.within(10_000, || disk.queue.can_pop()), "a read does not end");
        // SAFETY: the buffers of `begin`.
        unsafe {
            disk.queue.pop_used(
                self.token,
                &[self.header.as_bytes()],
                &mut [&mut self.data, self.status.as_mut_slice()],
            )
        }?;
        ensure!(self.status[0] == 0, "status {}", self.status[0]);
        Ok(())
    }
}

//! The machine as this guest uses it: memory mapping, interrupts, clocks, application processors, power.

use core::cell::UnsafeCell;
use core::fmt;
use core::sync::atomic::{AtomicU8, AtomicU32, Ordering, fence};

use crate::acpi::{Acpi, Port};
use crate::boot_info::{BootInfo, PhysicalMemory};
use crate::clock::{DateTime, PvClock};
use crate::cpu;

/// Bytes that boot.s maps from address 0 on.
const MAPPED: u64 = 1 << 30;
const GIB_SHIFT: u32 = 30;
const PAGE: u64 = 4096;
/// Most GiB that one page of directory pointers maps.
const MAX_GIB: u64 = 512;

/// Event status of the generic event device: reading clears it, bit 0 is the power button. (`layout::ACPI_GED`)
const GED_STATUS: u16 = 0x604;
/// The sleep control register and the reset register with its value, where the FADT names none. (`layout::ACPI_*`)
const SLEEP_CONTROL: Port = Port(0x600);
const RESET: (Port, u8) = (Port(0x602), 1);
/// SLP_TYP 5 in bits 2-4, SLP_EN in bit 5: ACPI S5.
const SOFT_OFF: u8 = 5 << 2 | 1 << 5;
const I8042_COMMAND: u16 = 0x64;
const I8042_RESET: u8 = 0xfe;
/// IOAPIC pins (GSIs) of the serial port and the generic event device.
const SERIAL_PIN: u32 = 4;
const GED_PIN: u32 = 9;
/// Local APIC registers (Intel SDM volume 3, table 11-1).
const APIC_ID: u32 = cpu::LAPIC + 0x20;
const APIC_SPURIOUS: u32 = cpu::LAPIC + 0xf0;
const APIC_COMMAND: u32 = cpu::LAPIC + 0x300;
const APIC_COMMAND_HIGH: u32 = cpu::LAPIC + 0x310;
const APIC_TIMER: u32 = cpu::LAPIC + 0x320;
const APIC_TIMER_COUNT: u32 = cpu::LAPIC + 0x380;
const APIC_TIMER_DIVIDE: u32 = cpu::LAPIC + 0x3e0;
/// Where application processors start: a page below 1 MiB that holds nothing else.
const START_UP_PAGE: u32 = 0x9_0000;

unsafe extern "C" {
    static mut pdpt: [u64; 512];
    static image_end: u8;
    static ap_trampoline: u8;
    static ap_trampoline_end: u8;
    static ap_id: AtomicU32;
    static ap_greeting: AtomicU32;
    static ap_greeting_len: AtomicU32;
    static boot_apic_id: AtomicU32;
}

/// The memory that boot.s maps, for the parsers.
pub(crate) struct LowMemory;

impl PhysicalMemory for LowMemory {
    fn read(&self, address: u64, into: &mut [u8]) -> bool {
        if address == 0 || address.checked_add(into.len() as u64).is_none_or(|end| end > MAPPED) {
            return false;
        }
        for (byte, address) in into.iter_mut().zip(address..) {
            // SAFETY: mapped, not null; whatever is there (memory, a device, nothing) gives some byte, read volatile because
            // the compiler knows no object there.
            *byte = unsafe { (address as usize as *const u8).read_volatile() };
        }
        true
    }
}

/// Maps memory above the first GiB, from free pages behind the image, and knows which memory is free.
pub(crate) struct Mapper {
    next_page: u64,
}

impl Mapper {
    /// Nothing mapped yet but what boot.s maps.
    pub(crate) fn new() -> Self {
        Self {
            next_page: ((&raw const image_end) as u64).next_multiple_of(PAGE),
        }
    }

    /// First address that nothing uses.
    pub(crate) fn free_memory(&self) -> u64 {
        self.next_page
    }

    /// Maps the GiB with this number if it is not; false if that cannot be.
    pub(crate) fn map(&mut self, gib: u64, memory: &BootInfo) -> bool {
        if gib >= MAX_GIB {
            return false;
        }
        let entry = (&raw mut pdpt).cast::<u64>().wrapping_add(gib as usize);
        // SAFETY: `gib` is an index into the table, whose page is mapped; this CPU alone changes it.
        if unsafe { entry.read_volatile() } & 1 != 0 {
            return true;
        }
        let (page, end) = (self.next_page, self.next_page + PAGE);
        if end > MAPPED || !memory.is_usable(page, end) {
            return false;
        }
        for index in 0..512 {
            let address = gib << GIB_SHIFT | index << 21;
            // SAFETY: the page is free memory behind the image, mapped, and from here on a page directory's.
            unsafe {
                (page as usize as *mut u64)
                    .add(index as usize)
                    .write_volatile(address | 0xe7)
            };
        }
        // SAFETY: as the read above; the directory is complete. An entry that was not present is in no TLB.
        unsafe { entry.write_volatile(page | 0x67) };
        self.next_page = end;
        true
    }
}

/// The last IOAPIC index and data writes that make a pin send `vector` to this CPU, edge-triggered.
const fn route(pin: u32, vector: u32, apic_id: u32) -> [[u32; 2]; 4] {
    let (index, data) = (cpu::IOAPIC, cpu::IOAPIC + 0x10);
    [
        [index, 0x11 + 2 * pin],
        [data, apic_id << 24],
        [index, 0x10 + 2 * pin],
        [data, vector],
    ]
}

const fn vector(bit: u32) -> u32 {
    cpu::FIRST_VECTOR + bit.trailing_zeros()
}

/// Switches on the local APIC and routes the serial port's and the generic event device's interrupts.
pub(crate) fn enable_interrupts() {
    let own = cpu::mmio_read(APIC_ID) >> 24;
    cpu::mmio_write(&[[APIC_SPURIOUS, 0x100 | cpu::SPURIOUS_VECTOR]]);
    cpu::mmio_write(&route(SERIAL_PIN, vector(cpu::SERIAL), own));
    cpu::mmio_write(&route(GED_PIN, vector(cpu::GED), own));
    // 8 data bits, FIFOs on, OUT2 (which gates the interrupt line), interrupt on received data.
    for (register, value) in [(3, 0x03), (2, 0x01), (4, 0x0b), (1, 0x01)] {
        cpu::outb(cpu::COM1 + register, value);
    }
}

/// Number of IOAPIC pins, if one answers.
pub(crate) fn ioapic_pins() -> Option<u32> {
    cpu::mmio_write(&[[cpu::IOAPIC, 1]]);
    let version = cpu::mmio_read(cpu::IOAPIC + 0x10);
    (version != 0 && version != u32::MAX).then_some((version >> 16 & 0xff) + 1)
}

/// Whether there is a serial port: without one every read gives 0xff, which would look like input without end.
pub(crate) fn serial_present() -> bool {
    cpu::inb(cpu::COM1 + 5) != 0xff
}

/// Whether the serial port keeps what is written to its scratch register.
pub(crate) fn serial_works() -> bool {
    cpu::outb(cpu::COM1 + 7, 0x5a);
    cpu::inb(cpu::COM1 + 7) == 0x5a
}

/// Whether the power button was pressed since the last call. Without the device all bits read as one.
pub(crate) fn power_button_pressed() -> bool {
    let status = cpu::inl(GED_STATUS);
    status != u32::MAX && status & 1 != 0
}

/// Asks for ACPI S5; returns if the VMM lets it.
pub(crate) fn soft_off(acpi: Option<&Acpi>) {
    let Port(port) = acpi.and_then(|acpi| acpi.sleep_control).unwrap_or(SLEEP_CONTROL);
    if port < cpu::PORTS {
        cpu::outb(port, SOFT_OFF);
    }
}

/// Resets by ACPI's register; returns if the VMM lets it.
pub(crate) fn acpi_reset(acpi: Option<&Acpi>) {
    let (Port(port), value) = acpi.and_then(|acpi| acpi.reset).unwrap_or(RESET);
    if port < cpu::PORTS {
        cpu::outb(port, value);
    }
}

/// Resets by the keyboard controller; returns if the VMM lets it.
pub(crate) fn i8042_reset() {
    cpu::outb(I8042_COMMAND, I8042_RESET);
}

/// Configuration register of a PCI function by the ports 0xcf8 and 0xcfc.
pub(crate) fn pci_read(device: u32, function: u32, register: u32) -> u32 {
    cpu::outl(0xcf8, 1 << 31 | device << 11 | function << 8 | register);
    cpu::inl(0xcfc)
}

/// Whether the ports 0xcf8 and 0xcfc answer.
pub(crate) fn pci_ports() -> bool {
    cpu::outl(0xcf8, 1 << 31);
    cpu::inl(0xcf8) == 1 << 31
}

/// The real-time clock's date; `None` without a clock.
pub(crate) fn date() -> Option<DateTime> {
    const REGISTERS: [u8; 9] = [0, 2, 4, 7, 8, 9, 0x32, 0xb, 0xa];
    // An update between two reads shows as a difference, one under way as bit 7 of the last register.
    let read = || Some(cpu::cmos_read(&REGISTERS)).filter(|values| values[8] & 0x80 == 0);
    let settled = |_| read().filter(|&values| read() == Some(values));
    DateTime::from_cmos((0..100).find_map(settled)?)
}

/// KVM's paravirtual clock, where the VMM offers it.
pub(crate) struct MonotonicClock {
    running: Option<bool>,
}

/// The host writes here.
#[repr(C, align(64))]
struct PvClockPage(UnsafeCell<[u32; 8]>);
// SAFETY: one CPU reads it; the host's writes are told by the version, which every read checks.
unsafe impl Sync for PvClockPage {}
static PV_CLOCK: PvClockPage = PvClockPage(UnsafeCell::new([0; 8]));

impl MonotonicClock {
    /// Not looked for yet.
    pub(crate) const fn new() -> Self {
        Self { running: None }
    }

    /// Nanoseconds since the machine was created; `None` without a clock.
    pub(crate) fn now(&mut self) -> Option<u64> {
        if !*self.running.get_or_insert_with(start_pv_clock) {
            return None;
        }
        let word = |index: usize| {
            // SAFETY: `index` is below 8 in every call; volatile because the host writes too.
            unsafe { PV_CLOCK.0.get().cast::<u32>().add(index).read_volatile() }
        };
        let long = |index: usize| u64::from(word(index)) | u64::from(word(index + 1)) << 32;
        (0..1000).find_map(|_| {
            let version = word(0);
            fence(Ordering::Acquire);
            let clock = PvClock {
                tsc: long(2),
                nanoseconds: long(4),
                multiplier: word(6),
                shift: word(7).to_le_bytes()[0] as i8,
            };
            let now = clock.at(cpu::tsc());
            fence(Ordering::Acquire);
            (version & 1 == 0 && version != 0 && word(0) == version).then_some(now)
        })
    }
}

/// Tells KVM where to write the clock; false if the hypervisor is not KVM or offers none.
fn start_pv_clock() -> bool {
    const LEAF: u32 = 0x4000_0000;
    let [_, b, c, d] = cpu::cpuid(LEAF);
    if [b, c, d].map(u32::to_le_bytes).as_flattened() != b"KVMKVMKVM\0\0\0" {
        return false;
    }
    let [features, ..] = cpu::cpuid(LEAF + 1);
    // KVM_FEATURE_CLOCKSOURCE2, KVM_FEATURE_CLOCKSOURCE (Documentation/virt/kvm/x86/cpuid.rst).
    let register = match features {
        _ if features & 1 << 3 != 0 => 0x4b56_4d01,
        _ if features & 1 != 0 => 0x12,
        _ => return false,
    };
    // SAFETY: the register makes the host write 32 bytes to PV_CLOCK, which exists for that; bit 0 switches it on.
    unsafe { cpu::wrmsr(register, PV_CLOCK.0.get() as u64 | 1) };
    true
}

/// Has the local APIC's timer set [`cpu::TIMER`] once, in so many nanoseconds: KVM's APIC bus runs at 1 GHz. 0 stops it.
pub(crate) fn set_timer(nanoseconds: u32) {
    cpu::mmio_write(&[
        [APIC_TIMER, vector(cpu::TIMER)],
        [APIC_TIMER_DIVIDE, 0xb],
        [APIC_TIMER_COUNT, nanoseconds],
    ]);
}

/// This CPU's APIC ID.
pub(crate) fn own_apic_id() -> u32 {
    cpu::mmio_read(APIC_ID) >> 24
}

/// Puts the start-up code below 1 MiB; false if there is no usable memory.
pub(crate) fn place_start_up_code(memory: &BootInfo) -> bool {
    let page = u64::from(START_UP_PAGE);
    if !memory.is_usable(page, page + PAGE) {
        return false;
    }
    let (start, end) = (&raw const ap_trampoline, &raw const ap_trampoline_end);
    for offset in 0..end as usize - start as usize {
        // SAFETY: from this program's code to a page of memory that nothing uses, both mapped.
        unsafe {
            (START_UP_PAGE as usize as *mut u8)
                .add(offset)
                .write_volatile(start.add(offset).read_volatile())
        };
    }
    true
}

/// What the next started CPU prints: static, since a CPU may come late. Text past its end is dropped.
pub(crate) struct Greeting {
    length: usize,
}

static GREETING: [AtomicU8; 32] = [const { AtomicU8::new(0) }; 32];

impl Greeting {
    /// Empty.
    pub(crate) fn new() -> Self {
        Self { length: 0 }
    }
}

impl fmt::Write for Greeting {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            GREETING
                .get(self.length)
                .ok_or(fmt::Error)?
                .store(byte, Ordering::Relaxed);
            self.length += 1;
        }
        Ok(())
    }
}

/// Starts the CPU with this APIC ID (below 255): it prints `greeting` and sets [`cpu::HELLO`].
pub(crate) fn start_cpu(apic_id: u32, greeting: &Greeting) {
    const INIT: u32 = 0x4500;
    const START_UP: u32 = 0x4600 | START_UP_PAGE >> 12;
    // SAFETY: boot.s reserves these words; the application processor reads them once it is started, below.
    let (text, length, boot_id) = unsafe { (&ap_greeting, &ap_greeting_len, &boot_apic_id) };
    text.store(GREETING.as_ptr() as usize as u32, Ordering::Release);
    length.store(greeting.length as u32, Ordering::Release);
    boot_id.store(own_apic_id(), Ordering::Release);
    let to = apic_id << 24;
    cpu::mmio_write(&[
        [APIC_COMMAND_HIGH, to],
        [APIC_COMMAND, INIT],
        [APIC_COMMAND_HIGH, to],
        [APIC_COMMAND, START_UP],
    ]);
}

/// APIC ID that the last CPU to say hello read from its own local APIC.
pub(crate) fn last_hello() -> u32 {
    // SAFETY: boot.s reserves the word; the processor that writes it has told by an interrupt that it has.
    unsafe { &ap_id }.load(Ordering::Acquire)
}

//! Ports, MMIO, the services at CPL 0 (`boot.s`) and the bits that interrupts set.

use core::arch::asm;
use core::sync::atomic::{AtomicU32, Ordering};

/// Set by an interrupt from the serial port.
pub(crate) const SERIAL: u32 = 1;
/// Set by an interrupt from the generic event device.
pub(crate) const GED: u32 = 2;
/// Set by the local APIC's timer.
pub(crate) const TIMER: u32 = 4;
/// Set by an application processor that has said hello.
pub(crate) const HELLO: u32 = 8;

/// First interrupt vector: [`SERIAL`]'s; the others follow in the order of the bits.
pub(crate) const FIRST_VECTOR: u32 = 0x20;
/// Vector that does nothing, for the local APIC's spurious interrupts.
pub(crate) const SPURIOUS_VECTOR: u32 = 0x3f;
/// Local APIC registers (one page).
pub(crate) const LAPIC: u32 = 0xfee0_0000;
/// IOAPIC registers (one page).
pub(crate) const IOAPIC: u32 = 0xfec0_0000;
/// First serial port (16550).
pub(crate) const COM1: u16 = 0x3f8;
/// Ports at and above this one are closed to CPL 3 by the task state's bitmap.
pub(crate) const PORTS: u16 = 0xd00;

// The services' numbers: boot.s lists them in this order.
const IDLE: u64 = 0;
const WRITE: u64 = 1;
const RECEIVE: u64 = 2;
const CMOS: u64 = 3;
const MMIO: u64 = 4;
const CPUID: u64 = 5;
const WRMSR: u64 = 6;
const CRASH: u64 = 7;
const TRIPLE_FAULT: u64 = 8;

unsafe extern "C" {
    static pending: AtomicU32;
}

/// Takes and clears the bits that interrupts have set.
pub(crate) fn take_pending() -> u32 {
    // SAFETY: boot.s reserves the word, and its handlers run only while this CPU waits in the idle service.
    unsafe { &pending }.swap(0, Ordering::Relaxed)
}

/// Waits in hlt for an interrupt; returns at once if one has set a bit that was not taken.
pub(crate) fn idle() {
    // SAFETY: the service keeps every register; it may change `pending`, so memory is not assumed unchanged.
    unsafe { asm!("int3", in("r8") IDLE) }
}

/// Writes a byte to a port below [`PORTS`].
pub(crate) fn outb(port: u16, value: u8) {
    // SAFETY: port output touches no memory of this program.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) }
}

/// Reads a byte from a port below [`PORTS`].
pub(crate) fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: port input touches no memory of this program.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, preserves_flags)) }
    value
}

/// Writes four bytes to a port below [`PORTS`].
pub(crate) fn outl(port: u16, value: u32) {
    // SAFETY: as outb.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) }
}

/// Reads four bytes from a port below [`PORTS`].
pub(crate) fn inl(port: u16) -> u32 {
    let value;
    // SAFETY: as inb.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, preserves_flags)) }
    value
}

/// Sends bytes to the serial port, which is taken to accept them at any rate, as a virtual one does.
pub(crate) fn serial_write(bytes: &[u8]) {
    // SAFETY: the service reads `bytes` and changes the registers named here.
    unsafe {
        asm!("int3", in("r8") WRITE, in("edx") u32::from(COM1), inout("rsi") bytes.as_ptr() => _,
            inout("rcx") bytes.len() => _)
    }
}

/// Takes what the serial port has received, as much as fits; returns how much.
pub(crate) fn serial_read(into: &mut [u8]) -> usize {
    if into.is_empty() {
        return 0;
    }
    let start = into.as_mut_ptr();
    let end: *mut u8;
    // SAFETY: the service writes at most `into.len()` bytes from `start` on and changes the registers named here.
    unsafe {
        asm!("int3", in("r8") RECEIVE, inout("rdi") start => end, inout("rcx") into.len() => _, out("eax") _, out("edx") _)
    }
    end as usize - start as usize
}

/// Reads the CMOS registers that `registers` lists.
pub(crate) fn cmos_read<const N: usize>(registers: &[u8; N]) -> [u8; N] {
    const { assert!(N > 0) };
    let mut values = [0; N];
    // SAFETY: the service reads N bytes, writes N bytes, and changes the registers named here.
    unsafe {
        asm!("int3", in("r8") CMOS, inout("rsi") registers.as_ptr() => _, inout("rdi") values.as_mut_ptr() => _,
            inout("rcx") N => _, out("eax") _)
    }
    values
}

/// Writes `{address, value}` pairs to device registers, in order.
pub(crate) fn mmio_write<const N: usize>(pairs: &[[u32; 2]; N]) {
    const { assert!(N > 0) };
    // SAFETY: the addresses are device registers, never this program's memory; the service reads `pairs` and changes the
    // registers named here.
    unsafe {
        asm!("int3", in("r8") MMIO, inout("rsi") pairs.as_ptr() => _, inout("rcx") N => _, out("eax") _, out("edx") _)
    }
}

/// Reads a device register in the first or the fourth GiB.
pub(crate) fn mmio_read(address: u32) -> u32 {
    // SAFETY: boot.s maps those two; the address is a device register, not this program's memory.
    unsafe { (address as usize as *const u32).read_volatile() }
}

/// CPUID as the VMM set it: EAX, EBX, ECX, EDX.
pub(crate) fn cpuid(leaf: u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u64, u32, u32);
    // SAFETY: the service executes CPUID; RBX, which the compiler keeps for itself, is saved round it.
    unsafe {
        asm!("xchg {b}, rbx", "int3", "xchg {b}, rbx", b = inout(reg) 0u64 => b, in("r8") CPUID,
            inout("eax") leaf => a, inout("ecx") 0 => c, out("edx") d)
    }
    [a, b as u32, c, d]
}

/// Writes a model-specific register; one that the VMM does not know ends in an exception report.
///
/// # Safety
///
/// The register must not change how this program runs; an address in it must be memory that the caller gives up.
pub(crate) unsafe fn wrmsr(register: u32, value: u64) {
    // SAFETY: the service executes WRMSR; the caller answers for the register.
    unsafe { asm!("int3", in("r8") WRMSR, in("ecx") register, in("eax") value as u32, in("edx") (value >> 32) as u32) }
}

/// The time-stamp counter.
pub(crate) fn tsc() -> u64 {
    // SAFETY: every x86-64 CPU has it, and CR4.TSD is clear.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Makes KVM fail to emulate an instruction at CPL 0.
pub(crate) fn crash() -> ! {
    // SAFETY: the service does not return.
    unsafe { asm!("int3", in("r8") CRASH, options(noreturn)) }
}

/// Triple fault.
pub(crate) fn triple_fault() -> ! {
    // SAFETY: the service does not return.
    unsafe { asm!("int3", in("r8") TRIPLE_FAULT, options(noreturn)) }
}

/// Runs for ever, interrupts off, without an exit.
pub(crate) fn spin() -> ! {
    // SAFETY: touches nothing.
    unsafe { asm!("2: pause", "jmp 2b", options(noreturn)) }
}

/// Waits for ever in hlt, whatever comes.
pub(crate) fn halt() -> ! {
    loop {
        idle();
        take_pending();
    }
}

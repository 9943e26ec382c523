//! PCI: finds the virtio devices on bus 0 and gives their BARs addresses where nobody has.

use alloc::format;
use alloc::vec::Vec;

use virtio_drivers::transport::DeviceType;
use virtio_drivers::transport::pci::bus::{
    BarInfo, Cam, Command, ConfigurationAccess, DeviceFunction, MmioCam, PciRoot,
};
use virtio_drivers::transport::pci::virtio_device_type;

use crate::acpi::Acpi;
use crate::arguments::Arguments;
use crate::guest::{Failure, Guest, Outcome};
use crate::{cpu, ensure};

/// ECAM's address where ACPI names none: that of this project's machine and of QEMU's microvm.
const ECAM: u64 = 0xe000_0000;
/// Where BARs go that have no address yet: below both machines' ECAM.
const WINDOW: u64 = 0xc000_0000;
/// Register of the command, 16 bits; the status is behind it.
const COMMAND: u8 = 4;

/// One of the two ways to the configuration space.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Memory-mapped, at this address.
    Ecam(u64),
    /// The ports 0xcf8 and 0xcfc.
    Ports,
}

impl Access {
    /// What `pci=` on the command line says (`ports`, or ECAM's address in hexadecimal), or ACPI, or the usual place.
    pub(crate) fn choose(word: Option<&str>, acpi: Option<&Acpi>) -> Self {
        match word {
            Some("ports") => Self::Ports,
            Some(address) => Self::Ecam(u64::from_str_radix(address.trim_start_matches("0x"), 16).unwrap_or(ECAM)),
            None => Self::Ecam(acpi.and_then(|acpi| acpi.ecam).map_or(ECAM, |(base, _)| base)),
        }
    }

    /// A bus to work with.
    pub(crate) fn root(self) -> PciRoot<Self> {
        PciRoot::new(self)
    }

    /// The crate's own ECAM; made for each access, since it is but an address.
    fn cam(base: u64) -> MmioCam<'static> {
        // SAFETY: ECAM lies in the fourth GiB, which boot.s maps uncached; no reference to it exists.
        unsafe { MmioCam::new(base as *mut u8, Cam::Ecam) }
    }

    /// Bus, device and function, as the ports have them.
    fn address(function: DeviceFunction) -> u64 {
        u64::from(function.bus) << 16 | u64::from(function.device) << 11 | u64::from(function.function) << 8
    }

    fn select(function: DeviceFunction, register: u8) {
        cpu::outl(
            0xcf8,
            1 << 31 | Self::address(function) as u32 | u32::from(register & 0xfc),
        );
    }
}

impl ConfigurationAccess for Access {
    fn read_word(&self, function: DeviceFunction, register: u8) -> u32 {
        match *self {
            Self::Ecam(base) => Self::cam(base).read_word(function, register),
            Self::Ports => {
                Self::select(function, register);
                cpu::inl(0xcfc)
            }
        }
    }

    fn write_word(&mut self, function: DeviceFunction, register: u8, data: u32) {
        match *self {
            // Command alone: what is behind it is not to be written, and not every VMM knows one write for both.
            Self::Ecam(base) if register == COMMAND => {
                let address = base + (Self::address(function) << 4) + u64::from(register);
                // SAFETY: as for the crate's own ECAM.
                unsafe { (address as *mut u16).write_volatile(data as u16) };
            }
            Self::Ecam(base) => Self::cam(base).write_word(function, register, data),
            Self::Ports => {
                Self::select(function, register);
                cpu::outl(0xcfc, data);
            }
        }
    }

    unsafe fn unsafe_clone(&self) -> Self {
        *self
    }
}

/// A virtio device on the bus.
#[derive(Clone, Copy)]
pub(crate) struct Found {
    pub(crate) function: DeviceFunction,
    pub(crate) kind: DeviceType,
}

/// The virtio devices of bus 0, ready to be driven.
pub(crate) fn scan(config: Access) -> Vec<Found> {
    let mut root = config.root();
    let found: Vec<Found> = root
        .enumerate_bus(0)
        .filter_map(|(function, info)| virtio_device_type(&info).map(|kind| Found { function, kind }))
        .collect();
    let mut next = WINDOW;
    for device in &found {
        for bar in bars(&mut root, device.function) {
            next = next.max(if bar.address < ECAM { bar.address + bar.size } else { 0 });
        }
    }
    for device in &found {
        for bar in bars(&mut root, device.function) {
            if bar.address == 0 {
                let address = next.next_multiple_of(bar.size);
                next = address + bar.size;
                move_bar(&mut root, device.function, &bar, address);
            }
        }
        root.set_command(device.function, Command::MEMORY_SPACE | Command::BUS_MASTER);
    }
    found
}

/// A memory BAR.
pub(crate) struct Bar {
    pub(crate) index: u8,
    pub(crate) wide: bool,
    pub(crate) address: u64,
    pub(crate) size: u64,
}

/// A function's memory BARs.
pub(crate) fn bars(root: &mut PciRoot<Access>, function: DeviceFunction) -> Vec<Bar> {
    let all = root.bars(function).unwrap_or_default();
    (0..)
        .zip(all)
        .filter_map(|(index, info)| {
            let info = info?;
            let wide = info.takes_two_entries();
            match info {
                BarInfo::Memory { address, size, .. } if size > 0 => Some(Bar {
                    index,
                    wide,
                    address,
                    size,
                }),
                _ => None,
            }
        })
        .collect()
}

/// Gives a BAR another address.
pub(crate) fn move_bar(root: &mut PciRoot<Access>, function: DeviceFunction, bar: &Bar, address: u64) {
    if bar.wide {
        root.set_bar_64(function, bar.index, address);
    } else {
        root.set_bar_32(function, bar.index, address as u32);
    }
}

/// Compares what ECAM and the ports show of every device.
pub(crate) fn compare_ways(guest: &mut Guest) -> Outcome {
    let ecam = match guest.config {
        Access::Ecam(base) => Access::Ecam(base),
        Access::Ports => Access::choose(None, guest.acpi.as_ref()),
    };
    for device in &guest.devices {
        for register in (0..=252).step_by(4) {
            let (one, other) = (
                ecam.read_word(device.function, register),
                Access::Ports.read_word(device.function, register),
            );
            ensure!(
                one == other,
                "register {register:#x} of {} is {one:#x} by ECAM and {other:#x} by ports",
                device.function
            );
        }
    }
    Ok(format!("devices={}", guest.devices.len()))
}

/// `bar-move[@N]`: the N-th device answers where its BAR was moved to, and no longer where it was.
pub(crate) fn bar_move(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let Some(device) = guest.devices.get(arguments.device).copied() else {
        return Err(Failure("there is no such device".into()));
    };
    let mut root = guest.config.root();
    let bars = bars(&mut root, device.function);
    let Some(bar) = bars.first() else {
        return Err(Failure("it has no BAR".into()));
    };
    let read = |address: u64| {
        // SAFETY: an address of a BAR, or of one that has moved away: a device's register or nothing, never memory.
        unsafe { (address as *const u32).read_volatile() }
    };
    let before = crate::port::Port::open_function(guest, device.function)?
        .registers
        .queue_count();
    // The window's last part, where nobody puts BARs one after the other.
    let target = (ECAM - bar.size).next_multiple_of(bar.size) - 16 * bar.size;
    move_bar(&mut root, device.function, bar, target);
    let after = crate::port::Port::open_function(guest, device.function)?
        .registers
        .queue_count();
    let left = read(bar.address);
    move_bar(&mut root, device.function, bar, bar.address);
    let back = crate::port::Port::open_function(guest, device.function)?
        .registers
        .queue_count();
    ensure!(left == u32::MAX, "its old place still reads {left:#x}");
    ensure!(
        before == after && after == back,
        "queues: {before}, moved {after}, moved back {back}"
    );
    Ok(format!("queues={before} from={:#x} to={target:#x}", bar.address))
}

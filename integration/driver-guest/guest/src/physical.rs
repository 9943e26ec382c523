//! The machine's memory and tables as they are: what is where, bytes that the host sees too, and who the guest is.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use crate::arguments::Arguments;
use crate::boot_info::bytes;
use crate::ensure;
use crate::guest::{Failure, Guest, Outcome};
use crate::machine::LowMemory;

/// How long the host may take, in milliseconds.
const PATIENCE: u64 = 60_000;
/// Where this project's machines have their ACPI tables.
const TABLES: core::ops::Range<u64> = 0xe_0000..0x10_0000;
/// The device that tells the instance id, by its `_HID`, and the name of what it tells (docs/devices.md).
const INSTANCE_DEVICE: [u8; 8] = *b"SEPL0002";
const UNIQUE_ID: [u8; 4] = *b"_UID";
/// StringPrefix (ACPI 20.2.3).
const STRING: u8 = 0x0d;
/// Digits of an instance id, two for each of its 64 bytes.
const DIGITS: usize = 128;
/// Bytes behind `_HID` in which `_UID` is looked for.
const NEAR: u64 = 64;

/// Bytes of memory that the guest may touch.
struct Stretch {
    start: u64,
    size: u64,
}

impl Stretch {
    /// From the command's arguments `first` (the address, decimal or 0x...) and the one behind it; both have to be memory.
    fn of(guest: &mut Guest, arguments: Arguments<'_>, size: u64) -> Result<Self, Failure> {
        let start = arguments.address(0)?;
        let end = start.checked_add(size).filter(|&end| end > start);
        let known = end.is_some_and(|end| guest.memory.is_usable(start, end));
        ensure!(known, "{size} bytes at {start:#x} are not memory");
        for gib in start >> 30..=(start + size - 1) >> 30 {
            ensure!(guest.mapper.map(gib, &guest.memory), "GiB {gib} cannot be mapped");
        }
        Ok(Self { start, size })
    }

    fn read(&self, index: u64) -> u8 {
        // SAFETY: usable memory that `of` has mapped; volatile because the host writes there too.
        unsafe { ((self.start + index) as *const u8).read_volatile() }
    }

    fn write(&self, index: u64, value: u8) {
        // SAFETY: as above; whoever gives the command chooses memory that nothing of this program lies in.
        unsafe { ((self.start + index) as *mut u8).write_volatile(value) }
    }
}

/// `memory`: the usable memory, `mib=`, and the ranges of the map that are, `START-END` in hexadecimal.
pub(crate) fn show(guest: &mut Guest, _: Arguments<'_>) -> Outcome {
    let usable = guest.memory.ranges().iter().filter(|range| range.usable());
    let ranges: Vec<String> = usable
        .map(|range| format!("{:x}-{:x}", range.start, range.end))
        .collect();
    let mib = guest.memory.usable_bytes().div_ceil(1 << 20);
    Ok(format!("mib={mib} ranges={}", ranges.join("+")))
}

/// `mem-sum:ADDRESS:BYTES`: `fnv=` of what is there.
pub(crate) fn sum(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let stretch = Stretch::of(guest, arguments, arguments.number(1, 1)?)?;
    let sum = (0..stretch.size).fold(0xcbf2_9ce4_8422_2325_u64, |sum, index| {
        (sum ^ u64::from(stretch.read(index))).wrapping_mul(0x100_0000_01b3)
    });
    Ok(format!("fnv={sum:016x}"))
}

/// `mem-fill:ADDRESS:BYTES[:SEED]`: byte `i` becomes `(SEED + i) mod 251`.
pub(crate) fn fill(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let stretch = Stretch::of(guest, arguments, arguments.number(1, 1)?)?;
    let seed: u64 = arguments.number(2, 0)?;
    for index in 0..stretch.size {
        stretch.write(index, (seed.wrapping_add(index) % 251) as u8);
    }
    Ok(format!("bytes={}", stretch.size))
}

/// `mem-wait:ADDRESS:VALUE`: until the byte there, which the host writes, is that.
pub(crate) fn wait(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let stretch = Stretch::of(guest, arguments, 1)?;
    let value: u8 = arguments.number(1, 1)?;
    guest.say("waiting mem-wait");
    let came = guest.within(PATIENCE, || stretch.read(0) == value);
    ensure!(came, "it stays {}", stretch.read(0));
    Ok(String::new())
}

/// `instance-id`: `id=`, the 128 digits that the device SEPL0002 tells, or `none` where there is no such device.
pub(crate) fn instance_id(_: &mut Guest, _: Arguments<'_>) -> Outcome {
    let byte = |address: u64| bytes(&LowMemory, address).map_or(0, |[byte]: [u8; 1]| byte);
    let device = TABLES
        .into_iter()
        .find(|&address| bytes(&LowMemory, address) == Some(INSTANCE_DEVICE));
    let Some(device) = device else {
        return Ok("id=none".into());
    };
    let name = (device..device + NEAR).find(|&address| bytes(&LowMemory, address) == Some(UNIQUE_ID));
    let Some(value) = name.map(|name| name + 4).filter(|&value| byte(value) == STRING) else {
        return Err(Failure("the device has no _UID that is a string".into()));
    };
    let digits: String = (value + 1..)
        .take(DIGITS + 1)
        .map(byte)
        .take_while(|&digit| digit != 0)
        .map(char::from)
        .collect();
    ensure!(digits.len() == DIGITS, "the id has {} digits", digits.len());
    Ok(format!("id={digits}"))
}

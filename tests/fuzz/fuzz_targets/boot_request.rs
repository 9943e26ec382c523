//! Whole requests: command lines, sizes of the initramfs, kernels in odd places, changed setup headers.
#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use sepal_fuzz::{Guest, SMALL, Segment, bzimage, elf};
use sepal_vmm_component::boot::Protocol;

#[derive(Arbitrary, Debug)]
struct Request {
    cmdline: String,
    /// Blanks appended, to reach the limits.
    padding: u16,
    /// Bytes of the initramfs, and their value.
    initrd: Option<(u32, u8)>,
    protocol: Option<bool>,
    segments: Vec<Segment>,
    entry: u8,
    /// Changes to the setup header; without any, the kernel is an ELF file.
    setup: Vec<(u8, u8)>,
}

/// More than fits into the guest.
const MAX_INITRD: u32 = 8 << 20;

thread_local!(static GUEST: Guest = Guest::new(SMALL));

fuzz_target!(|request: Request| {
    let mut kernel = elf(request.entry, &request.segments);
    if !request.setup.is_empty() {
        kernel = bzimage(&kernel, &request.setup);
    }
    let initrd = request
        .initrd
        .map(|(size, value)| vec![value; (size % MAX_INITRD) as usize]);
    let cmdline = request.cmdline + &" ".repeat((request.padding % 4096).into());
    let protocol = request
        .protocol
        .map(|pvh| if pvh { Protocol::Pvh } else { Protocol::Linux64 });
    GUEST.with(|guest| guest.load(&kernel, initrd.as_deref(), &cmdline, protocol));
});

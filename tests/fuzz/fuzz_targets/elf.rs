//! ELF kernels: any bytes behind an identification that is accepted.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sepal_fuzz::Guest;

/// 64-bit, little-endian, executable, x86-64.
const IDENTIFICATION: &[u8; 20] = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0";

thread_local!(static GUEST: Guest = Guest::default());

fuzz_target!(|bytes: &[u8]| {
    let mut image = bytes.to_vec();
    let known = image.len().min(IDENTIFICATION.len());
    image[..known].copy_from_slice(&IDENTIFICATION[..known]);
    GUEST.with(|guest| guest.load(&image, None, "console=ttyS0", None));
});

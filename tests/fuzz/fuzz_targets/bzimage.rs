//! bzImages. The first byte chooses: a whole image, or a payload of one of the formats in an image that is right.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sepal_fuzz::{Guest, bzimage};

const MAGICS: [&[u8]; 5] = [
    b"\x7fELF\x02\x01\x01",
    b"\x1f\x8b\x08\0\0\0\0\0\0\x03",
    b"\xfd7zXZ\0",
    b"\x28\xb5\x2f\xfd",
    b"\x02\x21\x4c\x18",
];

thread_local!(static GUEST: Guest = Guest::default());

fuzz_target!(|bytes: &[u8]| {
    let Some((choice, rest)) = bytes.split_first() else {
        return;
    };
    let image = match MAGICS.get(usize::from(*choice)) {
        Some(magic) => bzimage(&[magic, rest].concat(), &[]),
        None => rest.to_vec(),
    };
    GUEST.with(|guest| guest.load(&image, None, "console=ttyS0", None));
});

//! How fast a balloon grows and shrinks.

use alloc::format;
use alloc::vec::Vec;

use virtio_drivers::PAGE_SIZE;
use virtio_drivers::transport::Transport;
use zerocopy::IntoBytes;

use super::{ACTUAL, BATCH, Balloon};
use crate::arguments::Arguments;
use crate::ensure;
use crate::guest::{Guest, Outcome};
use crate::heap;

/// Between neighbours of a scattered order, in pages: odd, so that it reaches every page of a power of two, and far enough apart that no two
/// of a request are neighbours.
const STRIDE: usize = 4099;

/// `balloon-bench:MIB[:scattered]`: inflates by so many MiB (a power of two), which it has written to, when the host asks for them, and deflates
/// when the host asks for none, with as many pages a request and requests at once as Linux. The pages are neighbours, or scattered. Reports microseconds
/// of inflating, of deflating, and of writing to each page after that.
pub(crate) fn bench(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let mib: usize = arguments.number(0, 32)?;
    let scattered = arguments.text(1) == Some("scattered");
    ensure!(
        mib.is_power_of_two() && mib <= 1024,
        "{mib} MiB, not a power of two up to 1024"
    );
    let pages = (mib << 20) / PAGE_SIZE;
    let mut balloon = Balloon::open(guest, arguments.device, 0)?;
    let block = heap::leak_pages(pages);
    let first = (block as usize / PAGE_SIZE) as u32;
    let stride = if scattered { STRIDE } else { 1 };
    let numbers: Vec<u32> = (0..pages)
        .map(|index| first + (index * stride % pages) as u32)
        .collect();
    let write = |value: u8| {
        for page in 0..pages {
            // SAFETY: inside the block, which nothing else refers to; it is the guest's again whenever this is called.
            unsafe { block.add(page * PAGE_SIZE).write_volatile(value) };
        }
    };
    write(1);
    guest.say("waiting balloon-bench inflate");
    balloon.wait(guest, "inflating", |wanted| wanted as usize == pages)?;
    let start = guest.now();
    for piece in numbers.chunks(BATCH) {
        balloon
            .inflate
            .add_notify_wait_pop(&[piece.as_bytes()], &mut [], &mut balloon.port)?;
    }
    let inflated = guest.now();
    balloon.port.write_config_space(ACTUAL, pages as u32)?;
    guest.say("waiting balloon-bench deflate");
    balloon.wait(guest, "deflating", |wanted| wanted == 0)?;
    let again = guest.now();
    for piece in numbers.chunks(BATCH) {
        balloon
            .deflate
            .add_notify_wait_pop(&[piece.as_bytes()], &mut [], &mut balloon.port)?;
    }
    let deflated = guest.now();
    write(2);
    let written = guest.now();
    balloon.port.write_config_space(ACTUAL, 0_u32)?;
    let micros = |from: u64, to: u64| ((to - from) / 1000).max(1);
    Ok(format!(
        "mib={mib} inflate_us={} deflate_us={} write_us={}",
        micros(start, inflated),
        micros(again, deflated),
        micros(deflated, written)
    ))
}

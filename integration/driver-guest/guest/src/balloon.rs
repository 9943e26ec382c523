//! The memory balloon, for which the crate has no driver: the queues of virtio 5.5.

mod bench;

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use virtio_drivers::PAGE_SIZE;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::{DeviceType, Transport};
use zerocopy::IntoBytes;

use crate::arguments::Arguments;
use crate::ensure;
use crate::guest::{Failure, Guest, Outcome};
use crate::heap::{self, Identity};
use crate::port::Port;

pub(crate) use bench::bench;

/// Features (virtio 5.5.3).
const STATISTICS: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const REPORTING: u64 = 1 << 5;
/// Configuration (virtio 5.5.4).
const WANTED: usize = 0;
const ACTUAL: usize = 4;
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
/// Queues after the first two have the numbers of those that are there before them (virtio 5.5.2).
const THIRD: u16 = 2;
/// Page numbers in one request.
const BATCH: usize = 256;
const PATIENCE: u64 = 60_000;

type Queue = VirtQueue<Identity, 16>;

struct Balloon {
    port: Port,
    inflate: Queue,
    deflate: Queue,
    extra: Option<Queue>,
}

impl Balloon {
    fn open(guest: &mut Guest, number: usize, extra: u64) -> Result<Self, Failure> {
        let mut port = Port::open(guest, DeviceType::MemoryBalloon, number)?;
        port.negotiate(extra, DEFLATE_ON_OOM)?;
        let mut queue = |index| Queue::new(&mut port, index, false, false);
        let (inflate, deflate) = (queue(INFLATE)?, queue(DEFLATE)?);
        let extra = if extra == 0 { None } else { Some(queue(THIRD)?) };
        port.finish_init();
        Ok(Self {
            port,
            inflate,
            deflate,
            extra,
        })
    }

    fn wait(&self, guest: &mut Guest, what: &str, condition: impl Fn(u32) -> bool) -> Result<u32, Failure> {
        let mut wanted = 0;
        let came = guest.within(PATIENCE, || {
            wanted = self.port.read_config_space(WANTED).unwrap_or(0);
            condition(wanted)
        });
        ensure!(came, "{what} was not asked for: the host wants {wanted} pages");
        Ok(wanted)
    }
}

/// `balloon[:PAGES]`: gives pages that it has written to, as many as the host asks for (PAGES, or any), then waits until the host asks for
/// none and takes them back.
pub(crate) fn follow(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let pages: u32 = arguments.number(0, 0)?;
    let mut balloon = Balloon::open(guest, arguments.device, 0)?;
    guest.say("waiting balloon inflate");
    let wanted = balloon.wait(guest, "inflating", |wanted| {
        wanted != 0 && (pages == 0 || wanted == pages)
    })?;
    let block = heap::leak_pages(wanted as usize);
    let first = (block as usize / PAGE_SIZE) as u32;
    for page in 0..wanted as usize {
        // SAFETY: inside the block.
        unsafe { block.add(page * PAGE_SIZE).write_volatile(1) };
    }
    guest.say("waiting balloon touched");
    let numbers: Vec<u32> = (first..first + wanted).collect();
    for piece in numbers.chunks(BATCH) {
        balloon
            .inflate
            .add_notify_wait_pop(&[piece.as_bytes()], &mut [], &mut balloon.port)?;
    }
    balloon.port.write_config_space(ACTUAL, wanted)?;
    guest.say(&format!("waiting balloon deflate pages={wanted}"));
    balloon.wait(guest, "deflating", |wanted| wanted == 0)?;
    for piece in numbers.chunks(BATCH) {
        balloon
            .deflate
            .add_notify_wait_pop(&[piece.as_bytes()], &mut [], &mut balloon.port)?;
    }
    balloon.port.write_config_space(ACTUAL, 0_u32)?;
    let mut kept = 0;
    for page in 0..wanted as usize {
        let at = block.wrapping_add(page * PAGE_SIZE);
        // SAFETY: inside the block, which is ours again.
        unsafe {
            kept += u32::from(at.read_volatile() == 1);
            at.write_volatile(2);
            ensure!(at.read_volatile() == 2, "page {page} does not keep what is written");
        }
    }
    Ok(format!("pages={wanted} kept={kept}"))
}

/// One statistic: tag and value, without padding (virtio 5.5.6.3).
fn statistic(into: &mut Vec<u8>, tag: u16, value: u64) {
    into.extend_from_slice(&tag.to_le_bytes());
    into.extend_from_slice(&value.to_le_bytes());
}

/// `balloon-stats[:TIMES]`: answers the host's requests for statistics: free memory (tag 4) is 1000, all memory (tag 5) 2000 plus the
/// number of the answer.
pub(crate) fn statistics(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let times: u64 = arguments.number(0, 1)?;
    let mut balloon = Balloon::open(guest, arguments.device, STATISTICS)?;
    let Some(mut queue) = balloon.extra.take() else {
        return Err(Failure("it has no statistics queue".into()));
    };
    guest.say("waiting balloon-stats");
    // The first buffer is there for the host to ask with; each that it gives back is a question.
    for answer in 0..=times {
        let mut values = Vec::new();
        statistic(&mut values, 4, 1000);
        statistic(&mut values, 5, 2000 + answer);
        let inputs = [values.as_slice()];
        // SAFETY: the buffer lives until it is popped, or until the device was reset by the end of this function.
        let token = unsafe { queue.add(&inputs, &mut []) }?;
        balloon.port.notify(THIRD);
        if answer == times {
            // The host has taken this answer when it has read the buffer, which only its next question tells.
            return Ok(format!("answers={answer}"));
        }
        ensure!(guest.within(PATIENCE, || queue.can_pop()), "no question {answer} came");
        // SAFETY: the buffer that was added.
        unsafe { queue.pop_used(token, &inputs, &mut []) }?;
    }
    Ok(String::new())
}

/// `balloon-report[:MIB]`: writes to so much memory, reports it as free, and says how many of its pages read zero after that.
pub(crate) fn report(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let mib: usize = arguments.number(0, 16)?;
    let mut balloon = Balloon::open(guest, arguments.device, REPORTING)?;
    let Some(mut queue) = balloon.extra.take() else {
        return Err(Failure("it has no reporting queue".into()));
    };
    let bytes = mib << 20;
    let block = heap::leak_pages(bytes / PAGE_SIZE);
    // SAFETY: the block was just made, and nothing else refers to it.
    let memory = unsafe { core::slice::from_raw_parts_mut(block, bytes) };
    memory.fill(0xee);
    guest.say("waiting balloon-report touched");
    for piece in memory.chunks_mut(2 << 20) {
        queue.add_notify_wait_pop(&[], &mut [piece], &mut balloon.port)?;
    }
    let zero = memory.iter().step_by(PAGE_SIZE).filter(|&&byte| byte == 0).count();
    Ok(format!("pages={} zero={zero}", bytes / PAGE_SIZE))
}

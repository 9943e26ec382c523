//! The memory device (virtio-mem, virtio 5.15), for which the crate has no driver.

use alloc::format;

use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::{DeviceType, Transport};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::arguments::Arguments;
use crate::ensure;
use crate::guest::{Failure, Guest, Outcome};
use crate::heap::Identity;
use crate::port::Port;

/// Configuration (virtio 5.15.4).
const BLOCK: usize = 0;
const ADDRESS: usize = 16;
const REGION: usize = 24;
const USABLE: usize = 32;
const PLUGGED: usize = 40;
const REQUESTED: usize = 48;
/// Requests and answers (virtio 5.15.6).
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const STATE: u16 = 3;
const ACK: u16 = 0;
const ERROR: u16 = 3;
const PATIENCE: u64 = 60_000;

#[derive(IntoBytes, Immutable, Default)]
#[repr(C)]
struct Request {
    kind: u16,
    padding: [u16; 3],
    address: u64,
    blocks: u16,
    more_padding: [u16; 3],
}

#[derive(IntoBytes, FromBytes, Immutable, Default)]
#[repr(C)]
struct Response {
    kind: u16,
    padding: [u16; 3],
    state: u16,
}

struct Memory {
    port: Port,
    queue: VirtQueue<Identity, 16>,
}

impl Memory {
    fn request(&mut self, kind: u16, address: u64, blocks: u64) -> Result<Response, Failure> {
        let blocks = u16::try_from(blocks)?;
        let request = Request {
            kind,
            address,
            blocks,
            ..Request::default()
        };
        let mut response = Response::default();
        self.queue
            .add_notify_wait_pop(&[request.as_bytes()], &mut [response.as_mut_bytes()], &mut self.port)?;
        Ok(response)
    }

    fn expect(&mut self, what: &str, expected: u16, kind: u16, address: u64, blocks: u64) -> Result<u16, Failure> {
        let response = self.request(kind, address, blocks)?;
        ensure!(
            response.kind == expected,
            "{what}: answer {} instead of {expected}",
            response.kind
        );
        Ok(response.state)
    }

    fn wait(&self, guest: &mut Guest, what: &str, condition: impl Fn(u64) -> bool) -> Result<u64, Failure> {
        let mut requested = 0;
        let came = guest.within(PATIENCE, || {
            requested = self.port.config64(REQUESTED).unwrap_or(0);
            condition(requested)
        });
        ensure!(came, "{what} was not asked for: the host wants {requested} bytes");
        Ok(requested)
    }
}

/// `mem[:MIB]`: plugs as much as the host asks for (MIB, or any), uses it, checks that requests against the rules are refused, and unplugs
/// when the host asks for none.
pub(crate) fn plug(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let mib: u64 = arguments.number(0, 0)?;
    let mut port = Port::open(guest, DeviceType::Memory, arguments.device)?;
    port.negotiate(0, 0)?;
    let queue = VirtQueue::new(&mut port, 0, false, false)?;
    port.finish_init();
    let (block, base, region) = (port.config64(BLOCK)?, port.config64(ADDRESS)?, port.config64(REGION)?);
    ensure!(
        block > 0 && base.is_multiple_of(block) && region.is_multiple_of(block),
        "blocks of {block:#x}"
    );
    let mut device = Memory { port, queue };
    guest.say("waiting mem plug");
    let requested = device.wait(guest, "plugging", |requested| {
        requested != 0 && (mib == 0 || requested == mib << 20)
    })?;
    let usable = device.port.config64(USABLE)?;
    ensure!(
        requested <= usable && usable <= region,
        "requested {requested:#x}, usable {usable:#x} of {region:#x}"
    );
    let blocks = requested / block;
    device.expect("state before", ACK, STATE, base, blocks)?;
    device.expect("plugging", ACK, PLUG, base, blocks)?;
    let plugged = device.port.config64(PLUGGED)?;
    ensure!(plugged == requested, "plugged {plugged:#x} of {requested:#x}");
    let state = device.expect("state after", ACK, STATE, base, blocks)?;
    ensure!(state == 0, "state {state} instead of plugged");
    device.expect("plugging again", ERROR, PLUG, base, 1)?;
    device.expect("plugging outside", ERROR, PLUG, base + region, 1)?;
    for gib in base >> 30..=(base + requested - 1) >> 30 {
        ensure!(guest.mapper.map(gib, &guest.memory), "GiB {gib} cannot be mapped");
    }
    for address in (base..base + requested).step_by(4096) {
        // SAFETY: plugged memory, mapped, and nothing else is there.
        unsafe { (address as *mut u64).write_volatile(address) };
    }
    for address in (base..base + requested).step_by(4096) {
        // SAFETY: as above.
        let value = unsafe { (address as *const u64).read_volatile() };
        ensure!(value == address, "{value:#x} at {address:#x}");
    }
    guest.say(&format!("waiting mem unplug bytes={plugged}"));
    device.wait(guest, "unplugging", |requested| requested == 0)?;
    device.expect("unplugging", ACK, UNPLUG, base, blocks)?;
    let left = device.port.config64(PLUGGED)?;
    ensure!(left == 0, "{left:#x} still plugged");
    Ok(format!("bytes={plugged} block={block}"))
}

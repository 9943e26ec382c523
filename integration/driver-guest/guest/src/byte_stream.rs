//! The devices that carry plain bytes: entropy and console.

mod bench;

use alloc::format;
use alloc::string::String;
use alloc::vec;

use virtio_drivers::device::console::VirtIOConsole;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::transport::DeviceType;

use crate::arguments::Arguments;
use crate::guest::{Guest, Outcome};
use crate::heap::Identity;
use crate::port::Port;
use crate::{cpu, ensure};

pub(crate) use bench::{ping, serial, take};

/// How long an answer from outside may take, in milliseconds.
const PATIENCE: u64 = 60_000;

/// `rng[:BYTES[:PIECE]]`: so much entropy in requests of so many bytes, which is not all the same byte.
pub(crate) fn entropy(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let (wanted, piece): (usize, usize) = (arguments.number(0, 256)?, arguments.number(1, 64)?);
    let mut device = VirtIORng::<Identity, _>::new(Port::open(guest, DeviceType::EntropySource, arguments.device)?)?;
    let mut histogram = [0_usize; 256];
    let (mut got, mut requests) = (0, 0);
    let start = guest.now();
    while got < wanted {
        let mut buffer = vec![0; piece];
        let count = device.request_entropy(&mut buffer)?;
        ensure!(count > 0 && count <= piece, "{count} bytes for a request of {piece}");
        for &byte in buffer.iter().take(count) {
            histogram[usize::from(byte)] += 1;
        }
        got += count;
        requests += 1;
    }
    let micros = (guest.now() - start) / 1000;
    let most = histogram.iter().max().copied().unwrap_or(0);
    // 256 random bytes hold one value 16 times with a chance below one in a million million.
    ensure!(most < got / 16 + 16, "one byte {most} times among {got}");
    Ok(format!("bytes={got} requests={requests} us={micros}"))
}

/// `console[:TEXT]`: writes TEXT and a line end, then reads a line and reports it.
pub(crate) fn console(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let mut device = VirtIOConsole::<Identity, _>::new(Port::open(guest, DeviceType::Console, arguments.device)?)?;
    let text = arguments.text(0).unwrap_or("hello");
    device.send_bytes(format!("{text}\n").as_bytes())?;
    let mut line = String::new();
    let end = guest.now() + PATIENCE * 1_000_000;
    loop {
        match device.recv(true)? {
            Some(b'\n' | b'\r') if !line.is_empty() => break,
            Some(b'\n' | b'\r') => {}
            Some(byte) => line.push(char::from(byte)),
            None => {
                ensure!(guest.now() < end, "no line came; so far {line:?}");
                core::hint::spin_loop();
            }
        }
    }
    let size = device.size()?.map_or_else(|| "none".into(), |size| format!("{size}"));
    Ok(format!("got={line} size={size}"))
}

/// `serial-line`: reads a line from the serial port and reports it.
pub(crate) fn serial_line(guest: &mut Guest, _: Arguments<'_>) -> Outcome {
    guest.say("waiting serial-line");
    let mut line = String::new();
    let ended = guest.within(PATIENCE, || {
        let mut byte = [0];
        if cpu::serial_read(&mut byte) != 0 && byte != *b"\n" {
            line.push(char::from(byte[0]));
        }
        byte == *b"\n"
    });
    ensure!(ended, "no line came; so far {line:?}");
    Ok(format!("got={}", line.trim_end()))
}

/// `console-bulk[:BYTES[:PIECE]]`: writes so many bytes in pieces, and reports how long that took. The bytes are the counter 0, 1, ...
/// modulo 251.
pub(crate) fn console_bulk(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let (total, piece): (usize, usize) = (arguments.number(0, 1 << 20)?, arguments.number(1, 4096)?);
    let mut device = VirtIOConsole::<Identity, _>::new(Port::open(guest, DeviceType::Console, arguments.device)?)?;
    let mut buffer = vec![0_u8; piece];
    let mut sent = 0;
    let start = guest.now();
    while sent < total {
        let count = piece.min(total - sent);
        for (index, byte) in buffer.iter_mut().take(count).enumerate() {
            *byte = ((sent + index) % 251) as u8;
        }
        device.send_bytes(&buffer[..count])?;
        sent += count;
    }
    let micros = ((guest.now() - start) / 1000).max(1);
    Ok(format!("bytes={sent} us={micros} mb_s={}", sent as u64 / micros))
}

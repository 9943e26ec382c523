//! How fast consoles and the serial port are, with queues of our own: the crate's driver hands out what comes one byte at a time.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::{DeviceType, Transport};

use crate::arguments::Arguments;
use crate::guest::{Failure, Guest, Outcome};
use crate::heap::Identity;
use crate::multiport::Inbox;
use crate::port::Port;
use crate::round_trips::RoundTrips;
use crate::{cpu, ensure};

/// The queues of the first port (virtio 5.3.2).
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Buffers for what comes, and bytes of each: as many bytes as Linux has there.
const BUFFERS: usize = 15;
const BUFFER: usize = 4096;
/// Line status of a 16550, and its bit for room for another byte.
const LINE_STATUS: u16 = cpu::COM1 + 5;
const ROOM: u8 = 1 << 5;
/// Bytes of a line on the serial port.
const LINE: usize = 64;

struct RawConsole {
    port: Port,
    input: Inbox,
    output: Box<VirtQueue<Identity, 16>>,
}

impl RawConsole {
    fn open(guest: &mut Guest, number: usize) -> Result<Self, Failure> {
        let mut port = Port::open(guest, DeviceType::Console, number)?;
        port.negotiate(0, 0)?;
        let mut input = Inbox::new(&mut port, RECEIVE)?;
        let output = Box::new(VirtQueue::new(&mut port, TRANSMIT, false, false)?);
        port.finish_init();
        for _ in 0..BUFFERS {
            input.post(&mut port, vec![0; BUFFER])?;
        }
        Ok(Self { port, input, output })
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.output.add_notify_wait_pop(&[bytes], &mut [], &mut self.port)?;
        Ok(())
    }

    fn receive(&mut self, guest: &mut Guest) -> Result<Vec<u8>, Failure> {
        self.input.take(guest, &mut self.port)
    }
}

fn rate(bytes: usize, nanoseconds: u64) -> String {
    let micros = (nanoseconds / 1000).max(1);
    format!("bytes={bytes} us={micros} mb_s={}", bytes as u64 / micros)
}

/// `console-take[:BYTES]`: reads so many bytes, which are the counter 0, 1, ... modulo 251, and says how long that took from the first on.
pub(crate) fn take(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let total: usize = arguments.number(0, 1 << 20)?;
    let mut console = RawConsole::open(guest, arguments.device)?;
    guest.say("waiting console-take");
    let (mut got, mut start) = (0, 0);
    while got < total {
        let piece = console.receive(guest)?;
        if got == 0 {
            start = guest.now();
        }
        let first = piece.first().copied().map(usize::from);
        ensure!(first == Some(got % 251), "{first:?} after {got} bytes");
        got += piece.len();
    }
    ensure!(got == total, "{got} bytes instead of {total}");
    Ok(rate(got, guest.now() - start))
}

/// `console-ping[:COUNT[:BYTES]]`: sends so many bytes so often, each time when the host has sent the ones before back.
pub(crate) fn ping(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let (count, bytes): (usize, usize) = (arguments.number(0, 1000)?, arguments.number(1, 1)?);
    ensure!((1..=BUFFER).contains(&bytes), "1 to {BUFFER} bytes");
    let mut console = RawConsole::open(guest, arguments.device)?;
    guest.say("waiting console-ping");
    let mut trips = RoundTrips::default();
    for number in 0..count {
        let sent = vec![(number % 251) as u8; bytes];
        trips.time(guest, |guest| {
            console.send(&sent)?;
            let mut got = Vec::new();
            while got.len() < bytes {
                got.extend(console.receive(guest)?);
            }
            ensure!(got == sent, "round trip {number} comes back differently");
            Ok(())
        })?;
    }
    Ok(trips.report())
}

/// `serial-bulk[:BYTES]`: prints so many bytes on the serial port as Linux's console does, which looks for room before each.
pub(crate) fn serial(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let total: usize = arguments.number(0, 16 << 10)?;
    let start = guest.now();
    for index in 1..=total {
        while cpu::inb(LINE_STATUS) & ROOM == 0 {}
        let ends = index % LINE == 0 || index == total;
        cpu::outb(cpu::COM1, if ends { b'\n' } else { b'.' });
    }
    let nanoseconds = (guest.now() - start).max(1);
    let second = total as u64 * 1_000_000_000 / nanoseconds;
    Ok(format!("{} bytes_s={second}", rate(total, nanoseconds)))
}

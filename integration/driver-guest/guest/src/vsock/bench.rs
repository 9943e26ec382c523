//! How long the host takes to answer through a socket.

use alloc::vec;

use super::{Socket, byte};
use crate::arguments::Arguments;
use crate::ensure;
use crate::guest::{Guest, Outcome};
use crate::round_trips::RoundTrips;

/// `vsock-ping:PORT[:COUNT[:BYTES]]`: connects to the host's port, which echoes, and sends so many times so many bytes, each time when the ones before
/// have come back.
pub(crate) fn ping(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let (port, count, bytes): (u32, usize, usize) = (
        arguments.number(0, 1024)?,
        arguments.number(1, 1000)?,
        arguments.number(2, 64)?,
    );
    ensure!((1..=4096).contains(&bytes), "1 to 4096 bytes");
    let mut socket = Socket::open(guest, arguments.device)?;
    socket.connect(guest, port)?;
    let data: vec::Vec<u8> = (0..bytes).map(byte).collect();
    let mut buffer = vec![0; bytes];
    let mut trips = RoundTrips::default();
    for number in 0..count {
        trips.time(guest, |guest| {
            ensure!(socket.send(&data)? == bytes, "the host has no room");
            let mut got = 0;
            while got < bytes {
                let end = socket.poll(guest)?;
                got += socket.receive(&mut buffer[got..])?;
                ensure!(end.is_none(), "the host closed at round trip {number}");
            }
            Ok(())
        })?;
        ensure!(buffer == data, "round trip {number} comes back differently");
    }
    socket.driver.shutdown(socket.peer, socket.port)?;
    while socket.poll(guest)?.is_none() {}
    Ok(trips.report())
}

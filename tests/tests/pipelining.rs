//! Launch, console and first read in one round trip: counted on the wire.
//!
//! ```text
//!   client ---> relay: counts whole messages, passes them on ---> manager
//!   client <--- relay: lets nothing through before the client has said all that it has to say <--- manager
//! ```
//!
//! If any of the calls waited for the answer to another, nothing would ever come back.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: a failure is a panic with a message"
)]

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::mpsc,
    thread,
};

use capnp::{capability::FromClientHook, message::ReaderOptions, serialize};
use capnp_rpc::rpc_capnp::message;
use sepal_schema::{config::GuestConfig, guest_capnp::output, transport::Limits};
use sepal_tests::{PATIENCE, Rpc, World, kvm_missing};

/// Bootstrap, launch, serial, read.
const SAID: [&str; 4] = ["bootstrap", "call", "call", "call"];

/// What kind of message this is.
fn kind(message: &[u8]) -> &'static str {
    let read = serialize::read_message(message, ReaderOptions::new()).unwrap();
    match read.get_root::<message::Reader<'_>>().unwrap().which() {
        Ok(message::Bootstrap(_)) => "bootstrap",
        Ok(message::Call(_)) => "call",
        Ok(message::Return(_)) => "return",
        Ok(message::Finish(_)) => "finish",
        _ => "another",
    }
}

/// Reads one message as it is framed on the wire: its number of segments less one, their sizes in words, and the segments.
fn read_message(from: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4];
    from.read_exact(&mut bytes)?;
    let segments = u32::from_le_bytes(bytes[..4].try_into().unwrap()) as usize + 1;
    let mut sizes = vec![0; (segments | 1) * 4];
    from.read_exact(&mut sizes)?;
    let words: u32 = sizes
        .chunks(4)
        .take(segments)
        .map(|size| u32::from_le_bytes(size.try_into().unwrap()))
        .sum();
    let mut body = vec![0; words as usize * 8];
    from.read_exact(&mut body)?;
    bytes.extend(sizes);
    bytes.extend(body);
    Ok(bytes)
}

#[test]
fn launch_console_and_first_read_are_one_round_trip() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let manager = UnixStream::connect(world.socket()).unwrap();
    let (client, ours) = UnixStream::pair().unwrap();

    let (counted, count) = mpsc::channel();
    let (mut from_client, mut to_manager) = (ours.try_clone().unwrap(), manager.try_clone().unwrap());
    let requests = thread::spawn(move || {
        while let Ok(message) = read_message(&mut from_client) {
            // The receiver is gone once all has been said that is counted.
            let _ = counted.send(kind(&message));
            to_manager.write_all(&message).unwrap();
        }
        let _ = to_manager.shutdown(Shutdown::Write);
    });
    let (mut from_manager, mut to_client) = (manager, ours);
    let answers = thread::spawn(move || {
        let said: Vec<_> = (0..SAID.len())
            .map_while(|_| count.recv_timeout(PATIENCE).ok())
            .collect();
        if said == SAID {
            // Both ends may close at any time from here on.
            let _ = io::copy(&mut from_manager, &mut to_client);
        }
        let _ = to_client.shutdown(Shutdown::Both);
        said
    });

    let mut rpc = Rpc::over(client, Limits::default());
    let config = GuestConfig {
        name: "eager".into(),
        cmdline: "quiet".into(),
        ..GuestConfig::default()
    };
    let mut launch = rpc.manager.launch_request();
    config
        .encode(launch.get().init_config(), &rpc.connection.fds())
        .unwrap();
    let launch = launch.send();
    let guest = launch.pipeline.get_guest();
    let serial = guest.serial_request().send().pipeline.get_serial();
    let read = serial.clone().cast_to::<output::Client>().read_request().send().promise;

    let launched = rpc.wait("launch", launch.promise).unwrap();
    let piece = rpc.wait("the first read", read).unwrap();
    let piece = piece.get().unwrap();
    assert!(!piece.has_error());
    assert!(!piece.get_bytes().unwrap().is_empty(), "the guest's first output");
    assert_eq!(piece.get_position(), 0);

    drop((launched, guest, serial, rpc));
    assert_eq!(answers.join().unwrap(), SAID);
    requests.join().unwrap();
    world.end();
}

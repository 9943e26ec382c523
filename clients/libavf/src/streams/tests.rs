//! The relay between sockets of ours and pipes, as a program would give them.

use std::{
    fs::File,
    io::{PipeReader, PipeWriter, Read, Write, pipe},
    net::Shutdown,
};

use futures::executor::block_on;

use super::*;

/// The guest's ends.
struct Guest {
    serial: UnixStream,
    console: UnixStream,
    log: UnixStream,
}

fn ports() -> (Guest, Ports) {
    let [serial, console, log] = [(); 3].map(|()| UnixStream::pair().unwrap());
    let guest = Guest {
        serial: serial.0,
        console: console.0,
        log: log.0,
    };
    let ports = Ports {
        serial: serial.1,
        console: console.1,
        log: log.1,
    };
    (guest, ports)
}

fn start(ends: Ends) -> (Guest, Relay) {
    let (guest, ports) = ports();
    (guest, Relay::start(ports, Arc::new(ends)).unwrap())
}

fn outputs() -> (PipeReader, PipeReader, Ends) {
    let (out, console_out) = pipe().unwrap();
    let (log_out, log) = pipe().unwrap();
    let ends = Ends {
        console_out: Some(console_out.into()),
        console_in: None,
        log: Some(log.into()),
    };
    (out, log_out, ends)
}

fn read_all(mut from: impl Read) -> String {
    let mut text = String::new();
    from.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn all_that_was_printed_is_written_before_it_is_done() {
    let (out, log, ends) = outputs();
    let (mut guest, mut relay) = start(ends);
    let reader = std::thread::spawn(move || read_all(out));
    let line = "0123456789abcdef\n".repeat(10_000);
    guest.serial.write_all(line.as_bytes()).unwrap();
    guest.log.write_all(b"logged").unwrap();
    drop(guest);
    block_on(relay.done());
    assert_eq!(reader.join().unwrap(), line);
    assert_eq!(read_all(log), "logged");
}

#[test]
fn both_consoles_go_the_same_way() {
    let (mut out, _log, ends) = outputs();
    let (mut guest, _relay) = start(ends);
    for (port, word) in [(&mut guest.serial, b"one"), (&mut guest.console, b"two")] {
        port.write_all(word).unwrap();
        let mut read = [0; 3];
        out.read_exact(&mut read).unwrap();
        assert_eq!(&read, word);
    }
}

#[test]
fn what_is_typed_comes_to_both_ports() {
    let (console_in, mut keys) = pipe().unwrap();
    let (mut guest, mut relay) = start(Ends {
        console_in: Some(console_in.into()),
        ..Ends::default()
    });
    keys.write_all(b"ls\n").unwrap();
    for port in [&mut guest.serial, &mut guest.console] {
        let mut read = [0; 3];
        port.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"ls\n");
    }
    drop(guest);
    block_on(relay.done());
}

#[test]
fn a_port_that_the_guest_does_not_read_does_not_stop_the_other() {
    let (console_in, mut keys) = pipe().unwrap();
    let (mut guest, _relay) = start(Ends {
        console_in: Some(console_in.into()),
        ..Ends::default()
    });
    let typed: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
    let expected = typed.clone();
    let typing = std::thread::spawn(move || keys.write_all(&typed).unwrap());
    let mut read = vec![0; expected.len()];
    guest.console.read_exact(&mut read).unwrap();
    typing.join().unwrap();
    assert!(read == expected);
}

#[test]
fn an_end_of_input_leaves_the_output_alone() {
    let (mut out, _log, mut ends) = outputs();
    ends.console_in = Some(File::open("/dev/null").unwrap().into());
    let (mut guest, _relay) = start(ends);
    guest.console.write_all(b"still here").unwrap();
    let mut read = [0; 10];
    out.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"still here");
}

#[test]
fn a_reader_that_is_gone_does_not_stop_the_guest() {
    let (out, _log, ends) = outputs();
    drop(out);
    let (mut guest, mut relay) = start(ends);
    guest.serial.write_all(&vec![b'x'; 3_000_000]).unwrap();
    drop(guest);
    block_on(relay.done());
}

/// The writing end of a pipe that is full.
fn full(mut to: &PipeWriter) {
    let room = rustix::pipe::fcntl_getpipe_size(to).unwrap();
    to.write_all(&vec![0; room]).unwrap();
}

#[test]
fn a_reader_that_stands_still_holds_up_no_end() {
    let (_out, console_out) = pipe().unwrap();
    full(&console_out);
    let (mut guest, mut relay) = start(Ends {
        console_out: Some(console_out.into()),
        ..Ends::default()
    });
    guest.serial.write_all(b"nobody reads this").unwrap();
    guest.serial.shutdown(Shutdown::Both).unwrap();
    // Told to end, it does, with a byte left to write.
    relay.end();
    block_on(relay.done());
}

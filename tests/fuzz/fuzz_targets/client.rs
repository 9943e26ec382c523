//! A connection's bytes, as a client would send them: framing, limits, the RPC system, and a configuration's decoding.
//!
//! The first byte chooses: the rest is a stream to a served connection, or a message that holds a configuration.
#![no_main]

use std::{
    io::Write,
    os::{fd::OwnedFd, unix::net::UnixStream},
    time::Duration,
};

use libfuzzer_sys::fuzz_target;
use sepal_schema::{
    config::{GuestConfig, Handles},
    config_capnp::guest_config,
    error::{Error, Kind},
    lifecycle_capnp::guest_lifecycle,
    transport::{Limits, Reactor, guard, serve},
};

struct Server;

impl guest_lifecycle::Server for Server {
    async fn create(
        self: capnp::capability::Rc<Self>,
        params: guest_lifecycle::CreateParams,
        _: guest_lifecycle::CreateResults,
    ) -> Result<(), capnp::Error> {
        let _ = GuestConfig::decode(params.get()?.get_config()?, &NoHandles);
        Ok(())
    }
}

struct NoHandles;

impl Handles for NoHandles {
    fn send(&self, _: OwnedFd) -> Result<u32, Error> {
        Err(Error::new(Kind::NotSupported, "no descriptors here"))
    }
    fn take(&self, _: u32) -> Result<OwnedFd, Error> {
        Err(Error::new(Kind::BadConfig, "no descriptors here"))
    }
}

fn stream(bytes: &[u8]) {
    let mut reactor = Reactor::single_threaded().expect("an event loop");
    let handle = reactor.handle();
    let (mut ours, theirs) = UnixStream::pair().expect("a socket pair");
    let server: guest_lifecycle::Client = guard::new_client(Server);
    let connection = serve(&handle, theirs, Limits::default(), server.client).expect("a served socket");
    ours.write_all(&bytes[..bytes.len().min(64 * 1024)])
        .expect("room in the socket");
    drop(ours);
    // Ends with the stream; the limit only catches a server that does not.
    let ended = reactor.run_until(async { handle.timeout(Duration::from_secs(10), connection).await });
    ended
        .expect("an event loop")
        .expect("the connection did not end with its stream");
}

fn configuration(bytes: &[u8]) {
    let mut segment = bytes.to_vec();
    segment.resize(segment.len().next_multiple_of(8), 0);
    let segments = [&segment[..]];
    let array = capnp::message::SegmentArray::new(&segments);
    let message = capnp::message::Reader::new(array, capnp::message::ReaderOptions::new());
    if let Ok(config) = message.get_root::<guest_config::Reader<'_>>() {
        let _ = GuestConfig::decode(config, &NoHandles);
    }
}

fuzz_target!(|bytes: &[u8]| {
    match bytes.split_first() {
        Some((choice, rest)) if choice % 2 == 0 => stream(rest),
        Some((_, rest)) => configuration(rest),
        None => {}
    }
});

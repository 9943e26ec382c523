//! A tap without a kernel's driver, for tests and fuzz targets: sockets that keep packets apart (SOCK_SEQPACKET), whose other ends say what a tap
//! would.

use std::io;
use std::os::fd::OwnedFd;

use vm_memory::VolatileSlice;

use super::super::features;
use super::super::header::Header;
use super::tap::Tap;
use super::{Backend, Received, Room, Sent};

/// See the module's head.
pub(in super::super) struct Packets(Tap);

impl Packets {
    pub(in super::super) fn new(queues: Vec<OwnedFd>) -> Self {
        Self(Tap::unchecked(queues))
    }
}

impl Backend for Packets {
    fn ports(&self) -> &[OwnedFd] {
        self.0.ports()
    }

    fn features(&self) -> u64 {
        features::TAP_OFFLOADS | features::TAP_USO
    }

    fn set_offloads(&mut self, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn receive(&mut self, port: usize, room: &mut Room<'_, '_>) -> Received {
        self.0.receive(port, room)
    }

    fn discard(&mut self, port: usize) -> Received {
        self.0.discard(port)
    }

    fn send(&mut self, port: usize, header: &Header, slices: &[VolatileSlice<'_>]) -> Sent {
        self.0.send(port, header, slices)
    }

    fn flush(&mut self, port: usize) -> Sent {
        self.0.flush(port)
    }
}

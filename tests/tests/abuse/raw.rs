//! Cap'n Proto's RPC protocol as bytes (rpc.capnp), for clients that do not keep to it.

use std::{
    io::{ErrorKind, IoSlice, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::Path,
};

use capnp::{message, serialize, traits::HasTypeId};
use capnp_rpc::rpc_capnp;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use sepal_schema::manager_capnp::guest_manager;
use sepal_tests::PATIENCE;

/// The question that asks for the manager itself.
const BOOTSTRAP: u32 = 0;

/// A connection whose bytes are ours.
pub(crate) struct Raw(UnixStream);

impl Raw {
    /// Connects.
    pub(crate) fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self(stream)
    }

    /// Sends bytes. False once the manager takes no more because it has closed the connection.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> bool {
        match self.0.write_all(bytes) {
            Ok(()) => true,
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => false,
            Err(error) => panic!("the manager neither reads nor closes: {error}"),
        }
    }

    /// Sends as much as goes without waiting; none once the manager has closed the connection.
    pub(crate) fn send_some(&mut self, bytes: &[u8]) -> Option<usize> {
        self.0.set_nonblocking(true).unwrap();
        let sent = self.0.write(bytes);
        self.0.set_nonblocking(false).unwrap();
        match sent {
            Ok(length) => Some(length),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Some(0),
            Err(_) => None,
        }
    }

    /// Sends bytes with descriptors beside them. False once the manager has closed the connection.
    pub(crate) fn send_with(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(250))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        let sent = rustix::net::sendmsg(
            self.0.as_fd(),
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        );
        sent.is_ok()
    }

    /// Waits until the manager closes the connection, and returns what it still said.
    pub(crate) fn closed(&mut self) -> Vec<u8> {
        let mut said = Vec::new();
        match self.0.read_to_end(&mut said) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            Err(error) => panic!("the manager does not close the connection: {error}"),
        }
        said
    }

    /// Reads one byte of whatever comes.
    pub(crate) fn read_byte(&mut self) {
        self.0.read_exact(&mut [0]).unwrap();
    }
}

fn to_bytes(message: &message::Builder<message::HeapAllocator>) -> Vec<u8> {
    serialize::write_message_to_words(message)
}

/// Asks for the manager.
pub(crate) fn bootstrap() -> Vec<u8> {
    let mut message = message::Builder::new_default();
    let root: rpc_capnp::message::Builder<'_> = message.init_root();
    root.init_bootstrap().set_question_id(BOOTSTRAP);
    to_bytes(&message)
}

/// Calls a method of the manager without parameters, by its number.
pub(crate) fn call(question: u32, method: u16) -> Vec<u8> {
    let mut message = message::Builder::new_default();
    let root: rpc_capnp::message::Builder<'_> = message.init_root();
    let mut call = root.init_call();
    call.set_question_id(question);
    call.set_interface_id(guest_manager::Client::TYPE_ID);
    call.set_method_id(method);
    call.reborrow()
        .init_target()
        .init_promised_answer()
        .set_question_id(BOOTSTRAP);
    to_bytes(&message)
}

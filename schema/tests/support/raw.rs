//! A peer that speaks the protocol by hand, to break it in every way.

use std::{
    io::{IoSlice, Read, Write},
    mem::MaybeUninit,
    os::{fd::BorrowedFd, unix::net::UnixStream},
};

use capnp::message::{Builder, ReaderOptions};
use capnp_rpc::rpc_capnp::{message, return_};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

/// The bytes of a message.
pub fn encode(build: impl FnOnce(message::Builder<'_>)) -> Vec<u8> {
    let mut builder = Builder::new_default();
    build(builder.init_root());
    capnp::serialize::write_message_to_words(&builder)
}

pub fn bootstrap(question: u32) -> Vec<u8> {
    encode(|message| message.init_bootstrap().set_question_id(question))
}

/// A call of a method without parameters on the bootstrap capability that `bootstrap` question asked for.
pub fn call(question: u32, bootstrap: u32, interface: u64, method: u16) -> Vec<u8> {
    encode(|message| {
        let mut call = message.init_call();
        call.set_question_id(question);
        call.set_interface_id(interface);
        call.set_method_id(method);
        // No content: all parameters have their defaults.
        call.reborrow().init_params();
        call.init_target().init_promised_answer().set_question_id(bootstrap);
    })
}

pub fn finish(question: u32) -> Vec<u8> {
    encode(|message| {
        let mut finish = message.init_finish();
        finish.set_question_id(question);
        finish.set_release_result_caps(true);
    })
}

/// Sends bytes with descriptors.
pub fn send_with_fds(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    let sent = rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
    assert_eq!(sent, bytes.len());
}

/// What the other side says next: the reason of an abort, or the question that a return answers.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    Return { question: u32, failed: bool },
    Abort(String),
    Other,
    End,
}

pub fn read(socket: &mut UnixStream) -> Said {
    let message = match capnp::serialize::try_read_message(&mut *socket, ReaderOptions::new()) {
        Ok(Some(message)) => message,
        // An end, or a reset: the other side closed with bytes of ours unread.
        Ok(None) | Err(_) => return Said::End,
    };
    match message.get_root::<message::Reader<'_>>().unwrap().which().unwrap() {
        message::Return(ret) => {
            let ret = ret.unwrap();
            let failed = !matches!(ret.which(), Ok(return_::Results(_)));
            Said::Return {
                question: ret.get_answer_id(),
                failed,
            }
        }
        message::Abort(abort) => Said::Abort(abort.unwrap().get_reason().unwrap().to_string().unwrap()),
        _ => Said::Other,
    }
}

/// Writes what the other side takes: it may close in between.
pub fn write(socket: &mut UnixStream, bytes: &[u8]) -> bool {
    socket.write_all(bytes).is_ok()
}

/// Reads to the end, for the reason that an abort gives.
pub fn last_words(socket: &mut UnixStream) -> Option<String> {
    let mut words = None;
    loop {
        match read(socket) {
            Said::Abort(reason) => words = Some(reason),
            Said::End => return words,
            _ => (),
        }
    }
}

/// Waits for the end, whatever comes before.
pub fn drain(socket: &mut UnixStream) {
    let _ = socket.read_to_end(&mut Vec::new());
}

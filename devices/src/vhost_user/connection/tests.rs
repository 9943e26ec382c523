//! A connection against a back end that the test writes by hand.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::*;

fn pair() -> (Connection, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Connection::new(ours.into()), theirs)
}

fn reply(request: u32, payload: &[u8]) -> Vec<u8> {
    let words = [request, 5, payload.len() as u32];
    let mut bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    bytes.extend_from_slice(payload);
    bytes
}

fn replies(connection: &mut Connection) -> Vec<Reply> {
    let answers = connection.progress().unwrap();
    answers.into_iter().map(|answer| answer.reply).collect()
}

#[test]
fn replies_come_in_the_order_of_the_requests_however_they_are_cut() {
    let (mut connection, mut theirs) = pair();
    connection.send(&Request::SetOwner, Vec::new());
    connection.send(&Request::GetFeatures, Vec::new());
    connection.send(&Request::GetVringBase { queue: 1 }, Vec::new());
    assert_eq!(replies(&mut connection), []);
    let mut sent = vec![0; 12 + 12 + 20];
    theirs.read_exact(&mut sent).unwrap();

    let state: Vec<u8> = [1u32, 77].into_iter().flat_map(u32::to_le_bytes).collect();
    let bytes = [reply(1, &5u64.to_le_bytes()), reply(11, &state)].concat();
    let mut got = Vec::new();
    for byte in bytes {
        theirs.write_all(&[byte]).unwrap();
        got.extend(replies(&mut connection));
    }
    assert_eq!(got, [Reply::Value(5), Reply::Base { queue: 1, base: 77 }]);
    assert!(connection.is_idle());
}

#[test]
fn a_back_end_that_is_asked_to_confirm_can_refuse() {
    let (mut connection, mut theirs) = pair();
    connection.ask_to_confirm();
    connection.send(&Request::SetFeatures(1), Vec::new());
    connection.send(&Request::SetFeatures(2), Vec::new());
    theirs.write_all(&reply(2, &0u64.to_le_bytes())).unwrap();
    assert_eq!(replies(&mut connection), [Reply::Done]);
    theirs.write_all(&reply(2, &1u64.to_le_bytes())).unwrap();
    let lost = connection.progress().err().unwrap();
    assert_eq!(lost.to_string(), "the back end answered SET_FEATURES with error 1");
}

#[test]
fn what_was_not_asked_for_ends_the_connection() {
    let (mut connection, mut theirs) = pair();
    theirs.write_all(&reply(1, &[0; 8])).unwrap();
    assert!(matches!(connection.progress(), Err(Lost::Unasked(20))));
}

#[test]
fn a_closed_connection_is_told_from_a_silent_one() {
    let (mut connection, theirs) = pair();
    connection.send(&Request::GetFeatures, Vec::new());
    assert_eq!(replies(&mut connection), []);
    let late = connection.wait(Instant::now(), Duration::ZERO).err().unwrap();
    assert_eq!(late.to_string(), "the back end did not answer GET_FEATURES in 0 ms");
    drop(theirs);
    assert!(matches!(connection.progress(), Err(Lost::Closed)));
}

#[test]
fn a_back_end_that_does_not_read_blocks_nobody() {
    let (mut connection, mut theirs) = pair();
    let mut sent = 0;
    while !connection.wants_to_send() {
        connection.send(&Request::SetFeatures(sent), Vec::new());
        assert_eq!(replies(&mut connection), []);
        sent += 1;
    }
    let mut message = [0; 20];
    for n in 0..sent {
        theirs.read_exact(&mut message).unwrap();
        assert_eq!(message[12..], n.to_le_bytes());
        assert_eq!(replies(&mut connection), []);
    }
    assert!(connection.is_idle());
}

#[test]
fn descriptors_that_nobody_asked_for_do_not_pile_up() {
    let (mut connection, theirs) = pair();
    for n in 0..100u64 {
        connection.send(&Request::GetFeatures, Vec::new());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = [rustix::stdio::stdin(); 4];
        assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
        let bytes = reply(1, &n.to_le_bytes());
        rustix::net::sendmsg(&theirs, &[IoSlice::new(&bytes)], &mut control, SendFlags::empty()).unwrap();
        assert_eq!(replies(&mut connection), [Reply::Value(n)]);
    }
    assert!(connection.descriptors.len() <= DESCRIPTORS_MAX);
}

//! A device in another process whose back end answers anything, and a driver that resets it in the middle.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use sepal_devices::vhost_user::testing::Bench;
use sepal_devices::vhost_user::{ConfigSource, Settings, VhostUser};
use sepal_devices::virtio::device::DeviceKind;

/// How the back end answers one request.
#[derive(Arbitrary, Debug)]
enum Answer {
    /// As it should, with these bits for a number.
    Well(u64),
    /// With a header that is made up, and so many bytes.
    Header { request: u8, flags: u8, size: u16 },
    /// With these bytes; then it hangs up, since nobody knows what is to follow.
    Bytes(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
enum Step {
    Activate,
    Reset,
    ResetQueue(bool),
    Request { queue: bool, bytes: Vec<u8>, room: u16 },
    WriteConfig { offset: u8, bytes: [u8; 4] },
    Events(u8),
    Reconnect(Vec<Answer>),
}

/// A header of a reply.
fn reply(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let words = [request, flags, payload.len() as u32];
    let mut bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    bytes.extend_from_slice(payload);
    bytes
}

/// Rings as the transport has them, and protocol features.
const RINGS: u64 = 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32;

/// A back end that gives these answers, and then hangs up.
fn back_end(answers: Vec<Answer>) -> (UnixStream, JoinHandle<()>) {
    let (ours, mut theirs) = UnixStream::pair().expect("a pair of sockets");
    let thread = std::thread::spawn(move || {
        let mut answers = answers.into_iter();
        let mut header = [0; 12];
        while theirs.read_exact(&mut header).is_ok() {
            let word = |n: usize| u32::from_le_bytes(header[4 * n..4 * n + 4].try_into().expect("four bytes"));
            let (request, flags, size) = (word(0), word(1), word(2));
            let mut payload = vec![0; size as usize];
            if theirs.read_exact(&mut payload).is_err() {
                return;
            }
            let has_answer = matches!(request, 1 | 11 | 15 | 17 | 24 | 31) || flags & 8 != 0;
            if !has_answer {
                continue;
            }
            let bytes = match answers.next() {
                None => return,
                Some(Answer::Well(bits)) => match request {
                    1 => reply(1, 5, &(RINGS | bits).to_le_bytes()),
                    15 | 17 => reply(request, 5, &bits.to_le_bytes()),
                    11 => reply(11, 5, &payload[..8]),
                    24 | 31 => reply(request, 5, &payload),
                    _ => reply(request, 5, &[0; 8]),
                },
                Some(Answer::Header {
                    request: other,
                    flags,
                    size,
                }) => {
                    let request = if other < 128 { request } else { u32::from(other) };
                    reply(request, u32::from(flags), &vec![other; usize::from(size % 400)])
                }
                Some(Answer::Bytes(bytes)) => {
                    let _ = theirs.write_all(&bytes);
                    return;
                }
            };
            if theirs.write_all(&bytes).is_err() {
                return;
            }
        }
    });
    (ours, thread)
}

fuzz_target!(|input: (Vec<Answer>, bool, bool, Vec<Step>)| {
    let (answers, asks, lends, steps) = input;
    let (socket, thread) = back_end(answers);
    let mut threads = vec![thread];
    let settings = Settings {
        kind: DeviceKind::Other(2),
        queue_sizes: vec![16, 16],
        config: if asks {
            ConfigSource::BackEnd
        } else {
            ConfigSource::Given(Default::default())
        },
    };
    if let Ok((device, handle)) = VhostUser::connect(socket.into(), settings) {
        let mut bench = Bench::new(device, lends);
        let mut active = false;
        for step in steps.into_iter().take(30) {
            match step {
                Step::Activate if !active => {
                    bench.activate();
                    active = true;
                }
                Step::Reset => {
                    bench.reset();
                    active = false;
                }
                Step::ResetQueue(queue) if active => bench.reset_queue(queue.into()),
                Step::Request { queue, bytes, room } if active => {
                    bench.request(queue.into(), &bytes[..bytes.len().min(4096)], u32::from(room) % 4096);
                }
                Step::WriteConfig { offset, bytes } if active => bench.write_config(offset.into(), &bytes),
                Step::Events(count) => {
                    for _ in 0..count % 8 {
                        bench.step(0);
                    }
                }
                Step::Reconnect(answers) if threads.len() < 4 => {
                    let (socket, thread) = back_end(answers);
                    threads.push(thread);
                    handle.reconnect(socket.into());
                    bench.step(0);
                }
                _ => {}
            }
        }
    }
    for thread in threads {
        thread.join().expect("the back end does not panic");
    }
});

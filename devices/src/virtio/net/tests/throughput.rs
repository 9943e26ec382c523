//! How fast frames move between rings and the host, without a virtual machine: `cargo test --release -p sepal-devices --lib net::tests::throughput
//! -- --ignored --nocapture --test-threads 1`.

use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::host::{self, GUEST, HOST};
use super::*;

/// How long each case runs.
const TIME: Duration = Duration::from_secs(2);

/// A queue all of whose chains go round and round.
struct Wheel {
    queue: u16,
    used: u16,
}

impl Wheel {
    /// Chains of one buffer of `len` bytes, for the device to read if they hold `contents`.
    fn new(rig: &mut Rig<Net>, queue: u16, len: u32, contents: Option<&[u8]>) -> Self {
        for head in 0..rig.drivers[usize::from(queue)].setup.size {
            let address = rig.allocate(len);
            let flags = if contents.is_some() { 0 } else { 2 };
            if let Some(contents) = contents {
                rig.memory.write_slice(contents, GuestAddress(address)).unwrap();
            }
            rig.write_descriptor(queue, head, address, len, flags, 0);
            rig.make_available(queue, head);
        }
        Self { queue, used: 0 }
    }

    /// Makes what was used available again.
    fn turn(&mut self, rig: &mut Rig<Net>) {
        let setup = rig.drivers[usize::from(self.queue)].setup;
        let used: u16 = rig.memory.read_obj(GuestAddress(setup.used + 2)).unwrap();
        while self.used != used {
            let slot = u64::from(self.used % setup.size);
            let head: u32 = rig.memory.read_obj(GuestAddress(setup.used + 4 + 8 * slot)).unwrap();
            rig.make_available(self.queue, head as u16);
            self.used = self.used.wrapping_add(1);
        }
    }
}

/// Seconds that this thread has had a processor: what tells more than the rate where others want the processors, too.
fn processor_time() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn tell(what: &str, counters: impl Fn() -> NetCounters, mut step: impl FnMut()) {
    let (before, start, used) = (counters(), Instant::now(), processor_time());
    while start.elapsed() < TIME {
        step();
    }
    let (after, seconds, used) = (counters(), start.elapsed().as_secs_f64(), processor_time() - used);
    let frames = (after.frames - before.frames) as f64;
    let bytes = (after.bytes - before.bytes) as f64;
    println!(
        "{what}: {:.0} frames/s, {:.0} MB/s, {:.2} us of a processor for each",
        frames / seconds,
        bytes / seconds / 1e6,
        used / frames * 1e6
    );
}

/// The device sends frames of `len` bytes.
fn sending(what: &str, mut rig: Rig<Net>, handle: &NetHandle, frame: &[u8]) {
    let packet = [&[0; HEADER][..], frame].concat();
    let mut wheel = Wheel::new(&mut rig, TX, packet.len() as u32, Some(&packet));
    tell(
        &format!("{what}, {} bytes", frame.len()),
        || handle.stats().sent,
        || {
            rig.call(|device, context| device.notify(TX, context)).unwrap();
            rig.step().unwrap();
            wheel.turn(&mut rig);
        },
    );
}

/// The device receives what comes.
fn receiving(what: &str, mut rig: Rig<Net>, handle: &NetHandle) {
    let mut wheel = Wheel::new(&mut rig, RX, 2048, None);
    tell(
        what,
        || handle.stats().received,
        || {
            rig.try_kick(RX).unwrap();
            wheel.turn(&mut rig);
        },
    );
}

#[test]
#[ignore = "a measurement"]
fn socket() {
    for len in [60, 1514] {
        let (rig, handle, mut peer) = active();
        peer.0.set_nonblocking(false).unwrap();
        let reader = std::thread::spawn(move || {
            let mut bytes = vec![0; 1 << 18];
            while peer.0.read(&mut bytes).is_ok_and(|len| len > 0) {}
        });
        sending("to a socket", rig, &handle, &frame(1, len));
        reader.join().unwrap();

        let (rig, handle, mut peer) = active();
        peer.0.set_nonblocking(false).unwrap();
        let one = [&(len as u32).to_be_bytes()[..], &frame(1, len)].concat();
        let many = one.repeat((1 << 16) / one.len());
        let writer = std::thread::spawn(move || while peer.0.write_all(&many).is_ok() {});
        receiving(&format!("from a socket, {len} bytes"), rig, &handle);
        writer.join().unwrap();
    }
}

#[test]
#[ignore = "a measurement"]
fn tap() {
    host::alone(|| {
        for len in [60, 1514] {
            let Some(taps) = host::tap(1) else {
                return;
            };
            let (net, handle) = Net::new(config(NetBackend::Tap(taps))).unwrap();
            // A kind of frame that the kernel drops as soon as it has looked at it.
            let mut bytes = frame(1, len);
            bytes[..14].copy_from_slice(&[2, 0, 0, 0, 0, 0x77, 2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
            sending("to a tap", Rig::active(net), &handle, &bytes);
        }
        for (what, len, segment, accepted) in [
            ("from a tap, 60 bytes", 18, 0, u64::MAX),
            ("from a tap, 60 bytes, a simple driver", 18, 0, 0),
            ("from a tap, 1514 bytes", 1472, 0, u64::MAX),
            ("from a tap, 1514 bytes, a simple driver", 1472, 0, 0),
            ("from a tap, segments of 1400 bytes merged", 64400i32, 1400i32, u64::MAX),
        ] {
            let Some(taps) = host::tap(1) else {
                return;
            };
            let (net, handle) = Net::new(config(NetBackend::Tap(taps))).unwrap();
            let socket = UdpSocket::bind((HOST, 0)).unwrap();
            socket.connect((GUEST, 4000)).unwrap();
            // SAFETY: the option takes an int.
            let done =
                unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_UDP, 103, (&raw const segment).cast(), 4) };
            assert_eq!(done, 0);
            let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
            let until = Arc::clone(&stop);
            let writer = std::thread::spawn(move || {
                let payload = vec![1; len as usize];
                while !until.load(std::sync::atomic::Ordering::Relaxed) {
                    // The kernel drops what the tap has no room for.
                    let _ = socket.send(&payload);
                }
            });
            let mut rig = Rig::new(net);
            rig.activate(accepted).unwrap();
            receiving(what, rig, &handle);
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            writer.join().unwrap();
        }
    });
}

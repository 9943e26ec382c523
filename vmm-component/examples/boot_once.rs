//! Times a machine alone: made, started, the first byte on its serial port, torn down.
//!
//! `boot_once [ROUNDS [VCPUS [spare]]]`, 200 rounds of 1 vCPU if not said; `spare` leaves out what can be done ahead of time.
//!
//! The guest writes one byte and resets. What is printed are minimum, median and maximum in microseconds.

#![allow(clippy::expect_used, reason = "what is not as expected fails the program")]

#[path = "../tests/machine/guests.rs"]
#[allow(dead_code, reason = "shared with the tests of the machine")]
mod guests;
#[path = "../tests/machine/rig.rs"]
#[allow(dead_code, reason = "shared with the tests of the machine")]
mod rig;

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use sepal_vmm_component::machine::{Machine, Spare};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default| {
        arguments
            .get(at)
            .map_or(default, |a| a.parse::<usize>().expect("a number"))
    };
    let rounds = number(0, 200).max(1);
    let vcpus = u8::try_from(number(1, 1)).expect("at most 255 vCPUs");
    let ahead = arguments.get(2).is_some_and(|a| a == "spare");
    let Some(kvm) = rig::kvm() else { return };
    let code = guests::hello();
    let mut times: [Vec<u128>; 4] = std::array::from_fn(|_| Vec::with_capacity(rounds));
    for _ in 0..rounds {
        let (mut serial, guest_end) = UnixStream::pair().expect("a socket pair");
        let config = rig::config(&code, vcpus, Some(guest_end.into()));
        let (hooks, _events) = rig::hooks();
        let spare = ahead.then(|| Spare::new(&kvm).expect("a spare machine"));
        let start = Instant::now();
        let spare = spare.unwrap_or_else(|| Spare::new(&kvm).expect("a spare machine"));
        let mut machine =
            Machine::create_from(&kvm, spare, config, hooks, &Arc::default()).expect("the machine is made");
        let made = start.elapsed();
        machine.start().expect("the machine starts");
        let started = start.elapsed();
        serial.read_exact(&mut [0]).expect("a byte");
        let spoke = start.elapsed();
        let ending = Instant::now();
        machine.join(rig::PATIENCE);
        for (list, time) in times.iter_mut().zip([made, started - made, spoke, ending.elapsed()]) {
            list.push(time.as_micros());
        }
    }
    for (name, list) in ["create", "start", "create to first byte", "teardown"]
        .iter()
        .zip(&mut times)
    {
        list.sort_unstable();
        println!("{name:22} {:6} {:6} {:6}", list[0], list[rounds / 2], list[rounds - 1]);
    }
}

//! The list of commands, and running the ones that the command line names.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::arguments::Arguments;
use crate::guest::{Failure, Guest, Outcome};
use crate::{
    balloon, block, bus, byte_stream, endings, hostile, interrupts, memory, multiport, network, physical, vsock,
};

type Command = fn(&mut Guest, Arguments<'_>) -> Outcome;

/// What each does is at the head of the crate `sepal-driver-guest`.
const COMMANDS: [(&str, Command); 55] = [
    ("pci", list),
    ("pci-ways", ways),
    ("bar-move", bus::bar_move),
    ("blk-info", block::info),
    ("blk-rw", block::read_write),
    ("blk-fill", block::fill),
    ("blk-sum", block::sum),
    ("blk-ro", block::refuses_writes),
    ("blk-zero", block::zero),
    ("blk-discard", block::discard),
    ("blk-past-end", block::past_end),
    ("blk-error", block::reads_fail),
    ("blk-wait-size", block::wait_size),
    ("blk-bench", block::bench),
    ("blk-reset-in-flight", block::reset_in_flight),
    ("blk-queue-reset", block::queue_reset),
    ("rng", byte_stream::entropy),
    ("console", byte_stream::console),
    ("console-bulk", byte_stream::console_bulk),
    ("console-take", byte_stream::take),
    ("console-ping", byte_stream::ping),
    ("console-ports", multiport::talk),
    ("net-info", network::info),
    ("net-ping", network::ping),
    ("net-serve", network::serve),
    ("net-tx", network::transmit),
    ("net-rx", network::receive),
    ("vsock-echo", vsock::echo),
    ("vsock-listen", vsock::listen),
    ("vsock-refused", vsock::refused),
    ("vsock-bulk", vsock::bulk),
    ("vsock-ping", vsock::ping),
    ("balloon", balloon::follow),
    ("balloon-bench", balloon::bench),
    ("balloon-stats", balloon::statistics),
    ("balloon-report", balloon::report),
    ("mem", memory::plug),
    ("hostile", hostile::run),
    ("msix", interrupts::msix),
    ("intx", interrupts::intx),
    ("serial-bulk", byte_stream::serial),
    ("say", say),
    ("serial-line", byte_stream::serial_line),
    ("console-say", multiport::say),
    ("console-echo", multiport::echo),
    ("memory", physical::show),
    ("mem-sum", physical::sum),
    ("mem-fill", physical::fill),
    ("mem-wait", physical::wait),
    ("instance-id", physical::instance_id),
    ("hang", endings::hang),
    ("halt", endings::halt),
    ("reset", endings::reset),
    ("crash", endings::crash),
    ("watchdog", endings::watchdog),
];

/// Runs the commands of `run=`, or of the script where there is no such word, in turn, each reporting in a line of its own.
pub(crate) fn run_all(guest: &mut Guest) {
    let run: String = match guest.option("run=") {
        Some(run) => run,
        None => core::mem::take(&mut guest.script),
    };
    for command in run.split([',', ' ']).filter(|command| !command.is_empty()) {
        let (name, arguments) = Arguments::parse(command);
        let outcome = match COMMANDS.iter().find(|(known, _)| *known == name) {
            Some((_, run)) => run(guest, arguments),
            None => Err(Failure("there is no such command".to_string())),
        };
        let line = match outcome {
            Ok(words) if words.is_empty() => format!("ok {name}"),
            Ok(words) => format!("ok {name} {words}"),
            Err(Failure(reason)) => format!("fail {name} {reason}"),
        };
        guest.say(&line);
    }
}

/// `pci`: the devices and where they are.
fn list(guest: &mut Guest, _: Arguments<'_>) -> Outcome {
    let devices: Vec<String> = guest
        .devices
        .iter()
        .map(|found| format!("{}={:?}", found.function, found.kind))
        .collect();
    Ok(devices.join(" "))
}

/// `pci-ways`: ECAM and the ports 0xcf8 and 0xcfc show the same configuration space.
fn ways(guest: &mut Guest, _: Arguments<'_>) -> Outcome {
    bus::compare_ways(guest)
}

/// `say:TEXT`: prints, for a host that waits for a point in a run.
fn say(_: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    Ok(arguments.text(0).unwrap_or_default().to_string())
}

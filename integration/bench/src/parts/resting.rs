//! Guests that wait in hlt, of any VMM.

use std::{io, thread, time::Duration};

use crate::{
    guests::Image,
    processes::{Activity, Process},
    vmm::{Machine, Running, StartError, Vmm},
};

/// How long processes have to have done nothing to be at rest.
const QUIET: Duration = Duration::from_millis(100);
/// A VMM that is not at rest after so many times of that never is: it is measured as it is.
const LOOKS: usize = 20;

/// A machine with the guest that does nothing.
pub(super) fn machine(image: &Image, memory_mib: u16) -> Machine<'_> {
    Machine {
        memory_mib: u32::from(memory_mib),
        ..Machine::new(image.kernel())
    }
}

/// Starts it; it is at rest when this returns.
pub(super) fn start(vmm: &dyn Vmm, machine: &Machine<'_>) -> Result<(Box<dyn Running>, Process), StartError> {
    let mut guest = vmm.start(machine)?;
    guest.first_byte()?;
    let process = Process(guest.pid()?);
    settle(&[process])?;
    Ok((guest, process))
}

/// Waits until processes do nothing any more.
pub(super) fn settle(processes: &[Process]) -> io::Result<()> {
    let mut last = activity(processes)?;
    for _ in 0..LOOKS {
        thread::sleep(QUIET);
        let now = activity(processes)?;
        if now == last {
            return Ok(());
        }
        last = now;
    }
    Ok(())
}

/// What processes have done, all together.
pub(super) fn activity(processes: &[Process]) -> io::Result<Activity> {
    processes.iter().map(|process| process.activity()).sum()
}

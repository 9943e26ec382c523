//! A real kernel: from starting the VMM to the first line of Linux's user space.
//!
//! The minimal kernel of the tests and its initramfs, the same for everybody, 128 MiB, one vCPU, a quiet console. On a host without hardware
//! virtualization KVM interprets the kernel, about 15 million instructions, so a boot takes more than ten seconds; what KVM has no interpreter for, the VMM
//! has to stand in for, and few do. All get the command line that spares them most of it.

use std::{
    path::Path,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use rustix::process::{Pid, Signal, kill_process};
use sepal_integration::{HarnessError, artifacts};

use super::Part;
use crate::{
    bench::Bench,
    figure::Figure,
    results::SEPAL,
    vmm::{Kernel, Machine, Running, StartError, Vmm},
};

static BOOT: Figure = Figure::cost("linux.boot", "Linux to user space", "s");

/// A real kernel.
pub(crate) const PART: Part = Part {
    name: "linux",
    about: "a minimal Linux, to its first line of user space",
    figures: &[&BOOT],
    run,
};

const CMDLINE: &str = "console=ttyS0 quiet panic=-1 sepal.run=poweroff";
/// Keeps a kernel from instructions that KVM does not interpret.
const INTERPRETED: &str = "noxsave clearcpuid=ssse3,sse4_1,sse4_2,aes,pclmulqdq,popcnt,avx,fma,f16c,movbe";
/// No peer takes longer, unless its guest hangs: then it is not waited for.
const PATIENCE: Duration = Duration::from_secs(120);

fn run(bench: &mut Bench) -> Result<()> {
    let interpreted = Path::new("/sys/module/kvm_pvm").exists();
    if bench.short && interpreted {
        bench.skip(
            &[&BOOT],
            "a boot takes too long for the short form without hardware virtualization",
        );
        return Ok(());
    }
    if bench.short && !artifacts::kernel_is_built()? {
        bench.skip(
            &[&BOOT],
            "the test kernel is not built; integration/kernel/build does that",
        );
        return Ok(());
    }
    let (kernel, initramfs) = (artifacts::kernel()?, artifacts::initramfs()?);
    let cmdline = if interpreted {
        format!("{CMDLINE} {INTERPRETED}")
    } else {
        CMDLINE.to_owned()
    };
    let rounds = if interpreted { 2 } else { bench.scaled(5, 1) };
    bench.alternate(&[&BOOT], rounds, |vmm: &dyn Vmm| {
        let mut machine = Machine::new(Kernel {
            elf: &kernel.vmlinux,
            bzimage: Some(&kernel.bz_image),
            flat: None,
        });
        machine.cmdline = &cmdline;
        machine.initrd = Some(&initramfs);
        let start = Instant::now();
        let mut guest = vmm.start(&machine)?;
        if vmm.name() == SEPAL {
            guest.wait_for("USERSPACE")?;
        } else {
            wait_patiently(guest.as_mut(), "USERSPACE")?;
        }
        Ok(vec![start.elapsed().as_secs_f64()])
    })
}

/// Waits for the guest to print this, and ends a VMM whose guest does not in time.
fn wait_patiently(guest: &mut dyn Running, text: &str) -> Result<(), StartError> {
    let pid = i32::try_from(guest.pid()?).ok().and_then(Pid::from_raw);
    let (printed, waiting) = mpsc::channel::<()>();
    let watch = thread::spawn(move || {
        let late = waiting.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout);
        if let (true, Some(pid)) = (late, pid) {
            // It is the caller's child and not waited for yet, so the number is still its own.
            let _ = kill_process(pid, Signal::KILL);
        }
        late
    });
    let result = guest.wait_for(text);
    drop(printed);
    match (result, watch.join().unwrap_or(false)) {
        (Err(HarnessError::Failed(_)), true) => Err(StartError::Unsupported(format!(
            "its guest did not get to user space within {PATIENCE:?}"
        ))),
        (result, _) => Ok(result?),
    }
}

//! A real kernel: from starting the VMM to the first line of Linux's user space.
//!
//! The minimal kernel of the tests and its initramfs, the same for everybody, 128 MiB, one vCPU, a quiet console. On a host without hardware
//! virtualization KVM interprets the kernel, about 15 million instructions, so a boot takes more than ten seconds; what KVM has no interpreter for, the VMM
//! has to stand in for, and few do. All get the command line that spares them most of it.

use std::{path::Path, time::Instant};

use anyhow::Result;
use sepal_integration::artifacts;

use super::Part;
use crate::{
    bench::Bench,
    figure::Figure,
    vmm::{Kernel, Machine, Vmm},
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
        guest.wait_for("USERSPACE")?;
        Ok(vec![start.elapsed().as_secs_f64()])
    })
}

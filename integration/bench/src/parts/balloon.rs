//! The memory balloon: how fast a guest gives memory to the host and takes it back.
//!
//! The guest has written to all of it before, so the host has memory to free. It puts 256 pages in a request and one request in the queue, as Linux
//! does. Pages that are neighbours cost the host less than scattered ones: a guest that has been running for a while has the latter.

use anyhow::Result;

use super::{Part, drivers::Drivers};
use crate::{bench::Bench, figure::Figure, vmm::Vmm};

static INFLATE: Figure = Figure::rate("balloon.inflate", "inflating, neighbouring pages", "MiB/s");
static DEFLATE: Figure = Figure::rate("balloon.deflate", "deflating, neighbouring pages", "MiB/s");
static REUSE: Figure = Figure::rate("balloon.reuse", "deflating and writing to the pages", "MiB/s");
static SCATTERED_INFLATE: Figure = Figure::rate("balloon.scattered-inflate", "inflating, scattered pages", "MiB/s");
static SCATTERED_DEFLATE: Figure = Figure::rate("balloon.scattered-deflate", "deflating, scattered pages", "MiB/s");

/// The memory balloon.
pub(crate) const PART: Part = Part {
    name: "balloon",
    about: "a virtio balloon: inflating and deflating",
    figures: &[&INFLATE, &DEFLATE, &REUSE, &SCATTERED_INFLATE, &SCATTERED_DEFLATE],
    run,
};

/// Pages of 4096 bytes in a MiB.
const PAGES: u32 = 256;

fn run(bench: &mut Bench) -> Result<()> {
    let drivers = Drivers::new(bench)?;
    let mib: u32 = bench.scaled(64, 16);
    let cmdline = format!("run=balloon-bench:{mib},balloon-bench:{mib}:scattered");
    let figures = PART.figures;
    bench.alternate(figures, bench.scaled(5, 1), |vmm: &dyn Vmm| {
        let mut machine = drivers.machine(&cmdline);
        machine.balloon = true;
        machine.memory_mib = 512;
        let mut guest = vmm.start(&machine)?;
        let mut values = Vec::new();
        for scattered in [false, true] {
            guest.wait_for("waiting balloon-bench inflate")?;
            guest.request_balloon(mib * PAGES)?;
            guest.wait_for("waiting balloon-bench deflate")?;
            guest.request_balloon(0)?;
            let report = guest.report("balloon-bench")?;
            let [inflate, deflate, write] =
                ["inflate_us", "deflate_us", "write_us"].map(|key| report.number(key).map(|us| us / 1e6));
            let (deflate, mib) = (deflate?, f64::from(mib));
            values.extend([mib / inflate?, mib / deflate]);
            if !scattered {
                values.push(mib / (deflate + write?));
            }
        }
        Ok(values)
    })
}

//! The balloon: any lists of pages, reports and statistics, and an owner that asks for them.
#![no_main]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use sepal_devices::virtio::balloon::{Balloon, BalloonConfig};
use sepal_devices::virtio::testing::MEMORY;
use sepal_fuzz::driver::{Driver, RingStep};

#[derive(Arbitrary, Debug)]
enum Step {
    Ring(RingStep),
    /// Pages that are in memory.
    Pages {
        deflate: bool,
        pages: Vec<u16>,
    },
    Statistics(Vec<(u16, u64)>),
    Target(u32),
    Ask {
        now: bool,
    },
}

fn out(queue: u8, out: Vec<u8>) -> RingStep {
    RingStep::Request {
        queue,
        out,
        split: 0,
        rooms: Vec::new(),
    }
}

fuzz_target!(|input: (bool, Vec<Step>)| {
    let (page_reporting, steps) = input;
    let (device, handle) = Balloon::new(BalloonConfig {
        deflate_on_oom: true,
        page_reporting,
    })
    .expect("a timer");
    let mut driver = Driver::new(device);
    let (mut asked, answered) = (0, Arc::new(AtomicUsize::new(0)));
    for step in steps {
        match step {
            Step::Ring(step) => driver.apply(step),
            Step::Pages { deflate, pages } => {
                // The upper half of memory, where no rings are.
                let numbers = pages
                    .iter()
                    .flat_map(|page| (2048 + u32::from(page % 2048)).to_le_bytes());
                driver.apply(out(deflate.into(), numbers.collect()));
                driver.kick(deflate.into());
            }
            Step::Statistics(stats) => {
                let bytes = stats
                    .iter()
                    .flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat());
                driver.apply(out(2, bytes.collect()));
                driver.kick(2);
            }
            Step::Target(pages) => {
                handle.set_target(pages);
                driver.settle();
                assert_eq!(driver.rig.bench.config()[..4], pages.to_le_bytes());
            }
            Step::Ask { now } => {
                let answered = Arc::clone(&answered);
                let timeout = if now { Duration::ZERO } else { Duration::from_secs(3600) };
                handle.request_stats(timeout, move |_| {
                    answered.fetch_add(1, Ordering::Relaxed);
                });
                asked += 1;
                driver.settle();
            }
        }
        for (start, len) in driver.rig.bench.discarded() {
            assert!(len > 0 && start + len <= MEMORY, "{start:#x} {len:#x}");
        }
    }
    drop(driver);
    assert_eq!(answered.load(Ordering::Relaxed), asked, "everybody is answered once");
    assert_eq!(handle.stats().refused, 0);
});

//! The memory device: any requests, and an owner that changes its mind.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use sepal_devices::virtio::memory::{MemoryDevice, MemoryDeviceConfig};
use sepal_fuzz::driver::{Driver, RingStep};

#[derive(Arbitrary, Debug)]
enum Step {
    Ring(RingStep),
    /// A request of a known kind about blocks that there are.
    Blocks {
        kind: u8,
        first: u8,
        count: u8,
    },
    Owner(u8),
}

const BLOCK: u64 = 0x1_0000;
const REGION: std::ops::Range<u64> = 0x80_0000..0x100_0000;

fuzz_target!(|steps: Vec<Step>| {
    let (device, handle) = MemoryDevice::new(MemoryDeviceConfig {
        block_size: BLOCK,
        region: REGION,
        requested: 16 * BLOCK,
    })
    .expect("a timer");
    let mut driver = Driver::new(device);
    for step in steps {
        match step {
            Step::Ring(step) => driver.apply(step),
            Step::Blocks { kind, first, count } => {
                let mut out = vec![0; 24];
                out[0] = kind % 5;
                out[8..16].copy_from_slice(&(REGION.start + u64::from(first) * BLOCK).to_le_bytes());
                out[16] = count;
                let request = RingStep::Request {
                    queue: 0,
                    out,
                    split: 24,
                    rooms: vec![10],
                };
                driver.apply(request);
                driver.kick(0);
            }
            Step::Owner(blocks) => {
                let _ = handle.request(u64::from(blocks) * BLOCK);
                driver.settle();
            }
        }
        let sizes = handle.sizes();
        assert!(sizes.plugged.is_multiple_of(BLOCK) && sizes.plugged <= sizes.region);
        assert_eq!(driver.rig.bench.config()[40..48], sizes.plugged.to_le_bytes());
        for (start, len) in driver.rig.bench.discarded() {
            assert!(
                start >= REGION.start && start + len <= REGION.end,
                "{start:#x} {len:#x}"
            );
        }
    }
});

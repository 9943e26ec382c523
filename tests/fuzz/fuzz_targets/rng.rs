//! The entropy device, with and without a limit.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sepal_devices::rate::RateLimit;
use sepal_devices::virtio::rng::{MOST_BYTES, Rng, RngConfig};
use sepal_fuzz::driver::{Driver, RingStep};

fuzz_target!(|input: (Option<u16>, Vec<RingStep>)| {
    let (limit, steps) = input;
    let rate = RateLimit {
        bytes_per_second: limit.unwrap_or(0).into(),
        burst_bytes: limit.unwrap_or(0).into(),
        ..RateLimit::default()
    };
    let (device, handle) = Rng::new(RngConfig { rate }).expect("a timer");
    let mut driver = Driver::new(device);
    for step in steps {
        driver.apply(step);
        while let Some(used) = driver.rig.used(0) {
            assert!((1..=MOST_BYTES).contains(&used.written));
        }
    }
    driver.settle();
    let stats = handle.stats();
    assert!(stats.bytes >= stats.requests && stats.bytes <= stats.requests * u64::from(MOST_BYTES));
});

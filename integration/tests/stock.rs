//! A distribution's kernel, as shipped, boots to user space. Runs only when asked for, since it takes from seconds (on a host with hardware
//! virtualization) to half an hour:
//!
//! ```text
//! SEPAL_STOCK_KERNEL=/boot/vmlinuz-6.1.0-56-cloud-amd64 cargo test -p sepal-integration --test stock -- --nocapture
//! ```

use std::{env, time::Duration};

use sepal_integration::{Boot, artifacts};
use sepal_schema::report::Reason;

/// What such a kernel can do without: each is many emulated instructions where there is no hardware virtualization.
const SPARE: &str = "numa=off nowatchdog security=none audit=0 init_on_alloc=0";

#[test]
fn a_stock_kernel_reaches_user_space_and_powers_off() {
    let Some(kernel) = env::var_os("SEPAL_STOCK_KERNEL") else {
        println!("not asked for: SEPAL_STOCK_KERNEL names no kernel");
        return;
    };
    let cmdline = format!("console=ttyS0 panic=-1 {SPARE} sepal.run=poweroff");
    let boot = Boot::new()
        .kernel(kernel)
        .initrd(artifacts::initramfs().unwrap())
        .cmdline(cmdline)
        .memory_mib(256);
    let started = std::time::Instant::now();
    let mut guest = boot.start().unwrap();
    let line = guest.wait_for_line("USERSPACE", Duration::from_secs(3600)).unwrap();
    println!("{line} after {:.1?}", started.elapsed());
    guest
        .assert_ends_with(Reason::Shutdown, Duration::from_secs(600))
        .unwrap();
}

//! Boots a kernel and an initramfs, waits for a line, and tells how the guest ended:
//!
//! ```text
//! cargo build && cargo run -p sepal-integration --example boot -- KERNEL INITRD TEXT
//! ```
//!
//! Without arguments it boots the test kernel and waits for its user space.

use std::{env, error::Error, path::PathBuf, time::Duration};

use sepal_integration::{Boot, artifacts};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = env::args().skip(1);
    let kernel = match args.next() {
        Some(path) => PathBuf::from(path),
        None => artifacts::kernel()?.vmlinux,
    };
    let initrd = args.next().map_or_else(artifacts::initramfs, |path| Ok(path.into()))?;
    let text = args.next().unwrap_or_else(|| "USERSPACE".into());

    let mut guest = Boot::new()
        .kernel(kernel)
        .initrd(initrd)
        .cmdline("console=ttyS0 panic=-1")
        .start()?;
    let line = guest.wait_for_line(&text, Duration::from_secs(600))?;
    println!("found: {line}");
    let report = guest.wait(Duration::from_secs(600))?;
    println!("ended: {}", report.detail);
    Ok(())
}

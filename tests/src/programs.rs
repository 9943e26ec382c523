//! The programs under test, and what the host must have for them.

use std::{fs::OpenOptions, path::PathBuf};

/// The programs that the tests start.
pub const PROGRAMS: [&str; 4] = ["guest", "guest-manager", "sepal-keeper", "vmm-component"];

/// Path of a program, built by the same profile as this test.
///
/// # Panics
/// If it is not there, with the command that builds it.
pub fn program(name: &str) -> PathBuf {
    let path = folder().join(name);
    assert!(
        path.exists(),
        "{} is missing; build the programs first: cargo build --workspace{}",
        path.display(),
        if cfg!(debug_assertions) { "" } else { " --release" }
    );
    path
}

/// The folder with the programs: the one above that of the test's own executable.
fn folder() -> PathBuf {
    let own = std::env::current_exe().expect("the test's own path");
    own.ancestors().nth(2).expect("target/PROFILE/deps/TEST").to_owned()
}

/// Says aloud that a test is skipped if this host has no `/dev/kvm` that can be opened.
pub fn kvm_missing() -> bool {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => false,
        Err(error) => {
            let test = std::thread::current().name().unwrap_or("test").to_owned();
            // Past the capture of the test harness: nobody shall take a skipped test for a passed one.
            let _ = std::io::Write::write_fmt(
                &mut std::io::stderr(),
                format_args!("{test} skipped: no /dev/kvm ({error})\n"),
            );
            true
        }
    }
}

/// True if the tests are run by root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

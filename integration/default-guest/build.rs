//! Builds the guest kernel under `guest/` with this build's rustc.
//!
//! The compiler is called directly, not through cargo: the guest has its own code generation and link options, and what the
//! user sets for the workspace (RUSTFLAGS, sanitizers, profiles, clippy) must not reach it. It uses only the `core` of the target
//! that the workspace is built for, so no further target is installed.

use std::env;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("the default guest was not built: {message}");
            ExitCode::FAILURE
        }
    }
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}: {error}"))
}

fn build() -> Result<(), String> {
    println!("cargo::rerun-if-changed=guest");
    println!("cargo::rerun-if-changed=build.rs");
    let target = variable("TARGET")?;
    if !(target.starts_with("x86_64-") && target.contains("-linux-")) {
        return Err(format!(
            "it is an x86-64 ELF program and needs an x86_64 Linux target's core and linker, not {target}"
        ));
    }
    let image = PathBuf::from(variable("OUT_DIR")?).join("default-guest.elf");
    let mut rustc = Command::new(variable("RUSTC")?);
    rustc
        .args([
            "--crate-name",
            "default_guest",
            "--crate-type",
            "bin",
            "--edition",
            "2024",
            "--target",
            &target,
        ])
        .args([
            "-C",
            "panic=abort",
            "-C",
            "opt-level=s",
            "-C",
            "lto=fat",
            "-C",
            "codegen-units=1",
            "-C",
            "strip=symbols",
        ])
        // Not position-independent: the image is linked at its physical address.
        .args(["-C", "relocation-model=static", "-C", "force-unwind-tables=no"])
        .args([
            "-C",
            "link-args=-nostartfiles -nostdlib -static -no-pie -Wl,--build-id=none,-Tguest/linker.ld",
        ])
        .arg("-o")
        .arg(&image)
        .arg("guest/main.rs");
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        rustc.arg("-C").arg(format!("linker={linker}"));
    }
    let status = rustc
        .status()
        .map_err(|error| format!("cannot run {rustc:?}: {error}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("{rustc:?} ended with {status}"))
    }
}

//! Builds the guest kernel under `guest/` by cargo, since it has dependencies, in a target folder of its own.
//!
//! What the user sets for the workspace (RUSTFLAGS, sanitizers, wrappers, clippy) must not reach the guest, and the guest's options must
//! not reach the procedural macros of its dependencies, which run on the host: hence `--target`, although it is the host's.

use std::env;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("the driver guest was not built: {message}");
            ExitCode::FAILURE
        }
    }
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}: {error}"))
}

fn build() -> Result<(), String> {
    println!("cargo::rerun-if-changed=guest/Cargo.toml");
    println!("cargo::rerun-if-changed=guest/Cargo.lock");
    println!("cargo::rerun-if-changed=guest/linker.ld");
    println!("cargo::rerun-if-changed=guest/src");
    println!("cargo::rerun-if-changed=build.rs");
    // The parts that both guests share.
    println!("cargo::rerun-if-changed=../default-guest/guest");
    let target = variable("TARGET")?;
    if !(target.starts_with("x86_64-") && target.contains("-linux-")) {
        return Err(format!(
            "it is an x86-64 ELF program and needs an x86_64 Linux target's core and linker, not {target}"
        ));
    }
    let out = PathBuf::from(variable("OUT_DIR")?);
    let folder = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let script = folder.join("guest/linker.ld");
    let link = format!(
        "link-args=-nostartfiles -nostdlib -static -no-pie -Wl,--build-id=none,-T{}",
        script.display()
    );
    // Not position-independent: the image is linked at its physical address.
    let flags = [
        "-C",
        "relocation-model=static",
        "-C",
        "force-unwind-tables=no",
        "-C",
        &link,
    ];
    let mut cargo = Command::new(variable("CARGO")?);
    cargo
        .args(["build", "--release", "--locked", "--quiet", "--target", &target])
        .arg("--manifest-path")
        .arg(folder.join("guest/Cargo.toml"))
        .arg("--target-dir")
        .arg(out.join("guest"))
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
    for name in [
        "RUSTFLAGS",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "CARGO_BUILD_TARGET",
        "CARGO_TARGET_DIR",
    ] {
        cargo.env_remove(name);
    }
    // Profiles of the workspace that come through the environment.
    for (name, _) in env::vars_os() {
        if name.to_string_lossy().starts_with("CARGO_PROFILE_") {
            cargo.env_remove(name);
        }
    }
    let status = cargo
        .status()
        .map_err(|error| format!("cannot run {cargo:?}: {error}"))?;
    if !status.success() {
        return Err(format!("{cargo:?} ended with {status}"));
    }
    let built = out.join("guest").join(&target).join("release/driver-guest");
    std::fs::copy(&built, out.join("driver-guest.elf"))
        .map_err(|error| format!("copying {}: {error}", built.display()))?;
    Ok(())
}

//! What the guests are made of: a minimal Linux kernel and an initramfs, built by scripts of this folder once and then cached; and programs that some of
//! them need.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::HarnessError;

/// The test kernel in the forms in which it can be booted.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// Stripped ELF, entered by PVH or the 64-bit protocol.
    pub vmlinux: PathBuf,
    /// Compressed, as distributions ship kernels.
    pub bz_image: PathBuf,
}

/// The test kernel; the first call on a machine builds it, which takes minutes.
///
/// # Errors
/// [`HarnessError::Artifact`] with what the build said.
pub fn kernel() -> Result<Kernel, HarnessError> {
    let folder = build("kernel/build")?;
    Ok(Kernel {
        vmlinux: folder.join("vmlinux"),
        bz_image: folder.join("bzImage"),
    })
}

/// Whether the test kernel was built before, so that [`kernel`] takes no time.
///
/// # Errors
/// As [`kernel`].
pub fn kernel_is_built() -> Result<bool, HarnessError> {
    Ok(run("kernel/build", &["--dir-only"])?.is_dir())
}

/// The initramfs; `initramfs/README.md` says what its init can be asked to do.
///
/// # Errors
/// As [`kernel`].
pub fn initramfs() -> Result<PathBuf, HarnessError> {
    build("initramfs/build")
}

/// The guests' agent, as one static file.
///
/// # Errors
/// As [`kernel`].
pub fn agent() -> Result<PathBuf, HarnessError> {
    build("agent/build")
}

/// A virtiofsd of the host's, or of the distribution's.
///
/// # Errors
/// As [`kernel`].
pub fn virtiofsd() -> Result<PathBuf, HarnessError> {
    build("virtiofsd/find")
}

/// Runs a build script, whose last line of output is where its result is.
fn build(script: &str) -> Result<PathBuf, HarnessError> {
    run(script, &[])
}

fn run(script: &str, arguments: &[&str]) -> Result<PathBuf, HarnessError> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(script);
    let output = Command::new(&path)
        .args(arguments)
        .output()
        .map_err(HarnessError::io("starting a build script"))?;
    let printed = String::from_utf8_lossy(&output.stdout);
    match printed.lines().last() {
        Some(result) if output.status.success() => Ok(PathBuf::from(result)),
        _ => Err(HarnessError::Artifact {
            script: path,
            said: String::from_utf8_lossy(&output.stderr).into_owned(),
        }),
    }
}

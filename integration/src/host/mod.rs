//! What devices need on the host.
//!
//! - `image`: disk images, made and checked by the tools that everybody uses.
//! - `namespace`: a network apart from the host's, with tap devices, gone when nobody uses it any more.
//! - `traffic`: both ends of bulk connections.

mod image;
mod namespace;
mod traffic;

pub use image::{Image, check_ext4, check_qcow2, compare_images, read_ext4};
pub use namespace::Namespace;
pub use traffic::{noise, receive_all, serve_once};

use std::process::Command;

use crate::HarnessError;

/// Runs a program; what it printed.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Result<Vec<u8>, HarnessError> {
    let output = Command::new(program).args(arguments).output();
    let command = || format!("{program} {}", arguments.join(" "));
    let output = output.map_err(|error| HarnessError::Command {
        command: command(),
        said: error.to_string(),
    })?;
    let printed = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if !output.status.success() {
        return Err(HarnessError::Command {
            command: command(),
            said: format!(
                "{}\n{}{}",
                output.status,
                printed(&output.stdout),
                printed(&output.stderr)
            ),
        });
    }
    Ok(output.stdout)
}

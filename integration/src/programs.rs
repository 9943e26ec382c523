//! Where the programs of this build are.

use std::{env, path::PathBuf};

use crate::HarnessError;

/// A program that was built together with the running one: beside it, or in the folder above (tests run in `deps`, examples in `examples`).
///
/// # Errors
/// [`HarnessError::MissingProgram`] says how to build it.
pub fn program(name: &str) -> Result<PathBuf, HarnessError> {
    let own = env::current_exe().map_err(HarnessError::io("finding this program's own file"))?;
    let found = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file());
    found.ok_or_else(|| HarnessError::MissingProgram(name.to_owned()))
}

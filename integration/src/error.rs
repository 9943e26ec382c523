//! Why a run failed, with what the guest printed last.

use std::{io, path::PathBuf, time::Duration};

use sepal_schema::error::Error;

/// Why a step of a run failed.
#[derive(Debug, thiserror::Error)]
pub enum HarnessError {
    /// A program is not there.
    #[error("the program {0} is not built; run: cargo build --workspace")]
    MissingProgram(String),
    /// A kernel or initramfs could not be built.
    #[error("{} failed:\n{said}", script.display())]
    Artifact {
        /// The build script.
        script: PathBuf,
        /// What it printed on standard error.
        said: String,
    },
    /// The host refused something.
    #[error("{step}: {source}")]
    Io {
        /// What was asked of it.
        step: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// A file of the guest cannot be opened.
    #[error("opening {}: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The manager or the component answered with a typed error.
    #[error(transparent)]
    Refused(#[from] Error),
    /// The connection broke.
    #[error("talking to the guest manager: {0}")]
    Rpc(#[from] capnp::Error),
    /// A program of the host failed.
    #[error("{command} failed: {said}")]
    Command {
        /// The command line.
        command: String,
        /// What it printed.
        said: String,
    },
    /// The guest reports that something failed.
    #[error("the guest reports: {0}")]
    Failed(String),
    /// What was waited for did not come.
    #[error("{what} did not happen within {patience:?}; the guest's last output:\n{output}")]
    TimedOut {
        /// What was waited for.
        what: String,
        /// How long.
        patience: Duration,
        /// The end of the guest's output.
        output: String,
    },
    /// The guest ended before.
    #[error("the guest ended ({how}) before {what}; its last output:\n{output}")]
    Ended {
        /// What was waited for.
        what: String,
        /// How it ended.
        how: String,
        /// The end of the guest's output.
        output: String,
    },
}

impl HarnessError {
    /// Wraps an I/O error; for `map_err`.
    pub(crate) fn io(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { step, source }
    }
}

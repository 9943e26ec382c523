//! The folder of what a manager keeps across its own restarts and the host's: where it is, who may reach it, and that one manager has it.
//!
//! ```text
//!   DIR (0700)   lock               flock'ed by the manager that uses the folder; its pid is in it
//!                definitions/       what guests are started from: store
//!                settings.sepal     what was set for all of them: store
//!                keepers/           how the next manager finds what goes on without this one
//! ```

use std::{
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    rc::Rc,
};

use sepal_schema::{
    error::{Error, Kind},
    state,
};

use crate::{
    listener::{self, ListenError},
    lock::{Lock, LockError},
};

/// Why a folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another manager uses it.
    #[error("another guest manager keeps its state in {} ({owner}); choose another folder with --state", .path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
        /// Which process it is, as far as can be told.
        owner: String,
    },
    /// It belongs to somebody else, others may reach it, or it cannot be made.
    #[error(transparent)]
    Folder(#[from] ListenError),
    /// It cannot be locked.
    #[error(transparent)]
    Lock(LockError),
    /// There is no place for it.
    #[error("there is no folder for it: neither XDG_STATE_HOME nor HOME is an absolute path")]
    NoHome,
}

/// The folder that a manager alone uses, until this is dropped.
#[derive(Debug)]
pub struct StateFolder {
    path: PathBuf,
    _lock: Lock,
}

impl StateFolder {
    /// Takes the folder at `path`, which is made (mode 0700) where it is not there; the folder that it is in has to be.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn open(path: &Path) -> Result<Self, StateError> {
        listener::make_folder(path, rustix::process::geteuid().as_raw())?;
        // Named from the root: what is kept in it outlives this process, and its current folder.
        let absolute = path.canonicalize().map_err(|error| ListenError::Io {
            doing: "cannot find",
            path: path.to_owned(),
            error,
        })?;
        let lock = Lock::take(absolute.join("lock")).map_err(|error| match error {
            LockError::Taken { owner, .. } => StateError::InUse {
                path: path.to_owned(),
                owner,
            },
            error @ LockError::Io { .. } => StateError::Lock(error),
        })?;
        Ok(Self {
            path: absolute,
            _lock: lock,
        })
    }

    /// Takes the user's own folder ([`state::default_path`]), and makes those that it is in.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn open_default() -> Result<Self, StateError> {
        let path = state::default_path().ok_or(StateError::NoHome)?;
        if let Some(above) = path.parent() {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(above);
            made.map_err(|error| ListenError::Io {
                doing: "cannot make",
                path: above.to_owned(),
                error,
            })?;
        }
        Self::open(&path)
    }

    /// Where it is, from the root.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where it is kept how the next manager finds the keepers of what goes on without this one. May not be there.
    pub fn keepers(&self) -> PathBuf {
        self.path.join(state::KEEPERS)
    }
}

/// Whether a manager keeps anything, and where.
#[derive(Debug, Clone)]
pub enum State {
    /// In this folder.
    Kept(Rc<StateFolder>),
    /// It keeps nothing, and why.
    Nowhere(Rc<str>),
}

impl State {
    /// The folder.
    ///
    /// # Errors
    /// `NO_STORAGE`, saying what to do.
    pub fn folder(&self) -> Result<&Rc<StateFolder>, Error> {
        match self {
            Self::Kept(folder) => Ok(folder),
            Self::Nowhere(why) => Err(Error::new(Kind::NoStorage, &**why)),
        }
    }
}

impl Default for State {
    /// Nothing is kept.
    fn default() -> Self {
        Self::Nowhere("this manager keeps no definitions: start it with --state DIR".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_manager_at_a_time_has_it() {
        let above = tempfile::tempdir().unwrap();
        let path = above.path().join("state");
        let first = StateFolder::open(&path).unwrap();
        let error = StateFolder::open(&path).unwrap_err().to_string();
        let own = std::process::id();
        assert!(
            error.contains(&format!("process {own}")) && error.contains("state"),
            "{error}"
        );
        drop(first);
        StateFolder::open(&path).unwrap();
    }
}

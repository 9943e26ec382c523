//! A lock file: only one process has it, and it goes with that process, however it ends.
//!
//! The file is removed while the lock is held, so nobody's is removed by mistake; the process's id is in it, for whoever comes second. One that a process
//! left which was killed is taken as it is: the keeper that cleans up behind that process looks whose lock it is by then (`KeeperClient::remove_unless_locked`).

use std::{
    fs,
    io::{self, Read, Seek, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    fs::{FlockOperation, OFlags},
    io::Errno,
    process::Pid,
};

/// How long a lock is waited for whose owner is gone, or has not said yet who it is: whoever cleans up behind an owner holds it for a moment.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two tries.
const BETWEEN_TRIES: Duration = Duration::from_millis(1);

/// Why a lock was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has it.
    #[error("{} is locked ({owner})", .path.display())]
    Taken {
        /// The lock file.
        path: PathBuf,
        /// Which process it is, as far as can be told.
        owner: String,
    },
    /// A step failed.
    #[error("{doing} {}: {error}", .path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// How it failed.
        error: io::Error,
    },
}

/// A lock that this process has. Let go of, and its file removed, when dropped.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    _file: fs::File,
}

impl Lock {
    /// Takes the lock in the file `path`, which is made where it is not there.
    ///
    /// # Errors
    /// [`LockError::Taken`] where another process, or another lock of this one, has it; or what the file system says.
    pub fn take(path: PathBuf) -> Result<Self, LockError> {
        let failed = |doing| {
            let path = path.clone();
            move |error| LockError::Io { doing, path, error }
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let nofollow = OFlags::NOFOLLOW.bits().cast_signed();
            let mut options = fs::OpenOptions::new();
            options
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(nofollow);
            let mut file = options.open(&path).map_err(failed("cannot open the lock file"))?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => {
                    let mut pid = String::new();
                    let _ = (&mut file).take(16).read_to_string(&mut pid);
                    let pid = pid.trim().parse::<i32>().ok();
                    if !pid.is_some_and(is_there) && Instant::now() < deadline {
                        std::thread::sleep(BETWEEN_TRIES);
                        continue;
                    }
                    let owner = match pid {
                        Some(pid) => format!("process {pid}"),
                        None => "process unknown".to_owned(),
                    };
                    return Err(LockError::Taken { path, owner });
                }
                Err(error) => return Err(failed("cannot lock")(error.into())),
            }
            // The holder before us removes the file while it holds the lock: what we have locked must still be what is there.
            let ours = file.metadata().map_err(failed("cannot look at"))?;
            let there = fs::symlink_metadata(&path).ok();
            if there.is_none_or(|there| (there.dev(), there.ino()) != (ours.dev(), ours.ino())) {
                continue;
            }
            let write = |file: &mut fs::File| {
                file.set_len(0)?;
                file.rewind()?;
                writeln!(file, "{}", std::process::id())
            };
            write(&mut file).map_err(failed("cannot write to"))?;
            return Ok(Self { path, _file: file });
        }
    }

    /// The lock file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Whether there is a process of this number.
fn is_there(pid: i32) -> bool {
    // Without a process of that number, and only then, there is nobody to be asked.
    Pid::from_raw(pid).is_some_and(|pid| rustix::process::test_kill_process(pid) != Err(Errno::SRCH))
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

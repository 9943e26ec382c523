//! The manager's socket: where it is, who may reach it, and that only one manager has it.
//!
//! ```text
//!   lock file beside it, flock'ed -- taken: another manager runs (its pid is in the file)
//!     | ours
//!   socket file there? -- connect() answered: somebody listens without the lock: leave it alone
//!     | nobody listens: what a killed manager left; removed
//!   bind, mode 0600 or 0666, listen
//! ```
//!
//! The lock goes with the process, however it ends. Both files are removed while the lock is held, so nobody's are removed by mistake.

use std::{
    fmt, fs, io,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Mode, OFlags},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};
use sepal_schema::state;

use crate::lock::{Lock, LockError};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Why the manager cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another manager has the socket.
    #[error("a guest manager is already running at {} ({owner})", .path.display())]
    AlreadyRunning {
        /// The socket.
        path: PathBuf,
        /// Which process it is, as far as can be told.
        owner: String,
    },
    /// Something else than a socket is there.
    #[error("{} exists and is not a socket; move it away, or choose another path with --socket", .0.display())]
    NotASocket(PathBuf),
    /// The folder for sockets belongs to somebody else, or others may write to it.
    #[error("the folder {} cannot be trusted: {reason}", .path.display())]
    UnsafeFolder {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        reason: String,
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

/// Makes the folder of the user's own socket (see [`sepal_schema::socket`]), or checks that it is reserved for the user `uid`.
///
/// # Errors
/// [`ListenError::UnsafeFolder`], or what the file system says.
pub fn make_folder(path: &Path, uid: u32) -> Result<(), ListenError> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(io_error("cannot make", path)(error)),
    }
    let metadata = fs::symlink_metadata(path).map_err(io_error("cannot look at", path))?;
    let reason = if !metadata.is_dir() {
        "it is not a folder".to_owned()
    } else if metadata.uid() != uid {
        format!("it belongs to the user {} and not to {uid}", metadata.uid())
    } else if metadata.mode() & 0o077 != 0 {
        format!(
            "others may reach it (mode {:o}, 700 is needed)",
            metadata.mode() & 0o7777
        )
    } else {
        return Ok(());
    };
    Err(ListenError::UnsafeFolder {
        path: path.to_owned(),
        reason,
    })
}

/// Opens the log beside a socket (`manager.log` for `manager.sock`), to append to it.
///
/// # Errors
/// What the file system says; a symbolic link is none of ours.
pub fn open_log(socket: &Path) -> Result<fs::File, ListenError> {
    let path = socket.with_extension("log");
    let nofollow = OFlags::NOFOLLOW.bits().cast_signed();
    let mut options = fs::OpenOptions::new();
    options.append(true).create(true).mode(0o600).custom_flags(nofollow);
    options.open(&path).map_err(io_error("cannot open the log", &path))
}

/// Who may connect to a socket, as far as its file says; whoever is served is decided when the connection is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Its owner: mode 0600.
    Owner,
    /// Everyone who can reach the folder: mode 0666.
    Everyone,
}

impl Reach {
    fn mode(self) -> Mode {
        let owner = Mode::RUSR | Mode::WUSR;
        match self {
            Self::Owner => owner,
            Self::Everyone => owner | Mode::RGRP | Mode::WGRP | Mode::ROTH | Mode::WOTH,
        }
    }
}

/// The first folder on the way to `path` that not everyone may pass, with its mode; none if there is none, or nobody can tell.
pub fn closed_folder(path: &Path) -> Option<(PathBuf, u32)> {
    let path = path.canonicalize().ok()?;
    path.ancestors().skip(1).find_map(|folder| {
        let mode = fs::metadata(folder).ok()?.mode() & 0o7777;
        (mode & 0o001 == 0).then(|| (folder.to_owned(), mode))
    })
}

/// A socket that this manager alone listens on. Removed when dropped, unless it is somebody else's.
pub struct Listening {
    socket: UnixListener,
    path: PathBuf,
    /// None for a socket that a service manager made, which has it for the next manager, too.
    lock: Option<Lock>,
}

impl fmt::Debug for Listening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listening")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl Listening {
    /// Listens at `path`.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn new(path: &Path, reach: Reach) -> Result<Self, ListenError> {
        let lock = lock_beside(path)?;
        // Kept open until there is another, which then has another number: whoever cleans up behind a manager that was killed may yet come.
        let mut _left = None;
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io_error("cannot look at", path)(error)),
            Ok(metadata) if !metadata.file_type().is_socket() => return Err(ListenError::NotASocket(path.to_owned())),
            Ok(_) => {
                if UnixStream::connect(path).is_ok() {
                    let owner = "somebody listens there".to_owned();
                    return Err(ListenError::AlreadyRunning {
                        path: path.to_owned(),
                        owner,
                    });
                }
                let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                _left = rustix::fs::open(path, flags, Mode::empty()).ok();
                fs::remove_file(path).map_err(io_error("cannot remove the stale socket", path))?;
            }
        }
        let socket = bind_for(path, reach).map_err(io_error("cannot listen at", path))?;
        Ok(Self {
            socket,
            path: path.to_owned(),
            lock: Some(lock),
        })
    }

    /// Listens on a socket that a service manager made at `path`, and keeps.
    pub fn passed(socket: UnixListener, path: PathBuf) -> Self {
        Self {
            socket,
            path,
            lock: None,
        }
    }

    /// The listening socket.
    pub fn socket(&self) -> &UnixListener {
        &self.socket
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Files that a killed manager leaves, each with the lock file whose holder they belong to.
    pub fn files(&self) -> Vec<(PathBuf, PathBuf)> {
        let lock = self.lock.as_ref().map(Lock::path);
        let files = lock.into_iter().flat_map(|lock| [(&*self.path, lock), (lock, lock)]);
        files.map(|(file, lock)| (file.to_owned(), lock.to_owned())).collect()
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if self.lock.is_some() {
            // Nothing can be done about a failure; the next start removes what is left.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Listens at `path`, for this user alone (mode 0600).
pub(crate) fn bind(path: &Path) -> io::Result<UnixListener> {
    bind_for(path, Reach::Owner)
}

fn bind_for(path: &Path, reach: Reach) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket: OwnedFd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    // Before anyone can connect: until listen() everybody is refused.
    rustix::fs::chmod(path, reach.mode())?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Takes the lock beside a socket.
fn lock_beside(socket: &Path) -> Result<Lock, ListenError> {
    Lock::take(state::lock_of(socket)).map_err(|error| match error {
        LockError::Taken { owner, .. } => ListenError::AlreadyRunning {
            path: socket.to_owned(),
            owner,
        },
        LockError::Io { doing, path, error } => ListenError::Io { doing, path, error },
    })
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ListenError {
    let path = path.to_owned();
    move |error| ListenError::Io { doing, path, error }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::fs::PermissionsExt};

    use super::*;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    #[test]
    fn a_folder_that_others_may_reach_is_refused() {
        let outer = folder();
        let uid = rustix::process::getuid().as_raw();
        let path = outer.path().join("sepal");
        make_folder(&path, uid).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        make_folder(&path, uid).unwrap();
        let not_ours = make_folder(&path, uid + 1);
        assert!(matches!(not_ours, Err(ListenError::UnsafeFolder { .. })));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o770)).unwrap();
        let error = make_folder(&path, uid).unwrap_err().to_string();
        assert!(error.contains("mode 770"), "{error}");
        fs::remove_dir(&path).unwrap();
        std::os::unix::fs::symlink("/tmp", &path).unwrap();
        assert!(matches!(make_folder(&path, uid), Err(ListenError::UnsafeFolder { .. })));
    }

    #[test]
    fn the_log_is_the_users_own_and_grows() {
        let folder = folder();
        let socket = folder.path().join("m.sock");
        for line in [b"one\n", b"two\n"] {
            open_log(&socket).unwrap().write_all(line).unwrap();
        }
        let log = folder.path().join("m.log");
        assert_eq!(fs::read(&log).unwrap(), b"one\ntwo\n");
        assert_eq!(fs::metadata(&log).unwrap().mode() & 0o777, 0o600);
        // Whoever could put a link there could have us write into any file of ours.
        fs::rename(&log, folder.path().join("precious")).unwrap();
        std::os::unix::fs::symlink("precious", &log).unwrap();
        assert!(open_log(&socket).is_err());
    }

    #[test]
    fn only_its_owner_may_connect_and_nothing_is_left_behind() {
        let folder = folder();
        let path = folder.path().join("m.sock");
        let listening = Listening::new(&path, Reach::Owner).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        drop(listening);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn everyone_may_connect_where_that_is_wanted() {
        let folder = folder();
        let path = folder.path().join("m.sock");
        let listening = Listening::new(&path, Reach::Everyone).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o666);
        // The lock stays the manager's own.
        assert_eq!(
            fs::metadata(folder.path().join("m.sock.lock")).unwrap().mode() & 0o777,
            0o600
        );
        let set = |mode| fs::set_permissions(folder.path(), fs::Permissions::from_mode(mode)).unwrap();
        set(0o711);
        assert_eq!(closed_folder(&path), None);
        set(0o710);
        assert_eq!(
            closed_folder(&path),
            Some((folder.path().canonicalize().unwrap(), 0o710))
        );
        drop(listening);
    }

    #[test]
    fn a_second_manager_is_told_which_process_is_the_first() {
        let folder = folder();
        let path = folder.path().join("m.sock");
        let first = Listening::new(&path, Reach::Owner).unwrap();
        let error = Listening::new(&path, Reach::Owner).unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        UnixStream::connect(&path).unwrap();
        drop(first);
        Listening::new(&path, Reach::Owner).unwrap();
    }

    #[test]
    fn what_a_killed_manager_left_is_replaced() {
        let folder = folder();
        let path = folder.path().join("m.sock");
        // Dropping a listener of the standard library leaves its file.
        drop(UnixListener::bind(&path).unwrap());
        fs::write(folder.path().join("m.sock.lock"), "999999\n").unwrap();
        let listening = Listening::new(&path, Reach::Owner).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(listening);
    }

    #[test]
    fn who_cleans_up_behind_the_one_before_can_tell_its_files() {
        let folder = folder();
        let path = folder.path().join("m.sock");
        let lock = folder.path().join("m.sock.lock");
        fs::write(&lock, "1\n").unwrap();
        drop(bind(&path).unwrap());
        let number = |path: &Path| fs::symlink_metadata(path).unwrap().ino();
        let before = number(&path);
        let _listening = Listening::new(&path, Reach::Owner).unwrap();
        // The socket by its number, and both by whose lock it is: it asks for that first.
        assert_ne!(number(&path), before);
        let file = fs::File::open(&lock).unwrap();
        let asked = rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive);
        assert_eq!(asked, Err(rustix::io::Errno::WOULDBLOCK));
        let holder = fs::read_to_string(&lock).unwrap();
        assert_eq!(holder.trim(), std::process::id().to_string());
    }

    #[test]
    fn a_listener_without_the_lock_and_other_files_are_left_alone() {
        let folder = folder();
        let path = folder.path().join("m.sock");
        let other = UnixListener::bind(&path).unwrap();
        assert!(matches!(
            Listening::new(&path, Reach::Owner),
            Err(ListenError::AlreadyRunning { .. })
        ));
        UnixStream::connect(&path).unwrap();
        drop(other);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "precious").unwrap();
        assert!(matches!(
            Listening::new(&path, Reach::Owner),
            Err(ListenError::NotASocket(_))
        ));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_path_that_is_too_long_is_an_error() {
        let folder = folder();
        let path = folder.path().join("x".repeat(120));
        assert!(matches!(
            Listening::new(&path, Reach::Owner),
            Err(ListenError::Io { .. })
        ));
    }
}

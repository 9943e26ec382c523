//! How the next manager finds the keepers of what goes on without this one: three files for each, in the state folder. They go with the keeper.
//!
//! ```text
//!   keepers/ID.sock     where the keeper waits once this manager is gone
//!   keepers/ID.key      32 bytes that prove who comes (mode 0600)
//!   keepers/ID.guests   what it holds (`roster`): for the case that it does not answer; no secret
//! ```

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::OFlags,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};
use sepal_runner::keeper::{KEY_BYTES, Key};

use super::roster::Roster;

/// Successors that may wait.
const BACKLOG: i32 = 8;
/// How a keeper's files end.
const SOCKET: &str = ".sock";
const KEY: &str = ".key";
const GUESTS: &str = ".guests";

/// The folder.
#[derive(Debug)]
pub(super) struct Keepers {
    path: PathBuf,
    /// By which its files are named, however long its path is: that of a socket has at most 107 bytes (unix(7)).
    folder: File,
}

/// What is said to a keeper about its successor.
pub(super) struct Offer {
    pub(super) listener: OwnedFd,
    pub(super) key: Key,
    pub(super) roster: File,
    /// Its files.
    pub(super) paths: [PathBuf; 3],
}

/// A keeper that an earlier manager has left.
#[derive(Debug)]
pub(super) struct Left {
    name: String,
    /// By which it is connected to, as long as the folder is open.
    pub(super) socket: PathBuf,
}

impl Keepers {
    /// Opens the folder; `make` it where it is not there.
    pub(super) fn open(path: &Path, make: bool) -> io::Result<Option<Self>> {
        if make {
            match fs::DirBuilder::new().mode(0o700).create(path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW;
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(flags.bits().cast_signed())
            .open(path);
        match opened {
            Ok(folder) => Ok(Some(Self {
                path: path.to_owned(),
                folder,
            })),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !make => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn short(&self, name: &str) -> PathBuf {
        format!("/proc/self/fd/{}/{name}", self.folder.as_raw_fd()).into()
    }

    /// Makes a socket and a key for a keeper.
    pub(super) fn offer(&self) -> io::Result<Offer> {
        let (mut key, mut id) = (Key::default(), [0; 8]);
        for bytes in [&mut key[..], &mut id[..]] {
            getrandom::fill(bytes).map_err(io::Error::other)?;
        }
        let id = format!("{:016x}", u64::from_le_bytes(id));
        let paths = [SOCKET, KEY, GUESTS].map(|end| self.path.join(format!("{id}{end}")));
        let [_, key_path, roster_path] = &paths;
        let make = |path: &Path| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create_new(true).mode(0o600).open(path)
        };
        let made = make(key_path)
            .and_then(|mut file| file.write_all(&key))
            .and_then(|()| Ok((make(roster_path)?, self.listen(&format!("{id}{SOCKET}"))?)));
        match made {
            Ok((roster, listener)) => Ok(Offer {
                listener,
                key,
                roster,
                paths,
            }),
            Err(error) => {
                for path in &paths {
                    let _ = fs::remove_file(path);
                }
                Err(error)
            }
        }
    }

    fn listen(&self, name: &str) -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(self.short(name))?)?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(socket)
    }

    /// The keepers that earlier managers have left, as far as their files tell.
    pub(super) fn left(&self) -> io::Result<Vec<Left>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let Some(id) = name.strip_suffix(SOCKET) else { continue };
            all.push(Left {
                socket: self.short(&name),
                name: id.to_owned(),
            });
        }
        // Always in the same order.
        all.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(all)
    }

    /// What proves to this keeper who comes.
    ///
    /// # Errors
    /// With the file's path. It may be mended meanwhile.
    pub(super) fn key(&self, left: &Left) -> io::Result<Key> {
        let mut key = [0; KEY_BYTES];
        self.with_own(left, KEY, false, 0o077, |mut file| file.read_exact(&mut key))?;
        Ok(key)
    }

    /// What this keeper holds. That others can read it does no harm.
    ///
    /// # Errors
    /// As [`Keepers::key`].
    pub(super) fn roster(&self, left: &Left) -> io::Result<Roster> {
        self.with_own(left, GUESTS, true, 0o022, Roster::open)
    }

    /// Does something with a keeper's file to which others have none of these permissions.
    fn with_own<T>(
        &self,
        left: &Left,
        end: &str,
        write: bool,
        forbidden: u32,
        work: impl FnOnce(File) -> io::Result<T>,
    ) -> io::Result<T> {
        let path = self.path.join(format!("{}{end}", left.name));
        let open = || {
            let flags = OFlags::NOFOLLOW.bits().cast_signed();
            let mut options = OpenOptions::new();
            let file = options.read(true).write(write).custom_flags(flags).open(&path)?;
            let status = file.metadata()?;
            if status.uid() != rustix::process::geteuid().as_raw() || status.mode() & forbidden != 0 {
                let mode = status.mode() & 0o777;
                let message = format!(
                    "others may have read or written it (mode {mode:03o}, uid {})",
                    status.uid()
                );
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
            }
            work(file)
        };
        open().map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the files of a keeper that is not there any more.
    pub(super) fn remove(&self, left: &Left) {
        for end in [SOCKET, KEY, GUESTS] {
            // May have gone already.
            let _ = fs::remove_file(self.path.join(format!("{}{end}", left.name)));
        }
    }

    /// Removes what is there without a socket: of keepers that have ended.
    pub(super) fn sweep(&self) {
        for entry in fs::read_dir(&self.path).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let alone = |id: &str| !self.path.join(format!("{id}{SOCKET}")).exists();
            if [KEY, GUESTS]
                .iter()
                .any(|end| name.strip_suffix(end).is_some_and(alone))
            {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

impl Left {
    /// What it is called in the log.
    pub(super) fn name(&self) -> &str {
        &self.name
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_is_offered_is_found_again() {
        let above = tempfile::tempdir().unwrap();
        // Longer than the path of a socket may be.
        let path = above.path().join("x".repeat(120)).join("keepers");
        fs::create_dir(path.parent().unwrap()).unwrap();
        assert!(Keepers::open(&path, false).unwrap().is_none());
        let keepers = Keepers::open(&path, true).unwrap().unwrap();
        let offer = keepers.offer().unwrap();
        let other = keepers.offer().unwrap();
        assert_ne!(offer.key, other.key);
        for path in offer
            .paths
            .iter()
            .chain(&other.paths)
            .filter(|path| !path.to_string_lossy().ends_with(SOCKET))
        {
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        let left = keepers.left().unwrap();
        assert_eq!(left.len(), 2);
        for left in &left {
            assert!([offer.key, other.key].contains(&keepers.key(left).unwrap()));
            assert!(left.socket.exists());
            keepers.remove(left);
        }
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
    }

    #[test]
    fn a_key_that_others_can_read_is_none() {
        let above = tempfile::tempdir().unwrap();
        let keepers = Keepers::open(above.path(), true).unwrap().unwrap();
        let offer = keepers.offer().unwrap();
        let left = &keepers.left().unwrap()[0];
        for (mode, key, roster) in [(0o644, false, true), (0o600, true, true), (0o660, false, false)] {
            for path in &offer.paths[1..] {
                fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
            }
            let usable = (keepers.key(left).is_ok(), keepers.roster(left).is_ok());
            assert_eq!(usable, (key, roster), "{mode:o}");
        }
        fs::remove_file(&offer.paths[2]).unwrap();
        let error = keepers.roster(left).map(drop).unwrap_err().to_string();
        assert!(error.contains(&*offer.paths[2].to_string_lossy()), "{error}");
        fs::remove_file(&offer.paths[1]).unwrap();
        assert!(keepers.key(left).is_err());
        // A key alone is of no use.
        fs::remove_file(&offer.paths[0]).unwrap();
        fs::write(&offer.paths[1], offer.key).unwrap();
        keepers.sweep();
        assert_eq!(fs::read_dir(above.path()).unwrap().count(), 0);
    }
}

//! What the store asks of a disk, and the disk that it asks: a folder.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{AtFlags, CWD, Dir, Mode, OFlags},
    io::Errno,
};

use super::envelope::MAX_FILE;

/// The files of one folder, by their names in it. What has returned is seen by everybody; what is on the disk for good is what the methods say.
pub(crate) trait Disk {
    /// The names of all files.
    fn names(&self) -> io::Result<Vec<String>>;

    /// What is in a file; at most one byte more than [`MAX_FILE`].
    fn read(&self, name: &str) -> io::Result<Vec<u8>>;

    /// Makes a file, or empties the one that is there, and fills it. Its content is on the disk for good; its name may not be.
    fn write(&self, name: &str, content: &[u8]) -> io::Result<()>;

    /// Gives a file another name, in one step; another file that had that name is gone.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Takes a file's name away.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// All names are on the disk for good, and those that are gone are gone for good.
    fn sync(&self) -> io::Result<()>;
}

/// A folder, held open: what is done is done in it, wherever its path leads by then.
#[derive(Debug)]
pub(crate) struct Folder(OwnedFd);

impl Folder {
    /// Opens a folder, which is made (mode 0700) if it is not there; the folder that it is in has to be. Its own name is on the disk for good on return,
    /// whoever made it, as far as that can be told of a folder above that is another's.
    ///
    /// # Errors
    /// What the file system says; a symbolic link is no folder of ours.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let made = match rustix::fs::mkdir(path, Mode::RWXU) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(error) => return Err(error.into()),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::openat(CWD, path, flags | OFlags::NOFOLLOW, Mode::empty())?;
        // Where it was there before, it may be so only since a manager that did not come this far.
        if let Some(above) = path.parent() {
            let synced = rustix::fs::openat(CWD, above, flags, Mode::empty()).and_then(rustix::fs::fsync);
            match synced {
                Err(error) if made => return Err(error.into()),
                Ok(()) | Err(_) => {}
            }
        }
        Ok(Self(folder))
    }

    /// The error for a folder that somebody has taken away. One of its name is another one.
    fn gone(&self) -> Option<io::Error> {
        let links = rustix::fs::fstat(&self.0).map(|status| status.st_nlink);
        let message = "the folder was taken away; the guest manager has to be started again when it is back";
        (links == Ok(0)).then(|| io::Error::new(io::ErrorKind::NotFound, message))
    }
}

impl Disk for Folder {
    fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.0)? {
            // Whatever is not a name in UTF-8 is none of ours.
            if let Ok(name) = entry?.file_name().to_str() {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        // Somebody's pipe must not hold it up.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(&self.0, name, flags, Mode::empty())?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is not a regular file"));
        }
        let mut content = Vec::new();
        file.take(MAX_FILE as u64 + 1).read_to_end(&mut content)?;
        Ok(content)
    }

    fn write(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(&self.0, name, flags, Mode::RUSR | Mode::WUSR);
        let mut file = File::from(opened.map_err(|error| self.gone().unwrap_or_else(|| error.into()))?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is not a regular file"));
        }
        file.write_all(content)?;
        file.sync_all()
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.0, from, &self.0, to)?)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.0, name, AtFlags::empty())?)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(self.0.as_fd())?)
    }
}

//! Files in and out. A file that is put appears under its name at once and whole, or not at all.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::{Connection, Trouble};
use crate::client::check_path;
use crate::protocol::{DATA_MAX, ErrorKind, ToAgent, ToHost};

/// Permission bits, with those for set-id and sticky.
const MODE_BITS: u32 = 0o7777;
/// Permission bits of a new file that is given none.
const DEFAULT_MODE: u32 = 0o644;

fn path_of(path: &[u8]) -> Result<&Path, Trouble> {
    check_path(path).map_err(|error| Trouble::bad(&error.to_string()))?;
    Ok(Path::new(OsStr::from_bytes(path)))
}

/// A file that is removed unless it gets its name.
struct Nameless {
    path: PathBuf,
    file: File,
    named: bool,
}

impl Nameless {
    /// A new file in the folder of `target`, readable by nobody else.
    fn new(target: &Path) -> io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (Some(folder), Some(name)) = (target.parent(), target.file_name()) else {
            return Err(io::ErrorKind::IsADirectory.into());
        };
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let suffix = format!(".{}-{number}.part", std::process::id());
            // A name has at most 255 bytes; only the beginning is kept of one that leaves no room.
            let name = &name.as_bytes()[..name.len().min(254 - suffix.len())];
            let path = folder.join(OsString::from_vec([b".", name, suffix.as_bytes()].concat()));
            match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
                Ok(file) => {
                    return Ok(Self {
                        path,
                        file,
                        named: false,
                    });
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Gives it its mode and its name.
    fn finish(mut self, target: &Path, mode: u32) -> io::Result<()> {
        self.file.set_permissions(Permissions::from_mode(mode))?;
        self.file.sync_all()?;
        std::fs::rename(&self.path, target)?;
        self.named = true;
        Ok(())
    }
}

impl Drop for Nameless {
    fn drop(&mut self) {
        if !self.named {
            // There is nothing to do if it cannot be removed.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Makes a file of what follows. One that is there already keeps its permission bits, and is replaced.
pub(super) fn put(connection: &mut Connection, path: &[u8], mode: u32) -> Result<(), Trouble> {
    let target = path_of(path)?;
    let failed = |error: &io::Error| Trouble::io(&target.display().to_string(), error);
    let mode = match std::fs::metadata(target) {
        Ok(there) if !there.is_file() => {
            let message = format!("{}: there is something that is no regular file", target.display());
            return Err(Trouble::Failed(ErrorKind::NotAFile, message));
        }
        Ok(there) => there.permissions().mode() & MODE_BITS,
        Err(_) if mode == 0 => DEFAULT_MODE,
        Err(_) => mode & MODE_BITS,
    };
    let mut part = Nameless::new(target).map_err(|e| failed(&e))?;
    connection.send(&ToHost::Go)?;
    let mut size = 0;
    loop {
        match connection.receive()? {
            Some(ToAgent::Data(data)) => {
                part.file.write_all(&data).map_err(|e| failed(&e))?;
                size += data.len() as u64;
            }
            Some(ToAgent::End) => break,
            Some(_) => return Err(Trouble::bad("something other than data in the middle of a file")),
            None => return Err(Trouble::Host("in the middle of a file".into())),
        }
    }
    part.finish(target, mode).map_err(|e| failed(&e))?;
    connection.send(&ToHost::Finished { size })
}

/// Sends a file, however long it turns out to be.
pub(super) fn get(connection: &mut Connection, path: &[u8]) -> Result<(), Trouble> {
    let path = path_of(path)?;
    let failed = |error: &io::Error| Trouble::io(&path.display().to_string(), error);
    // A pipe without a writer is not waited for.
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(nonblocking)
        .open(path)
        .map_err(|e| failed(&e))?;
    let metadata = file.metadata().map_err(|e| failed(&e))?;
    if !metadata.is_file() {
        let message = format!("{}: no regular file", path.display());
        return Err(Trouble::Failed(ErrorKind::NotAFile, message));
    }
    connection.send(&ToHost::File {
        size: metadata.len(),
        mode: metadata.permissions().mode() & MODE_BITS,
    })?;
    let mut buffer = vec![0; DATA_MAX];
    let mut size = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return connection.send(&ToHost::Finished { size }),
            Ok(count) => {
                connection.send(&ToHost::Data(buffer[..count].to_vec()))?;
                size += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(&error)),
        }
    }
}

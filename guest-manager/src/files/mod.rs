//! Files of a configuration: named in whichever way a client can, handed to the component as descriptors that are fit to be read.
//!
//! Whatever may block (opening a path on dead storage, asking about a file) happens on worker threads. `disks` knows what an image must be,
//! `images` which guest uses which, `scratch` where volatile disks keep what is written.

mod again;
mod disks;
mod images;
mod scratch;

use std::{
    fs::OpenOptions,
    io::{self, Write},
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
};

use rustix::fs::{MemfdFlags, OFlags, SealFlags};
use sepal_schema::{
    config::{File, GuestConfig, MemoryBacking, device::DiskMode},
    error::{Error, Kind},
    transport::file::{Requirements, check, check_shared_memory},
};

pub(crate) use self::again::take_again;
use self::disks::DiskJob;
use self::images::Claims;
pub use self::images::{ImageUse, Images};
use self::scratch::Scratch;
pub(crate) use self::scratch::default_folder as default_scratch;
use crate::manager::Manager;

/// What became of a configuration's files.
pub struct Opened {
    /// The configuration, which names its files by descriptors only.
    pub config: GuestConfig,
    /// What the guest holds of its images until its end.
    pub images: Vec<ImageUse>,
    /// Sentences for a person about what is not as it should be.
    pub notes: Vec<String>,
}

/// Opens the files of a configuration.
///
/// # Errors
/// `BAD_CONFIG`, `NOT_FOUND` or `PERMISSION_DENIED` with the field's name for a file that cannot be used; `ALREADY_RUNNING` for an image that
/// another guest uses; `GUEST_INITIALIZATION_FAILURE` for more memory than the host has.
pub async fn open(manager: &Manager, guest: &str, config: GuestConfig, may_name_paths: bool) -> Result<Opened, Error> {
    open_for(manager, Claims::new(&manager.images, guest), config, may_name_paths).await
}

/// Looks whether the files of a configuration can be used, and leaves all of them as they are. Returns the rest of the configuration.
///
/// # Errors
/// As for [`open`].
pub(crate) async fn look(manager: &Manager, config: GuestConfig, may_name_paths: bool) -> Result<GuestConfig, Error> {
    let opened = open_for(manager, Claims::look(&manager.images), config, may_name_paths).await?;
    Ok(opened.config)
}

async fn open_for(
    manager: &Manager,
    claims: Claims,
    mut config: GuestConfig,
    may_name_paths: bool,
) -> Result<Opened, Error> {
    let way = |field: &str, file| way(manager, field.to_owned(), file, may_name_paths);
    let kernel = match std::mem::take(&mut config.kernel) {
        File::None => Way::Ready(copy("kernel", &manager.default_kernel)?),
        file => way("kernel", file).await?,
    };
    let initrd = match std::mem::take(&mut config.initrd) {
        File::None => None,
        file => Some(way("initrd", file).await?),
    };
    let mut jobs = Vec::new();
    for (i, disk) in config.disks.iter_mut().enumerate() {
        let image = way(&format!("disks[{i}].image"), std::mem::take(&mut disk.image)).await?;
        let mut backing = Vec::new();
        for (j, below) in disk.backing.iter_mut().enumerate() {
            let field = format!("disks[{i}].backing[{j}]");
            backing.push(way(&field, std::mem::take(&mut below.file)).await?);
        }
        let scratch = match std::mem::take(&mut disk.scratch) {
            _ if disk.mode != DiskMode::VolatileWrite => Scratch::Unneeded,
            File::None if claims.only_looks() => Scratch::Unneeded,
            File::None => Scratch::In(manager.settings.scratch.clone()),
            file => Scratch::Given(way(&format!("disks[{i}].scratch"), file).await?),
        };
        jobs.push((DiskJob::new(i, disk, image, backing), scratch));
    }
    let custom_memory = std::mem::take(&mut config.custom_memory);
    let ready = |way: &Way| matches!(way, Way::Ready(_));
    let at_once = ready(&kernel) && initrd.iter().all(ready) && jobs.is_empty() && custom_memory.is_empty();
    let work = move || {
        let kernel = kernel.open("kernel", Requirements::READ)?;
        let initrd = initrd.map(|way| way.open("initrd", Requirements::READ)).transpose()?;
        for (i, range) in custom_memory.iter().enumerate() {
            check_backing(i, range)?;
        }
        let (mut uses, mut notes) = (Vec::new(), Vec::new());
        let open = |(i, (job, scratch)): (usize, (DiskJob, Scratch))| {
            Ok::<_, Error>((job.open(&claims, &mut uses)?, scratch.open(i, &mut notes)?))
        };
        let disks = jobs.into_iter().enumerate().map(open).collect::<Result<Vec<_>, _>>()?;
        Ok::<_, Error>((kernel, initrd, custom_memory, disks, uses, notes))
    };
    let done = match at_once {
        // Nothing is left that could block, so nobody else has to be woken for it.
        true => Ok(work()),
        false => manager.handle.spawn_foreign(work).await,
    };
    let (kernel, initrd, custom_memory, disks, images, notes) =
        done.map_err(|error| Error::new(Kind::NoResources, format!("the files cannot be opened: {error}")))??;
    config.kernel = File::Fd(kernel);
    config.initrd = initrd.map_or(File::None, File::Fd);
    config.custom_memory = custom_memory;
    for (disk, (files, scratch)) in config.disks.iter_mut().zip(disks) {
        let mut files = files.into_iter().map(File::Fd);
        disk.image = files.next().unwrap_or_default();
        for (below, file) in disk.backing.iter_mut().zip(files) {
            below.file = file;
        }
        disk.scratch = scratch.map_or(File::None, File::Fd);
    }
    Ok(Opened { config, images, notes })
}

/// How to come by a file.
async fn way(manager: &Manager, field: String, file: File, may_name_paths: bool) -> Result<Way, Error> {
    Ok(match file {
        File::None => return Err(Error::bad_config(field.clone(), format!("{field} names no file"))),
        File::Fd(fd) => Way::Check(fd),
        File::Bytes(bytes) => Way::Seal(bytes),
        File::Upload(upload) => Way::Ready(manager.uploads.content(&field, upload).await?),
        File::Path(path) if may_name_paths => Way::Open(path),
        File::Path(path) => return Err(no_paths(&field, &path)),
    })
}

/// The refusal of a path from a client that may not name any.
pub(crate) fn no_paths(field: &str, path: &str) -> Error {
    let message = format!("{field} names the path {path}: only a client with the manager's own uid may do that");
    Error::new(Kind::PermissionDenied, message).about(field)
}

/// How to come by a file. What may block comes with [`Way::open`].
enum Way {
    Ready(OwnedFd),
    Check(OwnedFd),
    Seal(Vec<u8>),
    Open(String),
}

impl Way {
    /// The open file, fit for what is needed.
    fn open(self, field: &str, needed: Requirements) -> Result<OwnedFd, Error> {
        let fd = match self {
            Self::Ready(fd) => return Ok(fd),
            Self::Check(fd) => fd,
            Self::Seal(bytes) => return sealed_memory(field, &bytes),
            Self::Open(path) => {
                // Opening must not wait for the other end of a pipe, nor become the controlling terminal's.
                let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
                let opened = OpenOptions::new()
                    .read(true)
                    .write(needed.writable)
                    .custom_flags(flags)
                    .open(&path);
                opened
                    .map_err(|error| cannot_open(field, &path, needed, &error))?
                    .into()
            }
        };
        match check(&fd, needed) {
            Ok(_) => Ok(fd),
            Err(error) => Err(Error::bad_config(field, format!("{field}: {error}"))),
        }
    }
}

fn cannot_open(field: &str, path: &str, needed: Requirements, error: &io::Error) -> Error {
    let kind = match error.kind() {
        io::ErrorKind::NotFound => Kind::NotFound,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Kind::PermissionDenied,
        _ => Kind::BadConfig,
    };
    let how = if needed.writable {
        " for reading and writing"
    } else {
        ""
    };
    Error::new(kind, format!("{field}: {path} cannot be opened{how}: {error}")).about(field)
}

fn check_backing(index: usize, range: &MemoryBacking) -> Result<(), Error> {
    let bad = |why: String| {
        let field = format!("customMemory[{index}].memfd");
        Error::bad_config(field.clone(), format!("{field}: {why}"))
    };
    // Its owner can only hurt its own guest, so that it need not be sealed.
    check_shared_memory(&range.memfd).map_err(|error| bad(error.to_string()))?;
    let needed = range.end - range.start;
    let status = rustix::fs::fstat(&range.memfd).map_err(|error| bad(error.to_string()))?;
    match u64::try_from(status.st_size) {
        Ok(size) if size >= needed => Ok(()),
        size => Err(bad(format!(
            "it has {} bytes, and the range has {needed}",
            size.unwrap_or(0)
        ))),
    }
}

/// Another descriptor for the same file.
pub(crate) fn copy(field: &str, fd: &OwnedFd) -> Result<OwnedFd, Error> {
    fd.try_clone().map_err(|error| no_resources(field, &error))
}

/// A memfd for content that will not change any more.
pub(crate) fn new_memory(field: &str) -> Result<std::fs::File, Error> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match rustix::fs::memfd_create("sepal", flags) {
        Ok(fd) => Ok(fd.into()),
        Err(error) => Err(no_resources(field, &error.into())),
    }
}

/// Nobody can change the content of a memfd any more.
pub(crate) fn seal(field: &str, memory: std::fs::File) -> Result<OwnedFd, Error> {
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&memory, seals).map_err(|error| no_resources(field, &error.into()))?;
    Ok(memory.into())
}

/// Content as a sealed memfd.
///
/// # Errors
/// `NO_RESOURCES`: there is no memory, or no descriptor.
pub(crate) fn sealed_memory(field: &str, content: &[u8]) -> Result<OwnedFd, Error> {
    let mut memory = new_memory(field)?;
    memory.write_all(content).map_err(|error| no_resources(field, &error))?;
    seal(field, memory)
}

fn no_resources(field: &str, error: &io::Error) -> Error {
    Error::new(Kind::NoResources, format!("{field} cannot be kept in memory: {error}")).about(field)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn kind<T>(result: Result<T, Error>) -> (Kind, String) {
        let error = result.err().unwrap();
        (error.kind, error.about)
    }

    #[test]
    fn paths_are_opened_with_errors_that_tell_what_is_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(path("kernel"), "image").unwrap();
        let read = |field: &str, path| Way::Open(path).open(field, Requirements::READ);
        assert!(read("kernel", path("kernel")).is_ok());
        let missing = kind(read("kernel", path("missing")));
        assert_eq!(missing, (Kind::NotFound, "kernel".into()));
        let not_a_file = kind(read("initrd", path(".")));
        assert_eq!(not_a_file, (Kind::BadConfig, "initrd".into()));
        // Would block for ever if it were opened for waiting.
        let name = std::ffi::CString::new(path("pipe")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &name,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        assert_eq!(kind(read("kernel", path("pipe"))).0, Kind::BadConfig);
    }

    #[test]
    fn descriptors_are_checked() {
        let given = |fd| Way::Check(fd).open("kernel", Requirements::READ);
        let memory = new_memory("kernel").unwrap();
        assert!(given(memory.into()).is_ok());
        let sealed = sealed_memory("kernel", b"image").unwrap();
        assert!(given(sealed).is_ok());
        let (socket, _other) = UnixStream::pair().unwrap();
        assert_eq!(kind(given(socket.into())), (Kind::BadConfig, "kernel".into()));
    }

    #[test]
    fn sealed_memory_cannot_be_changed() {
        let sealed = sealed_memory("kernel", b"image").unwrap();
        let mut content = [0; 8];
        let count = rustix::io::pread(&sealed, &mut content, 0).unwrap();
        assert_eq!(&content[..count], b"image");
        assert!(rustix::io::pwrite(&sealed, b"x", 0).is_err());
    }

    #[test]
    fn guest_memory_of_clients_must_be_shared_memory_that_is_large_enough() {
        let range = |memfd: OwnedFd| MemoryBacking {
            memfd,
            start: 4096,
            end: 1 << 20,
        };
        let (pipe, _writer) = std::io::pipe().unwrap();
        assert_eq!(
            kind(check_backing(3, &range(pipe.into()))),
            (Kind::BadConfig, "customMemory[3].memfd".into())
        );
        let memory = new_memory("m").unwrap();
        let backing = range(memory.try_clone().unwrap().into());
        memory.set_len((1 << 20) - 4097).unwrap();
        let error = check_backing(0, &backing).unwrap_err();
        assert!(error.message.contains("1044479 bytes"), "{error}");
        memory.set_len((1 << 20) - 4096).unwrap();
        check_backing(0, &backing).unwrap();
        rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK).unwrap();
        check_backing(0, &backing).unwrap();
    }
}

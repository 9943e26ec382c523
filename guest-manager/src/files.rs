//! Files of a configuration: named in whichever way a client can, handed to the component as descriptors that are fit to be read.
//!
//! Whatever may block (opening a path on dead storage, asking about a file) happens on worker threads.

use std::{
    fs::OpenOptions,
    io::{self, Write},
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
};

use rustix::fs::{MemfdFlags, OFlags, SealFlags};
use sepal_schema::{
    config::{File, GuestConfig, MemoryBacking},
    error::{Error, Kind},
    transport::file::{FileKind, Requirements, check},
};

use crate::{host, manager::Manager};

/// A configuration that names its files by descriptors only.
///
/// # Errors
/// `BAD_CONFIG`, `NOT_FOUND` or `PERMISSION_DENIED` with the field's name for a file that cannot be used; `GUEST_INITIALIZATION_FAILURE`
/// for more memory than the host has.
pub async fn open(manager: &Manager, config: GuestConfig, may_name_paths: bool) -> Result<GuestConfig, Error> {
    let memory_mib = config.memory_mib();
    let mut jobs = Vec::new();
    for (field, file) in [("kernel", config.kernel), ("initrd", config.initrd)] {
        jobs.push(match file {
            File::None if field == "kernel" => Job::Ready(Some(copy(field, &manager.default_kernel)?)),
            File::None => Job::Ready(None),
            File::Fd(fd) => Job::Check(field, fd),
            File::Bytes(bytes) => Job::Seal(field, bytes),
            File::Upload(upload) => Job::Ready(Some(manager.uploads.content(field, upload).await?)),
            File::Path(path) if may_name_paths => Job::Open(field, path),
            File::Path(path) => {
                let message =
                    format!("{field} names the path {path}: only a client with the manager's own uid may do that");
                return Err(Error::new(Kind::PermissionDenied, message).about(field));
            }
        });
    }
    let custom_memory = config.custom_memory;
    let work = move || {
        check_memory(memory_mib.into(), &custom_memory, host::available_mib())?;
        let mut files = jobs.into_iter().map(Job::run);
        let mut next = || files.next().unwrap_or(Ok(None));
        let (kernel, initrd) = (next()?, next()?);
        for (i, range) in custom_memory.iter().enumerate() {
            check_backing(i, range)?;
        }
        Ok::<_, Error>((kernel, initrd, custom_memory))
    };
    let done = manager.handle.spawn_blocking(work).await;
    let (kernel, initrd, custom_memory) =
        done.map_err(|error| Error::new(Kind::NoResources, format!("the files cannot be opened: {error}")))??;
    let file = |fd: Option<OwnedFd>| fd.map_or(File::None, File::Fd);
    Ok(GuestConfig {
        kernel: file(kernel),
        initrd: file(initrd),
        custom_memory,
        ..config
    })
}

/// One file and how to come by it.
enum Job {
    Ready(Option<OwnedFd>),
    Check(&'static str, OwnedFd),
    Seal(&'static str, Vec<u8>),
    Open(&'static str, String),
}

impl Job {
    fn run(self) -> Result<Option<OwnedFd>, Error> {
        Ok(match self {
            Self::Ready(file) => file,
            Self::Check(field, fd) => Some(readable(field, fd)?),
            Self::Seal(field, bytes) => Some(sealed_memory(field, &bytes)?),
            Self::Open(field, path) => {
                // Opening must not wait for the other end of a pipe, nor become the controlling terminal's.
                let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
                let opened = OpenOptions::new().read(true).custom_flags(flags).open(&path);
                let fd = opened.map_err(|error| {
                    let kind = match error.kind() {
                        io::ErrorKind::NotFound => Kind::NotFound,
                        io::ErrorKind::PermissionDenied => Kind::PermissionDenied,
                        _ => Kind::BadConfig,
                    };
                    Error::new(kind, format!("{field}: {path} cannot be opened: {error}")).about(field)
                })?;
                Some(readable(field, fd.into())?)
            }
        })
    }
}

fn readable(field: &str, fd: OwnedFd) -> Result<OwnedFd, Error> {
    match check(&fd, Requirements::READ) {
        Ok(_) => Ok(fd),
        Err(error) => Err(Error::bad_config(field, format!("{field}: {error}"))),
    }
}

fn check_backing(index: usize, range: &MemoryBacking) -> Result<(), Error> {
    let bad = |why: String| {
        let field = format!("customMemory[{index}].memfd");
        Err(Error::bad_config(field.clone(), format!("{field}: {why}")))
    };
    match check(&range.memfd, Requirements::READ_WRITE) {
        Ok(FileKind::SealedMemory) => Ok(()),
        Ok(_) => bad("it is no memfd; guest memory needs one with the seal F_SEAL_SHRINK".to_owned()),
        Err(error) => bad(error.to_string()),
    }
}

/// A guest gets at most what the host has; memory that clients bring is theirs.
fn check_memory(memory_mib: u64, brought: &[MemoryBacking], available_mib: Option<u64>) -> Result<(), Error> {
    let brought_mib: u64 = brought.iter().map(|range| (range.end - range.start) >> 20).sum();
    let needed = memory_mib.saturating_sub(brought_mib);
    match available_mib {
        Some(available) if needed > available => {
            let message = format!("the guest needs {needed} MiB of memory, and the host has {available} MiB left");
            Err(Error::new(Kind::GuestInitializationFailure, message).about("memoryMib"))
        }
        _ => Ok(()),
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
        assert!(Job::Open("kernel", path("kernel")).run().unwrap().is_some());
        let missing = kind(Job::Open("kernel", path("missing")).run());
        assert_eq!(missing, (Kind::NotFound, "kernel".into()));
        let not_a_file = kind(Job::Open("initrd", path(".")).run());
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
        assert_eq!(kind(Job::Open("kernel", path("pipe")).run()).0, Kind::BadConfig);
    }

    #[test]
    fn descriptors_are_checked() {
        let memory = new_memory("kernel").unwrap();
        let unsealed = kind(Job::Check("kernel", memory.into()).run());
        assert_eq!(unsealed, (Kind::BadConfig, "kernel".into()));
        let sealed = sealed_memory("kernel", b"image").unwrap();
        assert!(Job::Check("kernel", sealed).run().is_ok());
        let (socket, _other) = UnixStream::pair().unwrap();
        assert_eq!(kind(Job::Check("kernel", socket.into()).run()).0, Kind::BadConfig);
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
    fn guest_memory_of_clients_must_be_sealed_memory() {
        let range = |memfd: OwnedFd| MemoryBacking {
            memfd,
            start: 0,
            end: 1 << 20,
        };
        let unsealed = range(new_memory("m").unwrap().into());
        assert_eq!(
            kind(check_backing(3, &unsealed)),
            (Kind::BadConfig, "customMemory[3].memfd".into())
        );
        let file = range(tempfile::tempfile().unwrap().into());
        assert_eq!(kind(check_backing(0, &file)).0, Kind::BadConfig);
        let memory = new_memory("m").unwrap();
        rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK).unwrap();
        check_backing(0, &range(memory.into())).unwrap();
    }

    #[test]
    fn no_guest_gets_more_memory_than_the_host_has() {
        assert_eq!(
            kind(check_memory(2048, &[], Some(1024))).0,
            Kind::GuestInitializationFailure
        );
        check_memory(1024, &[], Some(1024)).unwrap();
        check_memory(1 << 40, &[], None).unwrap();
        let memfd = new_memory("m").unwrap().into();
        check_memory(
            2048,
            &[MemoryBacking {
                memfd,
                start: 0,
                end: 1 << 30,
            }],
            Some(1024),
        )
        .unwrap();
    }
}

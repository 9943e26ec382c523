//! Images of disks: opened with the rights that the disk's mode needs and no more, and checked for what is in them.
//!
//! The component does not get the open file of a client but one of its own where that is possible: its lock, its access mode and its flags are
//! then nobody else's.

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags, SeekFrom};
use sepal_schema::{
    config::device::{Disk, DiskFormat, DiskMode},
    error::{Error, Kind},
    transport::file::Requirements,
};

use super::{
    Way,
    images::{Claims, ImageUse},
};

/// The first bytes of a qcow2 image (docs/interop/qcow2.txt of QEMU).
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of a qcow2 header that are looked at: magic, version, and where the name of the file below is.
const QCOW2_HEADER: usize = 20;
/// Longest name that is told of the file below, in bytes.
const MAX_TOLD: usize = 256;

/// A disk whose files are to be opened.
pub(super) struct DiskJob {
    index: usize,
    mode: DiskMode,
    format: DiskFormat,
    direct: bool,
    block_size: u32,
    image: Way,
    backing: Vec<(Way, DiskFormat)>,
}

impl DiskJob {
    /// For `disk`, whose files are come by in these ways.
    pub(super) fn new(index: usize, disk: &Disk, image: Way, backing: Vec<Way>) -> Self {
        Self {
            index,
            mode: disk.mode,
            format: disk.format,
            direct: disk.direct,
            block_size: disk.block_size(),
            image,
            backing: backing
                .into_iter()
                .zip(disk.backing.iter().map(|below| below.format))
                .collect(),
        }
    }

    /// Opens the files and takes them into use. Returns the image, then the files below it.
    pub(super) fn open(self, claims: &Claims, uses: &mut Vec<ImageUse>) -> Result<Vec<OwnedFd>, Error> {
        let index = self.index;
        let field = format!("disks[{index}].image");
        let writes = self.mode == DiskMode::ReadWrite;
        let needed = if writes {
            Requirements::READ_WRITE
        } else {
            Requirements::READ
        };
        let image = own(self.image.open(&field, needed.or_block_device())?, writes);
        uses.push(claims.claim(&field, &image, writes)?);
        let mut files = vec![(field, image, self.format)];
        for (j, (way, format)) in self.backing.into_iter().enumerate() {
            let field = format!("disks[{index}].backing[{j}]");
            let file = own(way.open(&field, Requirements::READ.or_block_device())?, false);
            uses.push(claims.claim(&field, &file, false)?);
            files.push((field, file, format));
        }
        check_chain(&files, self.block_size)?;
        for (_, file, _) in &files {
            set_flags(&format!("disks[{index}].direct"), file, self.direct)?;
        }
        Ok(files.into_iter().map(|(_, file, _)| file).collect())
    }
}

/// An open file of our own for the same file, with these rights; the one given where there is none to be had. Rights that it does not carry
/// already are never asked for.
///
/// Reads through it do not note when the image was read last, where the manager may say so (open(2): to an owner, and to CAP_FOWNER): it costs each
/// of a guest's reads a look at clock and inode, and tells nobody anything about a file that a guest has open.
fn own(given: OwnedFd, writes: bool) -> OwnedFd {
    let access = if writes { OFlags::RDWR } else { OFlags::RDONLY };
    let path = format!("/proc/self/fd/{}", given.as_raw_fd());
    let flags = access | OFlags::CLOEXEC | OFlags::NOCTTY;
    rustix::fs::open(&path, flags | OFlags::NOATIME, Mode::empty())
        .or_else(|_| rustix::fs::open(&path, flags, Mode::empty()))
        .unwrap_or(given)
}

/// Sets the flags that reads and writes follow. An io_uring takes O_NONBLOCK at its word even on a disk, and would fail with EAGAIN.
fn set_flags(field: &str, file: &OwnedFd, direct: bool) -> Result<(), Error> {
    let set = rustix::fs::fcntl_getfl(file).and_then(|flags| {
        let flags = flags.difference(OFlags::NONBLOCK | OFlags::DIRECT);
        let wanted = if direct { OFlags::DIRECT } else { OFlags::empty() };
        rustix::fs::fcntl_setfl(file, flags | wanted)
    });
    set.map_err(|error| {
        let message = format!("{field}: the image's file system cannot go around the page cache ({error})");
        Error::new(Kind::DeviceInitializationFailure, message).about(field)
    })
}

/// What the beginning of an image says.
#[derive(Debug, PartialEq, Eq)]
enum Content {
    Raw,
    Qcow2 {
        /// The name that the image has for the file below it.
        below: Option<String>,
    },
}

fn content(file: &OwnedFd) -> Result<Content, rustix::io::Errno> {
    let mut header = [0; QCOW2_HEADER];
    let count = read_at(file, &mut header, 0)?;
    if count < QCOW2_HEADER || header[..4] != QCOW2_MAGIC {
        return Ok(Content::Raw);
    }
    // Fields 8..16 and 16..20, big-endian; both are hostile.
    let offset = header[8..16]
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte));
    let length = header[16..]
        .iter()
        .fold(0, |value, byte| value << 8 | usize::from(*byte));
    if offset == 0 {
        return Ok(Content::Qcow2 { below: None });
    }
    let mut name = vec![0; length.min(MAX_TOLD)];
    let count = read_at(file, &mut name, offset)?;
    let below = String::from_utf8_lossy(&name[..count]).escape_default().to_string();
    Ok(Content::Qcow2 { below: Some(below) })
}

/// Reads as much as there is. An offset past what a file can have is the end.
fn read_at(file: &OwnedFd, to: &mut [u8], offset: u64) -> Result<usize, rustix::io::Errno> {
    let mut done = 0;
    while done < to.len() {
        match rustix::io::pread(file, &mut to[done..], offset.saturating_add(done as u64)) {
            Ok(0) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::OVERFLOW) => break,
            Ok(count) => done += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Checks an image and the files below it, nearest first: each is what it is said to be, and has what it needs below it.
fn check_chain(files: &[(String, OwnedFd, DiskFormat)], block_size: u32) -> Result<(), Error> {
    for (i, (field, file, format)) in files.iter().enumerate() {
        let content = content(file)
            .map_err(|error| Error::bad_config(field.clone(), format!("{field}: the image cannot be read: {error}")))?;
        let follows = files.get(i + 1).map(|(field, _, _)| field);
        check_content(field, &content, *format, follows)?;
        if i == 0 && content_is_raw(*format) {
            check_size(field, file, block_size)?;
        }
    }
    Ok(())
}

fn content_is_raw(format: DiskFormat) -> bool {
    format != DiskFormat::Qcow2
}

fn check_content(field: &str, content: &Content, format: DiskFormat, follows: Option<&String>) -> Result<(), Error> {
    let bad = |about: &str, message: String| Err(Error::bad_config(about, message));
    match (format, content) {
        (DiskFormat::Unspecified, Content::Qcow2 { .. }) => bad(
            field,
            format!(
                "{field}: the image begins as a qcow2 image does; say which format it has: qcow2, or raw to show the guest these very bytes"
            ),
        ),
        (DiskFormat::Qcow2, Content::Raw) => bad(field, format!("{field}: the image is no qcow2 image")),
        (DiskFormat::Qcow2, Content::Qcow2 { below: Some(name) }) if follows.is_none() => bad(
            field,
            format!(
                "{field}: the image needs the file below it, which it calls \"{name}\"; names inside images are not followed: give it as backing"
            ),
        ),
        (DiskFormat::Qcow2, Content::Qcow2 { below: None }) => match follows {
            Some(extra) => bad(extra, format!("{extra}: {field} needs no file below it")),
            None => Ok(()),
        },
        (DiskFormat::Qcow2, Content::Qcow2 { .. }) => Ok(()),
        (DiskFormat::Unspecified | DiskFormat::Raw, _) => match follows {
            Some(extra) => bad(extra, format!("{extra}: {field} is raw, so there is nothing below it")),
            None => Ok(()),
        },
    }
}

fn check_size(field: &str, file: &OwnedFd, block_size: u32) -> Result<(), Error> {
    // Not fstat(2), which knows no size of a block device.
    let size = rustix::fs::seek(file, SeekFrom::End(0))
        .map_err(|error| Error::bad_config(field, format!("{field}: the size of the image is not known: {error}")))?;
    if size == 0 {
        return Err(Error::bad_config(field, format!("{field}: the image is empty")));
    }
    if !size.is_multiple_of(u64::from(block_size)) {
        let message = format!("{field}: the image has {size} bytes, no multiple of the block size {block_size}");
        return Err(Error::bad_config(field, message));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::Write,
        path::{Path, PathBuf},
    };

    use proptest::prelude::*;

    use super::*;
    use crate::files::Images;

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn raw(&self, name: &str) -> PathBuf {
            fs::write(self.path(name), [1; 8192]).unwrap();
            self.path(name)
        }

        /// Something that has the header of a qcow2 image.
        fn qcow2(&self, name: &str, below: &str) -> PathBuf {
            let mut content = vec![0; 8192];
            content[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
            if !below.is_empty() {
                content[8..16].copy_from_slice(&1024u64.to_be_bytes());
                content[16..20].copy_from_slice(&u32::try_from(below.len()).unwrap().to_be_bytes());
                content[1024..1024 + below.len()].copy_from_slice(below.as_bytes());
            }
            fs::write(self.path(name), content).unwrap();
            self.path(name)
        }
    }

    fn claims() -> Claims {
        Claims::new(&Images::default(), "web")
    }

    fn way(path: &Path) -> Way {
        Way::Open(path.to_str().unwrap().to_owned())
    }

    fn open_as(
        mode: DiskMode,
        format: DiskFormat,
        image: Way,
        backing: Vec<(Way, DiskFormat)>,
    ) -> Result<(Vec<OwnedFd>, Vec<ImageUse>), Error> {
        let mut uses = Vec::new();
        let job = DiskJob {
            index: 2,
            mode,
            format,
            direct: false,
            block_size: 512,
            image,
            backing,
        };
        Ok((job.open(&claims(), &mut uses)?, uses))
    }

    fn refused(about: &str, words: &str, result: Result<(Vec<OwnedFd>, Vec<ImageUse>), Error>) -> Kind {
        let error = result.err().unwrap();
        assert_eq!(error.about, about, "{error}");
        assert!(error.message.contains(words), "{error}");
        error.kind
    }

    const IMAGE: &str = "disks[2].image";

    #[test]
    fn images_are_opened_with_the_rights_of_the_mode() {
        let folder = Folder::new();
        let path = folder.raw("raw");
        for (mode, access) in [
            (DiskMode::ReadWrite, OFlags::RDWR),
            (DiskMode::ReadOnly, OFlags::RDONLY),
            (DiskMode::VolatileWrite, OFlags::RDONLY),
        ] {
            let given: OwnedFd = fs::File::options().read(true).write(true).open(&path).unwrap().into();
            for image in [way(&path), Way::Check(given)] {
                let (files, uses) = open_as(mode, DiskFormat::Unspecified, image, vec![]).unwrap();
                let flags = rustix::fs::fcntl_getfl(&files[0]).unwrap();
                assert_eq!((flags & OFlags::ACCMODE, uses.len()), (access, 1), "{mode:?}");
                assert!(!flags.contains(OFlags::NONBLOCK));
            }
        }
    }

    #[test]
    fn reads_of_the_manager_s_own_images_are_not_noted_and_others_are_opened_all_the_same() {
        let folder = Folder::new();
        let open = |path: &Path| {
            open_as(DiskMode::ReadOnly, DiskFormat::Raw, way(path), vec![])
                .unwrap()
                .0
        };
        let noted = |files: &[OwnedFd]| !rustix::fs::fcntl_getfl(&files[0]).unwrap().contains(OFlags::NOATIME);
        let path = folder.raw("raw");
        assert!(!noted(&open(&path)));
        // Somebody else's: only who may do anything with other users' files has it unnoted.
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(1), Some(1)).unwrap();
            fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
            fs::set_permissions(folder.0.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
            let others = std::thread::spawn(move || {
                // SAFETY: the system call changes the ids of the calling thread only, which ends with this test.
                assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) }, 0);
                noted(
                    &open_as(DiskMode::ReadOnly, DiskFormat::Raw, way(&path), vec![])
                        .unwrap()
                        .0,
                )
            });
            assert!(others.join().unwrap());
        }
    }

    #[test]
    fn files_that_cannot_be_used_are_refused() {
        let folder = Folder::new();
        let open = |mode, path: &Path| open_as(mode, DiskFormat::Unspecified, way(path), vec![]);
        let missing = refused(
            IMAGE,
            "cannot be opened",
            open(DiskMode::ReadOnly, &folder.path("missing")),
        );
        assert_eq!(missing, Kind::NotFound);
        refused(IMAGE, "directory", open(DiskMode::ReadOnly, folder.0.path()));
        refused(IMAGE, "directory", open(DiskMode::ReadWrite, folder.0.path()));
        refused(
            IMAGE,
            "character device",
            open(DiskMode::ReadOnly, Path::new("/dev/zero")),
        );
        let read_only: OwnedFd = fs::File::open(folder.raw("raw")).unwrap().into();
        let given = open_as(DiskMode::ReadWrite, DiskFormat::Raw, Way::Check(read_only), vec![]);
        refused(IMAGE, "not open for writing", given);
        fs::write(folder.path("empty"), []).unwrap();
        refused(IMAGE, "empty", open(DiskMode::ReadOnly, &folder.path("empty")));
        fs::write(folder.path("odd"), [0; 513]).unwrap();
        refused(IMAGE, "513 bytes", open(DiskMode::ReadOnly, &folder.path("odd")));
    }

    #[test]
    fn formats_are_told_and_never_guessed() {
        let folder = Folder::new();
        let (raw, qcow2) = (folder.raw("raw"), folder.qcow2("qcow2", ""));
        let open = |format, path: &Path| open_as(DiskMode::ReadOnly, format, way(path), vec![]);
        refused(IMAGE, "qcow2", open(DiskFormat::Unspecified, &qcow2));
        refused(IMAGE, "no qcow2 image", open(DiskFormat::Qcow2, &raw));
        for (format, path) in [
            (DiskFormat::Unspecified, &raw),
            (DiskFormat::Raw, &raw),
            (DiskFormat::Raw, &qcow2),
            (DiskFormat::Qcow2, &qcow2),
        ] {
            open(format, path).unwrap();
        }
    }

    #[test]
    fn what_is_below_an_image_has_to_be_given_and_to_fit() {
        let folder = Folder::new();
        let (raw, base) = (folder.raw("raw"), folder.qcow2("base", ""));
        let top = folder.qcow2("top", "base\n.img");
        let middle = folder.qcow2("middle", "raw.img");
        let open = |image: &Path, backing: &[(&Path, DiskFormat)]| {
            let backing = backing.iter().map(|(path, format)| (way(path), *format)).collect();
            open_as(DiskMode::ReadOnly, DiskFormat::Qcow2, way(image), backing)
        };
        refused(IMAGE, "base\\n.img", open(&top, &[]));
        refused(
            "disks[2].backing[0]",
            "raw.img",
            open(&top, &[(&middle, DiskFormat::Qcow2)]),
        );
        refused(
            "disks[2].backing[0]",
            "needs no file",
            open(&base, &[(&raw, DiskFormat::Raw)]),
        );
        refused(
            "disks[2].backing[0]",
            "qcow2",
            open(&top, &[(&base, DiskFormat::Unspecified)]),
        );
        let more = [(&raw as &Path, DiskFormat::Raw), (&raw, DiskFormat::Raw)];
        refused("disks[2].backing[1]", "nothing below", open(&top, &more));
        let chain = [(&middle as &Path, DiskFormat::Qcow2), (&raw, DiskFormat::Unspecified)];
        let (files, uses) = open(&top, &chain).unwrap();
        assert_eq!((files.len(), uses.len()), (3, 3));
    }

    #[test]
    fn direct_is_set_or_refused() {
        let folder = Folder::new();
        let mut disk = Disk::new(sepal_schema::config::File::None, DiskMode::ReadOnly);
        disk.direct = true;
        let job = DiskJob::new(2, &disk, way(&folder.raw("raw")), vec![]);
        match job.open(&claims(), &mut Vec::new()) {
            Ok(files) => assert!(rustix::fs::fcntl_getfl(&files[0]).unwrap().contains(OFlags::DIRECT)),
            // A tmpfs of an old kernel.
            Err(error) => assert_eq!(
                (error.kind, &error.about[..]),
                (Kind::DeviceInitializationFailure, "disks[2].direct")
            ),
        }
    }

    proptest! {
        #[test]
        fn any_header_is_read_without_a_panic(header in proptest::collection::vec(any::<u8>(), 0..64), magic: bool) {
            let mut file = tempfile::tempfile().unwrap();
            if magic {
                file.write_all(&QCOW2_MAGIC).unwrap();
            }
            file.write_all(&header).unwrap();
            let found = content(&file.into()).unwrap();
            let is_qcow2 = matches!(found, Content::Qcow2 { .. });
            prop_assert_eq!(is_qcow2, magic && header.len() >= QCOW2_HEADER - 4 || header.starts_with(&QCOW2_MAGIC) && header.len() >= QCOW2_HEADER);
        }
    }
}

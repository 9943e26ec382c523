//! Tests of what makes a file fit for use.

use std::{
    fs::{File, OpenOptions},
    io::{Seek, SeekFrom, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
};

use rustix::fs::{MemfdFlags, SealFlags};

use super::*;

fn memfd(seals: Option<SealFlags>) -> OwnedFd {
    let flags = if seals.is_some() {
        MemfdFlags::ALLOW_SEALING
    } else {
        MemfdFlags::empty()
    };
    let fd = rustix::fs::memfd_create("test", flags).unwrap();
    if let Some(seals) = seals {
        rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    }
    fd
}

fn sentence(result: Result<FileKind, FileError>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn ordinary_files_are_fit_as_they_were_opened() {
    // Not in a tmpfs only: the target folder is wherever the sources are.
    for folder in [
        tempfile::tempdir().unwrap(),
        tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap(),
    ] {
        let path = folder.path().join("file");
        let file = File::create(&path).unwrap();
        assert_eq!(
            check(
                &file,
                Requirements {
                    writable: true,
                    ..Default::default()
                }
            )
            .unwrap(),
            FileKind::Regular
        );
        assert_eq!(
            sentence(check(&file, Requirements::READ)),
            "the file is not open for reading"
        );
        let file = File::open(&path).unwrap();
        assert_eq!(check(&file, Requirements::READ).unwrap(), FileKind::Regular);
        assert_eq!(
            sentence(check(&file, Requirements::READ_WRITE)),
            "the file is not open for writing"
        );
        let file = OpenOptions::new().read(true).append(true).open(&path).unwrap();
        assert!(matches!(
            check(&file, Requirements::READ_WRITE),
            Err(FileError::AppendOnly)
        ));
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let path_only = rustix::fs::open(&path, flags, rustix::fs::Mode::empty()).unwrap();
        assert!(matches!(check_regular(&path_only), Err(FileError::NotReadable)));
    }
}

#[test]
fn a_memfd_is_an_ordinary_file() {
    for seals in [None, Some(SealFlags::empty()), Some(SealFlags::SHRINK)] {
        assert_eq!(check_regular(&memfd(seals)).unwrap(), FileKind::Regular);
    }
}

#[test]
fn shared_memory_is_taken_whatever_its_seals() {
    for seals in [
        None,
        Some(SealFlags::empty()),
        Some(SealFlags::SHRINK | SealFlags::SEAL),
    ] {
        check_shared_memory(&memfd(seals)).unwrap();
    }
    let memory = memfd(None);
    let read_only = File::open(format!("/proc/self/fd/{}", memory.as_raw_fd())).unwrap();
    assert!(matches!(check_shared_memory(&read_only), Err(FileError::NotWritable)));
    let (pipe, _writer) = std::io::pipe().unwrap();
    for other in [OwnedFd::from(pipe), File::open("/proc/self/exe").unwrap().into()] {
        let words = check_shared_memory(&other).unwrap_err().to_string();
        assert!(words.contains("no shared memory"), "{words}");
    }
}

#[test]
fn what_is_no_file_is_named() {
    let (socket, _peer) = UnixStream::pair().unwrap();
    assert_eq!(
        sentence(check_regular(&socket.into())),
        "the file is a socket; what is needed is an ordinary file"
    );
    let (pipe, _writer) = std::io::pipe().unwrap();
    let words = sentence(check(&pipe, Requirements::READ.or_block_device()));
    assert_eq!(
        words,
        "the file is a pipe; what is needed is an ordinary file or a block device"
    );
    let folder = File::open("/").unwrap();
    assert!(sentence(check_regular(&folder.into())).contains("a directory"));
    let zero = File::open("/dev/zero").unwrap();
    assert!(sentence(check_regular(&zero.into())).contains("a character device"));
}

#[test]
fn all_is_read_wherever_the_offset_is() {
    let mut file = tempfile::tempfile().unwrap();
    let content: Vec<u8> = (0..700_000u32).map(|n| n as u8).collect();
    file.write_all(&content).unwrap();
    file.seek(SeekFrom::Start(5)).unwrap();
    assert!(read_all(&file, 1_000_000).unwrap() == content);
    assert!(read_all(&file, 700_000).unwrap() == content);
    assert_eq!(file.stream_position().unwrap(), 5);
    let words = read_all(&file, 699_999).unwrap_err().to_string();
    assert_eq!(words, "the file has more than the 699999 bytes allowed");
    assert!(read_all(&file, usize::MAX).unwrap() == content);
    // Cut short by its owner: an early end.
    file.set_len(10).unwrap();
    assert_eq!(read_all(&file, 1_000_000).unwrap(), content[..10]);
    assert!(read_all(&tempfile::tempfile().unwrap(), 0).unwrap().is_empty());
    // Sparse and far larger than what is allowed.
    file.set_len(1 << 40).unwrap();
    assert!(matches!(
        read_all(&file, 1000),
        Err(FileError::TooLarge { limit: 1000 })
    ));
}

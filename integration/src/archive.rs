//! Cpio archives with one file each, which Linux unpacks after the initramfs that they are appended to.

use std::{
    fs,
    io::{Seek, Write},
    path::Path,
};

use tempfile::NamedTempFile;

use crate::HarnessError;

/// Fields of a header of the "newc" format after its magic number, eight hexadecimal digits each: inode, mode, uid, gid, links, time, size,
/// device (2), special device (2), bytes of the name, checksum (Documentation/driver-api/early-userspace/buffer-format.rst of Linux).
fn entry(into: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    let (size, name_size) = (content.len() as u32, name.len() as u32 + 1);
    into.extend_from_slice(b"070701");
    for field in [1, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
        into.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    into.extend_from_slice(name.as_bytes());
    into.push(0);
    pad(into);
    into.extend_from_slice(content);
    pad(into);
}

/// Names and contents begin at multiples of four bytes.
fn pad(into: &mut Vec<u8>) {
    into.resize(into.len().next_multiple_of(4), 0);
}

/// The archive, which begins at a multiple of four bytes wherever it is appended to another one.
fn archive(name: &str, content: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    entry(&mut archive, name, 0o100_755, content);
    entry(&mut archive, "TRAILER!!!", 0, &[]);
    archive
}

/// The initramfs at `base` with these files besides, as programs: names without the first '/', in folders that are there, and contents.
///
/// # Errors
/// `base` cannot be read, or the host has no room.
pub fn initrd(base: &Path, files: &[(&str, &[u8])]) -> Result<NamedTempFile, HarnessError> {
    let first = fs::read(base).map_err(|source| HarnessError::Open {
        path: base.into(),
        source,
    })?;
    let written = NamedTempFile::new().and_then(|mut file| {
        file.write_all(&first)?;
        for (name, content) in files {
            file.write_all(&archive(name, content))?;
        }
        file.rewind()?;
        Ok(file)
    });
    written.map_err(HarnessError::io("writing an initramfs"))
}

#[cfg(test)]
mod tests {
    use super::archive;

    #[test]
    fn sizes_and_places_are_right() {
        let bytes = archive("script", b"echo hello\n");
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.starts_with("070701"));
        assert_eq!(&text[54..62], "0000000b", "bytes of the content");
        assert_eq!(&text[94..102], "00000007", "bytes of the name");
        assert_eq!(&text[110..117], "script\0");
        // 110 bytes of header and 7 of the name, padded to 120.
        assert_eq!(&text[120..131], "echo hello\n");
        assert_eq!(text.find("070701000000010000000"), Some(132), "the trailer");
        assert_eq!(bytes.len() % 4, 0);
    }
}

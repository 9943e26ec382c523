//! Disk images, by e2fsprogs and qemu-utils.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use super::run;
use crate::HarnessError;

/// An image in a folder of its own, which goes with it.
pub struct Image {
    path: PathBuf,
    _folder: TempDir,
}

impl Image {
    fn new(name: &str) -> Result<Self, HarnessError> {
        let folder = TempDir::new().map_err(HarnessError::io("making a folder for an image"))?;
        Ok(Self {
            path: folder.path().join(name),
            _folder: folder,
        })
    }

    /// A raw image of so many bytes, all zero and sparse.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn raw(bytes: u64) -> Result<Self, HarnessError> {
        let image = Self::new("disk.img")?;
        let file = File::create(&image.path).and_then(|file| file.set_len(bytes));
        file.map_err(HarnessError::io("making an image"))?;
        Ok(image)
    }

    /// A raw image with an ext4 file system.
    ///
    /// # Errors
    /// As [`raw`](Self::raw), and when mkfs.ext4 is missing or fails.
    pub fn ext4(bytes: u64) -> Result<Self, HarnessError> {
        let image = Self::raw(bytes)?;
        // Tables written now are not written by the guest.
        run(
            "mkfs.ext4",
            &[
                "-q",
                "-F",
                "-E",
                "lazy_itable_init=0,lazy_journal_init=0",
                &image.text(),
            ],
        )?;
        Ok(image)
    }

    /// A qcow2 image, over another one if `backing` names it.
    ///
    /// # Errors
    /// When qemu-img is missing or fails.
    pub fn qcow2(bytes: u64, backing: Option<&Self>) -> Result<Self, HarnessError> {
        let image = Self::new("disk.qcow2")?;
        let (path, size) = (image.text(), bytes.to_string());
        match backing {
            None => run("qemu-img", &["create", "-q", "-f", "qcow2", &path, &size])?,
            Some(below) => run(
                "qemu-img",
                &[
                    "create",
                    "-q",
                    "-f",
                    "qcow2",
                    "-F",
                    "raw",
                    "-b",
                    &below.text(),
                    &path,
                    &size,
                ],
            )?,
        };
        Ok(image)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn text(&self) -> String {
        self.path.to_string_lossy().into_owned()
    }
}

/// Checks an ext4 file system without changing it.
///
/// # Errors
/// [`HarnessError::Command`] with what e2fsck found.
pub fn check_ext4(image: &Path) -> Result<(), HarnessError> {
    run("e2fsck", &["-f", "-n", &image.to_string_lossy()]).map(drop)
}

/// A file of an ext4 file system.
///
/// # Errors
/// [`HarnessError::Command`].
pub fn read_ext4(image: &Path, file: &str) -> Result<Vec<u8>, HarnessError> {
    run("debugfs", &["-R", &format!("cat {file}"), &image.to_string_lossy()])
}

/// Checks the structures of a qcow2 image.
///
/// # Errors
/// [`HarnessError::Command`] with what qemu-img found.
pub fn check_qcow2(image: &Path) -> Result<(), HarnessError> {
    run("qemu-img", &["check", "-f", "qcow2", &image.to_string_lossy()]).map(drop)
}

/// Compares what a guest would see of a qcow2 image with a raw one.
///
/// # Errors
/// [`HarnessError::Command`] with the first difference.
pub fn compare_images(qcow2: &Path, raw: &Path) -> Result<(), HarnessError> {
    let (qcow2, raw) = (qcow2.to_string_lossy(), raw.to_string_lossy());
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", &qcow2, &raw]).map(drop)
}

//! qcow2 images, read and written by the crate imago, and the chain of images below one.
//!
//! An image is hostile: whoever wrote it may be the guest of yesterday. So the header is looked at here first, the files that it names are never
//! opened but have to be given, and should imago panic over what it finds, the image is of no use from then on and each request fails.

mod header;
pub(super) mod storage;

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, Mapping};

use self::header::Header;
use self::storage::{HandleStorage, cached_only, note_stack};
use super::backend::Backend;
use super::buffers::{Bounce, Buffers};
use super::config::{BlockError, FileRole};
use super::image;
use super::raw::HostFile;
use crate::dispatch::panic_message;

/// Zeroes that are written at once where an image cannot note them.
const ZEROES: u64 = 64 << 10;

/// An image with all that is below it.
pub(super) struct Image {
    /// Written: what may change where clusters lie. Read: all else.
    access: RwLock<FormatAccess<HandleStorage>>,
    broken: AtomicBool,
}

impl Image {
    /// Opens the image in `file`, for writing if `write`, upon the images and files `backing`, nearest first.
    ///
    /// # Errors
    ///
    /// Which file is damaged, of a kind that is not served, missing or one too many.
    pub(super) fn open(file: HostFile, backing: Vec<OwnedFd>, write: bool) -> Result<Self, BlockError> {
        let given = backing.len();
        let mut backing = backing.into_iter().enumerate();
        // From the top down: each says whether and what it needs below.
        let mut layers = Vec::new();
        let mut next = Some((FileRole::Image, file));
        let mut bottom = None;
        while let Some((role, file)) = next.take() {
            let writable = write && layers.is_empty();
            let (qcow2, below) = open_layer(role, file, writable)?;
            layers.push(qcow2);
            let Some((name, format)) = below else { break };
            let Some((n, fd)) = backing.next() else {
                return Err(BlockError::BackingMissing { file: role, name });
            };
            let below_role = FileRole::Backing(n);
            let file = image::open_file(fd, below_role, false, false)?;
            let is_qcow2 = match format.as_deref() {
                Some("qcow2") => true,
                Some("raw" | "file") => false,
                Some(other) => {
                    return Err(BlockError::BackingFormat {
                        file: role,
                        format: other.to_owned(),
                    });
                }
                // Whatever it is taken for, only files that were given are read.
                None => Header::has_magic(&file).map_err(|error| image::host(below_role, "read", error))?,
            };
            if is_qcow2 {
                next = Some((below_role, file));
            } else {
                let raw = Raw::open_image(HandleStorage::new(file), false);
                let raw = raw.map_err(|error| image::host(below_role, "open", error))?;
                bottom = Some(FormatAccess::new(raw));
            }
        }
        let used = given - backing.len();
        if used != given {
            return Err(BlockError::BackingUnused { given, used });
        }
        for mut layer in layers.into_iter().rev() {
            layer.set_data_file(None);
            layer.set_backing(bottom.take());
            bottom = Some(FormatAccess::new(layer));
        }
        let access = bottom.ok_or_else(|| damaged(FileRole::Image, "it has no layers"))?;
        Ok(Self {
            access: RwLock::new(access),
            broken: AtomicBool::new(false),
        })
    }

    /// Bytes of the disk.
    pub(super) fn bytes(&self) -> u64 {
        self.shared().size()
    }

    fn shared(&self) -> RwLockReadGuard<'_, FormatAccess<HandleStorage>> {
        self.access.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn exclusive(&self) -> RwLockWriteGuard<'_, FormatAccess<HandleStorage>> {
        self.access.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls imago; a panic of its breaks the image, not the device.
    fn call<R>(&self, call: impl FnOnce() -> io::Result<R>) -> io::Result<R> {
        let broken = || io::Error::other("the image is damaged");
        if self.broken.load(Ordering::Relaxed) {
            return Err(broken());
        }
        note_stack();
        catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
            self.broken.store(true, Ordering::Relaxed);
            tracing::error!(reason = panic_message(&*panic), "a qcow2 image is damaged");
            Err(broken())
        })
    }

    /// [`shared`](Self::shared), if nobody has it for themselves.
    fn shared_at_once(&self) -> Option<RwLockReadGuard<'_, FormatAccess<HandleStorage>>> {
        self.access.try_read().ok()
    }
}

/// What an image says is below it: a name, and its format if it says.
type Below = (String, Option<String>);

/// Opens one image without what is below it.
fn open_layer(
    role: FileRole,
    file: HostFile,
    write: bool,
) -> Result<(Qcow2<HandleStorage>, Option<Below>), BlockError> {
    let header = Header::read(&file).map_err(|error| image::host(role, "read", error))?;
    header.check(role)?;
    if write {
        header.check_refcounts(role, &file)?;
    }
    note_stack();
    let opened = catch_unwind(AssertUnwindSafe(|| Qcow2::open_image(HandleStorage::new(file), write)));
    let qcow2: Qcow2<HandleStorage> = match opened {
        Ok(Ok(qcow2)) => qcow2,
        Ok(Err(error)) => return Err(damaged(role, &error.to_string())),
        Err(panic) => return Err(damaged(role, &panic_message(&*panic))),
    };
    if qcow2.requires_external_data_file() {
        return Err(BlockError::ExternalData { file: role });
    }
    let below = qcow2
        .implicit_backing_file()
        .map(|name| (name.clone(), qcow2.implicit_backing_format().cloned()));
    Ok((qcow2, below))
}

fn damaged(file: FileRole, reason: &str) -> BlockError {
    BlockError::Qcow2 {
        file,
        reason: reason.to_owned(),
    }
}

/// The row as imago takes it to fill it.
fn to_fill(buffers: &Buffers) -> IoVectorMut<'_> {
    let slices = buffers.all_vectors().iter().map(|vector| {
        // SAFETY: whoever made the row keeps it mapped for as long as it is used, and `IoVectorMut` lives no longer than the row. Nothing in this
        // process holds references to what lies there but imago for the time of a call, which only copies to it and hands it to the kernel; other
        // accesses are the guest's own.
        IoSliceMut::new(unsafe { std::slice::from_raw_parts_mut(vector.iov_base.cast(), vector.iov_len) })
    });
    slices.collect::<Vec<_>>().into()
}

/// The row as imago takes it to read it.
fn to_read(buffers: &Buffers) -> IoVector<'_> {
    let slices = buffers.all_vectors().iter().map(|vector| {
        // SAFETY: as in `to_fill`; imago only copies from it and hands it to the kernel.
        IoSlice::new(unsafe { std::slice::from_raw_parts(vector.iov_base.cast(), vector.iov_len) })
    });
    slices.collect::<Vec<_>>().into()
}

fn sync(access: &FormatAccess<HandleStorage>) -> io::Result<()> {
    access.flush()?;
    access.sync()
}

impl Backend for Image {
    fn read(&self, offset: u64, to: &Buffers) -> io::Result<()> {
        self.call(|| self.shared().readv(to_fill(to), offset))
    }

    fn read_cached(&self, offset: u64, to: &Buffers) -> io::Result<bool> {
        let Some(access) = self.shared_at_once() else {
            return Ok(false);
        };
        match self.call(|| cached_only(|| access.readv(to_fill(to), offset))) {
            Ok(()) => Ok(true),
            // Also what is wrong is told by the way that waits.
            Err(_) => Ok(false),
        }
    }

    fn write(&self, offset: u64, from: &Buffers, durable: bool) -> io::Result<()> {
        self.call(|| {
            let access = self.shared();
            access.writev(to_read(from), offset)?;
            if durable { sync(&access) } else { Ok(()) }
        })
    }

    fn write_cached(&self, offset: u64, from: &Buffers) -> io::Result<bool> {
        let Some(access) = self.shared_at_once() else {
            return Ok(false);
        };
        self.call(|| {
            // What has its place already only goes into the page cache.
            let placed = match cached_only(|| access.get_mapping(offset, from.bytes())) {
                Ok((Mapping::Raw { storage, writable, .. }, len)) => {
                    writable && len >= from.bytes() && !storage.is_direct()
                }
                _ => false,
            };
            if placed {
                access.writev(to_read(from), offset).map(|()| true)
            } else {
                Ok(false)
            }
        })
    }

    fn flush(&self) -> io::Result<()> {
        self.call(|| sync(&self.shared()))
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.call(|| match self.exclusive().discard_to_any(offset, len) {
            // A hint only.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            other => other,
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.call(|| {
            let done = if unmap {
                self.exclusive().discard_to_zero(offset, len)
            } else {
                self.shared().write_zeroes(offset, len)
            };
            match done {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    let mut zeroes = Bounce::new(ZEROES as usize, 4096)?;
                    let mut at = 0;
                    while at < len {
                        let buffers = zeroes.buffers((len - at).min(ZEROES) as usize);
                        self.shared().writev(to_read(&buffers), offset + at)?;
                        at += buffers.bytes();
                    }
                    Ok(())
                }
                other => other,
            }
        })
    }
}

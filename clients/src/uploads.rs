//! Files for a guest manager that cannot be handed an open one: their bytes are streamed there.

use std::{
    fs::File,
    io::{self, IsTerminal, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use rustix::fs::OFlags;
use sepal_schema::{
    config::{self, GuestConfig, device::DiskMode},
    error::{Error, Outcome},
    file_capnp::upload,
};

use crate::manager::Manager;

/// How a path of the guest manager's machine begins.
const THERE: &str = "path:";
/// Bytes sent at a time: the most that the protocol takes.
const CHUNK: usize = 64 * 1024;
/// The size from which on a person at a terminal is told what takes so long.
const TELL_FROM: u64 = 16 << 20;

/// The path of the guest manager's machine that `path:PATH` names; none for a file of this machine.
pub(crate) fn there(path: &Path) -> Option<&str> {
    path.to_str()?.strip_prefix(THERE)
}

/// A file of the command line as a configuration names it: opened here, or, as `path:PATH`, by the guest manager.
pub(crate) fn open(what: &str, path: &Path, write: bool) -> Result<config::File> {
    if let Some(there) = there(path) {
        return Ok(config::File::Path(there.to_owned()));
    }
    let how = if write { " for reading and writing" } else { "" };
    // Opening must not wait for the other end of a pipe, nor become the controlling terminal's. Whoever reads the file makes of it what it needs.
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    let file = File::options().read(true).write(write).custom_flags(flags).open(path);
    let file = file.with_context(|| format!("opening the {what} {}{how}", path.display()))?;
    Ok(config::File::Fd(file.into()))
}

/// Streams the files of a configuration that are open here to the guest manager. `disks` are their names, for messages.
///
/// # Errors
/// `NOT_SUPPORTED` for a disk that the guest would write to; what went wrong with the stream.
pub(crate) async fn replace(manager: &Manager, config: &mut GuestConfig, disks: &[PathBuf]) -> Result<()> {
    for (index, (disk, path)) in config.disks.iter().zip(disks).enumerate() {
        if disk.mode == DiskMode::ReadWrite && matches!(disk.image, config::File::Fd(_)) {
            let message = format!(
                "the guest could not write to {0}: this connection carries no open files. Name a file of the guest manager's machine \
                 (--disk path:/...), or upload this one (--disk {0},ro or --disk {0},volatile)",
                path.display()
            );
            return Err(Error::not_supported(format!("disks[{index}].image"), message).into());
        }
    }
    let mut files = vec![
        (&mut config.kernel, "kernel".to_owned()),
        (&mut config.initrd, "initrd".to_owned()),
    ];
    for (disk, path) in config.disks.iter_mut().zip(disks) {
        let path = path.display();
        files.push((&mut disk.image, format!("disk {path}")));
        for (number, below) in (1..).zip(&mut disk.backing) {
            files.push((&mut below.file, format!("file {number} below the disk {path}")));
        }
    }
    for (file, what) in files {
        if let config::File::Fd(_) = file
            && let config::File::Fd(fd) = std::mem::take(file)
        {
            let uploaded = upload(manager, fd.into(), &what).await;
            *file = config::File::Upload(uploaded.with_context(|| format!("uploading the {what}"))?);
        }
    }
    Ok(())
}

async fn upload(manager: &Manager, mut file: File, what: &str) -> Result<upload::Client> {
    let found = file.metadata()?;
    if !found.is_file() {
        bail!("it is no regular file");
    }
    if found.len() >= TELL_FROM && io::stderr().is_terminal() {
        say!("uploading the {what} ({} MiB)", found.len() >> 20);
    }
    let mut request = manager.client.upload_request();
    request.get().set_size(found.len());
    let response = request.send().promise.await?;
    let upload = response.get()?.outcome()?.get_upload()?;
    let mut buffer = vec![0; CHUNK];
    let mut sent = 0;
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        let mut call = upload.write_request();
        call.get().set_bytes(&buffer[..count]);
        // An error of the stream is told by its end.
        if call.send().await.is_err() {
            break;
        }
        sent += count as u64;
    }
    let received = upload.finish_request().send().promise.await?.get()?.get_size();
    if received != sent {
        bail!("{received} bytes of {sent} arrived");
    }
    Ok(upload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_the_other_machine_are_told_from_ours() {
        assert_eq!(there(Path::new("path:/a/b")), Some("/a/b"));
        assert_eq!(there(Path::new("./path:/a/b")), None);
        assert_eq!(there(Path::new("/a/b")), None);
    }
}

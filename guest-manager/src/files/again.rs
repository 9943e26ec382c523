//! Takes images into use again that the open files of a configuration are of: those of a guest that an earlier manager launched.

use std::{io, os::fd::OwnedFd};

use sepal_schema::{
    config::{File, GuestConfig, device::DiskMode},
    error::Error,
};

use super::{ImageUse, images::Claims};
use crate::manager::Manager;

/// Notes that the guest uses its images. The locks on them belong to its open files, so nobody can have taken them meanwhile.
pub(crate) async fn take_again(manager: &Manager, guest: &str, config: &GuestConfig) -> Vec<ImageUse> {
    let claims = Claims::new(&manager.images, guest);
    let mut files: Vec<(String, io::Result<OwnedFd>, bool)> = Vec::new();
    for (i, disk) in config.disks.iter().enumerate() {
        if let File::Fd(image) = &disk.image {
            let writes = disk.mode == DiskMode::ReadWrite;
            files.push((format!("disks[{i}].image"), image.try_clone(), writes));
        }
        for (j, below) in disk.backing.iter().enumerate() {
            if let File::Fd(file) = &below.file {
                files.push((format!("disks[{i}].backing[{j}]"), file.try_clone(), false));
            }
        }
    }
    if files.is_empty() {
        return Vec::new();
    }
    let take = move || {
        let take = |(field, file, writes): (String, io::Result<OwnedFd>, bool)| {
            let file = file.map_err(|error| super::no_resources(&field, &error))?;
            claims.claim(&field, &file, writes)
        };
        files.into_iter().map(take).collect::<Vec<Result<_, Error>>>()
    };
    let mut uses = Vec::new();
    for taken in manager.handle.spawn_foreign(take).await.unwrap_or_default() {
        match taken {
            Ok(taken) => uses.push(taken),
            Err(error) => tracing::error!(guest, "{error}"),
        }
    }
    uses
}

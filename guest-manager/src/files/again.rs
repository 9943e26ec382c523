//! Takes images into use again that the open files of a configuration are of: those of a guest that an earlier manager launched.

use sepal_schema::config::{File, GuestConfig, device::DiskMode};

use super::ImageUse;
use crate::manager::Manager;

/// Notes that the guest uses its images. The locks on them belong to its open files, so nobody can have taken them meanwhile, and nothing is asked of the
/// storage that they lie on: it may be dead.
pub(crate) fn take_again(manager: &Manager, guest: &str, config: &GuestConfig) -> Vec<ImageUse> {
    let mut uses = Vec::new();
    let mut take = |field: String, file: &File, writes: bool| {
        let File::Fd(file) = file else { return };
        match manager.images.claim_again(guest, &field, file, writes) {
            Ok(used) => uses.push(used),
            Err(error) => tracing::error!(guest, "{error}"),
        }
    };
    for (i, disk) in config.disks.iter().enumerate() {
        take(
            format!("disks[{i}].image"),
            &disk.image,
            disk.mode == DiskMode::ReadWrite,
        );
        for (j, below) in disk.backing.iter().enumerate() {
            take(format!("disks[{i}].backing[{j}]"), &below.file, false);
        }
    }
    uses
}

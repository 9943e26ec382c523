//! Reads disks out of a message.

use super::{bad, bounded, rate, unique, unknown};
use crate::{
    config::{
        File, Handles, MAX_DEVICES,
        decode::{at_most, file, text},
        device::{Backing, Disk, DiskFormat, DiskMode, MAX_BACKING, MAX_DISK_ID, MAX_QUEUES},
    },
    config_capnp::guest_config::{self, disk},
    error::Error,
};

pub(super) fn disks(config: guest_config::Reader<'_>, handles: &dyn Handles) -> Result<Vec<Disk>, Error> {
    let list = config.get_disks()?;
    at_most("disks", list.len(), MAX_DEVICES)?;
    let disks: Vec<_> = list
        .iter()
        .enumerate()
        .map(|(i, from)| disk(i, from, handles))
        .collect();
    let disks: Vec<Disk> = disks.into_iter().collect::<Result<_, _>>()?;
    let ids = disks.iter().enumerate().filter(|(_, disk)| !disk.id.is_empty());
    unique("disks", "id", ids.map(|(i, disk)| (i, &disk.id)), |id| {
        format!("\"{id}\"")
    })?;
    Ok(disks)
}

fn disk(i: usize, from: disk::Reader<'_>, handles: &dyn Handles) -> Result<Disk, Error> {
    let at = |name: &str| format!("disks[{i}].{name}");
    let image = file(&at("image"), from.get_image()?, handles);
    let backing = backing(i, from, handles);
    let scratch = file(&at("scratch"), from.get_scratch()?, handles);
    let (image, backing, scratch) = (image?, backing?, scratch?);
    let mode = from.get_mode().map_err(|_| unknown(&at("mode")))?;
    match &image {
        File::None => {
            let message = format!("{} is missing: a disk needs an image", at("image"));
            return Err(bad(at("image"), message));
        }
        File::Bytes(_) | File::Upload(_) if mode == DiskMode::ReadWrite => {
            let message = format!(
                "{} is given by its content, which nobody could read again: use readOnly or volatileWrite, or a file",
                at("image")
            );
            return Err(bad(at("image"), message));
        }
        _ => {}
    }
    match &scratch {
        File::None => {}
        _ if mode != DiskMode::VolatileWrite => {
            let message = format!("{} is set, but only a volatileWrite disk has one", at("scratch"));
            return Err(bad(at("scratch"), message));
        }
        File::Bytes(_) | File::Upload(_) => {
            let message = format!("{} is given by its content; it has to be an empty file", at("scratch"));
            return Err(bad(at("scratch"), message));
        }
        File::Fd(_) | File::Path(_) => {}
    }
    let format = from.get_format().map_err(|_| unknown(&at("format")))?;
    if !backing.is_empty() && format != DiskFormat::Qcow2 {
        let message = format!("{} is set, but only qcow2 images have files below them", at("backing"));
        return Err(bad(at("backing"), message));
    }
    let block_size = from.get_block_size();
    if !matches!(block_size, 0 | 512 | 4096) {
        let message = format!("{} is {block_size}; 512 and 4096 are possible", at("blockSize"));
        return Err(bad(at("blockSize"), message));
    }
    Ok(Disk {
        id: disk_id(&at("id"), from.get_id()?)?,
        image,
        mode,
        format,
        direct: from.get_direct(),
        block_size,
        rate_limit: rate(&at("rateLimit"), from.get_rate_limit()?)?,
        backing,
        queues: bounded(at("queues"), from.get_queues(), MAX_QUEUES)?,
        scratch,
    })
}

fn disk_id(field: &str, from: capnp::text::Reader<'_>) -> Result<String, Error> {
    let id = text(field, from, MAX_DISK_ID)?;
    match id.chars().find(|c| !c.is_ascii_graphic()) {
        Some(c) => Err(bad(
            field,
            format!(
                "{field} has the character '{}'; printable ASCII without blanks is allowed",
                c.escape_default()
            ),
        )),
        None => Ok(id),
    }
}

fn backing(i: usize, from: disk::Reader<'_>, handles: &dyn Handles) -> Result<Vec<Backing>, Error> {
    let field = format!("disks[{i}].backing");
    let files = from.get_backing()?;
    at_most(&field, files.len(), MAX_BACKING)?;
    let taken: Vec<_> = files
        .iter()
        .enumerate()
        .map(|(j, from)| file(&format!("{field}[{j}]"), from, handles))
        .collect();
    let formats = from.get_backing_format()?;
    at_most(&format!("disks[{i}].backingFormat"), formats.len(), files.len())?;
    let mut formats = formats.iter();
    let mut backing = Vec::new();
    for (j, file) in taken.into_iter().enumerate() {
        let file = file?;
        if file.is_none() {
            return Err(bad(format!("{field}[{j}]"), format!("{field}[{j}] names no file")));
        }
        let format = formats.next().unwrap_or(Ok(DiskFormat::Unspecified));
        let format = format.map_err(|_| unknown(&format!("disks[{i}].backingFormat[{j}]")))?;
        backing.push(Backing { file, format });
    }
    Ok(backing)
}

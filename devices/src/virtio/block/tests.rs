//! The device on a bench, without a virtual machine.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;

use tempfile::NamedTempFile;

use super::config::*;
use super::request::*;
use super::*;
use crate::dispatch::DeviceEvent;
use crate::rate::RateLimit;
use crate::virtio::device::{Fault, VirtioDevice};
use crate::virtio::testing::{Buffer, Rig, Used};

mod basic;
mod host;
mod model;
mod qcow2;
mod volatile;

/// Whether an io_uring may be used: both engines.
const ENGINES: [bool; 2] = [true, false];

/// An image of zeroes.
fn image(bytes: u64) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(bytes).unwrap();
    file
}

/// A descriptor of its own for reading and writing.
fn fd(file: &NamedTempFile) -> OwnedFd {
    File::options().read(true).write(true).open(file.path()).unwrap().into()
}

fn rig_of(config: BlockConfig) -> Rig<Block> {
    Rig::active(Block::new(config).unwrap().0)
}

/// A raw disk on `file`, changed by `change`.
fn rig(file: &NamedTempFile, change: impl FnOnce(&mut BlockConfig)) -> Rig<Block> {
    let mut config = BlockConfig::new("disk", fd(file));
    change(&mut config);
    rig_of(config)
}

fn contents(file: &NamedTempFile) -> Vec<u8> {
    std::fs::read(file.path()).unwrap()
}

/// Bytes that tell where they belong.
fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|n| (n as u8).wrapping_mul(31).wrapping_add((n >> 8) as u8) ^ seed)
        .collect()
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// The status of a request that sends `data`.
fn status(rig: &mut Rig<Block>, kind: u32, sector: u64, data: &[u8]) -> u8 {
    let used = rig.request(
        0,
        &[
            Buffer::Out(header(kind, sector)),
            Buffer::Out(data.to_vec()),
            Buffer::In(1),
        ],
    );
    assert_eq!(used.written, 1);
    used.bytes[0]
}

fn write(rig: &mut Rig<Block>, sector: u64, data: &[u8]) -> u8 {
    status(rig, T_OUT, sector, data)
}

fn flush(rig: &mut Rig<Block>) -> u8 {
    status(rig, T_FLUSH, 0, &[])
}

fn ranged(rig: &mut Rig<Block>, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
    status(rig, kind, 0, &range(sector, sectors, flags))
}

fn read(rig: &mut Rig<Block>, sector: u64, len: u32) -> (u8, Vec<u8>) {
    let used = rig.request(0, &[Buffer::Out(header(T_IN, sector)), Buffer::In(len), Buffer::In(1)]);
    assert_eq!(used.written, len + 1);
    let (data, status) = used.bytes.split_at(len as usize);
    (status[0], data.to_vec())
}

/// Rings, and waits until the device has given `count` requests back.
fn finish_all(rig: &mut Rig<Block>, queue: u16, count: usize) -> Vec<Used> {
    rig.kick(queue);
    let mut done = Vec::new();
    loop {
        while let Some(used) = rig.used(queue) {
            done.push(used);
        }
        if done.len() == count {
            return done;
        }
        rig.wait().unwrap();
    }
}

/// A descriptor that goes around the page cache; `None`, said out loud, where the file system has none.
fn open_direct(file: &NamedTempFile) -> Option<OwnedFd> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = libc::O_DIRECT;
    match File::options()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(file.path())
    {
        Ok(file) => Some(file.into()),
        Err(error) => {
            println!("skipped: no O_DIRECT here: {error}");
            None
        }
    }
}

/// Asks for a size, smaller or not, and steps until there is an answer.
fn resized(rig: &mut Rig<Block>, handle: &BlockHandle, bytes: u64) -> Result<u64, ResizeError> {
    resized_or_cut(rig, handle, bytes, true)
}

/// The same; the image may be cut only with `shrink`.
fn resized_or_cut(rig: &mut Rig<Block>, handle: &BlockHandle, bytes: u64, shrink: bool) -> Result<u64, ResizeError> {
    let (sender, answer) = std::sync::mpsc::channel();
    handle.resize(bytes, shrink, move |result| sender.send(result).unwrap());
    rig.settle().unwrap();
    answer.try_recv().unwrap()
}

//! The disks of the command line: which file, what is in it, what the guest may do with it.

use std::path::PathBuf;

use sepal_schema::config::device::{DiskFormat, DiskMode, RateLimit};

use super::{number, rate, split, unknown};

/// A disk of the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskSpec {
    pub(crate) file: PathBuf,
    pub(crate) id: String,
    pub(crate) mode: DiskMode,
    pub(crate) format: DiskFormat,
    pub(crate) direct: bool,
    pub(crate) queues: u16,
    pub(crate) block_size: u32,
    pub(crate) rate_limit: RateLimit,
    pub(crate) backing: Vec<(PathBuf, DiskFormat)>,
    pub(crate) scratch: Option<PathBuf>,
}

/// Reads what is in an image.
pub(crate) fn parse_format(value: &str) -> Result<DiskFormat, String> {
    match value {
        "raw" => Ok(DiskFormat::Raw),
        "qcow2" => Ok(DiskFormat::Qcow2),
        _ => Err(format!("'{value}' is no format of an image; raw and qcow2 are")),
    }
}

/// Reads what a guest may do with a disk.
pub(crate) fn parse_mode(text: &str) -> Result<DiskMode, String> {
    match text {
        "ro" => Ok(DiskMode::ReadOnly),
        "rw" => Ok(DiskMode::ReadWrite),
        "volatile" => Ok(DiskMode::VolatileWrite),
        _ => Err(format!(
            "'{text}' is nothing that is done with a disk; ro, rw and volatile are"
        )),
    }
}

/// Reads `FILE[,ro|rw|volatile][,id=..][,format=raw|qcow2][,direct][,queues=N][,block-size=N][,backing=FILE[,backing-format=..]]...[,scratch=FILE][,bps=..]`.
pub(crate) fn parse_disk(text: &str) -> Result<DiskSpec, String> {
    const KNOWN: &str = "ro, rw, volatile, id=, format=, direct, queues=, block-size=, backing=, backing-format=, scratch=, bps=, iops=, \
                         burst-bytes= and burst-ops=";
    let (file, options) = split(text);
    if file.is_empty() {
        return Err("a disk needs a file: FILE[,ro][,id=ID]...".into());
    }
    let mut disk = DiskSpec {
        file: file.into(),
        id: String::new(),
        mode: DiskMode::ReadWrite,
        format: DiskFormat::Unspecified,
        direct: false,
        queues: 0,
        block_size: 0,
        rate_limit: RateLimit::default(),
        backing: Vec::new(),
        scratch: None,
    };
    let modes = |(key, _): &&(String, Option<String>)| matches!(key.as_str(), "ro" | "rw" | "volatile");
    if let [(first, _), (second, _), ..] = options.iter().filter(modes).collect::<Vec<_>>()[..] {
        return Err(format!("'{first}' and '{second}': a disk has one mode"));
    }
    for (key, value) in options {
        match (key.as_str(), value.as_deref()) {
            (mode @ ("ro" | "rw" | "volatile"), None) => disk.mode = parse_mode(mode)?,
            ("id", Some(id)) => disk.id = id.to_owned(),
            ("format", Some(value)) => disk.format = parse_format(value)?,
            ("direct", None) => disk.direct = true,
            ("queues", Some(value)) => disk.queues = number("queues", value)?,
            ("block-size", Some(value)) => disk.block_size = number("block-size", value)?,
            ("backing", Some(file)) => disk.backing.push((file.into(), DiskFormat::Unspecified)),
            ("backing-format", Some(value)) => match disk.backing.last_mut() {
                Some((_, of_last)) => *of_last = parse_format(value)?,
                None => return Err("backing-format= comes after the backing= that it is about".into()),
            },
            ("scratch", Some(file)) => disk.scratch = Some(file.into()),
            (key, value) if rate(&mut disk.rate_limit, key, value)? => {}
            (key, value) => return Err(unknown(key, value, KNOWN)),
        }
    }
    Ok(disk)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks() {
        let plain = parse_disk("/images/a,,b.img").unwrap();
        assert_eq!(
            (plain.file.to_str().unwrap(), plain.mode),
            ("/images/a,b.img", DiskMode::ReadWrite)
        );
        let all = "disk.qcow2,volatile,id=root,format=qcow2,direct,queues=4,block-size=4096,bps=10M,iops=100,burst-bytes=20M,\
                   backing=middle,backing-format=qcow2,backing=base";
        let disk = parse_disk(all).unwrap();
        assert_eq!(
            (disk.mode, disk.format, disk.direct),
            (DiskMode::VolatileWrite, DiskFormat::Qcow2, true)
        );
        assert_eq!((disk.id.as_str(), disk.queues, disk.block_size), ("root", 4, 4096));
        assert_eq!(
            (disk.rate_limit.bytes_per_second, disk.rate_limit.burst_bytes),
            (10 << 20, 20 << 20)
        );
        let below = [
            ("middle".into(), DiskFormat::Qcow2),
            ("base".into(), DiskFormat::Unspecified),
        ];
        assert_eq!(disk.backing, below);
        for (text, word) in [
            ("", "needs a file"),
            ("a.img,ro,volatile", "one mode"),
            (",ro", "needs a file"),
            ("a,read-only", "'read-only'"),
            ("a,ro=yes", "'ro=yes'"),
            ("a,format=vmdk", "vmdk"),
            ("a,queues=many", "queues=many"),
            ("a,queues=70000", "too large"),
            ("a,backing-format=raw", "backing="),
            ("a,bps", "bps needs a value"),
            ("a,bps=1X", "no unit"),
        ] {
            let error = parse_disk(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}

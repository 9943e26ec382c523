//! The configuration of a guest, from what a file and the command line say.
//!
//! ```text
//!   FileConfig (or nothing) --options over it--> names of files --+-- opened --> a guest to be launched
//!                                                                 +-- paths  --> a definition
//! ```

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use sepal_schema::{
    config::{
        File, GuestConfig, MAX_CMDLINE, MAX_DEVICES, OnPanic, Pin,
        device::{Backend, Backing, Disk, DiskFormat, DiskMode, Link, Network, Share, VhostUser, Vsock},
    },
    error::Error,
};

use crate::{
    args::GuestOptions,
    configuration::{self, FileConfig, Source},
    specs::{DiskSpec, LinkSpec, NetSpec, ShareSpec, VhostUserSpec, VsockSpec},
    uploads,
};

/// What a Linux kernel needs to be told to print on the serial port.
const LINUX_CONSOLE: &str = "console=ttyS0";

/// A configuration, and where it was said.
pub(crate) struct Assembled {
    /// The configuration. Files have their names in it.
    config: GuestConfig,
    /// Whether a file said that the guest starts with its manager.
    pub(crate) autostart: bool,
    source: Source,
}

/// Puts together what `file` and `options` say, which count first. The manager is on this machine (`here`) or on another; `paths` is whether all files
/// are the manager's.
///
/// # Errors
/// The file is wrong, or a path cannot be told the manager.
pub(crate) fn assemble(
    name: Option<&str>,
    file: Option<&Path>,
    options: &GuestOptions,
    here: bool,
    paths: bool,
) -> Result<Assembled> {
    let mut said = match file {
        Some(path) => configuration::load(path, here || !paths, here)?,
        None => FileConfig::default(),
    };
    if let Some(name) = name {
        name.clone_into(&mut said.config.name);
        said.source.forget("name");
    }
    whole(options, &mut said)?;
    devices(options, &mut said, here)?;
    let FileConfig {
        mut config,
        cmdline,
        agent,
        panic_device,
        autostart,
        source,
    } = said;
    config.cmdline = cmdline.unwrap_or_else(|| match config.kernel {
        File::None => String::new(),
        _ => LINUX_CONSOLE.to_owned(),
    });
    config.agent = config.vsock.is_some() && agent.unwrap_or(true);
    config.panic_device = panic_device.unwrap_or(config.on_panic != OnPanic::Leave);
    check_size(&config).map_err(|error| source.explain(error))?;
    Ok(Assembled {
        config,
        autostart: autostart.unwrap_or_default(),
        source,
    })
}

/// Whether a configuration can be sent at all. All else that may be wrong with it is the guest manager's to judge.
fn check_size(config: &GuestConfig) -> Result<(), Error> {
    let length = config.full_cmdline().len();
    if length > MAX_CMDLINE {
        let message =
            format!("the command line has {length} bytes with its additions; at most {MAX_CMDLINE} are possible");
        return Err(Error::bad_config("cmdline", message));
    }
    let devices = config.bus_devices();
    if devices > MAX_DEVICES as usize {
        let message =
            format!("the guest has {devices} devices on its bus; at most {MAX_DEVICES} of all kinds are possible");
        return Err(Error::bad_config("devices", message));
    }
    Ok(())
}

/// Whether all that can be long together fits into a message, which has to have room for the rest.
fn check_message(config: &GuestConfig) -> Result<(), Error> {
    /// What an entry of a list takes besides its texts and files, about.
    const ENTRY: usize = 160;
    /// Bytes that are left for it.
    const ROOM: usize = 112 * 1024;
    let path = |file: &File| match file {
        File::Path(path) => path.len() + 24,
        File::Bytes(bytes) => bytes.len() + 24,
        File::None | File::Fd(_) | File::Upload(_) => 24,
    };
    let disk = |disk: &Disk| {
        let below: usize = disk.backing.iter().map(|backing| path(&backing.file) + 2).sum();
        ENTRY + path(&disk.image) + path(&disk.scratch) + below
    };
    let texts = |texts: &[String]| texts.iter().map(|text| text.len() + 16).sum::<usize>();
    let pin = |pin: &Pin| 32 + 2 * pin.cpus.len();
    let parts = [
        ("pins", config.pins.iter().map(pin).sum::<usize>()),
        ("disks", config.disks.iter().map(disk).sum()),
        ("waivedLayers", texts(&config.waived_layers)),
        ("cmdlineAdd", texts(&config.cmdline_add)),
        ("name", config.name.len()),
    ];
    let all: usize = parts.iter().map(|(_, bytes)| bytes).sum();
    match parts.iter().max_by_key(|(_, bytes)| bytes) {
        Some((field, most)) if all > ROOM => {
            let message =
                format!("{field} takes {most} bytes in a message, and all that can be long has to do with {ROOM}");
            Err(Error::bad_config(*field, message))
        }
        _ => Ok(()),
    }
}

/// The options about the guest as a whole.
fn whole(options: &GuestOptions, said: &mut FileConfig) -> Result<()> {
    let FileConfig { config, source, .. } = said;
    macro_rules! over {
        ($option:expr => $($to:ident).+, $field:literal) => {
            if let Some(value) = $option {
                config.$($to).+ = value;
                source.forget($field);
            }
        };
    }
    let file = |path: &PathBuf| name(path).map(File::Path);
    over!(options.kernel.as_ref().map(file).transpose()? => kernel, "kernel");
    over!(options.initrd.as_ref().map(file).transpose()? => initrd, "initrd");
    over!(options.cpus => cpus, "cpus");
    over!(options.memory => memory_mib, "memoryMib");
    over!(options.on_reset => on_reset, "onReset");
    over!(options.on_panic => on_panic, "onPanic");
    over!(options.restart => restart, "restart");
    over!(options.uuid.map(Some) => uuid, "uuid");
    let memory = options.limit_memory.and_then(|mib| u64::try_from(mib).ok());
    over!(memory => limits.memory_mib, "limits.memoryMib");
    over!(options.limit_cpu => limits.cpu_percent, "limits.cpuPercent");
    over!(options.limit_weight => limits.cpu_weight, "limits.cpuWeight");
    over!(options.limit_tasks => limits.tasks, "limits.tasks");
    config.huge_pages |= options.huge_pages;
    config.protected_vm |= options.protected;
    config.durable |= options.durable;
    config.cmdline_add.extend_from_slice(&options.cmdline_add);
    config.waived_layers.extend_from_slice(&options.waive_layer);
    put(&mut config.pins, options.pins.clone(), "pins", source, |a, b| {
        a.vcpu == b.vcpu
    });
    if let Some(cmdline) = &options.cmdline {
        said.cmdline = Some(cmdline.clone());
        said.source.forget("cmdline");
    }
    Ok(())
}

/// The options about devices.
fn devices(options: &GuestOptions, said: &mut FileConfig, here: bool) -> Result<()> {
    let FileConfig { config, source, .. } = said;
    let devices = &options.devices;
    macro_rules! over {
        ($option:expr => $to:ident, $field:literal) => {
            if let Some(value) = $option {
                config.$to = Some(value);
                source.forget($field);
            }
        };
    }
    over!(devices.instance_id => instance_id, "instanceId");
    over!(devices.console => console, "console");
    over!(devices.rng => rng, "rng");
    over!(devices.balloon => balloon, "balloon");
    over!(devices.memory_device => memory_device, "memoryDevice");
    over!(devices.watchdog => watchdog, "watchdog");
    let vsock = devices.vsock.as_ref().map(|spec| socket_device(spec, here));
    over!(vsock.transpose()? => vsock, "vsock");
    if devices.no_balloon {
        config.balloon = None;
    }
    config.generation_id |= devices.generation_id;
    let disks = devices.disks.iter().map(disk).collect::<Result<_>>()?;
    let same_disk = |a: &Disk, b: &Disk| !a.id.is_empty() && a.id == b.id;
    put(&mut config.disks, disks, "disks", source, same_disk);
    let shares = devices.shares.iter().map(|spec| share(spec, here));
    let shares = shares.collect::<Result<_>>()?;
    put(&mut config.shares, shares, "shares", source, |a, b| a.tag == b.tag);
    config.networks.extend(devices.networks.iter().map(network));
    for spec in &devices.vhost_user {
        config.vhost_user.push(vhost_user(spec, here)?);
    }
    if devices.no_agent {
        said.agent = Some(false);
    }
    if devices.panic_device || options.on_panic.is_some_and(|does| does != OnPanic::Leave) {
        said.panic_device = Some(true);
    }
    Ok(())
}

/// Puts each of `entries` in the place of the one of the file's that is the same, or after all others.
fn put<T>(list: &mut Vec<T>, entries: Vec<T>, field: &str, source: &mut Source, same: impl Fn(&T, &T) -> bool) {
    // Two options that say the same are a mistake, which the guest manager tells.
    let mut of_file: Vec<usize> = (0..list.len()).collect();
    for entry in entries {
        match of_file.iter().position(|&i| same(&list[i], &entry)) {
            Some(position) => {
                let i = of_file.remove(position);
                list[i] = entry;
                source.forget(&format!("{field}[{i}]"));
            }
            None => list.push(entry),
        }
    }
}

/// A path as a configuration has it.
fn name(path: &Path) -> Result<String> {
    let text = path.to_str();
    text.map(str::to_owned)
        .with_context(|| format!("the path {} is not UTF-8", path.display()))
}

fn disk(spec: &DiskSpec) -> Result<Disk> {
    let below = |(path, format): &(PathBuf, DiskFormat)| {
        Ok::<_, anyhow::Error>(Backing {
            file: File::Path(name(path)?),
            format: *format,
        })
    };
    Ok(Disk {
        id: spec.id.clone(),
        image: File::Path(name(&spec.file)?),
        mode: spec.mode,
        format: spec.format,
        direct: spec.direct,
        block_size: spec.block_size,
        rate_limit: spec.rate_limit,
        backing: spec.backing.iter().map(below).collect::<Result<_>>()?,
        queues: spec.queues,
        scratch: match &spec.scratch {
            Some(path) => File::Path(name(path)?),
            None => File::None,
        },
    })
}

fn network(spec: &NetSpec) -> Network {
    Network {
        mac: spec.mac,
        link: match &spec.link {
            LinkSpec::User => Link::User,
            LinkSpec::Tap(name) => Link::TapNamed(name.clone()),
            LinkSpec::Bridge(name) => Link::Bridge(name.clone()),
        },
        mtu: spec.mtu,
        rate_limit: spec.rate_limit,
        queue_pairs: spec.queues,
        offloads: spec.offloads,
        link_down: spec.link_down,
    }
}

/// A path as the manager needs it, whose own folder is another. On another machine nobody knows ours.
fn absolute(path: &Path, here: bool) -> Result<String> {
    if !here && !path.is_absolute() {
        bail!(
            "{} is a path of the guest manager's machine, and has to begin with '/'",
            path.display()
        );
    }
    let path = std::path::absolute(path).with_context(|| format!("the path {}", path.display()))?;
    name(&path)
}

fn socket_device(spec: &VsockSpec, here: bool) -> Result<Vsock> {
    let socket = spec.socket.as_deref().map(|path| absolute(path, here)).transpose()?;
    Ok(Vsock {
        cid: spec.cid,
        listeners: Vec::new(),
        socket_path: socket.unwrap_or_default(),
    })
}

fn share(spec: &ShareSpec, here: bool) -> Result<Share> {
    Ok(Share {
        tag: spec.tag.clone(),
        backend: Backend::Path(absolute(&spec.socket, here)?),
        queues: spec.queues,
    })
}

fn vhost_user(spec: &VhostUserSpec, here: bool) -> Result<VhostUser> {
    Ok(VhostUser {
        device_type: spec.device_type,
        backend: Backend::Path(absolute(&spec.socket, here)?),
        queues: spec.queues,
        queue_size: spec.queue_size,
    })
}

/// What a configuration names a file for.
struct Use<'a> {
    file: &'a mut File,
    field: String,
    what: &'static str,
    write: bool,
}

/// All files of a configuration.
fn files(config: &mut GuestConfig) -> Vec<Use<'_>> {
    let whole = |file, field: &str, what| Use {
        file,
        field: field.to_owned(),
        what,
        write: false,
    };
    let mut files = vec![
        whole(&mut config.kernel, "kernel", "kernel"),
        whole(&mut config.initrd, "initrd", "initrd"),
    ];
    for (i, disk) in config.disks.iter_mut().enumerate() {
        let mut of_disk = |file, field: String, write| {
            files.push(Use {
                file,
                field: format!("disks[{i}].{field}"),
                what: "disk",
                write,
            });
        };
        of_disk(&mut disk.image, "image".to_owned(), disk.mode == DiskMode::ReadWrite);
        of_disk(&mut disk.scratch, "scratch".to_owned(), true);
        for (j, backing) in disk.backing.iter_mut().enumerate() {
            of_disk(&mut backing.file, format!("backing[{j}]"), false);
        }
    }
    files
}

impl Assembled {
    /// The images of the disks as they were named.
    pub(crate) fn disks(&self) -> Vec<PathBuf> {
        let name = |disk: &Disk| match &disk.image {
            File::Path(name) => name.into(),
            _ => PathBuf::new(),
        };
        self.config.disks.iter().map(name).collect()
    }

    /// Whether the guest is to go on without its manager.
    pub(crate) fn is_durable(&self) -> bool {
        self.config.durable
    }

    /// Opens all files that are named as ones of this machine, and returns the configuration.
    ///
    /// # Errors
    /// One cannot be opened.
    pub(crate) fn open(&mut self) -> Result<GuestConfig> {
        self.resolve(|of| uploads::open(of.what, Path::new(name_of(of.file)), of.write))
    }

    /// Names all files as the manager does, which is on this machine (`here`) or another, and returns the configuration.
    ///
    /// # Errors
    /// One cannot be named so.
    pub(crate) fn name(&mut self, here: bool) -> Result<GuestConfig> {
        self.resolve(|of| {
            let name = Path::new(name_of(of.file));
            let path = match uploads::there(name) {
                Some(there) => there.to_owned(),
                None => absolute(name, here)?,
            };
            Ok(File::Path(path))
        })
    }

    fn resolve(&mut self, resolve: impl Fn(&Use<'_>) -> Result<File>) -> Result<GuestConfig> {
        let mut config = std::mem::take(&mut self.config);
        for of in files(&mut config) {
            if of.file.is_none() {
                continue;
            }
            let resolved = resolve(&of);
            *of.file = resolved.map_err(|error| anyhow!(self.source.about(&of.field, format!("{error:#}"))))?;
        }
        check_message(&config).map_err(|error| self.source.explain(error))?;
        Ok(config)
    }

    /// Shows an error of the manager's about a field where the file says it.
    pub(crate) fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        match error.downcast::<Error>() {
            Ok(error) => self.source.explain(error).into(),
            Err(error) => error,
        }
    }
}

/// The name of a file that has one.
fn name_of(file: &File) -> &str {
    match file {
        File::Path(name) => name,
        File::None | File::Fd(_) | File::Bytes(_) | File::Upload(_) => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_message_can_carry_is_told_by_its_field() {
        let about = |change: &dyn Fn(&mut GuestConfig)| {
            let mut config = GuestConfig::default();
            change(&mut config);
            check_size(&config).map_err(|error| error.about)
        };
        assert_eq!(about(&|config| config.cmdline = "x".repeat(MAX_CMDLINE)), Ok(()));
        assert_eq!(
            about(&|config| config.cmdline = "x".repeat(500_000)),
            Err("cmdline".into())
        );
        assert_eq!(
            about(&|config| config.cmdline_add = vec!["x".repeat(500); 100]),
            Err("cmdline".into())
        );
        let disks = |config: &mut GuestConfig, count: usize| {
            config.disks = (0..count).map(|_| Disk::new(File::None, DiskMode::ReadOnly)).collect();
        };
        assert_eq!(about(&|config| disks(config, 32)), Ok(()));
        assert_eq!(about(&|config| disks(config, 2000)), Err("devices".into()));
    }

    #[test]
    fn what_takes_too_much_of_a_message_is_told_by_its_field() {
        let about = |config: &GuestConfig| check_message(config).map_err(|error| error.about);
        let pins = |count| GuestConfig {
            pins: (0..count)
                .map(|vcpu| Pin {
                    vcpu,
                    cpus: (0..1024).collect(),
                })
                .collect(),
            ..GuestConfig::default()
        };
        assert_eq!(about(&pins(32)), Ok(()));
        assert_eq!(about(&pins(64)), Err("pins".into()));
        let mut disk = Disk::new(File::Path("x".repeat(4000)), DiskMode::ReadOnly);
        disk.backing = (0..8)
            .map(|_| Backing {
                file: File::Path("x".repeat(4000)),
                format: DiskFormat::Raw,
            })
            .collect();
        let mut config = pins(10);
        config.disks.push(disk);
        assert_eq!(about(&config), Ok(()));
        for _ in 0..3 {
            let all = config.try_clone().unwrap().disks;
            config.disks.extend(all);
        }
        assert_eq!(about(&config), Err("disks".into()));
        config.disks.clear();
        config.waived_layers = vec!["x".repeat(1000); 900];
        assert_eq!(about(&config), Err("waivedLayers".into()));
    }

    #[test]
    fn options_replace_what_the_file_says_but_not_each_other() {
        let mut list = vec![("a", 1), ("b", 1)];
        let same = |a: &(&str, i32), b: &(&str, i32)| a.0 == b.0;
        let options = vec![("b", 2), ("b", 3), ("c", 2), ("c", 3)];
        put(&mut list, options, "list", &mut Source::default(), same);
        assert_eq!(list, [("a", 1), ("b", 2), ("b", 3), ("c", 2), ("c", 3)]);
    }
}

//! Reads a configuration out of a message: limits checked, errors that name the field.

use std::os::fd::OwnedFd;

use super::{
    DEVICE_HOLE, File, GuestConfig, Handles, INSTANCE_ID, Limits, MAX_CMDLINE, MAX_CMDLINE_ADDITIONS, MAX_CPUS,
    MAX_CUSTOM_MEMORY, MAX_GUEST_ADDRESS, MAX_INLINE_FILE, MAX_NAME, MemoryBacking,
    decode_devices::{Devices, unknown},
    upkeep,
};
use crate::{
    config_capnp::{Toggle, guest_config},
    error::Error,
    file_capnp,
};

const PAGE: u64 = 4096;
/// Longest path, in bytes (PATH_MAX of Linux counts the NUL, too).
const MAX_PATH: usize = libc::PATH_MAX as usize - 1;
const MAX_LAYERS: u32 = 32;
/// Bytes of a memory limit fit into a signed 64-bit number.
const MAX_LIMIT_MIB: u64 = (1 << 43) - 1;
/// A thousand CPUs.
const MAX_CPU_PERCENT: u64 = 100_000;
/// `PID_MAX_LIMIT` of 64-bit Linux.
const MAX_TASKS: u64 = 4 << 20;

impl GuestConfig {
    /// Reads a configuration.
    ///
    /// # Errors
    /// `BAD_CONFIG` or `NOT_SUPPORTED` with the field's name; internal errors for a message that is not well-formed. The descriptors that the
    /// message names have been taken from `handles` and closed then; where it could not be read to its end, those that are left are closed
    /// with the message, as all that nobody takes.
    pub fn decode(config: guest_config::Reader<'_>, handles: &dyn Handles) -> Result<Self, Error> {
        // Descriptors first: everything that is refused below must not keep them.
        let kernel = file("kernel", config.get_kernel()?, handles);
        let initrd = file("initrd", config.get_initrd()?, handles);
        let custom_memory = custom_memory(config, handles);
        let devices = Devices::take(config, handles);
        let unbuilt = refuse_unbuilt(config, handles);
        unbuilt?;

        let name = text("name", config.get_name()?, MAX_NAME)?;
        if !name.is_empty() {
            check_name(&name)?;
        }
        let instance_id = match config.get_instance_id()? {
            [] => None,
            id => Some(id.try_into().map_err(|_| {
                let message = format!(
                    "the instance id has {} bytes; it needs {INSTANCE_ID}, or none",
                    id.len()
                );
                Error::bad_config("instanceId", message)
            })?),
        };
        let cpus = config.get_cpus();
        if cpus > MAX_CPUS {
            return Err(Error::bad_config(
                "cpus",
                format!("{cpus} vCPUs were asked for; a guest has 1 to {MAX_CPUS}"),
            ));
        }

        let mut decoded = Self {
            name,
            instance_id,
            kernel: kernel?,
            initrd: initrd?,
            cmdline: command_line("cmdline", config.get_cmdline()?)?,
            cmdline_add: cmdline_add(config)?,
            cpus,
            memory_mib: config.get_memory_mib(),
            huge_pages: config.get_huge_pages(),
            protected_vm: config.get_protected_vm(),
            custom_memory: custom_memory?,
            limits: limits(config)?,
            waived_layers: waived_layers(config)?,
            on_reset: config.get_on_reset().map_err(|_| unknown("onReset"))?,
            ..Self::default()
        };
        if decoded.kernel.is_none() && !decoded.initrd.is_none() {
            let message = "initrd is set, but kernel, which would read it, is not";
            return Err(Error::bad_config("initrd", message));
        }
        devices.finish(config, &mut decoded)?;
        upkeep::decode(config, &mut decoded)?;
        decoded.check_limits()?;
        let length = decoded.full_cmdline().len();
        if length > MAX_CMDLINE {
            let message =
                format!("the command line has {length} bytes with its additions; at most {MAX_CMDLINE} are possible");
            return Err(Error::bad_config("cmdline", message));
        }
        Ok(decoded)
    }

    /// Refuses limits under which the component could not even begin, which its death would tell less well.
    fn check_limits(&self) -> Result<(), Error> {
        let least = |field: &str, seen: u64, least: u64, what: &str| match seen {
            0 => Ok(()),
            seen if seen < least => {
                let message = format!("{field} is {seen}; {what} of this guest needs {least} at least");
                Err(Error::bad_config(field, message))
            }
            _ => Ok(()),
        };
        let memory = self.least_memory_mib();
        least(
            "limits.memoryMib",
            self.limits.memory_mib,
            memory,
            "the component alone",
        )?;
        least(
            "limits.tasks",
            self.limits.tasks.into(),
            self.least_tasks(),
            "the component",
        )
    }
}

/// Checks a guest's name.
///
/// # Errors
/// `BAD_CONFIG` about `name`: it is empty, too long, or has a character that is not allowed.
pub fn check_name(name: &str) -> Result<(), Error> {
    let bad = |message: String| Err(Error::bad_config("name", message));
    let Some(first) = name.chars().next() else {
        return bad("the name is empty".into());
    };
    if name.chars().count() > MAX_NAME {
        return bad(format!(
            "the name has {} characters; at most {MAX_NAME} are allowed",
            name.chars().count()
        ));
    }
    if !first.is_ascii_alphanumeric() {
        return bad(format!(
            "the name \"{}\" must start with a letter or digit",
            name.escape_default()
        ));
    }
    let allowed = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    match name.chars().find(|c| !allowed(c)) {
        Some(c) => bad(format!(
            "the name \"{}\" has the character '{}'; letters, digits, '.', '_' and '-' are allowed",
            name.escape_default(),
            c.escape_default()
        )),
        None => Ok(()),
    }
}

pub(super) fn text(field: &str, from: capnp::text::Reader<'_>, most: usize) -> Result<String, Error> {
    if from.as_bytes().len() > most {
        return Err(Error::bad_config(
            field,
            format!(
                "{field} has {} bytes; at most {most} are allowed",
                from.as_bytes().len()
            ),
        ));
    }
    from.to_string()
        .map_err(|_| Error::bad_config(field, format!("{field} is not valid UTF-8")))
}

fn command_line(field: &str, from: capnp::text::Reader<'_>) -> Result<String, Error> {
    let line = text(field, from, MAX_CMDLINE)?;
    match line.chars().find(|c| c.is_control()) {
        Some(c) => Err(Error::bad_config(
            field,
            format!("{field} has the control character '{}'", c.escape_default()),
        )),
        None => Ok(line),
    }
}

fn cmdline_add(config: guest_config::Reader<'_>) -> Result<Vec<String>, Error> {
    let list = config.get_cmdline_add()?;
    at_most("cmdlineAdd", list.len(), MAX_CMDLINE_ADDITIONS)?;
    list.iter()
        .enumerate()
        .map(|(i, part)| command_line(&format!("cmdlineAdd[{i}]"), part?))
        .collect()
}

pub(super) fn at_most(field: &str, seen: u32, most: u32) -> Result<(), Error> {
    if seen > most {
        return Err(Error::bad_config(
            field,
            format!("{field} has {seen} entries; at most {most} are allowed"),
        ));
    }
    Ok(())
}

pub(super) fn file(field: &str, from: file_capnp::file::Reader<'_>, handles: &dyn Handles) -> Result<File, Error> {
    use file_capnp::file::Which;
    match from.which().map_err(|_| {
        Error::not_supported(
            field,
            format!("{field} is given in a way that this version does not know"),
        )
    })? {
        Which::None(()) => Ok(File::None),
        Which::Fd(fd) => Ok(File::Fd(take(field, fd?, handles)?)),
        Which::Bytes(bytes) => {
            let bytes = bytes?;
            if bytes.len() > MAX_INLINE_FILE {
                let message = format!(
                    "{field} has {} bytes; in a message at most {MAX_INLINE_FILE} are allowed: use an upload",
                    bytes.len()
                );
                return Err(Error::bad_config(field, message));
            }
            Ok(File::Bytes(bytes.to_vec()))
        }
        Which::Upload(upload) => Ok(File::Upload(upload?)),
        Which::Path(path) => {
            let path = text(field, path?, MAX_PATH)?;
            absolute(field, &path)?;
            Ok(File::Path(path))
        }
    }
}

/// Refuses a path that begins anywhere but at the root, or that no file can have.
pub(super) fn absolute(field: &str, path: &str) -> Result<(), Error> {
    let why = match path {
        path if !path.starts_with('/') => "is not absolute",
        path if path.contains('\0') => "has a NUL in it, which no path can have",
        _ => return Ok(()),
    };
    let message = format!("{field}: the path \"{}\" {why}", path.escape_debug());
    Err(Error::bad_config(field, message))
}

pub(super) fn take(field: &str, from: file_capnp::fd_ref::Reader<'_>, handles: &dyn Handles) -> Result<OwnedFd, Error> {
    handles.take(from.get_number()).map_err(|error| error.about(field))
}

fn custom_memory(config: guest_config::Reader<'_>, handles: &dyn Handles) -> Result<Vec<MemoryBacking>, Error> {
    let list = config.get_custom_memory()?;
    at_most("customMemory", list.len(), MAX_CUSTOM_MEMORY)?;
    let taken: Vec<_> = list
        .iter()
        .enumerate()
        .map(|(i, range)| {
            Ok((
                i,
                range,
                take(&format!("customMemory[{i}].memfd"), range.get_memfd()?, handles)?,
            ))
        })
        .collect();
    let ranges: Vec<MemoryBacking> = taken
        .into_iter()
        .map(|entry: Result<_, Error>| {
            let (i, range, memfd) = entry?;
            let (start, end) = (range.get_start(), range.get_end());
            if end <= start || start % PAGE != 0 || end % PAGE != 0 {
                return Err(Error::bad_config(
                    format!("customMemory[{i}]"),
                    format!(
                        "the range {start:#x}..{end:#x} must not be empty, and both ends must be multiples of {PAGE}"
                    ),
                ));
            }
            if (start < DEVICE_HOLE.end && end > DEVICE_HOLE.start) || end > MAX_GUEST_ADDRESS {
                let message = format!(
                    "no memory can be at {start:#x}..{end:#x}: devices are at {:#x}..{:#x}, and addresses end at {MAX_GUEST_ADDRESS:#x}",
                    DEVICE_HOLE.start, DEVICE_HOLE.end
                );
                return Err(Error::bad_config(format!("customMemory[{i}]"), message));
            }
            Ok(MemoryBacking { memfd, start, end })
        })
        .collect::<Result<_, Error>>()?;
    for (i, range) in ranges.iter().enumerate() {
        if let Some(j) = ranges[..i]
            .iter()
            .position(|other| range.start < other.end && other.start < range.end)
        {
            let message = format!(
                "the range {:#x}..{:#x} overlaps customMemory[{j}]",
                range.start, range.end
            );
            return Err(Error::bad_config(format!("customMemory[{i}]"), message));
        }
    }
    Ok(ranges)
}

fn limits(config: guest_config::Reader<'_>) -> Result<Limits, Error> {
    let from = config.get_limits()?;
    let limits = Limits {
        memory_mib: from.get_memory_mib(),
        cpu_percent: from.get_cpu_percent(),
        cpu_weight: from.get_cpu_weight(),
        tasks: from.get_tasks(),
    };
    if limits.cpu_weight > 10_000 {
        let message = format!("the CPU weight is {}; 1 to 10000 are possible", limits.cpu_weight);
        return Err(Error::bad_config("limits.cpuWeight", message));
    }
    let most = |field: &str, seen: u64, most: u64| match seen > most {
        true => Err(Error::bad_config(
            field,
            format!("{field} is {seen}; at most {most} is possible"),
        )),
        false => Ok(()),
    };
    most("limits.memoryMib", limits.memory_mib, MAX_LIMIT_MIB)?;
    most("limits.cpuPercent", limits.cpu_percent.into(), MAX_CPU_PERCENT)?;
    most("limits.tasks", limits.tasks.into(), MAX_TASKS)?;
    Ok(limits)
}

fn waived_layers(config: guest_config::Reader<'_>) -> Result<Vec<String>, Error> {
    let list = config.get_waived_layers()?;
    at_most("waivedLayers", list.len(), MAX_LAYERS)?;
    list.iter()
        .enumerate()
        .map(|(i, layer)| text(&format!("waivedLayers[{i}]"), layer?, MAX_NAME))
        .collect()
}

/// Refuses what later versions will honour, and claims the descriptors that go with it.
fn refuse_unbuilt(config: guest_config::Reader<'_>, handles: &dyn Handles) -> Result<(), Error> {
    let mut refusals = Vec::new();
    let mut refuse = |asked: bool, field: &str, what: &str| {
        if asked {
            refusals.push(Error::not_supported(
                field,
                format!("{what} is not supported by this version (field {field})"),
            ));
        }
    };
    let on = |toggle: Result<Toggle, capnp::NotInSchema>| !matches!(toggle, Ok(Toggle::ByDefault | Toggle::Off));

    let dtb = file("dtbOverlay", config.get_dtb_overlay()?, handles);
    refuse(!matches!(dtb, Ok(File::None)), "dtbOverlay", "a device tree overlay");
    let firmware = file("firmware", config.get_firmware()?, handles);
    refuse(!matches!(firmware, Ok(File::None)), "firmware", "firmware");

    refuse(on(config.get_gpu()), "gpu", "a GPU");
    refuse(on(config.get_sound()), "sound", "sound output");
    refuse(on(config.get_sound_input()), "soundInput", "sound input");
    refuse(
        config.get_hypervisor_specific_auth_method(),
        "hypervisorSpecificAuthMethod",
        "a hypervisor-specific authentication method",
    );
    refusals.into_iter().next().map_or(Ok(()), Err)
}

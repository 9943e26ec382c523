//! What would make a guest again: the configuration that an observer tells, as a configuration file.

use std::{fs::File, os::fd::OwnedFd};

use anyhow::Result;
use capnp::message;
use sepal_schema::{
    config::{GuestConfig, Handles},
    config_capnp::guest_config,
    error::{Error, Kind, Outcome},
    guest_capnp::observer,
};

use crate::{calls, configuration, show, status};

/// What stands for a file that has no name, while the rest is read; it is not told.
const NAMELESS: &str = "/";

/// Stands for descriptors, which nobody sends here.
struct NoHandles;

impl Handles for NoHandles {
    fn send(&self, _: OwnedFd) -> Result<u32, Error> {
        Err(Error::new(Kind::NotSupported, "nothing is sent from here"))
    }

    fn take(&self, _: u32) -> Result<OwnedFd, Error> {
        let nothing = File::open("/dev/null");
        nothing
            .map(OwnedFd::from)
            .map_err(|error| Error::new(Kind::NoResources, format!("opening /dev/null: {error}")))
    }
}

/// Prints the file that would make the guest again. `there` is whether its manager is on another machine.
pub(crate) async fn print(observer: &observer::Client, there: bool) -> Result<u8> {
    let info = calls::info(observer).await?;
    let response = observer.configuration_request().send().promise.await?;
    let answer = response.get()?.outcome()?;
    let missing = answer.get_missing()?.iter().map(|field| Ok(field?.to_string()?));
    let missing: Vec<String> = missing.collect::<Result<_>>()?;
    let config = read(answer.get_config()?, &missing)?;
    let missing = configuration::nameless(&config, &missing);
    let text = configuration::write(&config, info.upkeep.autostart, &missing, there)?;
    show::print(text.as_bytes())?;
    tell(&missing);
    Ok(status::SUCCESS)
}

/// Says which fields are left out.
pub(crate) fn tell(nameless: &[String]) {
    for field in nameless {
        say!("{field} has no name that could be written down");
    }
}

/// Reads a configuration whose `missing` fields are not there.
pub(crate) fn read(from: guest_config::Reader<'_>, missing: &[String]) -> Result<GuestConfig> {
    let mut message = message::Builder::new_default();
    message.set_root(from)?;
    let mut config: guest_config::Builder<'_> = message.get_root()?;
    for field in missing {
        fill(config.reborrow(), field)?;
    }
    Ok(GuestConfig::decode(config.into_reader(), &NoHandles)?)
}

/// Names a file that has no name, where a configuration without one is refused.
fn fill(mut config: guest_config::Builder<'_>, field: &str) -> Result<()> {
    let entry = |list: &str| {
        let (number, part) = field.strip_prefix(list)?.strip_prefix('[')?.split_once(']')?;
        Some((number.parse::<u32>().ok()?, part))
    };
    if field == "kernel" {
        config.reborrow().init_kernel().set_path(NAMELESS);
    }
    if let Some((i, part)) = entry("disks") {
        let disks = config.reborrow().get_disks()?;
        if i < disks.len() {
            let mut disk = disks.get(i);
            let below = part.strip_prefix(".backing[").and_then(|rest| rest.strip_suffix(']'));
            if part == ".image" {
                disk.init_image().set_path(NAMELESS);
            } else if let Some(j) = below.and_then(|number| number.parse::<u32>().ok()) {
                let backing = disk.reborrow().get_backing()?;
                if j < backing.len() {
                    backing.get(j).set_path(NAMELESS);
                }
            }
        }
    }
    Ok(())
}

//! A definition as it is kept: the message that is in its file, and what has to be known of it all the time. Pure.
//!
//! The message stays as it was read: what a later version has added to it is still there when this one changes what it knows.

use std::{os::fd::OwnedFd, rc::Rc, sync::Arc};

use capnp::{message::ReaderOptions, serialize};
use sepal_schema::{
    config::{File, GuestConfig, Handles, Uuid, check_name},
    crash::{CrashReport, MAX_CRASHES},
    error::Error,
    manager_capnp::guest_manager::definition,
    report::StopReport,
    store_capnp::stored_definition,
};

use crate::registry::Runs;

/// A definition that is valid but for what its host may make of it.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    /// The guest's name.
    pub(crate) name: Rc<str>,
    /// Tells it from all others.
    pub(crate) uuid: Uuid,
    /// It is started when the manager starts.
    pub(crate) autostart: bool,
    /// The message.
    pub(crate) content: Arc<[u8]>,
}

/// How messages of our own files are read: a file is at most a MiB.
pub(crate) fn options() -> ReaderOptions {
    let mut options = ReaderOptions::new();
    options.nesting_limit(32);
    options
}

impl Record {
    /// The record of a configuration that has a name and a UUID, and nothing that goes with its client ([`check_lasting`]).
    ///
    /// # Errors
    /// There is something that only a handle can give.
    pub(crate) fn new(config: GuestConfig, autostart: bool, unix_ns: u64) -> Result<Self, Error> {
        let mut message = capnp::message::Builder::new_default();
        let mut stored = message.init_root::<stored_definition::Builder<'_>>();
        stored.set_changed_ns(unix_ns);
        if let Some(uuid) = &config.uuid {
            stored.set_uuid(uuid.as_bytes());
        }
        let mut definition = stored.init_definition();
        definition.set_autostart(autostart);
        config.encode(definition.init_config(), &NoHandles)?;
        Ok(Self::read(serialize::write_message_to_words(&message))?)
    }

    /// Reads what is in a file.
    ///
    /// # Errors
    /// It is not well-formed, or has no name or no UUID.
    pub(crate) fn read(content: Vec<u8>) -> Result<Self, capnp::Error> {
        let message = serialize::read_message(&content[..], options())?;
        let stored: stored_definition::Reader<'_> = message.get_root()?;
        let definition = stored.get_definition()?;
        let name = definition.get_config()?.get_name()?.to_str()?;
        check_name(name).map_err(|error| capnp::Error::failed(error.message))?;
        let uuid = Uuid::from_slice(stored.get_uuid()?).ok().filter(|uuid| !uuid.is_nil());
        Ok(Self {
            name: name.into(),
            uuid: uuid.ok_or_else(|| capnp::Error::failed("it has no UUID".to_owned()))?,
            autostart: definition.get_autostart(),
            content: content.into(),
        })
    }

    /// The same, but for this.
    pub(crate) fn with_autostart(&self, autostart: bool, unix_ns: u64) -> capnp::Result<Self> {
        self.changed(|mut stored| {
            stored.set_changed_ns(unix_ns);
            stored.get_definition()?.set_autostart(autostart);
            Ok(())
        })
    }

    /// The same, but for what is known of its runs.
    pub(crate) fn with_runs(&self, runs: &Runs) -> capnp::Result<Self> {
        self.changed(|mut stored| {
            stored.set_generation(0);
            if let Some(stop) = &runs.stop {
                stored.set_generation(runs.generation);
                stop.write(stored.reborrow().init_stop());
            }
            let crashes = &runs.crashes[..runs.crashes.len().min(MAX_CRASHES)];
            let mut list = stored.init_crashes(u32::try_from(crashes.len()).unwrap_or(0));
            for (i, crash) in (0..).zip(crashes) {
                crash.write(list.reborrow().get(i));
            }
            Ok(())
        })
    }

    /// What is known of its runs. What cannot be read is left out: it is only to be looked at.
    pub(crate) fn runs(&self) -> Runs {
        let read = || {
            let message = serialize::read_message(&self.content[..], options())?;
            let stored: stored_definition::Reader<'_> = message.get_root()?;
            let crashes = stored.get_crashes()?.iter().take(MAX_CRASHES);
            let crashes = crashes.map(|crash| CrashReport::read(crash).map(Rc::new));
            let crashes = crashes.collect::<capnp::Result<Vec<_>>>()?;
            let failed = crashes.iter().map(|crash| crash.generation).max().unwrap_or(0);
            let (generation, stop) = match stored.get_generation() {
                generation if stored.has_stop() && generation >= failed => {
                    (generation, Some(StopReport::read(stored.get_stop()?)?))
                }
                // A version that knew of nothing else has written them.
                _ => (failed, crashes.first().map(|crash| crash.report.clone())),
            };
            Ok::<_, capnp::Error>(Runs {
                crashes,
                generation,
                stop,
            })
        };
        read().unwrap_or_default()
    }

    fn changed(&self, change: impl FnOnce(stored_definition::Builder<'_>) -> capnp::Result<()>) -> capnp::Result<Self> {
        let from = serialize::read_message(&self.content[..], options())?;
        let mut message = capnp::message::Builder::new_default();
        message.set_root(from.get_root::<stored_definition::Reader<'_>>()?)?;
        change(message.get_root()?)?;
        Self::read(serialize::write_message_to_words(&message))
    }

    /// What the guest is made of.
    ///
    /// # Errors
    /// `BAD_CONFIG` or `NOT_SUPPORTED`, naming the field: another version has accepted what this one cannot honour.
    pub(crate) fn config(&self) -> Result<GuestConfig, Error> {
        let message = serialize::read_message(&self.content[..], options())?;
        let stored: stored_definition::Reader<'_> = message.get_root()?;
        let mut config = GuestConfig::decode(stored.get_definition()?.get_config()?, &NoHandles)?;
        config.uuid = Some(self.uuid);
        Ok(config)
    }

    /// Hands the definition to `write`.
    ///
    /// # Errors
    /// What `write` says.
    pub(crate) fn definition(
        &self,
        write: impl FnOnce(definition::Reader<'_>) -> capnp::Result<()>,
    ) -> capnp::Result<()> {
        let message = serialize::read_message(&self.content[..], options())?;
        let stored: stored_definition::Reader<'_> = message.get_root()?;
        write(stored.get_definition()?)
    }
}

/// No descriptor goes into a definition, and none is in one.
pub(crate) struct NoHandles;

impl Handles for NoHandles {
    fn send(&self, _: OwnedFd) -> Result<u32, Error> {
        Err(transient(""))
    }

    fn take(&self, _: u32) -> Result<OwnedFd, Error> {
        Err(transient(""))
    }
}

fn transient(field: &str) -> Error {
    let message = "only a handle gives this, which is gone when its client is: a definition names files by their paths";
    Error::bad_config(field, message)
}

/// Whether nothing in a configuration goes with the client that sent it. What only descriptors can give is refused when it is decoded ([`NoHandles`]).
///
/// # Errors
/// `BAD_CONFIG` about the first field that does.
pub(crate) fn check_lasting(config: &GuestConfig) -> Result<(), Error> {
    let check = |field: &str, file: &File| match file {
        File::Fd(_) => Err(transient(field)),
        File::Upload(_) => {
            let message = format!(
                "{field} is an upload, which is gone when its client is: a definition names files by their paths"
            );
            Err(Error::bad_config(field, message))
        }
        File::None | File::Bytes(_) | File::Path(_) => Ok(()),
    };
    check("kernel", &config.kernel)?;
    check("initrd", &config.initrd)?;
    for (i, disk) in config.disks.iter().enumerate() {
        check(&format!("disks[{i}].image"), &disk.image)?;
        check(&format!("disks[{i}].scratch"), &disk.scratch)?;
        for (j, below) in disk.backing.iter().enumerate() {
            check(&format!("disks[{i}].backing[{j}]"), &below.file)?;
        }
    }
    match config.vsock.as_ref().map(|vsock| &vsock.listeners[..]) {
        None | Some([]) => Ok(()),
        Some(_) => {
            let message = "vsock.listeners are gone when their client is: a definition offers vsock at a socketPath";
            Err(Error::bad_config("vsock.listeners[0].acceptor", message))
        }
    }
}

#[cfg(test)]
mod tests {
    use sepal_schema::{
        config::device::{Disk, Vsock},
        config_capnp::guest_config::disk::Mode,
        error::Kind,
    };

    use super::*;

    fn config() -> GuestConfig {
        GuestConfig {
            name: "web".into(),
            uuid: Some(Uuid::from_bytes([7; 16])),
            kernel: File::Path("/boot/vmlinuz".into()),
            cmdline: "quiet".into(),
            cpus: 2,
            disks: vec![Disk::new(File::Path("/srv/web.img".into()), Mode::ReadWrite)],
            ..GuestConfig::default()
        }
    }

    #[test]
    fn a_record_gives_back_what_it_was_made_of() {
        let record = Record::new(config(), true, 5).unwrap();
        assert_eq!(
            (&*record.name, record.uuid, record.autostart),
            ("web", Uuid::from_bytes([7; 16]), true)
        );
        let back = Record::read(record.content.to_vec()).unwrap().config().unwrap();
        assert_eq!((&back.name[..], &back.cmdline[..], back.cpus), ("web", "quiet", 2));
        assert!(matches!(&back.kernel, File::Path(path) if path == "/boot/vmlinuz"));
        assert!(matches!(&back.disks[0].image, File::Path(path) if path == "/srv/web.img"));
        let off = record.with_autostart(false, 6).unwrap();
        assert_eq!(off.runs(), Runs::default());
        let report = StopReport {
            reason: sepal_schema::report::Reason::Crash,
            detail: "a triple fault".into(),
            error: None,
            uptime_ns: 3,
            time_ns: 4,
            about: "vcpu0".into(),
            rung: sepal_schema::report::Rung::None,
            component: None,
        };
        let crash = CrashReport {
            report,
            generation: 5,
            last_lines: vec!["the last line".into()],
            registers: Vec::new(),
            output: "Oops".into(),
        };
        let after = |generation, detail: &str| Runs {
            crashes: vec![Rc::new(crash.clone())],
            generation,
            stop: Some(StopReport {
                detail: detail.into(),
                ..crash.report.clone()
            }),
        };
        for runs in [after(5, "a triple fault"), after(7, "it shut down")] {
            let crashed = off.with_runs(&runs).unwrap();
            assert_eq!(crashed.with_autostart(true, 7).unwrap().runs(), runs);
        }
        // Where only crashes are known, or newer ones than the rest, the newest was the last.
        let newest = after(5, "a triple fault");
        for runs in [
            Runs {
                stop: None,
                ..newest.clone()
            },
            after(4, "it shut down"),
        ] {
            assert_eq!(off.with_runs(&runs).unwrap().runs(), newest);
        }
        assert_eq!(
            (off.autostart, off.uuid, off.config().unwrap().cpus),
            (false, record.uuid, 2)
        );
    }

    #[test]
    fn what_goes_with_its_client_is_named() {
        let about = |config: &GuestConfig| {
            let error = check_lasting(config).unwrap_err();
            assert_eq!(error.kind, Kind::BadConfig);
            error.about
        };
        check_lasting(&config()).unwrap();
        let (pipe, _writer) = std::io::pipe().unwrap();
        let mut given = config();
        given.disks[0].scratch = File::Fd(pipe.into());
        assert_eq!(about(&given), "disks[0].scratch");
        assert!(Record::new(given, false, 0).is_err());
        let mut given = config();
        given.vsock = Some(Vsock::default());
        check_lasting(&given).unwrap();
    }

    #[test]
    fn what_is_no_record_is_refused() {
        assert!(Record::read(Vec::new()).is_err());
        assert!(Record::read(vec![0xff; 64]).is_err());
        let nameless = GuestConfig {
            name: String::new(),
            ..config()
        };
        assert!(Record::new(nameless, false, 0).is_err());
        let without = GuestConfig { uuid: None, ..config() };
        assert!(Record::new(without, false, 0).is_err());
    }
}

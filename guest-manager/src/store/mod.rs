//! What the manager keeps across its own restarts and the host's: definitions of guests, and its settings.
//!
//! ```text
//!   definitions, pressure --> Store --work on disk, one after the other, on a worker thread--> files --> disk (a folder)
//!                               |                                                               '-- envelope: magic, version, length, checksum
//!                               '-- record: what is in a definition's file
//! ```
//!
//! One file for each definition, replaced as a whole: `docs/decisions/0014-files-for-definitions.md` tells why.

mod disk;
mod envelope;
mod files;
pub(crate) mod record;
#[cfg(test)]
mod simulated;

use std::{
    cell::RefCell,
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use capnp::serialize;
use sepal_schema::{
    error::{Error, Kind},
    store_capnp::stored_settings,
    transport::Handle,
};

use self::{
    disk::Folder,
    envelope::Content,
    files::{Files, Wrong},
    record::{Record, options},
};
use crate::state::StateFolder;

/// The folder of the definitions.
const DEFINITIONS: &str = "definitions";
/// The name of the settings' file, without its ending.
const SETTINGS: &str = "settings";

/// Files on real disks.
struct Disks {
    definitions: Files<Folder>,
    settings: Files<Folder>,
}

/// What was found when the store was opened.
#[derive(Debug, Default)]
pub(crate) struct Opened {
    /// The definitions.
    pub(crate) records: Vec<Record>,
    /// Names that no definition can have: there is a file that this version must leave alone.
    pub(crate) untouchable: BTreeSet<String>,
    /// A sentence for each file that is not as it should be.
    pub(crate) problems: Vec<String>,
}

/// The store of a manager.
pub(crate) struct Store {
    handle: Handle,
    path: PathBuf,
    // Only ever locked by worker threads.
    disks: Arc<Mutex<Disks>>,
    /// What is in the settings' file; empty if there is none.
    settings: RefCell<Vec<u8>>,
    /// There is a file of settings that this version must leave alone.
    settings_untouchable: bool,
    /// Whose turn it is to change the settings.
    turn: futures::lock::Mutex<()>,
}

impl Store {
    /// Opens the store in a folder, and puts in order what an earlier manager left. Works on the disk, which may take its time.
    ///
    /// # Errors
    /// `NO_STORAGE`: the folder cannot be used.
    pub(crate) fn open(handle: &Handle, folder: &StateFolder) -> Result<(Self, Opened), Error> {
        let path = folder.path().to_owned();
        let failed = |error: io::Error| no_storage(&path, "cannot be read", &error);
        let disk = Folder::open(&path.join(DEFINITIONS)).map_err(failed)?;
        let definitions = Files::new(disk, Content::Definition);
        let mut uuids = BTreeSet::new();
        let check = |name: &str, content: &[u8]| {
            let record = Record::read(content.to_vec()).map_err(|error| Wrong::Broken(error.to_string()))?;
            if *record.name != *name {
                return Err(Wrong::Broken(format!("the guest in it is \"{}\"", record.name)));
            }
            match uuids.insert(record.uuid) {
                true => Ok(()),
                false => Err(Wrong::Broken(format!(
                    "another definition has its UUID {}",
                    record.uuid
                ))),
            }
        };
        let found = definitions.recover(check).map_err(failed)?;
        let settings = Files::new(Folder::open(&path).map_err(failed)?, Content::Settings);
        let check = |name: &str, content: &[u8]| match name {
            SETTINGS => read_settings(content, |_| Ok(())).map_err(|error| Wrong::Broken(error.to_string())),
            _ => Err(Wrong::Unknown("this version knows nothing of that name".to_owned())),
        };
        let mut set = settings.recover(check).map_err(failed)?;
        let problems = found.problems.into_iter().chain(set.problems).collect();
        let records = found.contents.into_values().map(Record::read);
        let opened = Opened {
            // They were read before.
            records: records.filter_map(Result::ok).collect(),
            untouchable: found.untouchable,
            problems,
        };
        let store = Self {
            handle: handle.clone(),
            path,
            disks: Arc::new(Mutex::new(Disks { definitions, settings })),
            settings: RefCell::new(set.contents.remove(SETTINGS).unwrap_or_default()),
            settings_untouchable: set.untouchable.contains(SETTINGS),
            turn: futures::lock::Mutex::default(),
        };
        Ok((store, opened))
    }

    /// Keeps a definition, in place of one that has its name; it is on the disk on return. To be called by one task at a time, and waited for.
    ///
    /// # Errors
    /// `NO_STORAGE`: what the disk says. Whether the old definition or the new one is there then, the next start tells.
    pub(crate) async fn put(&self, record: &Record) -> Result<(), Error> {
        let (name, content) = (record.name.to_string(), record.content.clone());
        self.work(move |disks| disks.definitions.put(&name, &content)).await
    }

    /// Forgets a definition, which is gone from the disk on return. As [`Store::put`].
    ///
    /// # Errors
    /// `NO_STORAGE`: what the disk says.
    pub(crate) async fn delete(&self, name: &str) -> Result<(), Error> {
        let name = name.to_owned();
        self.work(move |disks| disks.definitions.delete(&name)).await
    }

    /// Looks at the settings.
    ///
    /// # Errors
    /// What `read` says.
    pub(crate) fn settings<R>(
        &self,
        read: impl FnOnce(stored_settings::Reader<'_>) -> capnp::Result<R>,
    ) -> capnp::Result<R> {
        read_settings(&self.settings.borrow(), read)
    }

    /// Changes the settings; they are on the disk on return. What `change` leaves alone stays, also what only later versions know.
    ///
    /// # Errors
    /// `NO_STORAGE`: what the disk says; or what `change` says.
    pub(crate) async fn set_settings(
        &self,
        change: impl FnOnce(stored_settings::Builder<'_>) -> capnp::Result<()>,
    ) -> Result<(), Error> {
        if self.settings_untouchable {
            let path = self.path.display();
            let message = format!(
                "there is a file for settings in the state folder {path} that this version of the manager cannot read, and leaves alone"
            );
            return Err(Error::new(Kind::NoStorage, message));
        }
        let _turn = self.turn.lock().await;
        let mut message = capnp::message::Builder::new_default();
        self.settings(|before| message.set_root(before))?;
        change(message.get_root()?)?;
        let content: Arc<[u8]> = serialize::write_message_to_words(&message).into();
        let written = content.clone();
        self.work(move |disks| disks.settings.put(SETTINGS, &written)).await?;
        self.settings.replace(content.to_vec());
        Ok(())
    }

    async fn work(&self, work: impl FnOnce(&Disks) -> io::Result<()> + Send + 'static) -> Result<(), Error> {
        let disks = self.disks.clone();
        let done = move || work(&disks.lock().unwrap_or_else(PoisonError::into_inner));
        let done = self.handle.spawn_blocking(done).await;
        let done = done.unwrap_or_else(|error| Err(io::Error::other(error)));
        done.map_err(|error| no_storage(&self.path, "cannot be written to", &error))
    }
}

/// What nobody has set yet reads as all defaults.
fn read_settings<R>(
    content: &[u8],
    read: impl FnOnce(stored_settings::Reader<'_>) -> capnp::Result<R>,
) -> capnp::Result<R> {
    if content.is_empty() {
        let mut message = capnp::message::Builder::new_default();
        return read(message.init_root::<stored_settings::Builder<'_>>().into_reader());
    }
    read(serialize::read_message(content, options())?.get_root()?)
}

fn no_storage(path: &Path, what: &str, error: &io::Error) -> Error {
    let message = format!("the state folder {} {what}: {error}", path.display());
    Error::new(Kind::NoStorage, message)
}

//! Definitions: what guests are started from. Kept on the disk (`store`), known by name to the registry, changed one at a time.
//!
//! ```text
//!   define         checked (host_check) --> name and UUID claimed --> on the disk --> kept
//!   undefine       gone from the disk --> let go of; what runs goes on
//!   setAutostart   on the disk --> kept
//!   a run fails    what is known of it on the disk, not too often (`failures`)
//!   start          a guest is created and run, as launch does with a configuration of the client's; autostart does it for all that are marked
//! ```
//!
//! A change that has begun is gone through with, also if nobody waits for it any more: what is known here and what is on the disk must not differ.

pub mod autostart;
mod failures;
mod host_check;
pub(crate) mod server;

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    future::Future,
    rc::Rc,
};

use futures::channel::oneshot;
use sepal_schema::{
    config::{GuestConfig, Uuid},
    error::{Error, Kind},
    transport::Handle,
};

use self::failures::Failures;
pub(crate) use self::failures::{finish, keep_crashes};
use crate::{
    client::Client,
    guest::Guest,
    list::Listings,
    manager::Manager,
    model::{Moment, cut},
    registry::{Kept, Origin, Runs},
    slot::{self, Slot},
    state::State,
    store::{
        Store,
        record::{self, Record},
    },
};

/// The definitions of a manager.
pub(crate) struct Definitions {
    store: Result<Store, Error>,
    records: RefCell<BTreeMap<Rc<str>, Record>>,
    /// Names that no definition can have: there is a file that this version must leave alone.
    untouchable: BTreeSet<String>,
    problems: Vec<String>,
    /// What is known of runs that failed and is not on the disk yet.
    failures: Failures,
    /// Whose turn it is to change something.
    turn: futures::lock::Mutex<()>,
    /// How much is kept for those who read listings.
    pub(crate) listings: Rc<Listings>,
}

impl Definitions {
    /// The definitions in the state folder, if there is one. Works on the disk.
    ///
    /// # Errors
    /// `NO_STORAGE`: there is a folder, and it cannot be used.
    pub(crate) fn open(handle: &Handle, state: &State) -> Result<Self, Error> {
        let mut definitions = Self {
            store: Err(Error::new(Kind::NoStorage, "")),
            records: RefCell::default(),
            untouchable: BTreeSet::new(),
            problems: Vec::new(),
            failures: Failures::default(),
            turn: futures::lock::Mutex::default(),
            listings: Rc::default(),
        };
        definitions.store = match state.folder() {
            Err(error) => Err(error),
            Ok(folder) => {
                let (store, opened) = Store::open(handle, folder)?;
                for problem in &opened.problems {
                    tracing::error!("state folder {}: {problem}", folder.path().display());
                }
                let records = opened.records.into_iter();
                definitions.records = RefCell::new(records.map(|record| (record.name.clone(), record)).collect());
                definitions.untouchable = opened.untouchable;
                definitions.problems = opened.problems;
                Ok(store)
            }
        };
        Ok(definitions)
    }

    /// Where they are kept.
    ///
    /// # Errors
    /// `NO_STORAGE`: this manager keeps nothing.
    pub(crate) fn store(&self) -> Result<&Store, Error> {
        self.store.as_ref().map_err(Clone::clone)
    }

    /// A sentence for each file of the state folder that was not as it should be when the manager started.
    pub(crate) fn problems(&self) -> &[String] {
        &self.problems
    }

    /// What the registry is to know of all of them, with what is known of the runs of each.
    pub(crate) fn kept(&self) -> Vec<(Rc<str>, Kept, Runs)> {
        let records = self.records.borrow();
        let kept = |(name, record): (&Rc<str>, &Record)| (name.clone(), kept(record), record.runs());
        records.iter().map(kept).collect()
    }

    /// The names of those that are to be started with the manager.
    fn marked(&self) -> Vec<Rc<str>> {
        let records = self.records.borrow();
        let marked = records.values().filter(|record| record.autostart);
        marked.map(|record| record.name.clone()).collect()
    }

    /// The definition of a name.
    ///
    /// # Errors
    /// `NOT_FOUND`, `NO_STORAGE`.
    pub(crate) fn get(&self, name: &str) -> Result<Record, Error> {
        self.store()?;
        self.records.borrow().get(name).cloned().ok_or_else(|| {
            let message = format!("there is no definition of a guest \"{}\"", cut(name, 64).escape_debug());
            Error::new(Kind::NotFound, message).about("name")
        })
    }
}

/// What the registry is to know of a definition.
fn kept(record: &Record) -> Kept {
    let config = record.config();
    if let Err(error) = &config {
        let about = &error.about;
        tracing::warn!(guest = &*record.name, about, "its definition cannot be used: {error}");
    }
    Kept {
        uuid: record.uuid,
        autostart: record.autostart,
        durable: config.as_ref().is_ok_and(|config| config.durable),
        restart: config.as_ref().map(|config| config.restart).unwrap_or_default(),
        descriptor: config.as_ref().map(slot::describe).ok(),
    }
}

/// A random UUID (RFC 9562, version 4).
///
/// # Errors
/// `INTERNAL_ERROR`: the kernel gives no random bytes.
pub(crate) fn fresh_uuid() -> Result<Uuid, Error> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| {
        let message = format!("the kernel gives no random bytes: {error}");
        Error::new(Kind::InternalError, message)
    })?;
    Ok(uuid::Builder::from_random_bytes(bytes).into_uuid())
}

/// Goes through with `work`, whether anybody waits for it or not.
async fn gone_through<T: 'static>(
    handle: &Handle,
    work: impl Future<Output = Result<T, Error>> + 'static,
) -> Result<T, Error> {
    let (tell, told) = oneshot::channel();
    handle.spawn(async move {
        // Whether anybody still waits is their business.
        let _ = tell.send(work.await);
    });
    let lost = |_| Error::new(Kind::InternalError, "the manager is ending");
    told.await.map_err(lost)?
}

/// What `define` answers.
pub(crate) struct Defined {
    /// The UUID that the definition has.
    pub(crate) uuid: Uuid,
    /// What would keep the guest from starting now.
    pub(crate) warnings: Vec<String>,
}

/// Keeps a definition; `client` sent it, and has the role for that.
///
/// # Errors
/// As `define` in `manager.capnp`.
pub(crate) async fn define(
    manager: &Rc<Manager>,
    client: &Client,
    config: GuestConfig,
    autostart: bool,
    replace: bool,
) -> Result<Defined, Error> {
    let definitions = &manager.definitions;
    definitions.store()?;
    if config.name.is_empty() {
        let message = "a definition needs a name, by which the guest is started";
        return Err(Error::bad_config("name", message));
    }
    record::check_lasting(&config)?;
    if definitions.untouchable.contains(&config.name) {
        let message = format!(
            "there is a file for \"{}\" in the state folder that this version of the manager cannot read, and leaves alone",
            config.name
        );
        return Err(Error::new(Kind::NoStorage, message).about("name"));
    }
    let warnings = host_check::warnings(manager, &config, client).await?;
    let work = write_definition(manager.clone(), config, autostart, replace);
    let uuid = gone_through(&manager.handle, work).await?;
    Ok(Defined { uuid, warnings })
}

async fn write_definition(
    manager: Rc<Manager>,
    mut config: GuestConfig,
    autostart: bool,
    replace: bool,
) -> Result<Uuid, Error> {
    let definitions = &manager.definitions;
    let _turn = definitions.turn.lock().await;
    let (wanted, fresh) = (config.uuid, fresh_uuid()?);
    let claim = manager.registry(|registry, _| registry.claim(&config.name, wanted, fresh, replace))?;
    let uuid = claim.uuid;
    config.uuid = Some(uuid);
    let runs = definitions.get(&config.name).map(|record| record.runs());
    let written = async {
        let record = Record::new(config, autostart, Moment::now().unix_ns)?;
        let record = record.with_runs(&runs.unwrap_or_default())?;
        definitions.store()?.put(&record).await?;
        Ok(record)
    };
    match written.await {
        Ok(record) => {
            manager.registry(|registry, now| registry.keep(&record.name, kept(&record), Some(claim), now));
            definitions.records.borrow_mut().insert(record.name.clone(), record);
            Ok(uuid)
        }
        Err(error) => {
            manager.registry(|registry, now| registry.unclaim(claim, now));
            Err(error)
        }
    }
}

/// Forgets a definition.
///
/// # Errors
/// `NOT_FOUND`, `NO_STORAGE`.
pub(crate) async fn undefine(manager: &Rc<Manager>, name: String) -> Result<(), Error> {
    let manager = manager.clone();
    let handle = manager.handle.clone();
    let work = async move {
        let definitions = &manager.definitions;
        let _turn = definitions.turn.lock().await;
        definitions.get(&name)?;
        definitions.store()?.delete(&name).await?;
        definitions.failures.forget(&name);
        definitions.records.borrow_mut().remove(&*name);
        manager.registry(|registry, now| registry.let_go(&name, now));
        Ok(())
    };
    gone_through(&handle, work).await
}

/// Says whether a guest is started when the manager starts.
///
/// # Errors
/// `NOT_FOUND`, `NO_STORAGE`.
pub(crate) async fn set_autostart(manager: &Rc<Manager>, name: String, autostart: bool) -> Result<(), Error> {
    let manager = manager.clone();
    let handle = manager.handle.clone();
    let work = async move {
        let definitions = &manager.definitions;
        let _turn = definitions.turn.lock().await;
        let record = definitions.get(&name)?;
        if record.autostart == autostart {
            return Ok(());
        }
        let record = record.with_autostart(autostart, Moment::now().unix_ns)?;
        definitions.store()?.put(&record).await?;
        manager.registry(|registry, now| registry.keep(&name, kept(&record), None, now));
        definitions.records.borrow_mut().insert(record.name.clone(), record);
        Ok(())
    };
    gone_through(&handle, work).await
}

/// Begins a guest from its definition, for `client`, which may start it. It may have what its definition asks for: whoever defined it might.
///
/// # Errors
/// `NOT_FOUND`, `ALREADY_RUNNING`, `NO_STORAGE`, `NO_RESOURCES`; what a definition of another version asks for that this one cannot give.
pub(crate) fn start(manager: &Rc<Manager>, client: &Client, name: &str, detach: bool) -> Result<Rc<Guest>, Error> {
    let config = manager.definitions.get(name)?.config()?;
    let client = Client {
        trusted: true,
        ..client.clone()
    };
    let slot = Slot::new(manager, name, Origin::Definition)?;
    if detach {
        manager.registry(|registry, _| registry.detach(slot.id));
    }
    slot.create(config, &client, true).inspect_err(|_| slot.release())
}

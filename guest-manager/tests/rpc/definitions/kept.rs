//! A state folder for managers one after the other, and what a client asks of their definitions.

use std::{fs, rc::Rc};

use sepal_guest_manager::{
    manager::Settings,
    state::{State, StateFolder},
};
use sepal_schema::{
    config::{File, GuestConfig, Uuid},
    error::{Error, Kind, read_completion},
    info::GuestInfo,
    manager_capnp::guest_manager::listing,
};
use tempfile::TempDir;

use crate::world::{Caller, Launched, World, with};

/// A state folder, and the settings of managers that use it one after the other.
pub(super) struct Kept {
    pub(super) folder: TempDir,
    pub(super) state: State,
}

impl Kept {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let state = StateFolder::open(&folder.path().join("state")).unwrap();
        Self {
            folder,
            state: State::Kept(Rc::new(state)),
        }
    }

    pub(super) fn settings(&self) -> Settings {
        Settings {
            state: self.state.clone(),
            ..Settings::default()
        }
    }

    /// A test on a manager that finds what the one before has left.
    pub(super) fn manager(&self, test: impl AsyncFnOnce(World)) {
        with(self.settings(), test);
    }

    pub(super) fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    /// A file that can be a kernel.
    pub(super) fn file(&self, name: &str) -> File {
        fs::write(self.path(name), vec![0; 4096]).unwrap();
        File::Path(self.path(name))
    }
}

pub(super) struct Page {
    pub(super) names: Vec<String>,
    pub(super) ended: bool,
}

pub(super) async fn next(listing: &listing::Client, most: u32) -> Page {
    let mut request = listing.next_request();
    request.get().set_most(most);
    let answer = request.send().promise.await.unwrap();
    let answer = answer.get().unwrap();
    let guests = answer.get_guests().unwrap().iter();
    Page {
        names: guests.map(|info| GuestInfo::read(info).unwrap().name).collect(),
        ended: answer.get_ended(),
    }
}

impl Caller {
    pub(super) async fn define_as(
        &self,
        config: GuestConfig,
        autostart: bool,
        replace: bool,
    ) -> Result<(Uuid, Vec<String>), Error> {
        let mut request = self.manager.define_request();
        request.get().set_replace(replace);
        let mut definition = request.get().init_definition();
        definition.set_autostart(autostart);
        config.encode(definition.init_config(), &self.connection.fds())?;
        let answer = request.send().promise.await?;
        let answer = answer.get()?;
        if answer.has_error() {
            return Err(Error::read(answer.get_error()?)?);
        }
        let warnings = answer
            .get_warnings()?
            .iter()
            .map(|text| text.unwrap().to_string().unwrap());
        Ok((Uuid::from_slice(answer.get_uuid()?).unwrap(), warnings.collect()))
    }

    pub(super) async fn define(&self, config: GuestConfig) -> Result<(Uuid, Vec<String>), Error> {
        self.define_as(config, false, false).await
    }

    pub(super) async fn undefine(&self, name: &str) -> Result<(), Error> {
        let mut request = self.manager.undefine_request();
        request.get().set_name(name);
        read_completion(request.send().promise.await?.get()?)
    }

    pub(super) async fn set_autostart(&self, name: &str, autostart: bool) -> Result<(), Error> {
        let mut request = self.manager.set_autostart_request();
        request.get().set_name(name);
        request.get().set_autostart(autostart);
        read_completion(request.send().promise.await?.get()?)
    }

    /// The number of vCPUs in a definition, and whether it is started with the manager.
    pub(super) async fn definition(&self, name: &str) -> Result<(u8, bool), Error> {
        let mut request = self.manager.definition_request();
        request.get().set_name(name);
        let answer = request.send().promise.await?;
        let answer = answer.get()?;
        if answer.has_error() {
            return Err(Error::read(answer.get_error()?)?);
        }
        let definition = answer.get_definition()?;
        assert_eq!(definition.get_config()?.get_name()?, name);
        Ok((definition.get_config()?.get_cpus(), definition.get_autostart()))
    }

    pub(super) async fn start(&self, name: &str, detach: bool) -> Result<Launched, Error> {
        let mut request = self.manager.start_request();
        request.get().set_name(name);
        request.get().set_detach(detach);
        Launched::read(request.send().promise.await?.get()?)
    }

    pub(super) async fn browse(&self) -> Result<(listing::Client, u32), Error> {
        let answer = self.manager.browse_request().send().promise.await?;
        let answer = answer.get()?;
        Ok((answer.get_listing()?, answer.get_count()))
    }

    pub(super) async fn seen(&self, name: &str) -> Option<GuestInfo> {
        self.list().await.into_iter().find(|info| info.name == name)
    }
}

pub(super) fn error<T>(outcome: Result<T, Error>) -> (Kind, String) {
    let error = outcome.err().unwrap();
    (error.kind, error.about)
}

pub(super) fn about<T>(outcome: Result<T, Error>, kind: Kind) -> String {
    let (seen, about) = error(outcome);
    assert_eq!(seen, kind, "about {about}");
    about
}

//! Who holds a name: the guests created under it, one after the other, and the component that they share.
//!
//! A component is started by the first creation, and kept for the next one where a client drives the guest itself. One that `launch`
//! started ends with its guest.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use sepal_schema::{
    config::{File, GuestConfig},
    error::{Error, Kind},
    info::{GuestDescriptor, read_layers},
    report::Reason,
};

use crate::{
    client::Client,
    component::{Component, StartRequest, Started},
    configuration::path_of,
    definitions::fresh_uuid,
    guest::{Creation, Guest, StopCause},
    life,
    manager::Manager,
    model::{Ending, GuestId, bounded_layers, cut},
    registry::Origin,
};

/// The holder of a name.
pub struct Slot {
    /// The shared state.
    pub manager: Rc<Manager>,
    /// Identifies the holder.
    pub id: GuestId,
    /// The name.
    pub name: Rc<str>,
    origin: Origin,
    released: Cell<bool>,
    component: RefCell<Option<Rc<Component>>>,
    current: RefCell<Option<Rc<Guest>>>,
}

impl Slot {
    /// Takes a name; an empty one is chosen.
    ///
    /// # Errors
    /// `BAD_CONFIG`, `ALREADY_RUNNING`, `ALREADY_BOUND`, `NO_RESOURCES`.
    pub fn new(manager: &Rc<Manager>, name: &str, origin: Origin) -> Result<Rc<Self>, Error> {
        if manager.is_leaving() {
            let message = "this guest manager gives way to another one, and begins nothing any more";
            return Err(Error::new(Kind::NoResources, message));
        }
        let (id, name) = manager.registry(|registry, now| {
            let id = registry.reserve(name, origin, now)?;
            Ok::<_, Error>((id, registry.name(id).unwrap_or_else(|| name.into())))
        })?;
        let slot = Rc::new(Self {
            manager: manager.clone(),
            id,
            name,
            origin,
            released: Cell::new(false),
            component: RefCell::default(),
            current: RefCell::default(),
        });
        manager.add_slot(slot.clone());
        Ok(slot)
    }

    /// The name of a guest that an earlier manager launched; the registry knows it already.
    pub(crate) fn restored(manager: &Rc<Manager>, id: GuestId, name: Rc<str>) -> Rc<Self> {
        let slot = Rc::new(Self {
            manager: manager.clone(),
            id,
            name,
            origin: Origin::Launch,
            released: Cell::new(false),
            component: RefCell::default(),
            current: RefCell::default(),
        });
        manager.add_slot(slot.clone());
        slot
    }

    /// Takes over the guest that an earlier manager created.
    pub(crate) fn take_over(&self, guest: Rc<Guest>) {
        *self.current.borrow_mut() = Some(guest);
    }

    /// The guest that was created last.
    pub fn current(&self) -> Option<Rc<Guest>> {
        self.current.borrow().clone()
    }

    /// The component that is there at the moment.
    pub(crate) fn component_there(&self) -> Option<Rc<Component>> {
        self.component.borrow().clone()
    }

    /// Begins to create a guest, and with `run` to run it as soon as it is created. `client` sent the configuration.
    ///
    /// # Errors
    /// `ALREADY_RUNNING`, `ALREADY_BOUND` about `uuid`. What goes wrong later is told by [`Guest::created`].
    pub fn create(self: &Rc<Self>, config: GuestConfig, client: &Client, run: bool) -> Result<Rc<Guest>, Error> {
        let descriptor = describe(&config);
        let manager = &self.manager;
        let (wanted, fresh) = (config.uuid, fresh_uuid()?);
        let creation = manager.registry(|registry, now| {
            registry.check_identity(self.id, wanted)?;
            let creation = registry.create(self.id, descriptor, now)?;
            registry.identify(self.id, wanted, fresh);
            registry.set_restart(self.id, config.restart);
            Ok::<_, Error>(creation)
        })?;
        if let (Some(report), Some(before)) = (creation.replaced, self.current()) {
            before.set_superseded(report);
        }
        let creation = Creation::of(&config, creation.generation, run);
        let guest = Guest::new(manager.clone(), self.id, self.name.clone(), creation);
        guest.note(&config);
        *self.current.borrow_mut() = Some(guest.clone());
        tracing::info!(guest = &*self.name, generation = guest.generation(), "creating");
        manager
            .handle
            .spawn(life::live(guest.clone(), self.clone(), config, client.clone()));
        Ok(guest)
    }

    /// Runs the guest that was created last, as soon as it is created.
    ///
    /// # Errors
    /// `NOT_CREATED`, `ALREADY_RUNNING`.
    pub async fn run(&self, guest: Option<Rc<Guest>>) -> Result<Rc<Guest>, Error> {
        let generation = match &guest {
            Some(guest) => {
                // Whatever kept it from being created was the answer to create.
                let _ = guest.created().await;
                guest.generation()
            }
            None => 0,
        };
        self.manager.registry(|registry, _| registry.run(self.id, generation))?;
        let guest = guest.ok_or_else(|| Error::new(Kind::NotCreated, "there is no guest"))?;
        guest.want_run();
        Ok(guest)
    }

    /// Stops the guest by force, and returns when it is gone.
    pub async fn stop(&self, why: &str) {
        if let Some(guest) = self.current() {
            guest.want_stop(StopCause::Killed(why.to_owned()));
            guest.ended().await;
        }
    }

    /// Stops the guest by force, ends the component, and returns when both are gone.
    pub async fn end(&self, why: &str) {
        self.released.set(true);
        self.stop(why).await;
        self.end_component().await;
    }

    /// Whoever drives the guest lets go of it: its name is free at once, and what runs under it is stopped.
    pub fn release(self: &Rc<Self>) {
        const WHY: &str = "the client that drove it let go of it";
        let slot = self.clone();
        self.manager.handle.spawn(async move { slot.end(WHY).await });
        if let Some(guest) = self.current() {
            guest.want_stop(StopCause::Killed(WHY.to_owned()));
        }
        let ending = Ending::new(Reason::Killed, WHY);
        self.manager
            .registry(|registry, now| registry.release(self.id, ending, now));
    }

    /// A component for the next creation: the one that is there, if it was started with the same limits and layers, or a new one.
    ///
    /// # Errors
    /// `START_FAILURE`, saying what is missing.
    pub(crate) async fn component(self: &Rc<Self>, request: StartRequest) -> Result<Rc<Component>, Error> {
        let there = self.component.borrow().clone();
        match there {
            Some(component) if component.serves(&request) => return Ok(component),
            Some(_) => self.end_component().await,
            None => {}
        }
        let started = self.manager.starter.start(request.clone()).await?;
        let component = self.adopt(request, started)?;
        tracing::debug!(guest = &*self.name, pid = component.pid, "component started");
        Ok(component)
    }

    /// Connects to the component that is to run the guest from now on.
    ///
    /// # Errors
    /// `START_FAILURE`: there are no descriptors left.
    pub(crate) fn adopt(self: &Rc<Self>, request: StartRequest, started: Started) -> Result<Rc<Component>, Error> {
        let handle = &self.manager.handle;
        let component = Component::new(handle, request, started)
            .map_err(|error| Error::new(Kind::StartFailure, format!("the component's connection: {error}")))?;
        *self.component.borrow_mut() = Some(component.clone());
        self.manager
            .registry(|registry, _| registry.component(self.id, component.pid));

        let (slot, watched) = (self.clone(), component.clone());
        handle.spawn(async move {
            watched.exited().await;
            slot.forget_component(&watched);
        });
        let layers = component.client().layers_request().send().promise;
        let (slot, asked) = (Rc::downgrade(self), Rc::downgrade(&component));
        handle.spawn(async move {
            let layers =
                async { Ok::<_, capnp::Error>(bounded_layers(read_layers(layers.await?.get()?.get_layers()?)?)) };
            if let (Ok(layers), Some(slot), Some(_)) = (layers.await, slot.upgrade(), asked.upgrade()) {
                slot.manager.registry(|registry, _| registry.layers(slot.id, layers));
                if let Some(guest) = slot.current() {
                    guest.save();
                }
            }
        });
        Ok(component)
    }

    /// Whether the component is to be there for another creation.
    pub(crate) fn keeps_component(&self) -> bool {
        self.origin == Origin::Lifecycle && !self.released.get()
    }

    /// Ends the component's process, and returns when it is gone.
    pub(crate) async fn end_component(&self) {
        let component = self.component.borrow().clone();
        if let Some(component) = component {
            component.kill();
            component.exited().await;
            self.forget_component(&component);
        }
    }

    fn forget_component(&self, gone: &Rc<Component>) {
        let is_it = |component: &Rc<Component>| Rc::ptr_eq(component, gone);
        if self.component.borrow().as_ref().is_some_and(is_it) {
            *self.component.borrow_mut() = None;
            self.manager.registry(|registry, _| registry.component(self.id, 0));
        }
    }
}

/// What is known of a guest before its component says more.
pub(crate) fn describe(config: &GuestConfig) -> GuestDescriptor {
    let kernel = match &config.kernel {
        File::None => "embedded".to_owned(),
        File::Fd(fd) => path_of(fd).map_or_else(|| "fd".to_owned(), |path| cut(&path, MAX_PATH)),
        File::Bytes(_) => "bytes".to_owned(),
        File::Upload(_) => "upload".to_owned(),
        File::Path(path) => path.clone(),
    };
    GuestDescriptor {
        cpus: config.cpus(),
        memory_mib: config.memory_mib().into(),
        kernel,
        cmdline: config.full_cmdline(),
        devices: Vec::new(),
    }
}

/// Longest path that is told of a kernel, in bytes.
const MAX_PATH: usize = 1024;

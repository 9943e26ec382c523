//! What a guest needs from the host besides its component: files, networks, a context id, other processes. Got before it is created, and held
//! until it has ended and its component has let go.
//!
//! ```text
//!   configuration of a client --prepare--> Resources: descriptors, addresses and numbers, nothing left to choose
//!                                              '--furnish, for each run--> configuration for the component: descriptors of its own for the
//!                                                                          same files; processes of its own for networks and devices
//!                   '--check--> whether all that could be got; nothing is
//! ```

use std::{
    rc::{Rc, Weak},
    time::Duration,
};

use sepal_schema::{
    config::{
        File, GuestConfig, OnPanic, OnReset, RestartPolicy,
        device::{AGENT_PORT, Backend, Link, Listener, Vsock},
    },
    error::{Error, Kind},
    transport::{FdTable, Handle},
    vsock_capnp::vsock_listener,
};

use crate::{
    agent,
    backends::{self, Paths},
    capacity::{self, Need, Promise},
    cids::Cid,
    client::Client,
    component::StartRequest,
    cpu,
    durable::{self, Durable, Owner},
    files::{self, ImageUse, no_paths},
    guest::Guest,
    macs,
    manager::Manager,
    network,
    networks::{self, Networks},
    pressure, protection,
    vsock::{self, path::PathSocket},
};

/// How long a guest that begins again waits for the processes behind its devices. They end with the connection, as a rule, and whoever started
/// them starts them again.
const BACKENDS_AGAIN: Duration = Duration::from_secs(10);
/// Milliseconds between the attempts to get what a component may hold that is about to end. The kernel takes that long for one with much memory.
const HELD_AGAIN: [u64; 5] = [100, 200, 400, 800, 1600];

/// What is held for a guest. Dropping it gives all of it back.
pub(crate) struct Resources {
    /// What every run is configured from.
    template: GuestConfig,
    /// How often it was used.
    runs: u64,
    trusted: bool,
    promise: Rc<Promise>,
    _images: Vec<ImageUse>,
    _cid: Option<Cid>,
    networks: Networks,
    /// Where the processes behind its devices are.
    pub(crate) backends: Paths,
    /// Who listens from the start.
    pub(crate) listening: Option<Listening>,
}

/// Who is to listen on ports of the host before the guest runs.
pub(crate) struct Listening {
    listeners: Vec<Listener>,
    path: Option<PathSocket>,
    /// The descriptors that travel with the messages of the listeners' client.
    fds: FdTable,
    /// What listens, once somebody does.
    held: Option<Vec<vsock_listener::Client>>,
}

/// Gets what `config` needs from the host, for the client who sent it.
///
/// What a guest needs that is started because the manager is there may still be with the component that it had before, as after the death of manager and
/// keeper: that is waited for.
///
/// # Errors
/// With the field's name: what cannot be had, who has it, or which privilege is lacking.
pub(crate) async fn prepare(guest: &Guest, config: GuestConfig, client: &Client) -> Result<Resources, Error> {
    for pause in HELD_AGAIN.iter().take_while(|_| guest.insists()) {
        let copy = config.try_clone().map_err(|error| no_descriptors(&error))?;
        match get(guest, copy, client).await {
            Err(error) if may_be_held(&error) => {
                tracing::info!(guest = &*guest.name, "waiting for {}: {error}", error.about);
                guest.manager.handle.sleep(Duration::from_millis(*pause)).await;
            }
            outcome => return outcome,
        }
    }
    get(guest, config, client).await
}

/// Whether a component that is about to end may hold what could not be had: images, taps and context ids, or the host's memory.
fn may_be_held(error: &Error) -> bool {
    matches!(
        error.kind,
        Kind::AlreadyRunning | Kind::AlreadyBound | Kind::GuestInitializationFailure
    )
}

async fn get(guest: &Guest, config: GuestConfig, client: &Client) -> Result<Resources, Error> {
    let manager = &guest.manager;
    check_protection(&config)?;
    check_durable(manager, &config)?;
    cpu::check(&config.pins)?;
    guest.set_only_once(check_only_once(&config)?);
    let need = Need::of(&config);
    capacity::admit(&need, &manager.room())?;
    let promise = Rc::new(manager.capacity.promise(&need));
    guest.ballast.fit(config.balloon.is_some().then_some(need.at_once));
    let files::Opened {
        mut config,
        images,
        notes,
    } = files::open(manager, &guest.name, config, client.trusted).await?;
    guest.set_notes(notes);
    for (i, network) in config.networks.iter_mut().enumerate() {
        network.mac.get_or_insert_with(|| macs::derive(&guest.name, i));
    }
    let named = std::mem::take(&mut config.networks);
    config.networks = networks::taps(&manager.handle, named, client.trusted).await?;
    let (mut held_cid, mut listens, mut socket_path) = (None, None, String::new());
    if let Some(vsock) = &mut config.vsock {
        socket_path.clone_from(&vsock.socket_path);
        let cid = manager
            .cids
            .take_in_time(&manager.handle, vsock.cid, &guest.name)
            .await?;
        vsock.cid = cid.number();
        guest.set_cid(cid.number());
        held_cid = Some(cid);
        listens = listening(guest, vsock, client.trusted, client.fds.clone()).await?;
    }
    if config.durable {
        let mut config = config.try_clone().map_err(|error| no_descriptors(&error))?;
        if let Some(vsock) = &mut config.vsock {
            vsock.socket_path = socket_path;
        }
        let held = durable::copies(held_cid.as_ref().map_or(&[], Cid::fds));
        let held = held.map_err(|error| no_descriptors(&error))?;
        guest.set_durable(Durable::new(config, client.into(), held)?)?;
    }
    Ok(Resources {
        template: config,
        runs: 0,
        trusted: client.trusted,
        promise,
        _images: images,
        _cid: held_cid,
        networks: Networks::default(),
        backends: Paths::default(),
        listening: listens,
    })
}

/// Holds again what an earlier manager held for a guest, which goes on whatever becomes of that. `config` is what that one got of the host.
pub(crate) async fn resume(guest: &Guest, mut config: GuestConfig, owner: Owner) -> Resources {
    let manager = &guest.manager;
    let told = |error: Error| tracing::error!(guest = &*guest.name, "not as it was: {error}");
    let need = Need::of(&config);
    // Before anything is waited for: nobody else is to be promised it meanwhile. What it has, it has.
    let promise = manager.capacity.promise(&need);
    promise.is_kept();
    guest.ballast.fit(config.balloon.is_some().then_some(need.at_once));
    pressure::resumed(guest);
    let images = files::take_again(manager, &guest.name, &config);
    let (mut held_cid, mut listens) = (None, None);
    if let Some(vsock) = &mut config.vsock {
        held_cid = manager.cids.take(vsock.cid, &guest.name).map_err(told).ok();
        let fds = FdTable::none();
        listens = listening(guest, vsock, owner.trusted, fds)
            .await
            .unwrap_or_else(|error| {
                told(error);
                None
            });
    }
    Resources {
        promise: Rc::new(promise),
        _images: images,
        _cid: held_cid,
        networks: Networks::default(),
        backends: backends::paths(&mut config),
        listening: listens,
        template: config,
        runs: 1,
        trusted: owner.trusted,
    }
}

fn no_descriptors(error: &std::io::Error) -> Error {
    let message = format!("no descriptors for the guest's files: {error}");
    Error::new(Kind::NoResources, message)
}

/// Refuses a guest that is to go on without its manager and could not.
fn check_durable(manager: &Manager, config: &GuestConfig) -> Result<(), Error> {
    durable::check(manager, config)?;
    match only_once(config).filter(|_| config.durable) {
        Some(error) => Err(Error::not_supported("durable", error.message)),
        None => Ok(()),
    }
}

/// Whether a guest with this configuration could be created, as far as that can be told without making, starting or taking anything. `client`
/// sent it, and may have what it asks for.
///
/// # Errors
/// What [`prepare`] and the component's start would fail with.
pub(crate) async fn check(manager: &Manager, config: GuestConfig, client: &Client) -> Result<(), Error> {
    check_protection(&config)?;
    check_durable(manager, &config)?;
    cpu::check(&config.pins)?;
    check_only_once(&config)?;
    capacity::admit(&Need::of(&config), &manager.room())?;
    manager.starter.check(&StartRequest::new("".into(), &config))?;
    let mut config = files::look(manager, config, client.trusted).await?;
    let vsock = config.vsock.take().unwrap_or_default();
    manager.cids.look(vsock.cid)?;
    let backends = backends::named(&mut config);
    let (networks, path) = (config.networks, vsock.socket_path);
    let look = move || {
        for (i, network) in networks.iter().enumerate() {
            network::check(i, network)?;
        }
        for (field, path) in backends {
            backends::check(&field, &path)?;
        }
        match path.is_empty() {
            true => Ok(()),
            false => PathSocket::check(&path),
        }
    };
    let looked = manager.handle.spawn_foreign(look).await;
    looked.map_err(|error| Error::new(Kind::NoResources, error.to_string()))?
}

/// Refuses to make what nobody can make here.
fn check_protection(config: &GuestConfig) -> Result<(), Error> {
    match config.protected_vm {
        true => Err(protection::refusal()),
        false => Ok(()),
    }
}

/// Why a guest with this configuration cannot begin again, if it cannot; refuses one that is to do so all the same.
fn check_only_once(config: &GuestConfig) -> Result<Option<Error>, Error> {
    let may_begin_again = config.on_reset != OnReset::Stop
        || config.on_panic == OnPanic::Restart
        || config.restart.policy != RestartPolicy::Never;
    match only_once(config) {
        Some(error) if may_begin_again => Err(error),
        only_once => Ok(only_once),
    }
}

/// Why a guest with this configuration cannot begin again, if it cannot. What has begun on a stream, a new component cannot go on with.
fn only_once(config: &GuestConfig) -> Option<Error> {
    let shares = config.shares.iter().enumerate();
    let shares = shares.map(|(i, share)| (format!("shares[{i}].backend"), &share.backend));
    let others = config.vhost_user.iter().enumerate();
    let others = others.map(|(i, device)| (format!("vhostUser[{i}].backend"), &device.backend));
    let backend = shares
        .chain(others)
        .find(|(_, backend)| matches!(backend, Backend::Socket(_)));
    let network = config
        .networks
        .iter()
        .position(|network| matches!(network.link, Link::Socket(_)));
    let field = backend
        .map(|(field, _)| field)
        .or_else(|| network.map(|i| format!("networks[{i}].socket")))?;
    let message =
        format!("{field} was given as a connected socket, which serves one run only: such a guest cannot begin again");
    Some(Error::not_supported(field, message))
}

impl Resources {
    /// The configuration for the next run's component. Returns when all that serves it is there.
    ///
    /// # Errors
    /// With the field's name: what cannot be had. `NO_RESOURCES`: there are no descriptors left.
    pub(crate) async fn furnish(&mut self, guest: &Rc<Guest>) -> Result<GuestConfig, Error> {
        let handle = &guest.manager.handle;
        let again = self.runs > 0;
        if !again {
            handle.spawn(keep_promise(guest.clone(), Rc::downgrade(&self.promise)));
        }
        self.runs += 1;
        let mut config = match guest.only_once() {
            Some(error) if again => return Err(error),
            // Nobody else is to keep the other end of a connection from being told that this one has closed.
            Some(_) => std::mem::take(&mut self.template),
            None => self.template.try_clone().map_err(|error| no_descriptors(&error))?,
        };
        if again {
            clear_scratch(handle, &config).await?;
        }
        let patience = if again { BACKENDS_AGAIN } else { Duration::ZERO };
        self.backends = backends::connect(handle, &mut config, self.trusted, patience).await?;
        let networks = std::mem::take(&mut config.networks);
        (config.networks, self.networks) = Networks::start(handle, networks).await?;
        Ok(config)
    }

    /// Ends what served one run, whose component is gone.
    pub(crate) async fn end_run(&mut self) {
        std::mem::take(&mut self.networks).end().await;
        self.backends = Paths::default();
    }
}

/// When a guest is created, it has what it was promised.
async fn keep_promise(guest: Rc<Guest>, promise: Weak<Promise>) {
    // If it is not, the promise is void with all else that it was to have.
    if let (Ok(()), Some(promise)) = (guest.created().await, promise.upgrade()) {
        promise.is_kept();
    }
}

/// Empties the files of volatile disks: a new component does not know what is in them.
async fn clear_scratch(handle: &Handle, config: &GuestConfig) -> Result<(), Error> {
    let mut files = Vec::new();
    for (i, disk) in config.disks.iter().enumerate() {
        if let File::Fd(file) = &disk.scratch {
            files.push((format!("disks[{i}].scratch"), file.try_clone()));
        }
    }
    if files.is_empty() {
        return Ok(());
    }
    let clear = move || {
        for (field, file) in files {
            let cleared = file.and_then(|file| Ok(rustix::fs::ftruncate(file, 0)?));
            cleared.map_err(|error| {
                let message = format!("{field}: what was written to the disk cannot be dropped: {error}");
                Error::new(Kind::NoStorage, message).about(field)
            })?;
        }
        Ok(())
    };
    let cleared = handle.spawn_foreign(clear).await;
    cleared.map_err(|error| Error::new(Kind::NoResources, error.to_string()))?
}

async fn listening(guest: &Guest, vsock: &mut Vsock, trusted: bool, fds: FdTable) -> Result<Option<Listening>, Error> {
    let path = std::mem::take(&mut vsock.socket_path);
    let listeners = std::mem::take(&mut vsock.listeners);
    if path.is_empty() && listeners.is_empty() && !guest.has_agent {
        return Ok(None);
    }
    let path = match path.is_empty() {
        true => None,
        false if !trusted => return Err(no_paths("vsock.socketPath", &path)),
        false => {
            let bound = guest
                .manager
                .handle
                .spawn_foreign(move || PathSocket::bind(&path))
                .await;
            Some(bound.map_err(|error| Error::new(Kind::NoResources, error.to_string()))??)
        }
    };
    Ok(Some(Listening {
        listeners,
        path,
        fds,
        held: None,
    }))
}

impl Listening {
    /// Begins to listen, for all runs of the guest, unless that was done for an earlier one; the component has been asked to create it.
    ///
    /// # Errors
    /// What keeps somebody from listening.
    pub(crate) async fn begin(&mut self, guest: &Rc<Guest>) -> Result<(), Error> {
        if self.held.is_some() {
            return Ok(());
        }
        let mut held = Vec::new();
        // A client that listens there itself hears of the agent instead.
        let taken = self.listeners.iter().any(|listener| listener.port == AGENT_PORT);
        if guest.has_agent && !taken {
            let acceptor = agent::ready_acceptor(guest);
            held.push(vsock::listen_here(guest, AGENT_PORT, acceptor).await?);
            if guest.has_started() {
                agent::look_again(guest);
            }
        }
        for Listener { port, acceptor } in std::mem::take(&mut self.listeners) {
            let listener = vsock::listen(guest, port, acceptor, self.fds.clone()).await;
            held.push(listener.map_err(|error| error.about("vsock.listeners"))?);
        }
        if let Some(path) = &mut self.path {
            path.serve(guest).await?;
        }
        self.held = Some(held);
        Ok(())
    }
}

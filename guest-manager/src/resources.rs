//! What a guest needs from the host besides its component: files, networks, a context id, other processes. Got before it is created, and held
//! until it has ended and its component has let go.
//!
//! ```text
//!   configuration of a client --prepare--> configuration for the component: descriptors, addresses and numbers, nothing left to choose
//!                                '-------> Resources
//! ```

use std::rc::Rc;

use sepal_schema::{
    config::{
        GuestConfig,
        device::{AGENT_PORT, Listener, Vsock},
    },
    error::{Error, Kind},
    transport::FdTable,
    vsock_capnp::vsock_listener,
};

use crate::{
    agent,
    backends::{self, Paths},
    cids::Cid,
    client::Client,
    files::{self, ImageUse, no_paths},
    guest::Guest,
    macs,
    networks::Networks,
    vsock::{self, path::PathSocket},
};

/// What is held for a guest. Dropping it gives all of it back.
#[derive(Default)]
pub(crate) struct Resources {
    _images: Vec<ImageUse>,
    _cid: Option<Cid>,
    pub(crate) networks: Networks,
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
    held: Vec<vsock_listener::Client>,
}

/// Gets what `config` needs from the host, for the client who sent it.
///
/// # Errors
/// With the field's name: what cannot be had, who has it, or which privilege is lacking.
pub(crate) async fn prepare(
    guest: &Guest,
    config: GuestConfig,
    client: &Client,
) -> Result<(GuestConfig, Resources), Error> {
    let manager = &guest.manager;
    let files::Opened {
        mut config,
        images,
        notes,
    } = files::open(manager, &guest.name, config, client.trusted).await?;
    guest.set_notes(notes);
    let mut resources = Resources {
        _images: images,
        backends: backends::connect(&manager.handle, &mut config, client.trusted).await?,
        ..Resources::default()
    };
    for (i, network) in config.networks.iter_mut().enumerate() {
        network.mac.get_or_insert_with(|| macs::derive(&guest.name, i));
    }
    let networks = std::mem::take(&mut config.networks);
    (config.networks, resources.networks) = Networks::open(&manager.handle, networks, client.trusted).await?;
    if let Some(vsock) = &mut config.vsock {
        let cid = manager.cids.take(vsock.cid, &guest.name)?;
        vsock.cid = cid.number();
        guest.set_cid(cid.number());
        resources._cid = Some(cid);
        resources.listening = listening(guest, vsock, client).await?;
    }
    Ok((config, resources))
}

async fn listening(guest: &Guest, vsock: &mut Vsock, client: &Client) -> Result<Option<Listening>, Error> {
    let path = std::mem::take(&mut vsock.socket_path);
    let listeners = std::mem::take(&mut vsock.listeners);
    if path.is_empty() && listeners.is_empty() && !guest.has_agent {
        return Ok(None);
    }
    let path = match path.is_empty() {
        true => None,
        false if !client.trusted => return Err(no_paths("vsock.socketPath", &path)),
        false => {
            let bound = guest
                .manager
                .handle
                .spawn_blocking(move || PathSocket::bind(&path))
                .await;
            Some(bound.map_err(|error| Error::new(Kind::NoResources, error.to_string()))??)
        }
    };
    Ok(Some(Listening {
        listeners,
        path,
        fds: client.fds.clone(),
        held: Vec::new(),
    }))
}

impl Listening {
    /// Begins to listen; the component has been asked to create the guest.
    ///
    /// # Errors
    /// What keeps somebody from listening.
    pub(crate) async fn begin(&mut self, guest: &Rc<Guest>) -> Result<(), Error> {
        let remote = vsock::remote(guest).await?;
        // A client that listens there itself hears of the agent instead.
        let taken = self.listeners.iter().any(|listener| listener.port == AGENT_PORT);
        if guest.has_agent && !taken {
            let acceptor = agent::ready_acceptor(guest);
            self.held
                .push(vsock::listen_here(guest, &remote, AGENT_PORT, acceptor).await?);
        }
        for Listener { port, acceptor } in std::mem::take(&mut self.listeners) {
            let listener = vsock::listen(guest, &remote, port, acceptor, self.fds.clone()).await;
            self.held
                .push(listener.map_err(|error| error.about("vsock.listeners"))?);
        }
        if let Some(path) = &mut self.path {
            path.serve(guest, remote).await?;
        }
        Ok(())
    }
}

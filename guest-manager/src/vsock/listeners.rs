//! Who listens on ports of the host for a guest. It goes on doing so when the guest begins again.
//!
//! ```text
//!   client or manager --VsockListener--> Listening --remote--> listener of the component of this run
//! ```

use std::{
    cell::{Cell, RefCell},
    rc::{Rc, Weak},
};

use sepal_schema::{
    error::{Error, Outcome},
    transport::guard,
    vsock_capnp::{host_vsock_endpoint, vsock_acceptor, vsock_listener},
};

use crate::{guest::Guest, model::bounded_error};

/// Those who listen. They are held by whoever wants them to.
#[derive(Default)]
pub(crate) struct Listeners(RefCell<Vec<Weak<Listening>>>);

/// Listens until it is dropped.
struct Listening {
    port: u32,
    acceptor: vsock_acceptor::Client,
    /// The generation of the guest that `remote` belongs to.
    generation: Cell<u64>,
    remote: RefCell<Option<vsock_listener::Client>>,
}

impl vsock_listener::Server for Listening {}

impl Listeners {
    /// Whether nobody listens.
    pub(crate) fn is_empty(&self) -> bool {
        self.living().is_empty()
    }

    fn living(&self) -> Vec<Rc<Listening>> {
        let mut all = self.0.borrow_mut();
        all.retain(|listening| listening.strong_count() > 0);
        all.iter().filter_map(Weak::upgrade).collect()
    }
}

impl Listening {
    async fn begin(&self, guest: &Guest, remote: &host_vsock_endpoint::Client) -> Result<(), Error> {
        let generation = guest.generation();
        let mut call = remote.listen_request();
        call.get().set_port(self.port);
        call.get().set_acceptor(self.acceptor.clone());
        let answer = guest.answer(call.send().promise).await?;
        let listener = answer.get()?.outcome().map_err(bounded_error)?.get_listener()?;
        self.generation.set(generation);
        self.remote.replace(Some(listener));
        Ok(())
    }
}

/// Listens on a port of the host, until what is returned is dropped.
///
/// # Errors
/// `ALREADY_BOUND`, `NO_RESOURCES`, `DEVICE_NOT_PRESENT`, or that the guest does not answer.
pub(crate) async fn listen_here(
    guest: &Guest,
    port: u32,
    acceptor: vsock_acceptor::Client,
) -> Result<vsock_listener::Client, Error> {
    let remote = super::remote(guest).await?;
    let listening = Rc::new(Listening {
        port,
        acceptor,
        generation: Cell::default(),
        remote: RefCell::default(),
    });
    listening.begin(guest, &remote).await?;
    let mut all = guest.listeners.0.borrow_mut();
    all.retain(|listening| listening.strong_count() > 0);
    all.push(Rc::downgrade(&listening));
    Ok(guard::new_client_from_rc(listening))
}

/// Has those who listened in an earlier run of the guest listen in this one, whose component has been asked to create it.
///
/// # Errors
/// As [`listen_here`].
pub(crate) async fn listen_again(guest: &Guest) -> Result<(), Error> {
    let generation = guest.generation();
    let mut living = guest.listeners.living();
    living.retain(|listening| listening.generation.get() != generation);
    if living.is_empty() {
        return Ok(());
    }
    let remote = super::remote(guest).await?;
    for listening in living {
        listening.begin(guest, &remote).await?;
    }
    Ok(())
}

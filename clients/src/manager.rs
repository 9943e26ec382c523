//! The connection to the guest manager, wherever that is.

use std::time::Duration;

use anyhow::{Context, Result};
use sepal_schema::{
    config::Handles,
    manager_capnp::guest_manager,
    transport::{Connection, Handle, Limits, connect, connection::connect_plain},
};

use crate::{
    local::{self, Private},
    place::{Address, Otherwise, Place},
};

/// A connection to a guest manager.
pub(crate) struct Manager {
    pub(crate) client: guest_manager::Client,
    pub(crate) connection: Connection,
    /// The process, if it was started for this command.
    child: Option<Private>,
}

impl Manager {
    /// Connects to the manager that runs; where none does but guests go on, to one that takes them over.
    pub(crate) fn running(handle: &Handle, place: &Place) -> Result<Self> {
        Self::connect(handle, place, Otherwise::Resume)
    }

    /// Connects to the manager that runs, or does what is to be done if none does.
    pub(crate) fn connect(handle: &Handle, place: &Place, otherwise: Otherwise) -> Result<Self> {
        let socket = match place.address() {
            None => None,
            Some(Address::Socket(path)) => Some(path.as_path()),
            Some(Address::Ssh(remote)) => {
                let (from, to) = place.dial(remote, otherwise)?;
                let register = || Ok::<_, std::io::Error>((handle.register(from)?, handle.register(to)?));
                let (from, to) = register().context("waiting for ssh")?;
                let (client, connection) = connect_plain(handle, from, to, Limits::default());
                return Ok(Self {
                    client,
                    connection,
                    child: None,
                });
            }
        };
        let found = local::connect(socket, otherwise)?;
        let (client, connection) =
            connect(handle, found.socket, Limits::default()).context("talking to the guest manager")?;
        Ok(Self {
            client,
            connection,
            child: found.child,
        })
    }

    /// The descriptors that travel with the connection's messages.
    pub(crate) fn fds(&self) -> impl Handles + use<> {
        self.connection.fds()
    }

    /// Whether it was started for this command, and ends with it.
    pub(crate) fn is_private(&self) -> bool {
        self.child.is_some()
    }

    /// Whether open files can be handed over; otherwise their bytes are.
    pub(crate) fn carries_fds(&self) -> bool {
        self.connection.fds().can_carry()
    }

    /// Why a call failed, as far as the end of a private manager explains it.
    pub(crate) async fn explain(&mut self, handle: &Handle, error: anyhow::Error) -> anyhow::Error {
        let broken = |error: &capnp::Error| error.kind == capnp::ErrorKind::Disconnected;
        if !error.downcast_ref().is_some_and(broken) {
            return error;
        }
        let Some(child) = self.child.take() else {
            return error;
        };
        // Calls fail a moment before the connection has ended. If it does not, the capability broke for another reason.
        if handle
            .timeout(Duration::from_secs(1), self.connection.ended())
            .await
            .is_err()
        {
            self.child = Some(child);
            return error;
        }
        // Its connection ends with it, or it ends with its connection.
        match handle.spawn_blocking(move || child.wait()).await {
            Ok(Ok(status)) => error.context(format!("the guest manager ended ({status})")),
            _ => error,
        }
    }

    /// Lets go of the manager; a private one has ended when this returns, and cleaned up behind itself.
    pub(crate) async fn close(self, handle: &Handle) {
        let Self {
            client,
            connection,
            child,
        } = self;
        drop(client);
        drop(connection);
        if let Some(child) = child {
            // Not on this thread: its loop is what closes the connection.
            let _ = handle.spawn_blocking(move || child.wait()).await;
        }
    }
}

//! A server that does nothing for its answers, in a process of its own: what is left is what calls themselves cost.
//!
//! It speaks the guest manager's protocol, so that the same calls go to both.

use std::{
    cell::Cell,
    io,
    os::{fd::AsFd, unix::net::UnixStream},
    rc::Rc,
};

use anyhow::Result;
use capnp::capability::{Client, FromClientHook};
use sepal_schema::{
    file_capnp::{file, upload},
    manager_capnp::guest_manager,
    transport::{FdTable, Limits, Reactor, guard, reactor::LINGER, serve_with},
};

/// Serves the socket that is this process's standard input until the other end closes it.
pub(crate) fn serve_calls() -> Result<()> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut reactor = Reactor::single_threaded()?.lingering(LINGER);
    let connection = serve_with(&reactor.handle(), socket, Limits::default(), |fds| {
        let client: guest_manager::Client = guard::new_client(Nothing { fds });
        Client::new(client.into_client_hook())
    })?;
    reactor.run_until(connection)?;
    Ok(())
}

/// Answers.
struct Nothing {
    fds: FdTable,
}

impl guest_manager::Server for Nothing {
    async fn version(
        self: Rc<Self>,
        _: guest_manager::VersionParams,
        mut results: guest_manager::VersionResults,
    ) -> capnp::Result<()> {
        let mut to = results.get();
        to.set_version(env!("CARGO_PKG_VERSION"));
        to.set_pid(std::process::id());
        Ok(())
    }

    /// Takes the descriptor of the kernel, and launches nothing.
    async fn launch(
        self: Rc<Self>,
        params: guest_manager::LaunchParams,
        _: guest_manager::LaunchResults,
    ) -> capnp::Result<()> {
        match params.get()?.get_config()?.get_kernel()?.which()? {
            file::Which::Fd(number) => {
                let taken = self.fds.take(number?.get_number());
                taken.map(drop).map_err(|error| capnp::Error::failed(error.to_string()))
            }
            _ => Err(capnp::Error::failed("there is no descriptor".to_owned())),
        }
    }

    async fn upload(
        self: Rc<Self>,
        _: guest_manager::UploadParams,
        mut results: guest_manager::UploadResults,
    ) -> capnp::Result<()> {
        results.get().set_upload(guard::new_client(Counted(Cell::new(0))));
        Ok(())
    }
}

/// Counts the bytes that it throws away.
struct Counted(Cell<u64>);

impl upload::Server for Counted {
    async fn write(self: Rc<Self>, params: upload::WriteParams) -> capnp::Result<()> {
        let length = params.get()?.get_bytes()?.len();
        self.0.set(self.0.get() + length as u64);
        Ok(())
    }

    async fn finish(self: Rc<Self>, _: upload::FinishParams, mut results: upload::FinishResults) -> capnp::Result<()> {
        results.get().set_size(self.0.get());
        Ok(())
    }
}

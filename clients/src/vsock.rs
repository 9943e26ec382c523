//! `guest vsock`: standard input and output on a connection with a guest.
//!
//! ```text
//!   standard input  --(thread)--> socket --> guest     its end is passed on; the guest may go on sending
//!   standard output <--(thread)-- socket <-- guest     its end ends the command
//! ```

use std::{cell::RefCell, io, net::Shutdown, os::unix::net::UnixStream, rc::Rc, thread};

use anyhow::{Context, Result, bail};
use futures::{FutureExt, channel::oneshot, select};
use sepal_schema::{
    error::Outcome,
    guest_capnp::guest,
    transport::{Handle, guard},
    vsock_capnp::{host_vsock_endpoint, vsock_acceptor, vsock_connection},
};

use crate::{args::VsockCommand, calls, manager::Manager, place::Place, status, streams};

/// `guest vsock`.
pub(crate) async fn vsock(handle: &Handle, place: &Place, args: &VsockCommand) -> Result<u8> {
    let (VsockCommand::Connect { name, port } | VsockCommand::Listen { name, port }) = args;
    let manager = Manager::running(handle, place)?;
    let guest = calls::lookup(&manager.client, name).await?;
    let endpoint = endpoint(&guest).await?;
    match args {
        VsockCommand::Connect { .. } => connect(handle, &manager, &endpoint, *port).await,
        VsockCommand::Listen { .. } => {
            let observer = calls::observer(&guest);
            let ended = calls::wait(&observer).fuse();
            let accepted = accept(handle, &manager, &endpoint, *port).fuse();
            futures::pin_mut!(ended, accepted);
            let stream = select! {
                stream = accepted => stream?,
                report = ended => bail!("guest \"{name}\" has ended: {}", report?.detail),
            };
            converse(&manager, stream).await
        }
    }
}

/// Connects to a port of the guest, and copies until the guest has sent its last.
pub(crate) async fn connect(
    handle: &Handle,
    manager: &Manager,
    endpoint: &host_vsock_endpoint::Client,
    port: u32,
) -> Result<u8> {
    let stream = streams::connect(handle, manager, endpoint, port).await?;
    converse(manager, stream).await
}

/// Waits until the guest connects to a port of the host, and copies until it has sent its last.
pub(crate) async fn listen(
    handle: &Handle,
    manager: &Manager,
    endpoint: &host_vsock_endpoint::Client,
    port: u32,
) -> Result<u8> {
    let stream = accept(handle, manager, endpoint, port).await?;
    converse(manager, stream).await
}

async fn converse(manager: &Manager, stream: UnixStream) -> Result<u8> {
    let copied = copy(stream)?;
    select! {
        result = copied.fuse() => result.unwrap_or(Ok(())).context("writing what the guest sent")?,
        reason = manager.connection.ended().fuse() => bail!("the connection to the guest manager ended: {reason}"),
    }
    Ok(status::SUCCESS)
}

async fn endpoint(guest: &guest::Client) -> Result<host_vsock_endpoint::Client> {
    let response = guest.host_vsock_endpoint_request().send().promise.await?;
    Ok(response.get()?.outcome()?.get_endpoint()?)
}

/// Listens until the guest connects, once.
async fn accept(
    handle: &Handle,
    manager: &Manager,
    endpoint: &host_vsock_endpoint::Client,
    port: u32,
) -> Result<UnixStream> {
    let (sender, asked) = oneshot::channel();
    let mut request = endpoint.listen_request();
    request.get().set_port(port);
    request
        .get()
        .set_acceptor(guard::new_client(First(RefCell::new(Some(sender)))));
    let response = request.send().promise.await?;
    let listener = response.get()?.outcome()?.get_listener()?;
    say!("listening on port {port}");
    let connection = asked.await.context("the guest manager listens no longer")?;
    drop(listener);
    streams::open(handle, manager, &connection).await
}

/// Takes the first connection; those after it are refused.
struct First(RefCell<Option<oneshot::Sender<vsock_connection::Client>>>);

impl vsock_acceptor::Server for First {
    async fn accept(
        self: Rc<Self>,
        params: vsock_acceptor::AcceptParams,
        _: vsock_acceptor::AcceptResults,
    ) -> Result<(), capnp::Error> {
        let connection = params.get()?.get_connection()?;
        if let Some(sender) = self.0.borrow_mut().take() {
            // Nobody waits any more if the command is ending.
            let _ = sender.send(connection);
        }
        Ok(())
    }
}

/// Copies both ways, on threads, until the guest has sent its last.
fn copy(stream: UnixStream) -> Result<oneshot::Receiver<io::Result<()>>> {
    stream.set_nonblocking(false).context("waiting for the guest")?;
    let (mut from, mut to) = (stream.try_clone().context("waiting for the guest")?, stream);
    let input = move || {
        // Whatever ends the input, the guest is told that there is no more.
        let _ = streams::copy(&mut io::stdin().lock(), &mut to);
        let _ = to.shutdown(Shutdown::Write);
    };
    thread::Builder::new()
        .name("input".into())
        .spawn(input)
        .context("starting a thread for the input")?;
    let (done, copied) = oneshot::channel();
    let output = move || {
        let mut out = io::stdout().lock();
        let result = streams::copy(&mut from, &mut out);
        // Nobody listens any more if the command is ending.
        let _ = done.send(result);
    };
    thread::Builder::new()
        .name("output".into())
        .spawn(output)
        .context("starting a thread for the output")?;
    Ok(copied)
}

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
    config::Handles,
    error::{Error, Outcome},
    guest_capnp::guest,
    transport::{Handle, guard},
    vsock_capnp::{
        host_vsock_endpoint::{self, stream_result},
        vsock_acceptor, vsock_connection,
    },
};

use crate::{args::VsockCommand, calls, manager::Manager, place::Place, status};

/// `guest vsock`.
pub(crate) async fn vsock(handle: &Handle, place: &Place, args: &VsockCommand) -> Result<u8> {
    let (VsockCommand::Connect { name, port } | VsockCommand::Listen { name, port }) = args;
    let manager = Manager::running(handle, place)?;
    let guest = calls::lookup(&manager.client, name).await?;
    let endpoint = endpoint(&guest).await?;
    let stream = match args {
        VsockCommand::Connect { .. } => connect(&manager, &endpoint, *port).await?,
        VsockCommand::Listen { .. } => {
            let observer = calls::observer(&guest);
            let ended = calls::wait(&observer).fuse();
            let accepted = accept(&manager, &endpoint, *port).fuse();
            futures::pin_mut!(ended, accepted);
            select! {
                stream = accepted => stream?,
                report = ended => bail!("guest \"{name}\" has ended: {}", report?.detail),
            }
        }
    };
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

fn stream(fds: &impl Handles, result: stream_result::Reader<'_>) -> Result<UnixStream> {
    match result.which()? {
        stream_result::Fd(fd) => Ok(UnixStream::from(fds.take(fd?.get_number())?)),
        stream_result::Error(error) => Err(Error::read(error?)?.into()),
    }
}

async fn connect(manager: &Manager, endpoint: &host_vsock_endpoint::Client, port: u32) -> Result<UnixStream> {
    let mut request = endpoint.connect_request();
    request.get().set_port(port);
    let response = request.send().promise.await?;
    stream(&manager.fds(), response.get()?)
}

/// Listens until the guest connects, once.
async fn accept(manager: &Manager, endpoint: &host_vsock_endpoint::Client, port: u32) -> Result<UnixStream> {
    let (sender, asked) = oneshot::channel();
    let mut request = endpoint.listen_request();
    request.get().set_port(port);
    request
        .get()
        .set_acceptor(guard::new_client(First(RefCell::new(Some(sender)))));
    let response = request.send().promise.await?;
    let listener = response.get()?.outcome()?.get_listener()?;
    eprintln!("listening on port {port}");
    let connection = asked.await.context("the guest manager listens no longer")?;
    drop(listener);
    let response = connection.open_request().send().promise.await?;
    stream(&manager.fds(), response.get()?)
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
        let _ = io::copy(&mut io::stdin().lock(), &mut to);
        let _ = to.shutdown(Shutdown::Write);
    };
    thread::Builder::new()
        .name("input".into())
        .spawn(input)
        .context("starting a thread for the input")?;
    let (done, copied) = oneshot::channel();
    let output = move || {
        let mut out = io::stdout().lock();
        let result = io::copy(&mut from, &mut out).and_then(|_| io::Write::flush(&mut out));
        // Nobody listens any more if the command is ending.
        let _ = done.send(result);
    };
    thread::Builder::new()
        .name("output".into())
        .spawn(output)
        .context("starting a thread for the output")?;
    Ok(copied)
}

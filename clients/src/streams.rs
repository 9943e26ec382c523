//! A guest's ports as stream sockets of this process, whether the connection carries descriptors or not.
//!
//! ```text
//!   it does       the socket that the guest manager sends
//!   it does not   a socket pair of our own, and tasks that turn its other end into calls:
//!                   ours <--pair-- read, or a stream that the guest's side writes to  <-- guest
//!                   ours --pair--> write, or a stream of the guest's side             --> guest
//! ```

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    rc::Rc,
};

use anyhow::{Context, Result};
use capnp::capability::FromClientHook;
use futures::{AsyncReadExt, AsyncWriteExt};
use sepal_schema::{
    bytes_capnp::byte_stream,
    config::Handles,
    error::{Error, Kind, Outcome, write_completion},
    facet::Right,
    facet_capnp::facet,
    guest_capnp::{output, serial},
    transport::{AsyncFd, Handle, guard},
    vsock_capnp::{
        host_vsock_endpoint::{self, stream_result},
        vsock_connection,
    },
};

use crate::{calls, manager::Manager};

/// Bytes sent at a time.
const CHUNK: usize = 64 * 1024;

type Socket = Rc<AsyncFd<UnixStream>>;

/// Both ends of a pair, the second on the loop.
fn pair(handle: &Handle) -> Result<(UnixStream, Socket)> {
    let make = || {
        let (ours, theirs) = UnixStream::pair()?;
        Ok::<_, std::io::Error>((ours, Rc::new(handle.register(theirs)?)))
    };
    make().context("making a socket pair")
}

/// A serial port or a port of the console, from `position` of its output on. It ends with the guest.
pub(crate) async fn port(
    handle: &Handle,
    manager: &Manager,
    port: &serial::Client,
    position: u64,
) -> Result<UnixStream> {
    use serial::open_result::Which;
    if manager.carries_fds() {
        let mut request = port.open_request();
        request.get().set_position(position);
        let response = request.send().promise.await?;
        return match response.get()?.which()? {
            Which::Fd(fd) => Ok(UnixStream::from(manager.fds().take(fd?.get_number())?)),
            Which::Error(error) => Err(Error::read(error?)?.into()),
        };
    }
    let facet: facet::Client = port.clone().cast_to();
    let may_type = calls::describe(&facet).await?.rights.has(Right::Input);
    let (ours, theirs) = pair(handle)?;
    handle.spawn(type_in(theirs.clone(), port.clone(), may_type));
    handle.spawn(print(theirs, port.clone().cast_to(), position));
    Ok(ours)
}

/// What is typed by somebody who may not is discarded, as a socket of the manager's does: a stream that was refused once would fail every later
/// call to the port, reading included.
async fn type_in(from: Socket, port: serial::Client, may_type: bool) {
    let mut buffer = vec![0; CHUNK];
    while let Ok(count @ 1..) = (&*from).read(&mut buffer).await {
        if !may_type {
            continue;
        }
        let mut call = port.write_request();
        call.get().set_bytes(&buffer[..count]);
        // Who has nobody to type to is told so by the output's end.
        if call.send().await.is_err() {
            return;
        }
    }
}

async fn print(to: Socket, output: output::Client, mut position: u64) {
    loop {
        match read(&output, position).await {
            Ok((bytes, next, ended)) => {
                position = next;
                let over = ended && bytes.is_empty();
                if over || (&*to).write_all(&bytes).await.is_err() {
                    break;
                }
            }
            // As with a socket of the manager's: nothing arrives, but what is typed does.
            Err(error) if is(&error, Kind::PermissionDenied) => return,
            Err(_) => break,
        }
    }
    // Whoever has closed the other end does not read the end.
    let _ = to.shutdown(Shutdown::Both);
}

fn is(error: &anyhow::Error, kind: Kind) -> bool {
    error.downcast_ref::<Error>().is_some_and(|error| error.kind == kind)
}

/// Bytes from `position` on, the position after them, and whether there is nothing after those that are kept.
async fn read(output: &output::Client, position: u64) -> Result<(Vec<u8>, u64, bool)> {
    let mut request = output.read_request();
    request.get().set_position(position);
    let response = request.send().promise.await?;
    let piece = response.get()?.outcome()?;
    let bytes = piece.get_bytes()?;
    let next = piece.get_position() + bytes.len() as u64;
    Ok((bytes.to_vec(), next, piece.get_ended()))
}

/// A connection with a port of the guest.
pub(crate) async fn connect(
    handle: &Handle,
    manager: &Manager,
    endpoint: &host_vsock_endpoint::Client,
    port: u32,
) -> Result<UnixStream> {
    if manager.carries_fds() {
        let mut request = endpoint.connect_request();
        request.get().set_port(port);
        let response = request.send().promise.await?;
        return received(manager, response.get()?);
    }
    let (ours, theirs) = pair(handle)?;
    let mut request = endpoint.connect_stream_request();
    request.get().set_port(port);
    request
        .get()
        .set_from_guest(guard::new_client(FromGuest(theirs.clone())));
    let response = request.send().promise.await?;
    let to_guest = response.get()?.outcome()?.get_to_guest()?;
    handle.spawn(feed(theirs, to_guest));
    Ok(ours)
}

/// A connection that the guest has asked for.
pub(crate) async fn open(
    handle: &Handle,
    manager: &Manager,
    connection: &vsock_connection::Client,
) -> Result<UnixStream> {
    if manager.carries_fds() {
        let response = connection.open_request().send().promise.await?;
        return received(manager, response.get()?);
    }
    let (ours, theirs) = pair(handle)?;
    let mut request = connection.open_stream_request();
    request
        .get()
        .set_from_guest(guard::new_client(FromGuest(theirs.clone())));
    let response = request.send().promise.await?;
    let to_guest = response.get()?.outcome()?.get_to_guest()?;
    handle.spawn(feed(theirs, to_guest));
    Ok(ours)
}

fn received(manager: &Manager, result: stream_result::Reader<'_>) -> Result<UnixStream> {
    match result.which()? {
        stream_result::Fd(fd) => Ok(UnixStream::from(manager.fds().take(fd?.get_number())?)),
        stream_result::Error(error) => Err(Error::read(error?)?.into()),
    }
}

/// Sends what is written to our end to the guest, and then that there is no more.
async fn feed(from: Socket, to: byte_stream::Client) {
    let mut buffer = vec![0; CHUNK];
    loop {
        match (&*from).read(&mut buffer).await {
            Ok(0) => break,
            Ok(count) => {
                let mut call = to.write_request();
                call.get().set_bytes(&buffer[..count]);
                if call.send().await.is_err() {
                    return;
                }
            }
            Err(_) => return,
        }
    }
    // A guest that is gone needs no end.
    let _ = to.end_request().send().promise.await;
}

/// Takes what the guest sends. Dropped without its end, the connection was reset.
struct FromGuest(Socket);

impl byte_stream::Server for FromGuest {
    async fn write(self: Rc<Self>, params: byte_stream::WriteParams) -> Result<(), capnp::Error> {
        let written = (&*self.0).write_all(params.get()?.get_bytes()?).await;
        written.map_err(|error| capnp::Error::failed(error.to_string()))
    }

    async fn end(
        self: Rc<Self>,
        _: byte_stream::EndParams,
        mut results: byte_stream::EndResults,
    ) -> Result<(), capnp::Error> {
        // If nobody reads any more, nobody misses it.
        let _ = self.0.shutdown(Shutdown::Write);
        write_completion(&Ok(()), results.get());
        Ok(())
    }
}

impl Drop for FromGuest {
    fn drop(&mut self) {
        // The task that feeds the guest may hold the socket as well.
        let _ = self.0.shutdown(Shutdown::Write);
    }
}

/// Copies until there is no more, each piece as it comes. Not the standard library's copy: splice(2), which that makes of it, keeps a pipe locked while it
/// waits for a socket, and whoever wants to look whether there is something in the pipe waits with it.
pub(crate) fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => to.write_all(&buffer[..count]).and_then(|()| to.flush())?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

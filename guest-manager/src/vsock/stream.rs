//! Sockets as byte streams, for clients that receive no descriptors.
//!
//! ```text
//!   split:  socket --read--> from_guest.write ... end        (a task; ends with the socket's end of file)
//!           to_guest.write --> socket; end --> shutdown(WR); dropped without end: both directions end at once
//! ```

use std::{io, net::Shutdown, os::unix::net::UnixStream, pin::pin, rc::Rc, time::Duration};

use futures::future::select;
use rustix::net::{RecvFlags, SendFlags};
use sepal_schema::{
    bytes_capnp::byte_stream,
    error::{Error, Kind, write_completion},
    transport::{
        AsyncFd, Handle, guard,
        reactor::{Direction, Task},
    },
};

use crate::{
    access::{Relayed, holder::Holder},
    serial::yield_now,
};

/// Most bytes of one write.
const MAX_WRITE: usize = 64 * 1024;
/// What is read at a time.
const CHUNK: usize = 64 * 1024;
/// How long a client may take to hear that a stream has ended.
const END_HEARD: Duration = Duration::from_secs(10);

pub(super) async fn receive(socket: &AsyncFd<UnixStream>, buffer: &mut [u8]) -> io::Result<usize> {
    let receive = |socket: &UnixStream| Ok(rustix::net::recv(socket, &mut *buffer, RecvFlags::DONTWAIT)?.1);
    socket.io(Direction::Read, receive).await
}

async fn send_all(socket: &AsyncFd<UnixStream>, mut bytes: &[u8]) -> io::Result<()> {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    while !bytes.is_empty() {
        let sent = socket
            .io(Direction::Write, |socket| Ok(rustix::net::send(socket, bytes, flags)?))
            .await?;
        bytes = &bytes[sent..];
    }
    Ok(())
}

/// Passes what comes from `socket` to `from_guest`, and returns a stream whose bytes go the other way. All ends with the capability of `holder`.
///
/// # Errors
/// `NO_RESOURCES`: the socket cannot be waited for.
pub(crate) fn split(
    handle: &Handle,
    socket: UnixStream,
    from_guest: byte_stream::Client,
    holder: Option<(Holder, Relayed)>,
) -> Result<byte_stream::Client, Error> {
    let (holder, counted) = holder.unzip();
    // It counts for as long as either way is open.
    let counted = Rc::new(counted);
    let counted_here = counted.clone();
    let registered = handle.register(socket);
    let socket = Rc::new(registered.map_err(|error| Error::new(Kind::NoResources, format!("no stream: {error}")))?);
    let from = socket.clone();
    let clock = handle.clone();
    let pass = async move {
        let mut buffer = vec![0; CHUNK];
        loop {
            match receive(&from, &mut buffer).await {
                Ok(0) => break,
                // Without its end, which would say that this was all.
                Err(_) => return,
                Ok(count) => {
                    let mut call = from_guest.write_request();
                    call.get().set_bytes(&buffer[..count]);
                    if call.send().await.is_err() {
                        let _ = from.get_ref().shutdown(Shutdown::Read);
                        return;
                    }
                }
            }
            yield_now().await;
        }
        // Whoever does not want to know the end needs no help, and is not waited for without end.
        let _ = clock.timeout(END_HEARD, from_guest.end_request().send().promise).await;
    };
    let until = holder.as_ref().map(Holder::until_ended);
    handle.spawn(async move {
        let _counted = counted_here;
        match until {
            None => pass.await,
            Some(ended) => {
                select(pin!(ended), pin!(pass)).await;
            }
        }
    });
    let until = holder.as_ref().map(|holder| {
        let (ended, closed) = (holder.until_ended(), socket.clone());
        handle.spawn_owned(async move {
            ended.await;
            // Fails only if the other side is gone already.
            let _ = closed.get_ref().shutdown(Shutdown::Both);
        })
    });
    Ok(guard::new_client(Writer {
        socket,
        holder,
        _counted: counted,
        _until: until,
        ended: std::cell::Cell::new(false),
    }))
}

/// A byte stream into a socket.
struct Writer {
    socket: Rc<AsyncFd<UnixStream>>,
    holder: Option<Holder>,
    _counted: Rc<Option<Relayed>>,
    /// Ends the socket with the holder's capability.
    _until: Option<Task>,
    ended: std::cell::Cell<bool>,
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.ended.get() {
            // Fails only if the other side is gone already.
            let _ = self.socket.get_ref().shutdown(Shutdown::Both);
        }
    }
}

impl byte_stream::Server for Writer {
    async fn write(self: Rc<Self>, params: byte_stream::WriteParams) -> Result<(), capnp::Error> {
        let bytes = params.get()?.get_bytes()?;
        if bytes.len() > MAX_WRITE {
            let length = bytes.len();
            return Err(capnp::Error::failed(format!(
                "{length} bytes were written at once; at most {MAX_WRITE} are allowed"
            )));
        }
        let send = async {
            let sent = send_all(&self.socket, bytes).await;
            sent.map_err(|error| Error::new(Kind::NotRunning, format!("the stream has ended: {error}")))
        };
        let sent = match &self.holder {
            None => send.await,
            Some(holder) => holder.while_live(send).await,
        };
        sent.map_err(|error| error.exception())
    }

    async fn end(
        self: Rc<Self>,
        _: byte_stream::EndParams,
        mut results: byte_stream::EndResults,
    ) -> Result<(), capnp::Error> {
        self.ended.set(true);
        let end = || {
            self.holder.as_ref().map_or(Ok(()), Holder::check_live)?;
            let ended = self.socket.get_ref().shutdown(Shutdown::Write);
            ended.map_err(|error| Error::new(Kind::NotRunning, format!("the stream has ended: {error}")))
        };
        let outcome = end();
        write_completion(&outcome, results.get());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        cell::RefCell,
        io::{Read, Write},
        time::Duration,
    };

    use sepal_schema::{error::read_completion, transport::Reactor};

    use super::*;

    /// Remembers what it is given.
    #[derive(Default)]
    struct Sink {
        bytes: RefCell<Vec<u8>>,
        ended: crate::changed::Changed<bool>,
    }

    struct SinkServer(Rc<Sink>);

    impl byte_stream::Server for SinkServer {
        async fn write(self: Rc<Self>, params: byte_stream::WriteParams) -> Result<(), capnp::Error> {
            self.0.bytes.borrow_mut().extend_from_slice(params.get()?.get_bytes()?);
            Ok(())
        }

        async fn end(
            self: Rc<Self>,
            _: byte_stream::EndParams,
            mut results: byte_stream::EndResults,
        ) -> Result<(), capnp::Error> {
            self.0.ended.change(|ended| *ended = true);
            write_completion(&Ok(()), results.get());
            Ok(())
        }
    }

    fn run(test: impl AsyncFnOnce(Handle)) {
        let mut reactor = Reactor::new().unwrap();
        let handle = reactor.handle();
        let done = reactor.run_until(handle.timeout(Duration::from_secs(60), test(handle.clone())));
        done.unwrap().expect("the test hangs");
    }

    #[test]
    fn a_socket_becomes_two_streams() {
        run(async |handle| {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let sink = Rc::new(Sink::default());
            let to_guest = split(&handle, ours, guard::new_client(SinkServer(sink.clone())), None).unwrap();
            let guest = handle.spawn_blocking(move || {
                theirs.write_all(&[7; 200_000]).unwrap();
                theirs.shutdown(Shutdown::Write).unwrap();
                let mut all = Vec::new();
                theirs.read_to_end(&mut all).unwrap();
                all
            });
            for _ in 0..10 {
                let mut call = to_guest.write_request();
                call.get().set_bytes(&[9; MAX_WRITE]);
                call.send().await.unwrap();
            }
            let answer = to_guest.end_request().send().promise.await.unwrap();
            read_completion(answer.get().unwrap()).unwrap();
            assert_eq!(guest.await.unwrap(), vec![9; 10 * MAX_WRITE]);
            sink.ended.until(|ended| ended.then_some(())).await;
            assert_eq!(*sink.bytes.borrow(), vec![7; 200_000]);
        });
    }

    #[test]
    fn a_stream_that_is_dropped_ends_the_socket() {
        run(async |handle| {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let sink = Rc::new(Sink::default());
            drop(split(&handle, ours, guard::new_client(SinkServer(sink.clone())), None).unwrap());
            let read = handle.spawn_blocking(move || theirs.read(&mut [0; 1]).unwrap());
            assert_eq!(read.await.unwrap(), 0);
        });
    }

    #[test]
    fn too_much_at_once_is_refused() {
        run(async |handle| {
            let (ours, _theirs) = UnixStream::pair().unwrap();
            let to_guest = split(&handle, ours, guard::new_client(SinkServer(Rc::default())), None).unwrap();
            let mut call = to_guest.write_request();
            call.get().set_bytes(&[9; MAX_WRITE + 1]);
            assert!(call.send().await.is_err());
        });
    }
}

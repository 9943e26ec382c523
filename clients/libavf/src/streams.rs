//! What a running machine prints and reads: bytes between the guest's stream sockets and the program's descriptors, by a thread of their own.
//!
//! ```text
//!   serial port ---+--> consoleOut
//!   console 0   ---+               consoleIn --> window ---+--> serial port
//!   console 2   ------> logFd                              +--> console 0
//! ```
//!
//! The thread ends when all three sockets have ended and what came from them is written, or when it is told to. The program's descriptors are open files
//! that it may share with others, so they are never made non-blocking. Where the kernel takes the wish not to wait with the call (sockets, and pipes of newer
//! kernels), that is used; else at most as much is written at once as fits for certain when poll(2) says that there is room (PIPE_BUF). What waits all the
//! same (a terminal whose user has stopped it) makes this thread wait, and nobody else.

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
    thread::JoinHandle,
};

use futures::channel::oneshot;
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd, poll},
    fs::FileType,
    io::{Errno, IoSlice, IoSliceMut, ReadWriteFlags},
    net::{RecvFlags, SendFlags},
};

use crate::{
    threads,
    window::{PORTS, Window},
};

/// What is read and written at a time: what a pipe takes without waiting if it takes anything (PIPE_BUF).
pub(crate) const CHUNK: usize = 4096;
/// Where a pipe's position does not matter.
const ANYWHERE: u64 = u64::MAX;

/// The program's descriptors of a machine.
#[derive(Debug, Default)]
pub(crate) struct Ends {
    pub(crate) console_out: Option<OwnedFd>,
    pub(crate) console_in: Option<OwnedFd>,
    pub(crate) log: Option<OwnedFd>,
}

/// The guest's stream sockets.
pub(crate) struct Ports {
    pub(crate) serial: UnixStream,
    pub(crate) console: UnixStream,
    pub(crate) log: UnixStream,
}

/// The thread. Dropping this tells it to end.
pub(crate) struct Relay {
    end: Arc<OwnedFd>,
    done: oneshot::Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Begins.
    ///
    /// # Errors
    /// No thread or event descriptor is to be had.
    pub(crate) fn start(ports: Ports, ends: Arc<Ends>) -> io::Result<Self> {
        let end = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (sender, done) = oneshot::channel();
        let told = end.clone();
        let thread = threads::spawn("avf-streams", move || {
            relay(&ports, &ends, &told);
            // Before anybody hears that it is done: the program's descriptors are then closed with its handle.
            drop((ports, ends, told));
            // Nobody waits if it was told to end.
            let _ = sender.send(());
        })?;
        Ok(Self {
            end,
            done,
            thread: Some(thread),
        })
    }

    /// Tells it to end, with what is not written yet.
    pub(crate) fn end(&self) {
        // Fails only if it has been told already.
        let _ = rustix::io::write(&self.end, &1_u64.to_ne_bytes());
    }

    /// Waits until all is written.
    pub(crate) async fn done(&mut self) {
        // Also if the thread panicked: then nothing more will be.
        let _ = (&mut self.done).await;
        if let Some(thread) = self.thread.take() {
            // It has nothing left to do.
            let _ = thread.join();
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.end();
    }
}

/// How a descriptor of the program's is read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Socket,
    Pipe,
    Other,
}

impl Kind {
    pub(crate) fn of(fd: BorrowedFd<'_>) -> Self {
        let kind = rustix::fs::fstat(fd).map(|status| FileType::from_raw_mode(status.st_mode));
        match kind {
            Ok(FileType::Socket) => Self::Socket,
            Ok(FileType::Fifo) => Self::Pipe,
            _ => Self::Other,
        }
    }

    fn read(self, fd: BorrowedFd<'_>, to: &mut [u8]) -> Result<usize, Errno> {
        match self {
            Self::Socket => rustix::net::recv(fd, to, RecvFlags::DONTWAIT).map(|(count, _)| count),
            Self::Pipe => match rustix::io::preadv2(fd, &mut [IoSliceMut::new(to)], ANYWHERE, ReadWriteFlags::NOWAIT) {
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => rustix::io::read(fd, to),
                read => read,
            },
            Self::Other => rustix::io::read(fd, to),
        }
    }

    pub(crate) fn write(self, fd: BorrowedFd<'_>, bytes: &[u8]) -> Result<usize, Errno> {
        match self {
            Self::Socket => rustix::net::send(fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
            Self::Pipe => match rustix::io::pwritev2(fd, &[IoSlice::new(bytes)], ANYWHERE, ReadWriteFlags::NOWAIT) {
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => rustix::io::write(fd, bytes),
                written => written,
            },
            Self::Other => rustix::io::write(fd, bytes),
        }
    }
}

/// Whether a call only has to be made again, later.
fn later(error: Errno) -> bool {
    matches!(error, Errno::AGAIN | Errno::INTR)
}

/// Where output goes, and what of it is not there yet.
struct Sink<'a> {
    /// None: nowhere, or nobody reads it any more.
    to: Option<(BorrowedFd<'a>, Kind)>,
    pending: Vec<u8>,
}

impl<'a> Sink<'a> {
    fn new(to: Option<&'a OwnedFd>) -> Self {
        Self {
            to: to.map(|fd| (fd.as_fd(), Kind::of(fd.as_fd()))),
            pending: Vec::new(),
        }
    }

    /// Takes what there is in a guest's socket, if all from before is written; whether the socket goes on.
    fn take(&mut self, from: &UnixStream) -> bool {
        if !self.pending.is_empty() {
            return true;
        }
        let mut room = [0; CHUNK];
        match rustix::net::recv(from, &mut room, RecvFlags::DONTWAIT) {
            Ok((0, _)) => false,
            Ok((count, _)) => {
                self.pending.extend_from_slice(&room[..count]);
                true
            }
            Err(error) => later(error),
        }
    }

    fn write(&mut self) {
        let Some((fd, kind)) = self.to else {
            self.pending.clear();
            return;
        };
        match kind.write(fd, &self.pending) {
            Ok(count) => drop(self.pending.drain(..count)),
            Err(error) if later(error) => {}
            // Its reader is gone, or its disk is full. The guest goes on.
            Err(_) => {
                self.to = None;
                self.pending.clear();
            }
        }
    }
}

/// Where input comes from, and where it is to go.
struct Source<'a> {
    /// None: nothing more comes.
    from: Option<(BorrowedFd<'a>, Kind)>,
    to: [&'a UnixStream; PORTS],
    window: Window,
}

impl Source<'_> {
    fn read(&mut self) {
        let Some((fd, kind)) = self.from else { return };
        let mut room = [0; CHUNK];
        match kind.read(fd, &mut room) {
            Ok(count @ 1..) => self.window.push(&room[..count]),
            Err(error) if later(error) => {}
            Ok(0) | Err(_) => self.from = None,
        }
    }

    fn write(&mut self, port: usize) {
        match rustix::net::send(
            self.to[port],
            self.window.next(port),
            SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
        ) {
            Ok(count) => self.window.took(port, count),
            Err(error) if later(error) => {}
            Err(_) => self.window.close(port),
        }
    }
}

/// What a descriptor is waited for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    End,
    /// Output of the port with this number.
    Output(usize),
    /// Room in the sink with this number.
    Room(usize),
    Input,
    /// Room in the port with this number.
    PortRoom(usize),
}

/// Which sink takes the output of which port: the serial port's, console 0's, console 2's.
const SINK_OF: [usize; 3] = [0, 0, 1];

fn relay(ports: &Ports, ends: &Ends, end: &OwnedFd) {
    let sockets = [&ports.serial, &ports.console, &ports.log];
    let mut open = [true; 3];
    let mut sinks = [ends.console_out.as_ref(), ends.log.as_ref()].map(Sink::new);
    let mut source = Source {
        from: ends.console_in.as_ref().map(|fd| (fd.as_fd(), Kind::of(fd.as_fd()))),
        to: [&ports.serial, &ports.console],
        window: Window::new(),
    };
    while open.contains(&true) || sinks.iter().any(|sink| !sink.pending.is_empty()) {
        let mut waits = vec![(Wait::End, end.as_fd(), PollFlags::IN)];
        for (port, socket) in sockets.iter().enumerate() {
            if open[port] && sinks[SINK_OF[port]].pending.is_empty() {
                waits.push((Wait::Output(port), socket.as_fd(), PollFlags::IN));
            }
        }
        for (number, sink) in sinks.iter().enumerate() {
            if let Some((fd, _)) = sink.to.filter(|_| !sink.pending.is_empty()) {
                waits.push((Wait::Room(number), fd, PollFlags::OUT));
            }
        }
        if let Some((fd, _)) = source.from.filter(|_| source.window.has_room()) {
            waits.push((Wait::Input, fd, PollFlags::IN));
        }
        for (port, socket) in source.to.iter().enumerate() {
            if !source.window.next(port).is_empty() {
                waits.push((Wait::PortRoom(port), socket.as_fd(), PollFlags::OUT));
            }
        }
        let mut polled: Vec<_> = waits
            .iter()
            .map(|(_, fd, flags)| PollFd::from_borrowed_fd(*fd, *flags))
            .collect();
        match poll(&mut polled, None) {
            Err(Errno::INTR) => continue,
            Err(_) => return,
            Ok(_) => {}
        }
        let ready = polled.iter().zip(&waits).filter(|(fd, _)| !fd.revents().is_empty());
        for wait in ready.map(|(_, (wait, ..))| *wait).collect::<Vec<_>>() {
            match wait {
                Wait::End => return,
                Wait::Output(port) => {
                    let sink = &mut sinks[SINK_OF[port]];
                    open[port] = sink.take(sockets[port]);
                    if sink.to.is_none() {
                        sink.write();
                    }
                }
                Wait::Room(number) => sinks[number].write(),
                Wait::Input => source.read(),
                Wait::PortRoom(port) => source.write(port),
            }
        }
    }
}

#[cfg(test)]
mod tests;

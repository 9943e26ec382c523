//! Who the component's manager is, and who may come after it.
//!
//! ```text
//!            the connection closes, the guest is durable          a connection comes by `successors`
//!   served ───────────────────────────────────────────> waiting ───────────────────────────────────> served
//!     │ closes; nobody can come after                      │ nobody holds the other end of `successors`
//!     └──────────────────────> everything ends <───────────┘
//! ```
//!
//! A connection that comes while a manager is there is closed. But it may overtake the news that the manager has gone: its socket is looked at
//! first.

use std::{
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    rc::{Rc, Weak},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketType, recvmsg, sockopt},
};
use sepal_schema::{
    error::{Error, Kind},
    transport::{
        AsyncFd, Handle, Limits,
        reactor::{Direction, Task},
        serve_with,
    },
};

use super::{component::ComponentServer, controller::Controller};
use crate::lifecycle::Input;

/// Counts the managers.
pub(super) type Visit = u64;

/// Who is there, and who may come.
#[derive(Default)]
pub(super) struct Attendance {
    visits: Visit,
    /// The manager, and its socket.
    present: Option<(Visit, OwnedFd)>,
    /// Listens for those to come, while the guest is durable.
    expecting: Option<Task>,
}

impl Attendance {
    /// Those who come after the manager come by this socket; without one, nobody does.
    ///
    /// # Errors
    /// The socket cannot be waited for.
    pub(super) fn expect(
        &mut self,
        successors: Option<OwnedFd>,
        controller: &Weak<Controller>,
        spawner: &Handle,
    ) -> Result<(), Error> {
        let register = |socket| {
            let registered = spawner.register(socket);
            registered.map_err(|error| Error::new(Kind::InternalError, format!("host.successors: {error}")))
        };
        let socket = successors.map(register).transpose()?;
        self.expecting = socket.map(|socket| spawner.spawn_owned(listen(socket, controller.clone())));
        Ok(())
    }
}

impl Controller {
    /// Serves the manager at the other end of `socket`.
    ///
    /// # Errors
    /// The socket cannot be put on the loop.
    pub fn serve(self: &Rc<Self>, socket: UnixStream) -> io::Result<()> {
        let watched = OwnedFd::from(socket.try_clone()?);
        let visit = {
            let attendance = &mut self.inner.borrow_mut().attendance;
            attendance.visits += 1;
            attendance.visits
        };
        let connection = serve_with(&self.spawner, socket, Limits::default(), |fds| {
            ComponentServer::client(self.clone(), fds, visit).client
        })?;
        self.inner.borrow_mut().attendance.present = Some((visit, watched));
        self.feed(Input::Attended);
        let controller = self.clone();
        self.spawner.spawn(async move {
            let reason = connection.await;
            tracing::debug!("the guest manager's connection ended: {reason}");
            controller.left(visit);
        });
        Ok(())
    }

    /// A manager has gone.
    pub(super) fn left(&self, visit: Visit) {
        let (input, _socket) = {
            let inner = &mut *self.inner.borrow_mut();
            let attendance = &mut inner.attendance;
            let Some(present) = attendance.present.take_if(|(present, _)| *present == visit) else {
                return;
            };
            let input = match attendance.expecting {
                Some(_) => Input::Left,
                None => Input::Disconnected,
            };
            (input, present)
        };
        self.feed(input);
    }

    /// A connection has come.
    fn offered(self: &Rc<Self>, connection: OwnedFd) {
        let gone = self
            .inner
            .borrow()
            .attendance
            .present
            .as_ref()
            .and_then(|(visit, socket)| hung_up(socket.as_fd()).then_some(*visit));
        if let Some(visit) = gone {
            self.left(visit);
        }
        if self.inner.borrow().attendance.present.is_some() {
            return tracing::warn!("another manager is sent away: there is one");
        }
        if !is_stream(&connection) {
            return tracing::warn!("what came for another manager is no connection");
        }
        if let Err(error) = self.serve(connection.into()) {
            tracing::error!("another manager cannot be served: {error}");
        }
    }

    /// Nobody can come any more.
    fn forsaken(&self) {
        let (expecting, is_alone) = {
            let attendance = &mut self.inner.borrow_mut().attendance;
            (attendance.expecting.take(), attendance.present.is_none())
        };
        if is_alone {
            self.feed(Input::Disconnected);
        }
        // The task that this is.
        drop(expecting);
    }
}

/// Takes what comes for the managers to come, until nobody is left who could send it.
async fn listen(socket: AsyncFd<OwnedFd>, controller: Weak<Controller>) {
    loop {
        // An error is the end, too: nothing can come by a socket that is broken.
        let received = socket.io(Direction::Read, |socket| receive(socket.as_fd())).await;
        let Some(controller) = controller.upgrade() else { return };
        match received {
            Ok(Some(connections)) => connections
                .into_iter()
                .for_each(|connection| controller.offered(connection)),
            Ok(None) | Err(_) => return controller.forsaken(),
        }
    }
}

/// The descriptors of the next message; none at the end.
fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<Vec<OwnedFd>>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    )?;
    let mut connections = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            connections.extend(rights);
        }
    }
    Ok((received.bytes > 0).then_some(connections))
}

fn is_stream(socket: &OwnedFd) -> bool {
    sockopt::socket_type(socket) == Ok(SocketType::STREAM) && sockopt::socket_domain(socket) == Ok(AddressFamily::UNIX)
}

/// Nobody is at the other end any more.
fn hung_up(socket: BorrowedFd<'_>) -> bool {
    let mut looked_at = [PollFd::from_borrowed_fd(socket, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let [looked] = match poll(&mut looked_at, Some(&now)) {
        Ok(1..) => &looked_at,
        _ => return false,
    };
    looked.revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

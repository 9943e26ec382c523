//! Whether the agent is there: it says so by a connection that it keeps, and is asked where it could not.
//!
//! ```text
//!   guest --connects to port 1024 of the host--> heard, at most 8 at a time --> there (guestReady, once a run) --the last one ends--> not there
//!   taken over from an earlier manager ---------> asked, again and again ---------^
//! ```

use std::{os::unix::net::UnixStream, rc::Rc, time::Duration};

use sepal_agent::client::{Client, Event, Operation as Wish};
use sepal_schema::{
    config::device::AGENT_PORT,
    error::{Error, Kind},
    transport::{AsyncFd, guard},
    vsock_capnp::vsock_acceptor,
};

use super::{PATIENCE, Reply};
use crate::{guest::Guest, serial::receive, vsock};

/// Seconds between the attempts to reach an agent that an earlier manager knew to be there.
const LOOKS_AGAIN: [u64; 5] = [5, 10, 20, 40, 80];
/// Connections at a time by which a guest may say that its agent is there. An agent makes one; others may follow each other closely.
const MOST_HEARD: u32 = 8;

/// Hears from the guest that its agent is there.
pub(crate) fn ready_acceptor(guest: &Rc<Guest>) -> vsock_acceptor::Client {
    guard::new_client(Ready(guest.clone()))
}

struct Ready(Rc<Guest>);

impl vsock_acceptor::Server for Ready {
    async fn accept(self: Rc<Self>, params: vsock_acceptor::AcceptParams, _: vsock_acceptor::AcceptResults) -> Reply {
        let connection = params.get()?.get_connection()?;
        let guest = self.0.clone();
        let Some(heard) = Heard::one_more(&guest) else {
            return Ok(());
        };
        let (generation, handle) = (guest.generation(), guest.manager.handle.clone());
        // The component need not wait for that.
        handle.clone().spawn(async move {
            let opened = vsock::open(&guest, &connection).await;
            if let Ok(Ok(socket)) = opened.map(|socket| handle.register(socket)) {
                attend(&guest, generation, &socket, heard).await;
            }
        });
        Ok(())
    }
}

/// A connection by which a guest says that its agent is there, or is about to.
struct Heard(Rc<Guest>);

impl Heard {
    /// One more, if there are not enough of them.
    fn one_more(guest: &Rc<Guest>) -> Option<Self> {
        let count = guest.agents.get();
        (count < MOST_HEARD).then(|| {
            guest.agents.set(count + 1);
            Self(guest.clone())
        })
    }

    /// It says so no more. Without another one that does, in the same run, the agent is not there: whatever else in the guest connects, and goes.
    fn no_more(self, generation: u64) {
        let guest = self.0.clone();
        drop(self);
        if guest.generation() == generation && guest.agents.get() == 0 {
            guest.set_agent_ready(false);
        }
    }
}

impl Drop for Heard {
    fn drop(&mut self) {
        self.0.agents.set(self.0.agents.get() - 1);
    }
}

/// The agent is there for as long as the connection lasts. Its greeting says nothing that is needed here.
async fn attend(guest: &Guest, generation: u64, socket: &AsyncFd<UnixStream>, heard: Heard) {
    if guest.generation() != generation {
        return;
    }
    guest.agent_arrives();
    let mut buffer = [0; 4096];
    while let Ok(1..) = receive(socket, &mut buffer).await {}
    heard.no_more(generation);
}

/// Finds out whether the agent is there, in a guest that an earlier manager had: the connection by which it said so has ended with that manager, or there was
/// nobody to hear it.
pub(crate) fn look_again(guest: &Rc<Guest>) {
    let (guest, generation) = (guest.clone(), guest.generation());
    let handle = guest.manager.handle.clone();
    handle.clone().spawn(async move {
        let Some(heard) = Heard::one_more(&guest) else { return };
        let same = || guest.generation() == generation && guest.live();
        let mut pauses = LOOKS_AGAIN.iter();
        while same() {
            match handle.timeout(PATIENCE, greeted(&guest)).await {
                Ok(Ok(socket)) => return attend(&guest, generation, &socket, heard).await,
                Ok(Err(error)) if error.kind == Kind::ConnectionRefused => break,
                _ => {}
            }
            // The guest may be paused, or its host busy: what was there is not taken to be gone at once.
            let Some(pause) = pauses.next().filter(|_| guest.agent_is_ready()) else {
                break;
            };
            handle.sleep(Duration::from_secs(*pause)).await;
        }
        heard.no_more(generation);
    });
}

/// A connection to the agent, which has greeted: whatever else listens there does not.
async fn greeted(guest: &Guest) -> Result<AsyncFd<UnixStream>, Error> {
    let silent = || Error::new(Kind::TimedOut, "no agent has greeted");
    let socket = vsock::connect(guest, &vsock::remote(guest).await?, AGENT_PORT).await?;
    let socket = guest.manager.handle.register(socket).map_err(|_| silent())?;
    let mut client = Client::new(Wish::Greet).map_err(|_| silent())?;
    let mut buffer = [0; 4096];
    loop {
        match receive(&socket, &mut buffer).await {
            Ok(count @ 1..) => client.receive(&buffer[..count]),
            _ => return Err(silent()),
        }
        match client.next_event() {
            Ok(None) => {}
            Ok(Some(Event::Hello(_))) => return Ok(socket),
            _ => return Err(silent()),
        }
    }
}

//! Facets of a guest: what clients hold, in front of what the manager knows and the component offers.
//!
//! ```text
//!   ports      serial port, console, output       observer   info, events, statistics
//!   power      whether it runs                    debug      registers and memory
//!   devices    balloon, memory, disks, networks   cpu        vCPUs and their share of the host
//!   (vsock and the agent have modules of their own)
//! ```
//!
//! Every call goes through its [`Holder`](crate::access::holder::Holder). The component's own capabilities never reach a client: they are asked
//! for with each call, so that a facet lives on when the guest is created again, that calls can be given up, that the end of the guest is told in
//! words, and that texts of the component are fit to be shown.

mod cpu;
mod debug;
mod devices;
mod observer;
mod ports;
mod power;

use capnp::{
    capability::{FromClientHook, Promise, Response},
    traits::{Owned, Pipelined},
};
use sepal_schema::{
    error::{Error, Kind, read_completion},
    error_capnp::{self, completion},
    guest_capnp::guest,
};

use crate::{guest::Guest, model::bounded_error};

pub(crate) use self::{
    cpu::CpuServer,
    debug::DebugServer,
    devices::{BalloonServer, DiskServer, MemoryServer, NetworkServer, check_device, set_balloon},
    observer::{ObserverServer, StatisticsServer},
    ports::{OutputServer, PortServer, console_port},
    power::PowerServer,
};

type Reply = Result<(), capnp::Error>;
type Answer<T> = Promise<Response<T>, capnp::Error>;

/// Reads an error of a component.
pub(crate) fn error_of(error: Result<error_capnp::error::Reader<'_>, capnp::Error>) -> Error {
    match error.and_then(Error::read) {
        Ok(error) => bounded_error(error),
        Err(broken) => broken.into(),
    }
}

/// Asks a component for a facet: `ask` sends the question, `take` takes the facet out of the answer.
pub(crate) async fn facet<T: Owned + Pipelined, C: FromClientHook>(
    guest: &Guest,
    ask: impl FnOnce(&guest::Client) -> Answer<T>,
    take: impl FnOnce(T::Reader<'_>) -> Result<C, Error>,
) -> Result<C, Error> {
    let remote = guest.remote()?;
    let answer = guest.answer(ask(&remote)).await?;
    take(answer.get()?).map_err(bounded_error)
}

/// Passes a question on whose answer is that it worked, or not.
async fn complete(guest: &Guest, question: Answer<completion::Owned>) -> Result<(), Error> {
    let answer = guest.answer(question).await?;
    read_completion(answer.get()?).map_err(bounded_error)
}

/// Passes the answer of a component on whose results are a union of something and an error.
macro_rules! pass {
    ($answer:expr, $results:ident, $result:path) => {{
        use $result as result;
        match $answer {
            Ok(answer) => match answer.get()?.which() {
                Ok(result::Error(error)) => $crate::facets::error_of(error).write($results.get().init_error()),
                _ => $results.set(answer.get()?)?,
            },
            Err(error) => error.write($results.get().init_error()),
        }
        Ok(())
    }};
}
use pass;

/// The error for a device that the guest does not have.
pub(crate) fn not_there(device: &str) -> Error {
    let message = format!("the guest has no {device}: its configuration left it out");
    Error::new(Kind::DeviceNotPresent, message).about(device)
}

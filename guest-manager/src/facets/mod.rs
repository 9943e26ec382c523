//! Facets of a guest's devices: what clients hold, in front of what the component offers.
//!
//! The component's own capability never reaches a client. A call passes through here, so that it can be given up, that the end of the guest is
//! told in words, and that texts of the component are fit to be shown.

use std::rc::Rc;

use capnp::{
    capability::{FromClientHook, Promise, Response},
    traits::{Owned, Pipelined},
};
use sepal_schema::{
    device_capnp::{balloon_controller, disk_controller, mem_controller, net_controller},
    error::{Error, Kind, Outcome, read_completion, write_completion},
    error_capnp::completion,
    facet_capnp,
    guest_capnp::{console, guest as component_guest},
    transport::guard,
};

use crate::{guest::Guest, model::bounded_error};

type Reply = Result<(), capnp::Error>;
type Answer<T> = Promise<Response<T>, capnp::Error>;

/// A facet of a guest, and the component's side of it.
pub(crate) struct Facet<C> {
    guest: Rc<Guest>,
    remote: C,
}

/// Reads an error of a component.
pub(crate) fn error_of(error: Result<sepal_schema::error_capnp::error::Reader<'_>, capnp::Error>) -> Error {
    match error.and_then(Error::read) {
        Ok(error) => bounded_error(error),
        Err(broken) => broken.into(),
    }
}

/// Asks a component for a facet: `ask` sends the question, `take` takes the facet out of the answer.
pub(crate) async fn facet<T: Owned + Pipelined, C: FromClientHook>(
    guest: &Guest,
    ask: impl FnOnce(&component_guest::Client) -> Answer<T>,
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

/// Passes a call on whose results are a union of something and an error.
macro_rules! pass {
    ($self:ident, $call:expr, $results:ident, $result:path) => {{
        use $result as result;
        match $self.guest.answer($call.send().promise).await {
            Ok(answer) => match answer.get()?.which() {
                Ok(result::Error(error)) => error_of(error).write($results.get().init_error()),
                _ => $results.set(answer.get()?)?,
            },
            Err(error) => error.write($results.get().init_error()),
        }
        Ok(())
    }};
}

/// Asks a component for the facet of a kind, and puts a [`Facet`] in front of it.
macro_rules! facet_of {
    ($name:ident, $module:ident) => {
        #[doc = concat!("The guest's `", stringify!($module), "`.")]
        ///
        /// # Errors
        /// `DEVICE_NOT_PRESENT`, or that the guest does not answer.
        pub(crate) async fn $name(guest: &Rc<Guest>) -> Result<$module::Client, Error> {
            let ask = |remote: &component_guest::Client| remote.$name().send().promise;
            let remote: $module::Client = facet(guest, ask, |answer| {
                Ok(answer.outcome()?.get_controller()?)
            })
            .await?;
            Ok(guard::new_client(Facet {
                guest: guest.clone(),
                remote,
            }))
        }
    };
}

facet_of!(balloon_controller_request, balloon_controller);
facet_of!(mem_controller_request, mem_controller);
facet_of!(disk_controller_request, disk_controller);
facet_of!(net_controller_request, net_controller);

impl<C: 'static> facet_capnp::facet::Server for Facet<C> {}

impl balloon_controller::Server for Facet<balloon_controller::Client> {
    async fn get_balloon_size(
        self: Rc<Self>,
        _: balloon_controller::GetBalloonSizeParams,
        mut results: balloon_controller::GetBalloonSizeResults,
    ) -> Reply {
        let call = self.remote.get_balloon_size_request();
        pass!(self, call, results, balloon_controller::size_result)
    }

    async fn request_balloon_size(
        self: Rc<Self>,
        params: balloon_controller::RequestBalloonSizeParams,
        mut results: balloon_controller::RequestBalloonSizeResults,
    ) -> Reply {
        let mut call = self.remote.request_balloon_size_request();
        call.get().set_pages(params.get()?.get_pages());
        let outcome = complete(&self.guest, call.send().promise).await;
        write_completion(&outcome, results.get());
        Ok(())
    }

    async fn get_mem_stats(
        self: Rc<Self>,
        _: balloon_controller::GetMemStatsParams,
        mut results: balloon_controller::GetMemStatsResults,
    ) -> Reply {
        let call = self.remote.get_mem_stats_request();
        pass!(self, call, results, balloon_controller::stats_result)
    }
}

impl mem_controller::Server for Facet<mem_controller::Client> {
    async fn get_mem_size(
        self: Rc<Self>,
        _: mem_controller::GetMemSizeParams,
        mut results: mem_controller::GetMemSizeResults,
    ) -> Reply {
        let call = self.remote.get_mem_size_request();
        pass!(self, call, results, mem_controller::size_result)
    }

    async fn request_size(
        self: Rc<Self>,
        params: mem_controller::RequestSizeParams,
        mut results: mem_controller::RequestSizeResults,
    ) -> Reply {
        let mut call = self.remote.request_size_request();
        call.get().set_bytes(params.get()?.get_bytes());
        let outcome = complete(&self.guest, call.send().promise).await;
        write_completion(&outcome, results.get());
        Ok(())
    }
}

impl disk_controller::Server for Facet<disk_controller::Client> {
    async fn list(self: Rc<Self>, _: disk_controller::ListParams, mut results: disk_controller::ListResults) -> Reply {
        let call = self.remote.list_request();
        pass!(self, call, results, disk_controller::list_result)
    }

    async fn resize(
        self: Rc<Self>,
        params: disk_controller::ResizeParams,
        mut results: disk_controller::ResizeResults,
    ) -> Reply {
        let mut call = self.remote.resize_request();
        call.get().set_disk(params.get()?.get_disk()?);
        call.get().set_bytes(params.get()?.get_bytes());
        let outcome = complete(&self.guest, call.send().promise).await;
        write_completion(&outcome, results.get());
        Ok(())
    }
}

impl net_controller::Server for Facet<net_controller::Client> {
    async fn list(self: Rc<Self>, _: net_controller::ListParams, mut results: net_controller::ListResults) -> Reply {
        let call = self.remote.list_request();
        pass!(self, call, results, net_controller::list_result)
    }

    async fn set_link(
        self: Rc<Self>,
        params: net_controller::SetLinkParams,
        mut results: net_controller::SetLinkResults,
    ) -> Reply {
        let mut call = self.remote.set_link_request();
        call.get().set_network(params.get()?.get_network()?);
        call.get().set_up(params.get()?.get_up());
        let outcome = complete(&self.guest, call.send().promise).await;
        write_completion(&outcome, results.get());
        Ok(())
    }
}

/// Tells the guest the size of the terminal at a port of its console.
///
/// # Errors
/// `DEVICE_NOT_PRESENT`, or that the guest does not answer.
pub(crate) async fn resize(guest: &Guest, port: u32, columns: u16, rows: u16) -> Result<(), Error> {
    let ask = |remote: &component_guest::Client| {
        let mut request = remote.console_request();
        request.get().set_port(port);
        request.send().promise
    };
    let console: console::Client = facet(guest, ask, |answer| {
        Ok(answer.outcome()?.get_console()?)
    })
    .await?;
    let mut call = console.resize_request();
    call.get().set_columns(columns);
    call.get().set_rows(rows);
    complete(guest, call.send().promise).await
}

/// The error for a device that the guest does not have.
pub(crate) fn not_there(device: &str) -> Error {
    let message = format!("the guest has no {device}: its configuration left it out");
    Error::new(Kind::DeviceNotPresent, message).about(device)
}

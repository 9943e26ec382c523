//! `GuestLifecycle` as clients drive it themselves, with the manager's policy on top: names, files, components.

use std::{future::Future, rc::Rc};

use sepal_schema::{
    config::GuestConfig,
    error::{Error, Kind, write_completion},
    lifecycle_capnp::guest_lifecycle::{
        self, BindParams, BindResults, CreateParams, CreateResults, RunParams, RunResults, StopParams, StopResults,
    },
    report::Reason,
    transport::guard,
};

use crate::{
    audit::Call,
    client::Client,
    guest::{Guest, StopCause},
    guest_server::GuestServer,
    slot::Slot,
};

/// The server. Dropping it lets go of the name and stops what runs under it.
pub struct LifecycleServer {
    client: Client,
    slot: Rc<Slot>,
}

impl LifecycleServer {
    /// Gives a client a holder of a name.
    pub fn new_client(client: Client, slot: Rc<Slot>) -> guest_lifecycle::Client {
        guard::new_client(Self { client, slot })
    }

    /// A call that changes something begins.
    fn call(&self, deed: &'static str) -> Call {
        let mut call = Call::new(&self.slot.manager.audit, self.client.who, deed);
        call.guest(&self.slot.name);
        call
    }

    /// Reads the configuration, while its descriptors are there, and begins.
    fn begin(&self, params: &CreateParams) -> Result<Rc<Guest>, Error> {
        let params = params.get()?;
        let config = GuestConfig::decode(params.get_config()?, &self.client.fds)?;
        if params.has_host() {
            let message = "the field host is for a guest manager that talks to a component; leave it out";
            return Err(Error::bad_config("host", message));
        }
        if !config.name.is_empty() && config.name != *self.slot.name {
            let (asked, held) = (&config.name, &self.slot.name);
            let message = format!("the configuration names the guest \"{asked}\", and newGuest was given \"{held}\"");
            return Err(Error::bad_config("name", message));
        }
        if config.durable {
            let message = "a guest that its client drives ends with that client's connection, and cannot go on without \
                           its manager (field durable): launch it";
            return Err(Error::not_supported("durable", message));
        }
        self.client.check_config(&config)?;
        self.slot.create(config, &self.client, false)
    }
}

impl Drop for LifecycleServer {
    fn drop(&mut self) {
        if self.slot.current().is_some_and(|guest| guest.live()) {
            self.call("GuestLifecycle.drop").done(Ok(()));
        }
        self.slot.release();
    }
}

// What a call changes is changed when it arrives, so that calls sent together take effect in their order; only waiting comes later.
impl guest_lifecycle::Server for LifecycleServer {
    fn create(
        self: Rc<Self>,
        params: CreateParams,
        mut results: CreateResults,
    ) -> impl Future<Output = Result<(), capnp::Error>> + 'static {
        let call = self.call("GuestLifecycle.create");
        let guest = self.begin(&params);
        async move {
            let created = match guest {
                Ok(guest) => guest.created().await,
                Err(error) => Err(error),
            };
            call.done(created.as_ref().copied());
            write_completion(&created, results.get());
            Ok(())
        }
    }

    fn bind(
        self: Rc<Self>,
        _: BindParams,
        mut results: BindResults,
    ) -> impl Future<Output = Result<(), capnp::Error>> + 'static {
        let (guest, client) = (self.slot.current(), self.client.clone());
        async move {
            let broken = |error: Error| error.exception();
            let not_created = || Error::new(Kind::NotCreated, "no guest has been created");
            let guest = guest.ok_or_else(not_created).map_err(broken)?;
            guest.created().await.map_err(broken)?;
            guest.check_live().map_err(broken)?;
            results.get().set_guest(GuestServer::new_client(client, guest));
            Ok(())
        }
    }

    fn run(
        self: Rc<Self>,
        _: RunParams,
        mut results: RunResults,
    ) -> impl Future<Output = Result<(), capnp::Error>> + 'static {
        let guest = self.slot.current();
        let call = self.call("GuestLifecycle.run");
        async move {
            let begun = self.slot.run(guest).await;
            // Noted now: how and when it ends is the guest's affair.
            call.done(begun.as_ref().map(drop));
            let report = match begun {
                Ok(guest) => guest.ended().await,
                Err(error) => {
                    error.write(results.get().init_error());
                    return Ok(());
                }
            };
            if matches!(report.reason, Reason::Shutdown | Reason::Reset) {
                report.write(results.get().init_ended());
            } else {
                let unexplained = || Error::new(Kind::InternalError, report.detail.clone());
                let error = report.error.clone().unwrap_or_else(unexplained);
                error.write(results.get().init_error());
            }
            Ok(())
        }
    }

    fn stop(
        self: Rc<Self>,
        _: StopParams,
        mut results: StopResults,
    ) -> impl Future<Output = Result<(), capnp::Error>> + 'static {
        let guest = self.slot.current();
        let call = self.call("GuestLifecycle.stop");
        if let Some(guest) = &guest {
            guest.want_stop(StopCause::Killed("it was stopped by its lifecycle's stop".to_owned()));
        }
        async move {
            if let Some(guest) = guest {
                guest.ended().await;
            }
            call.done(Ok(()));
            write_completion(&Ok(()), results.get());
            Ok(())
        }
    }
}

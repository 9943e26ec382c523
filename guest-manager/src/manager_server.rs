//! `GuestManager`: what a connection to the manager's socket begins with.

use std::{future::Future, rc::Rc};

use sepal_schema::{
    answer,
    config::GuestConfig,
    error::{Error, Kind, write_completion},
    manager_capnp::{PROTOCOL_VERSION, guest_manager},
    transport::guard,
};

use crate::{
    access::{
        redeem::{describe, redeem},
        thing,
    },
    audit::Call,
    client::Client,
    definitions::server as definitions,
    guest::Guest,
    guest_server::GuestServer,
    ladder,
    lease::{self, Lease},
    lifecycle_server::LifecycleServer,
    list,
    manager::Manager,
    node,
    pressure::{self, policy::Policy},
    registry::Origin,
    resources,
    roles::Role,
    serial::yield_now,
    slot::Slot,
    statistics, subscription,
};

/// Rounds of the event loop in which an answer has certainly come to its connection: it takes three.
const ROUNDS_TO_ANSWER: usize = 16;

type Reply = Result<(), capnp::Error>;

fn reply(result: Reply) -> impl Future<Output = Reply> + 'static {
    futures::future::ready(result)
}

/// The server, one for each connection.
pub struct ManagerServer {
    manager: Rc<Manager>,
    client: Client,
}

impl ManagerServer {
    /// The bootstrap capability of a client's connection.
    pub fn new_client(manager: Rc<Manager>, client: Client) -> guest_manager::Client {
        guard::new_client(Self { manager, client })
    }

    /// A call that changes something begins.
    fn call(&self, deed: &'static str) -> Call {
        Call::new(&self.manager.audit, self.client.who, deed)
    }

    /// Reads the configuration, while its descriptors are there, and begins.
    fn begin(&self, params: &guest_manager::LaunchParams, call: &mut Call) -> Result<(Rc<Guest>, Rc<Lease>), Error> {
        self.client.check(Role::Operate, "launch")?;
        let params = params.get()?;
        let config = GuestConfig::decode(params.get_config()?, &self.client.fds)?;
        call.guest(&config.name);
        call.detail(in_words(&config, params.get_detach()));
        self.client.check_config(&config)?;
        let slot = Slot::new(&self.manager, &config.name, Origin::Launch)?;
        call.guest(&slot.name);
        if params.get_detach() {
            self.manager.registry(|registry, _| registry.detach(slot.id));
        }
        let guest = slot
            .create(config, &self.client, true)
            .inspect_err(|_| slot.release())?;
        // From here on: a caller that gives up before the answer stops the guest like one that drops the lease.
        let lease = Lease::new(self.client.who, &guest, params.get_detach());
        Ok((guest, lease))
    }

    /// Ends the manager. The answer goes first: connections are ended when what is to be sent on them is known.
    fn end_when_answered(&self) {
        let manager = self.manager.clone();
        self.manager.handle.spawn(async move {
            for _ in 0..ROUNDS_TO_ANSWER {
                yield_now().await;
            }
            manager.shut_down();
        });
    }

    /// Reads a configuration that only is to be looked at, while its descriptors are there.
    fn read(&self, params: &guest_manager::CheckParams) -> Result<GuestConfig, Error> {
        self.client.check(Role::Operate, "check")?;
        let config = GuestConfig::decode(params.get()?.get_config()?, &self.client.fds)?;
        self.client.check_config(&config)?;
        Ok(config)
    }

    /// The guest that was created last under a name, also by an earlier manager if it has ended and that is known.
    fn look_up(&self, name: &str) -> Result<Rc<Guest>, Error> {
        self.find(name).or_else(|error| {
            let manager = &self.manager;
            let past = manager.registry(|registry, _| {
                let id = registry.lookup(name).ok()?;
                Some((id, registry.past_runs(id)?))
            });
            let (id, runs) = past.ok_or(error)?;
            let config = manager.definitions.get(name).and_then(|record| record.config());
            Ok(Guest::bygone(manager, id, name, &config.unwrap_or_default(), runs))
        })
    }

    /// The guest that was created last under a name, by this manager.
    fn find(&self, name: &str) -> Result<Rc<Guest>, Error> {
        let (id, defined, unreached) = self.manager.registry(|registry, _| {
            let id = registry.lookup(name)?;
            Ok::<_, Error>((id, registry.is_defined(name), registry.is_unreached(id)))
        })?;
        let guest = self.manager.slot(id).and_then(|slot| slot.current());
        guest.ok_or_else(|| {
            let message = match (unreached, defined) {
                (true, _) => format!(
                    "guest \"{name}\" goes on with the keeper of an earlier guest manager, which does not answer: it is taken over when that does"
                ),
                (false, true) => format!("guest \"{name}\" is defined, and does not run"),
                (false, false) => format!("the name \"{name}\" is taken, but no guest has been created yet"),
            };
            Error::new(Kind::NotFound, message).about("name")
        })
    }
}

/// What is launched, for the audit.
fn in_words(config: &GuestConfig, detach: bool) -> String {
    let detached = if detach { ", detached" } else { "" };
    format!("{} vCPUs, {} MiB{detached}", config.cpus(), config.memory_mib())
}

fn name_of(name: Result<capnp::text::Reader<'_>, capnp::Error>) -> Result<String, Error> {
    let name = name?.to_str();
    Ok(name
        .map_err(|_| Error::bad_config("name", "the name is not valid UTF-8"))?
        .to_owned())
}

impl guest_manager::Server for ManagerServer {
    fn version(
        self: Rc<Self>,
        _: guest_manager::VersionParams,
        mut results: guest_manager::VersionResults,
    ) -> impl Future<Output = Reply> + 'static {
        let mut to = results.get();
        to.set_version(env!("CARGO_PKG_VERSION"));
        to.set_protocol(PROTOCOL_VERSION);
        to.set_pid(std::process::id());
        reply(Ok(()))
    }

    fn new_guest(
        self: Rc<Self>,
        params: guest_manager::NewGuestParams,
        mut results: guest_manager::NewGuestResults,
    ) -> impl Future<Output = Reply> + 'static {
        let mut call = self.call("GuestManager.newGuest");
        let mut take = || {
            self.client.check(Role::Operate, "newGuest")?;
            let name = name_of(params.get()?.get_name())?;
            call.guest(&name);
            let slot = Slot::new(&self.manager, &name, Origin::Lifecycle)?;
            call.guest(&slot.name);
            Ok(LifecycleServer::new_client(self.client.clone(), slot))
        };
        let lifecycle = take();
        call.done(lifecycle.as_ref().map(drop));
        answer!(results, set_lifecycle, lifecycle);
        reply(Ok(()))
    }

    fn launch(
        self: Rc<Self>,
        params: guest_manager::LaunchParams,
        mut results: guest_manager::LaunchResults,
    ) -> impl Future<Output = Reply> + 'static {
        let mut call = self.call("GuestManager.launch");
        let begun = self.begin(&params, &mut call);
        let client = self.client.clone();
        async move {
            let launched = match begun {
                Ok((guest, lease)) => guest.started().await.map(|()| (guest, lease)),
                Err(error) => Err(error),
            };
            call.done(launched.as_ref().map(drop));
            match launched {
                Ok((guest, lease)) => {
                    let mut to = results.get();
                    to.set_name(&*guest.name);
                    to.set_guest(GuestServer::new_client(client, guest));
                    to.set_lease(guard::new_client_from_rc(lease));
                }
                Err(error) => {
                    let mut to = results.get();
                    to.set_guest(error.broken());
                    error.write(to.init_error());
                }
            }
            Ok(())
        }
    }

    async fn define(
        self: Rc<Self>,
        params: guest_manager::DefineParams,
        results: guest_manager::DefineResults,
    ) -> Reply {
        definitions::define(self.manager.clone(), self.client.clone(), params, results).await
    }

    async fn undefine(
        self: Rc<Self>,
        params: guest_manager::UndefineParams,
        results: guest_manager::UndefineResults,
    ) -> Reply {
        definitions::undefine(self.manager.clone(), self.client.clone(), params, results).await
    }

    async fn definition(
        self: Rc<Self>,
        params: guest_manager::DefinitionParams,
        results: guest_manager::DefinitionResults,
    ) -> Reply {
        definitions::definition(&self.manager, &self.client, &params, results)
    }

    fn start(
        self: Rc<Self>,
        params: guest_manager::StartParams,
        results: guest_manager::StartResults,
    ) -> impl Future<Output = Reply> + 'static {
        definitions::start(&self.manager, &self.client, &params, results)
    }

    async fn set_autostart(
        self: Rc<Self>,
        params: guest_manager::SetAutostartParams,
        results: guest_manager::SetAutostartResults,
    ) -> Reply {
        definitions::set_autostart(self.manager.clone(), self.client.clone(), params, results).await
    }

    async fn browse(self: Rc<Self>, _: guest_manager::BrowseParams, results: guest_manager::BrowseResults) -> Reply {
        definitions::browse(&self.manager, &self.client, results)
    }

    fn lookup(
        self: Rc<Self>,
        params: guest_manager::LookupParams,
        mut results: guest_manager::LookupResults,
    ) -> impl Future<Output = Reply> + 'static {
        let find = || {
            self.client.check(Role::Observe, "lookup")?;
            self.look_up(&name_of(params.get()?.get_name())?)
        };
        let guest = find().map(|guest| GuestServer::new_client(self.client.clone(), guest));
        answer!(results, set_guest, guest);
        reply(Ok(()))
    }

    fn list(
        self: Rc<Self>,
        _: guest_manager::ListParams,
        mut results: guest_manager::ListResults,
    ) -> impl Future<Output = Reply> + 'static {
        if let Err(error) = self.client.check(Role::Observe, "list") {
            return reply(Err(error.exception()));
        }
        let infos = match list::fit(self.manager.infos()) {
            Ok(infos) => infos,
            Err(error) => return reply(Err(error.exception())),
        };
        let mut to = results
            .get()
            .init_guests(u32::try_from(infos.len()).unwrap_or(u32::MAX));
        for (i, info) in (0..).zip(&infos) {
            info.write(to.reborrow().get(i));
        }
        reply(Ok(()))
    }

    async fn stats(self: Rc<Self>, params: guest_manager::StatsParams, results: guest_manager::StatsResults) -> Reply {
        let checked = self.client.check(Role::Observe, "stats");
        checked.map_err(|error| error.exception())?;
        statistics::serve(self.manager.clone(), params, results).await
    }

    fn subscribe(
        self: Rc<Self>,
        params: guest_manager::SubscribeParams,
        mut results: guest_manager::SubscribeResults,
    ) -> impl Future<Output = Reply> + 'static {
        let mut subscribe = || {
            let checked = self.client.check(Role::Observe, "subscribe");
            checked.map_err(|error| error.exception())?;
            let params = params.get()?;
            let replay = usize::try_from(params.get_replay()).unwrap_or(usize::MAX);
            let cursor = self.manager.registry(|registry, _| registry.log().cursor(replay));
            let subscription = subscription::new_client(&self.manager, cursor, params.get_sink()?);
            results.get().set_subscription(subscription);
            Ok(())
        };
        reply(subscribe())
    }

    fn force_shutdown(
        self: Rc<Self>,
        params: guest_manager::ForceShutdownParams,
        mut results: guest_manager::ForceShutdownResults,
    ) -> impl Future<Output = Reply> + 'static {
        let mut call = self.call("GuestManager.forceShutdown");
        let mut find = || {
            self.client.check(Role::Operate, "forceShutdown")?;
            let name = name_of(params.get()?.get_name())?;
            call.guest(&name);
            self.find(&name)
                .map_err(|error| Error::new(Kind::NotRunning, error.message).about("name"))
        };
        let guest = find();
        async move {
            let outcome = match guest {
                Ok(guest) => ladder::kill(&guest, "it was stopped by force").await.map(drop),
                Err(error) => Err(error),
            };
            call.done(outcome.as_ref().copied());
            write_completion(&outcome, results.get());
            Ok(())
        }
    }

    fn remove(
        self: Rc<Self>,
        params: guest_manager::RemoveParams,
        mut results: guest_manager::RemoveResults,
    ) -> impl Future<Output = Reply> + 'static {
        let mut call = self.call("GuestManager.remove");
        let mut remove = || {
            self.client.check(Role::Operate, "remove")?;
            let name = name_of(params.get()?.get_name())?;
            call.guest(&name);
            self.manager.registry(|registry, now| registry.remove(&name, now))
        };
        let outcome = remove();
        call.done(outcome.as_ref().copied());
        write_completion(&outcome, results.get());
        reply(Ok(()))
    }

    fn upload(
        self: Rc<Self>,
        params: guest_manager::UploadParams,
        mut results: guest_manager::UploadResults,
    ) -> impl Future<Output = Reply> + 'static {
        let mut call = self.call("GuestManager.upload");
        let mut create = || {
            self.client.check(Role::Operate, "upload")?;
            let size = params.get()?.get_size();
            call.detail(format!("{size} bytes"));
            self.manager.uploads.create(size, &self.client.uploads)
        };
        let upload = create();
        call.done(upload.as_ref().map(drop));
        answer!(results, set_upload, upload);
        reply(Ok(()))
    }

    fn redeem(
        self: Rc<Self>,
        params: guest_manager::RedeemParams,
        mut results: guest_manager::RedeemResults,
    ) -> impl Future<Output = Reply> + 'static {
        let redeem = || {
            let token = params.get()?.get_token()?.to_str();
            redeem(&self.manager, &self.client, token.unwrap_or_default())
        };
        let mut to = results.get();
        match redeem() {
            Ok(holder) => {
                to.set_kind(holder.thing.kind());
                to.set_guest(&*holder.guest.name);
                to.set_facet(thing::serve(holder));
            }
            Err(error) => {
                to.set_facet(error.broken());
                error.write(to.init_error());
            }
        }
        reply(Ok(()))
    }

    async fn shutdown(
        self: Rc<Self>,
        _: guest_manager::ShutdownParams,
        mut results: guest_manager::ShutdownResults,
    ) -> Reply {
        let call = self.call("GuestManager.shutdown");
        let outcome = self.client.check(Role::Admin, "shutdown");
        if outcome.is_ok() {
            self.manager.stop_all("the manager was shut down").await;
            self.end_when_answered();
        }
        call.done(outcome.as_ref().copied());
        write_completion(&outcome, results.get());
        Ok(())
    }

    async fn retire(
        self: Rc<Self>,
        _: guest_manager::RetireParams,
        mut results: guest_manager::RetireResults,
    ) -> Reply {
        let call = self.call("GuestManager.retire");
        let outcome = self.client.check(Role::Admin, "retire");
        if outcome.is_ok() {
            self.manager.leave("the manager gives way to another one").await;
            self.end_when_answered();
        }
        call.done(outcome.as_ref().copied());
        write_completion(&outcome, results.get());
        Ok(())
    }

    fn redeem_lease(
        self: Rc<Self>,
        params: guest_manager::RedeemLeaseParams,
        mut results: guest_manager::RedeemLeaseResults,
    ) -> impl Future<Output = Reply> + 'static {
        let mut call = self.call("GuestManager.redeemLease");
        let redeem = || {
            let token = params.get()?.get_token()?.to_str();
            lease::redeem(&self.manager, &self.client, token.unwrap_or_default())
        };
        let redeemed = redeem().inspect(|lease| call.guest(&lease.guest().name));
        call.done(redeemed.as_ref().map(drop));
        let mut to = results.get();
        match redeemed {
            Ok(lease) => {
                let guest = lease.guest().clone();
                to.set_name(&*guest.name);
                to.set_guest(GuestServer::new_client(self.client.clone(), guest));
                to.set_lease(guard::new_client_from_rc(lease));
            }
            Err(error) => {
                to.set_guest(error.broken());
                error.write(to.init_error());
            }
        }
        reply(Ok(()))
    }

    fn check(
        self: Rc<Self>,
        params: guest_manager::CheckParams,
        mut results: guest_manager::CheckResults,
    ) -> impl Future<Output = Reply> + 'static {
        let config = self.read(&params);
        async move {
            let checked = match config {
                Ok(config) => resources::check(&self.manager, config, &self.client).await,
                Err(error) => Err(error),
            };
            write_completion(&checked, results.get());
            Ok(())
        }
    }

    fn describe(
        self: Rc<Self>,
        params: guest_manager::DescribeParams,
        mut results: guest_manager::DescribeResults,
    ) -> impl Future<Output = Reply> + 'static {
        let described = || {
            let token = params.get()?.get_token()?.to_str();
            describe(&self.manager, &self.client, token.unwrap_or_default())
        };
        match described() {
            Ok(description) => description.write(results.get().init_description()),
            Err(error) => error.write(results.get().init_error()),
        }
        reply(Ok(()))
    }

    fn who_am_i(
        self: Rc<Self>,
        _: guest_manager::WhoAmIParams,
        mut results: guest_manager::WhoAmIResults,
    ) -> impl Future<Output = Reply> + 'static {
        let mut to = results.get();
        to.set_uid(self.client.who.uid);
        to.set_gid(self.client.who.gid);
        to.set_role(self.client.role.into());
        to.set_read_only(self.client.read_only);
        reply(Ok(()))
    }

    async fn node(self: Rc<Self>, _: guest_manager::NodeParams, mut results: guest_manager::NodeResults) -> Reply {
        let checked = self.client.check(Role::Observe, "node");
        checked.map_err(|error| error.exception())?;
        let answered = node::answer(&self.manager, results.get().init_node()).await;
        answered.map_err(|error| error.exception())
    }

    async fn pressure(
        self: Rc<Self>,
        _: guest_manager::PressureParams,
        mut results: guest_manager::PressureResults,
    ) -> Reply {
        let checked = self.client.check(Role::Observe, "pressure");
        checked.map_err(|error| error.exception())?;
        let answered = pressure::answer(&self.manager, results.get().init_state()).await;
        answered.map_err(|error| error.exception())
    }

    async fn set_pressure_policy(
        self: Rc<Self>,
        params: guest_manager::SetPressurePolicyParams,
        mut results: guest_manager::SetPressurePolicyResults,
    ) -> Reply {
        let mut call = self.call("GuestManager.setPressurePolicy");
        let mut read = || {
            self.client.check(Role::Admin, "setPressurePolicy")?;
            let policy = Policy::read(params.get()?.get_policy()?)?;
            call.detail(policy.in_words());
            Ok(policy)
        };
        let outcome = match read() {
            Ok(policy) => pressure::change(&self.manager, policy).await,
            Err(error) => Err(error),
        };
        call.done(outcome.as_ref().copied());
        write_completion(&outcome, results.get());
        Ok(())
    }
}

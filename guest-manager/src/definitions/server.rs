//! The calls that concern definitions, and the listings that are read page by page.

use std::{
    cell::{Cell, RefCell},
    future::{Future, ready},
    rc::Rc,
};

use sepal_schema::{
    config::GuestConfig,
    error::{Error, Kind, write_completion},
    info::GuestInfo,
    manager_capnp::guest_manager::{self, listing},
    transport::guard,
};

use crate::{
    audit::Call, client::Client, definitions, guest::Guest, guest_server::GuestServer, lease::Lease, list,
    manager::Manager, roles::Role, store::record::NoHandles,
};

type Reply = Result<(), capnp::Error>;

/// Most listings that a connection has at a time.
const MAX_LISTINGS: usize = 16;

fn call(manager: &Manager, client: &Client, deed: &'static str) -> Call {
    Call::new(&manager.audit, client.who, deed)
}

/// The name in a request.
fn name_of(name: Result<capnp::text::Reader<'_>, capnp::Error>) -> Result<String, Error> {
    let name = name?.to_str();
    Ok(name
        .map_err(|_| Error::bad_config("name", "the name is not valid UTF-8"))?
        .to_owned())
}

pub(crate) async fn define(
    manager: Rc<Manager>,
    client: Client,
    params: guest_manager::DefineParams,
    mut results: guest_manager::DefineResults,
) -> Reply {
    let mut call = call(&manager, &client, "GuestManager.define");
    let mut read = || {
        client.check(Role::Admin, "define")?;
        let params = params.get()?;
        let definition = params.get_definition()?;
        let config = GuestConfig::decode(definition.get_config()?, &NoHandles)?;
        call.guest(&config.name);
        let (autostart, replace) = (definition.get_autostart(), params.get_replace());
        let started = if autostart { ", started with the manager" } else { "" };
        let replaced = if replace { ", in place of another" } else { "" };
        call.detail(format!(
            "{} vCPUs, {} MiB{started}{replaced}",
            config.cpus(),
            config.memory_mib()
        ));
        Ok::<_, Error>((config, autostart, replace))
    };
    let read = read();
    drop(params);
    let defined = match read {
        Ok((config, autostart, replace)) => definitions::define(&manager, &client, config, autostart, replace).await,
        Err(error) => Err(error),
    };
    call.done(defined.as_ref().map(drop));
    let mut to = results.get();
    match defined {
        Ok(defined) => {
            to.set_uuid(defined.uuid.as_bytes());
            to.set_warnings(&defined.warnings[..])?;
        }
        Err(error) => error.write(to.init_error()),
    }
    Ok(())
}

pub(crate) async fn undefine(
    manager: Rc<Manager>,
    client: Client,
    params: guest_manager::UndefineParams,
    mut results: guest_manager::UndefineResults,
) -> Reply {
    let mut call = call(&manager, &client, "GuestManager.undefine");
    let mut read = || {
        client.check(Role::Admin, "undefine")?;
        let name = name_of(params.get()?.get_name())?;
        call.guest(&name);
        Ok(name)
    };
    let outcome = match read() {
        Ok(name) => definitions::undefine(&manager, name).await,
        Err(error) => Err(error),
    };
    call.done(outcome.as_ref().copied());
    write_completion(&outcome, results.get());
    Ok(())
}

pub(crate) async fn set_autostart(
    manager: Rc<Manager>,
    client: Client,
    params: guest_manager::SetAutostartParams,
    mut results: guest_manager::SetAutostartResults,
) -> Reply {
    let mut call = call(&manager, &client, "GuestManager.setAutostart");
    let mut read = || {
        client.check(Role::Admin, "setAutostart")?;
        let params = params.get()?;
        let name = name_of(params.get_name())?;
        call.guest(&name);
        let autostart = params.get_autostart();
        call.detail(if autostart { "on" } else { "off" }.to_owned());
        Ok((name, autostart))
    };
    let outcome = match read() {
        Ok((name, autostart)) => definitions::set_autostart(&manager, name, autostart).await,
        Err(error) => Err(error),
    };
    call.done(outcome.as_ref().copied());
    write_completion(&outcome, results.get());
    Ok(())
}

pub(crate) fn definition(
    manager: &Manager,
    client: &Client,
    params: &guest_manager::DefinitionParams,
    mut results: guest_manager::DefinitionResults,
) -> Reply {
    let find = || {
        client.check(Role::Observe, "definition")?;
        manager.definitions.get(&name_of(params.get()?.get_name())?)
    };
    let mut to = results.get();
    match find() {
        Ok(record) => record.definition(|definition| to.set_definition(definition)),
        Err(error) => {
            error.write(to.init_error());
            Ok(())
        }
    }
}

/// Begins when the call arrives; only the waiting comes later.
pub(crate) fn start(
    manager: &Rc<Manager>,
    client: &Client,
    params: &guest_manager::StartParams,
    mut results: guest_manager::StartResults,
) -> impl Future<Output = Reply> + use<> {
    let mut call = call(manager, client, "GuestManager.start");
    let mut begin = || {
        client.check(Role::Operate, "start")?;
        let params = params.get()?;
        let name = name_of(params.get_name())?;
        call.guest(&name);
        let detach = params.get_detach();
        if detach {
            call.detail("detached".to_owned());
        }
        let guest = definitions::start(manager, client, &name, detach)?;
        // A caller that gives up before the answer stops the guest like one that drops the lease.
        let lease = Lease::new(client.who, &guest, detach);
        Ok::<(Rc<Guest>, Rc<Lease>), Error>((guest, lease))
    };
    let begun = begin();
    let client = client.clone();
    async move {
        let started = match begun {
            Ok((guest, lease)) => guest.started().await.map(|()| (guest, lease)),
            Err(error) => Err(error),
        };
        call.done(started.as_ref().map(drop));
        let mut to = results.get();
        match started {
            Ok((guest, lease)) => {
                to.set_name(&*guest.name);
                to.set_guest(GuestServer::new_client(client, guest));
                to.set_lease(guard::new_client_from_rc(lease));
            }
            Err(error) => {
                to.set_guest(error.broken());
                error.write(to.init_error());
            }
        }
        Ok(())
    }
}

pub(crate) fn browse(manager: &Manager, client: &Client, mut results: guest_manager::BrowseResults) -> Reply {
    let checked = client.check(Role::Observe, "browse");
    checked.map_err(|error| error.exception())?;
    let open = &client.listings;
    if open.get() >= MAX_LISTINGS {
        let message = format!("this connection has {MAX_LISTINGS} listings; let go of one first");
        return Err(Error::new(Kind::NoResources, message).exception());
    }
    let guests = manager.infos();
    let held = match client.role {
        Role::Admin => None,
        _ => Some(manager.definitions.listings.hold(client.who.uid, guests.len())),
    };
    let held = held.transpose().map_err(|error| error.exception())?;
    open.set(open.get() + 1);
    let mut to = results.get();
    to.set_count(u32::try_from(guests.len()).unwrap_or(u32::MAX));
    to.set_listing(guard::new_client(Listing {
        open: open.clone(),
        _held: held,
        guests: RefCell::new(guests.into_iter()),
    }));
    Ok(())
}

/// What was there at one moment, the part that has not been read yet.
struct Listing {
    open: Rc<Cell<usize>>,
    _held: Option<list::Held>,
    guests: RefCell<std::vec::IntoIter<GuestInfo>>,
}

impl Drop for Listing {
    fn drop(&mut self) {
        self.open.set(self.open.get().saturating_sub(1));
    }
}

impl listing::Server for Listing {
    fn next(
        self: Rc<Self>,
        params: listing::NextParams,
        mut results: listing::NextResults,
    ) -> impl Future<Output = Reply> + 'static {
        let mut answer = || {
            let most = params.get()?.get_most();
            let mut guests = self.guests.borrow_mut();
            let page = list::page(&mut guests, most);
            let mut to = results.get();
            to.set_ended(guests.as_slice().is_empty());
            let mut to = to.init_guests(u32::try_from(page.len()).unwrap_or(u32::MAX));
            for (i, info) in (0..).zip(&page) {
                info.write(to.reborrow().get(i));
            }
            Ok(())
        };
        ready(answer())
    }
}

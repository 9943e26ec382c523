//! What capabilities permit: rights, bounds, revoking, shares; over every facet and every method.

mod audit;
mod bounds;
mod every;
mod methods;
mod shares;
mod streams;

use std::{rc::Rc, time::Duration};

use sepal_guest_manager::{client::Who, roles::Role};
use sepal_schema::{
    config::{
        GuestConfig,
        device::{AGENT_PORT, Balloon, Console, Vsock},
    },
    error::{Error, Outcome, read_completion},
    facet::{Bounds, Description, FacetKind, RIGHTS, Right, Rights, Share, Terms},
    facet_capnp::{facet, revoker},
    guest_capnp::{event_sink, guest},
};

use self::methods::cast;
use crate::world::{Caller, Launched, World, named};

/// A subscriber that does not care.
pub(crate) struct Nothing;

impl event_sink::Server for Nothing {
    async fn event(self: Rc<Self>, _: event_sink::EventParams) -> Result<(), capnp::Error> {
        Ok(())
    }
}

/// Launches a guest with everything that there are facets of, and an agent in it.
async fn launch(world: &World, caller: &Caller, name: &str) -> Launched {
    let config = GuestConfig {
        console: Some(Console {
            ports: 2,
            ..Console::default()
        }),
        balloon: Some(Balloon::default()),
        vsock: Some(Vsock::default()),
        agent: true,
        ..named(name)
    };
    let launched = caller.launch_config(config, false).await.unwrap();
    let (sockets, handle) = (world.fake.last().sockets.clone(), world.handle.clone());
    world.handle.spawn(async move {
        loop {
            let (port, socket) = sockets.next_raw().await;
            if port == AGENT_PORT {
                let served = handle.spawn_blocking(move || sepal_agent::server::serve(socket.into()));
                handle.spawn(async move { served.await.unwrap() });
            }
        }
    });
    launched
}

/// A client of this user.
fn user(world: &World, uid: u32) -> Caller {
    let who = Who {
        uid,
        gid: uid,
        pid: None,
        share: None,
    };
    world.caller_with(|fds| sepal_guest_manager::client::Client::new(fds, who, Role::None))
}

async fn narrow(of: &facet::Client, bounds: &Bounds) -> Result<(facet::Client, revoker::Client), Error> {
    let mut call = of.narrow_request();
    bounds.write(call.get().init_bounds());
    let answer = call.send().promise.await.map_err(|error| methods::said(&error))?;
    let narrowed = answer.get()?.outcome()?;
    Ok((narrowed.get_facet()?, narrowed.get_revoker()?))
}

/// A narrowed guest and what revokes it.
async fn narrow_guest(of: &guest::Client, bounds: &Bounds) -> (guest::Client, revoker::Client) {
    let (narrowed, revoker) = narrow(&cast(of.clone()), bounds).await.unwrap();
    (cast(narrowed), revoker)
}

struct Shared {
    token: String,
    id: u64,
    revoker: revoker::Client,
}

async fn share(of: &facet::Client, bounds: &Bounds, terms: &Terms) -> Result<Shared, Error> {
    let mut call = of.share_request();
    bounds.write(call.get().init_bounds());
    terms.write(call.get().init_terms());
    let answer = call.send().promise.await.map_err(|error| methods::said(&error))?;
    let shared = answer.get()?.outcome()?;
    Ok(Shared {
        token: shared.get_token()?.to_string().unwrap(),
        id: shared.get_id(),
        revoker: shared.get_revoker()?,
    })
}

async fn redeem(caller: &Caller, token: &str) -> Result<(facet::Client, FacetKind, String), Error> {
    let mut call = caller.manager.redeem_request();
    call.get().set_token(token);
    let answer = call.send().promise.await?;
    let redeemed = answer.get()?.outcome()?;
    let kind = redeemed.get_kind().unwrap();
    Ok((redeemed.get_facet()?, kind, redeemed.get_guest()?.to_string().unwrap()))
}

async fn revoke(revoker: &revoker::Client) {
    let answer = revoker.revoke_request().send().promise.await.unwrap();
    read_completion(answer.get().unwrap()).unwrap();
}

async fn describe(of: &facet::Client) -> Result<Description, Error> {
    let answer = of.describe_request().send().promise.await;
    let answer = answer.map_err(|error| methods::said(&error))?;
    match answer.get()?.which().unwrap() {
        facet::describe_result::Description(description) => Description::read(description?),
        facet::describe_result::Error(error) => Err(Error::read(error?)?),
    }
}

/// What a token stands for, without redeeming it.
async fn describe_token(caller: &Caller, token: &str) -> Result<Description, Error> {
    let mut call = caller.manager.describe_request();
    call.get().set_token(token);
    match call.send().promise.await?.get()?.which().unwrap() {
        facet::describe_result::Description(description) => Description::read(description?),
        facet::describe_result::Error(error) => Err(Error::read(error?)?),
    }
}

async fn shares(of: &guest::Client) -> Result<Vec<Share>, Error> {
    let answer = of.shares_request().send().promise.await?;
    match answer.get()?.which().unwrap() {
        guest::shares_result::Shares(shares) => shares?.iter().map(Share::read).collect(),
        guest::shares_result::Error(error) => Err(Error::read(error?)?),
    }
}

async fn revoke_share(of: &guest::Client, id: u64) -> Result<(), Error> {
    let mut call = of.revoke_share_request();
    call.get().set_id(id);
    read_completion(call.send().promise.await?.get()?)
}

/// All rights but one.
fn all_but(right: Right) -> Rights {
    RIGHTS.into_iter().filter(|&other| other != right).collect()
}

fn lasting(lifetime: Duration) -> Bounds {
    Bounds {
        lifetime: Some(lifetime),
        ..Bounds::default()
    }
}

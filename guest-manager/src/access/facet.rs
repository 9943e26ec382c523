//! What all facets have in common, done once: narrow, share, describe; and the revokers that come of it.

use std::{rc::Rc, time::Instant};

use sepal_schema::{
    error::{Error, write_completion},
    facet::{Bounds, Right, Rights, Terms, kind_name},
    facet_capnp::{facet, revoker},
    transport::guard,
};

use super::{
    grant::Grant,
    holder::{Deed, Holder},
    secret,
    shares::Token,
    thing,
};
use crate::serial::yield_now;

type Reply = Result<(), capnp::Error>;

const SHARE: Deed = Deed::new("Facet.share", &[Right::Share]);
const REVOKE: Deed = Deed::new("Revoker.revoke", &[]);

/// Rounds of the event loop in which all that a revoked capability held open has certainly been closed: it takes one.
const ROUNDS_TO_CLOSE: usize = 4;

/// Makes servers facets: `$server` is a tuple or struct whose `$holder` is a [`Holder`].
macro_rules! facets {
    ($($server:ty { $holder:tt }),* $(,)?) => {$(
        impl sepal_schema::facet_capnp::facet::Server for $server {
            async fn narrow(
                self: std::rc::Rc<Self>,
                params: sepal_schema::facet_capnp::facet::NarrowParams,
                results: sepal_schema::facet_capnp::facet::NarrowResults,
            ) -> Result<(), capnp::Error> {
                $crate::access::facet::narrow(&self.$holder, params, results)
            }

            async fn share(
                self: std::rc::Rc<Self>,
                params: sepal_schema::facet_capnp::facet::ShareParams,
                results: sepal_schema::facet_capnp::facet::ShareResults,
            ) -> Result<(), capnp::Error> {
                $crate::access::facet::share(&self.$holder, params, results).await
            }

            async fn describe(
                self: std::rc::Rc<Self>,
                _: sepal_schema::facet_capnp::facet::DescribeParams,
                results: sepal_schema::facet_capnp::facet::DescribeResults,
            ) -> Result<(), capnp::Error> {
                $crate::access::facet::describe(&self.$holder, results)
            }
        }
    )*};
}
pub(crate) use facets;

/// `Facet.narrow`.
pub(crate) fn narrow(holder: &Holder, params: facet::NarrowParams, mut results: facet::NarrowResults) -> Reply {
    let narrowed = || {
        holder.check_live()?;
        holder.narrow(&Bounds::read(params.get()?.get_bounds()?)?)
    };
    let mut to = results.get();
    match narrowed() {
        Ok(narrowed) => {
            to.set_revoker(RevokerServer::new_client(holder, narrowed.grant.clone()));
            to.set_facet(thing::serve(narrowed));
        }
        Err(error) => {
            to.set_revoker(error.broken());
            to.set_facet(error.broken());
            error.write(to.init_error());
        }
    }
    Ok(())
}

/// `Facet.share`.
pub(crate) async fn share(holder: &Holder, params: facet::ShareParams, mut results: facet::ShareResults) -> Reply {
    let (bounds, terms) = {
        let params = params.get()?;
        (Bounds::read(params.get_bounds()?), Terms::read(params.get_terms()?))
    };
    let make = async {
        let (bounds, terms) = (bounds?, terms?);
        let secret = secret::fresh()?;
        // Nobody could redeem it.
        holder.guest.check_live()?;
        let shared = holder.narrow(&bounds)?;
        check_useful(&shared, &bounds)?;
        let (grant, uid) = (shared.grant, holder.client.who.uid);
        let mut shares = holder.guest.access.shares.borrow_mut();
        let what = (shared.thing, grant.clone());
        let id = shares.add(what, terms, uid, secret, Instant::now())?;
        let kind = kind_name(shared.thing.kind()).to_owned();
        Ok::<_, Error>((Token { kind, id, secret }, grant))
    };
    let made = holder.perform(SHARE, holder.thing, make).await;
    holder.guest.save();
    let mut to = results.get();
    match made {
        Ok((token, grant)) => {
            to.set_token(token.write());
            to.set_id(token.id);
            to.set_revoker(RevokerServer::new_client(holder, grant));
        }
        Err(error) => {
            to.set_revoker(error.broken());
            error.write(to.init_error());
        }
    }
    Ok(())
}

/// Refuses rights of which nothing is left: whoever redeems the token could do nothing with it.
fn check_useful(shared: &Holder, bounds: &Bounds) -> Result<(), Error> {
    if bounds.only.is_none() || shared.permitted() != Rights::NONE {
        return Ok(());
    }
    let thing = shared.thing;
    let message = format!(
        "nothing of it is left by these rights: those of {thing} are {}",
        thing.rights()
    );
    Err(Error::bad_config("bounds.only", message))
}

/// `Facet.describe`.
pub(crate) fn describe(holder: &Holder, mut results: facet::DescribeResults) -> Reply {
    match holder.check_live() {
        Ok(()) => holder.describe().write(results.get().init_description()),
        Err(error) => error.write(results.get().init_error()),
    }
    Ok(())
}

/// Lets all that was held open through what was revoked just now be closed.
pub(crate) async fn closed() {
    for _ in 0..ROUNDS_TO_CLOSE {
        yield_now().await;
    }
}

/// Takes back what `holder` gave.
struct RevokerServer {
    holder: Holder,
    grant: Grant,
}

impl RevokerServer {
    fn new_client(holder: &Holder, grant: Grant) -> revoker::Client {
        guard::new_client(Self {
            holder: holder.clone(),
            grant,
        })
    }
}

impl revoker::Server for RevokerServer {
    async fn revoke(self: Rc<Self>, _: revoker::RevokeParams, mut results: revoker::RevokeResults) -> Reply {
        if self.grant.ended(Instant::now()).is_none() {
            self.grant.revoke();
            self.holder.guest.save();
            self.holder.note(REVOKE, &self.holder.thing.to_string(), Ok(()));
        }
        closed().await;
        write_completion(&Ok(()), results.get());
        Ok(())
    }
}

//! From a token to a capability, on the connection of whoever redeems it.

use std::{rc::Rc, time::Instant};

use sepal_schema::{
    error::{Error, Kind},
    facet::{Bounds, Description},
};

use super::{holder::Holder, shares::Token};
use crate::{
    audit::Call,
    client::{Client, Who},
    manager::Manager,
};

/// The capability that a token stands for, for `client`. The token is noted nowhere: it may be of use to others.
///
/// # Errors
/// `NOT_FOUND` for what is none, was used up or has been revoked; `PERMISSION_DENIED` for a token of another user.
pub(crate) fn redeem(manager: &Rc<Manager>, client: &Client, token: &str) -> Result<Holder, Error> {
    let mut call = Call::new(&manager.audit, client.who, "GuestManager.redeem");
    let redeemed = find(manager, client, token);
    if let Ok(holder) = &redeemed {
        call.guest(&holder.guest.name);
        let share = holder.client.who.share.unwrap_or(0);
        holder.guest.access.shares.borrow_mut().redeemed(share);
        holder.guest.save();
        call.detail(format!("{}, share {share}", holder.thing));
    }
    call.done(redeemed.as_ref().map(drop));
    redeemed
}

/// What [`redeem`] would give, without doing it. It only looks, so that nothing is noted of it but a token that was tried in vain.
///
/// # Errors
/// As [`redeem`].
pub(crate) fn describe(manager: &Rc<Manager>, client: &Client, token: &str) -> Result<Description, Error> {
    let found = find(manager, client, token);
    if let Err(error) = &found {
        Call::new(&manager.audit, client.who, "GuestManager.describe").done(Err(error));
    }
    found.map(|holder| holder.describe())
}

/// What a token stands for, as `client` would hold it; it has not been redeemed by that.
fn find(manager: &Rc<Manager>, client: &Client, text: &str) -> Result<Holder, Error> {
    let unknown = || {
        let message = "there is no such token: it was used up or revoked, its guest has ended, or it never was";
        Error::new(Kind::NotFound, message).about("token")
    };
    let token = Token::read(text).ok_or_else(unknown)?;
    for guest in manager.guests() {
        if !guest.live() {
            continue;
        }
        let (uid, now) = (client.who.uid, Instant::now());
        let found = guest.access.shares.borrow().find(&token, uid, now)?;
        let Some(found) = found else { continue };
        let who = Who {
            share: Some(token.id),
            ..client.who
        };
        let holder = Holder {
            client: Client { who, ..client.clone() },
            guest,
            grant: found.grant,
            thing: found.thing,
        };
        return match client.read_only {
            // Whatever it comes by, it can only look.
            true => holder.narrow(&Bounds::only(client.role.rights())),
            false => Ok(holder),
        };
    }
    Err(unknown())
}

//! What was shared of a guest: tokens with which other clients get a capability. Pure: secrets and time are passed in.
//!
//! ```text
//!   share --> waiting --redeemed--> waiting (lasting), or used up (once)
//!                |                     |
//!                '------ ended --------'-->  gone: the grant was revoked or has expired, or it is used up and nobody holds what it gave
//! ```

use std::{collections::BTreeMap, time::Instant};

use sepal_schema::{
    error::{Error, Kind},
    facet::{Bounds, MAX_TOKEN, Share, Terms, kind_name},
};

use super::{
    grant::Grant,
    secret::{self, Digest, Secret},
    thing::Thing,
};

/// Shares of a guest at a time.
pub(crate) const MAX_SHARES: usize = 256;

/// A token: `console.7.5d...`, the kind, the share's id, and the secret in hexadecimal.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Token {
    /// The name of the kind.
    pub(crate) kind: String,
    /// Identifies the share to its guest.
    pub(crate) id: u64,
    /// Known to whoever was given the token.
    pub(crate) secret: Secret,
}

impl Token {
    /// Reads a token; none if it is none.
    pub(crate) fn read(text: &str) -> Option<Self> {
        if text.len() > MAX_TOKEN || !text.is_ascii() {
            return None;
        }
        let mut parts = text.trim().splitn(3, '.');
        let (kind, id, hex) = (parts.next()?, parts.next()?, parts.next()?);
        Some(Self {
            kind: kind.to_owned(),
            id: id.parse().ok()?,
            secret: secret::of_hex(hex)?,
        })
    }

    /// As it is given out.
    pub(crate) fn write(&self) -> String {
        format!("{}.{}.{}", self.kind, self.id, secret::hex(&self.secret))
    }
}

struct Entry {
    digest: Digest,
    thing: Thing,
    terms: Terms,
    grant: Grant,
    redeemed: u32,
    shared_by_uid: u32,
}

impl Entry {
    fn used_up(&self) -> bool {
        self.terms.once && self.redeemed > 0
    }

    fn gone(&self, now: Instant) -> bool {
        self.grant.ended(now).is_some() || (self.used_up() && !self.grant.is_shared())
    }
}

/// A share as the next manager has to know it: the capabilities that it was derived from end with this one, and so do those that came of it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Kept {
    pub(crate) id: u64,
    /// The share by which whoever shared it had come to it; 0: none.
    pub(crate) parent: u64,
    pub(crate) thing: Thing,
    pub(crate) digest: Digest,
    /// The tightest on the way to the root, without a lifetime.
    pub(crate) bounds: Bounds,
    /// When it ends by itself.
    pub(crate) expires: Option<Instant>,
    pub(crate) terms: Terms,
    pub(crate) redeemed: u32,
    pub(crate) shared_by_uid: u32,
}

/// The shares of a guest.
#[derive(Default)]
pub(crate) struct Shares {
    last: u64,
    all: BTreeMap<u64, Entry>,
}

/// What a token stands for.
pub(crate) struct Found {
    /// What it is for.
    pub(crate) thing: Thing,
    /// What it permits.
    pub(crate) grant: Grant,
}

impl Shares {
    fn prune(&mut self, now: Instant) {
        self.all.retain(|_, share| !share.gone(now));
    }

    /// Remembers a share of `thing` that permits `grant`, and returns its id.
    ///
    /// # Errors
    /// `NO_RESOURCES`.
    pub(crate) fn add(
        &mut self,
        (thing, grant): (Thing, Grant),
        terms: Terms,
        shared_by_uid: u32,
        secret: Secret,
        now: Instant,
    ) -> Result<u64, Error> {
        self.prune(now);
        if self.all.len() >= MAX_SHARES {
            let message = format!("{MAX_SHARES} things are shared of this guest; revoke some of them first");
            return Err(Error::new(Kind::NoResources, message));
        }
        self.last += 1;
        let share = Entry {
            digest: secret::digest(&secret),
            thing,
            terms,
            grant,
            redeemed: 0,
            shared_by_uid,
        };
        self.all.insert(self.last, share);
        Ok(self.last)
    }

    /// All of them, as the next manager has to know them.
    pub(crate) fn kept(&self, now: Instant) -> Vec<Kept> {
        let there = || self.all.iter().filter(|(_, share)| share.grant.ended(now).is_none());
        let kept = |(&id, share): (&u64, &Entry)| Kept {
            id,
            parent: there()
                .filter(|(other, above)| **other < id && above.grant.can_end() && share.grant.is_under(&above.grant))
                .map(|(other, _)| *other)
                .next_back()
                .unwrap_or(0),
            thing: share.thing,
            digest: share.digest,
            bounds: Bounds {
                only: Some(share.grant.rights()),
                lifetime: None,
                ..share.grant.bounds(now)
            },
            expires: share.grant.expires_in(now).map(|left| now + left),
            terms: share.terms.clone(),
            redeemed: share.redeemed,
            shared_by_uid: share.shared_by_uid,
        };
        // Nobody could redeem one that is used up.
        there().filter(|(_, share)| !share.used_up()).map(kept).collect()
    }

    /// Takes over what an earlier manager had, below `root`; returns the grants.
    pub(crate) fn restore(&mut self, kept: Vec<Kept>, root: &Grant, now: Instant) -> Vec<Grant> {
        let mut grants = Vec::new();
        for share in kept {
            let lifetime = share.expires.map(|at| at.saturating_duration_since(now));
            let above = self.all.get(&share.parent).map_or(root, |share| &share.grant);
            let bounds = Bounds {
                lifetime,
                ..share.bounds
            };
            // What has nothing in common with its parent any more, there is none of.
            let Ok(grant) = above.narrow(&bounds, now) else {
                continue;
            };
            self.last = self.last.max(share.id);
            grants.push(grant.clone());
            let entry = Entry {
                digest: share.digest,
                thing: share.thing,
                terms: share.terms,
                grant,
                redeemed: share.redeemed,
                shared_by_uid: share.shared_by_uid,
            };
            self.all.insert(share.id, entry);
        }
        grants
    }

    /// What a token stands for; none if it is none of this guest's, was used up, or was revoked.
    ///
    /// # Errors
    /// `PERMISSION_DENIED`: it is for another user.
    pub(crate) fn find(&self, token: &Token, uid: u32, now: Instant) -> Result<Option<Found>, Error> {
        let Some(share) = self.all.get(&token.id) else {
            return Ok(None);
        };
        let known = share.digest == secret::digest(&token.secret) && token.kind == kind_name(share.thing.kind());
        if !known || share.used_up() || share.grant.ended(now).is_some() {
            return Ok(None);
        }
        if let Some(only) = share.terms.uid
            && only != uid
        {
            let message = format!("this token is for the user with uid {only}, and this client has uid {uid}");
            return Err(Error::new(Kind::PermissionDenied, message).about("token"));
        }
        Ok(Some(Found {
            thing: share.thing,
            grant: share.grant.clone(),
        }))
    }

    /// What [`Shares::find`] has found in this share was given to somebody.
    pub(crate) fn redeemed(&mut self, id: u64) {
        if let Some(share) = self.all.get_mut(&id) {
            share.redeemed = share.redeemed.saturating_add(1);
        }
    }

    /// What is shared by `by` or what was derived from it, oldest first.
    pub(crate) fn list(&mut self, by: &Grant, now: Instant) -> Vec<Share> {
        self.prune(now);
        let governed = self.all.iter().filter(|(_, share)| share.grant.is_under(by));
        governed
            .map(|(&id, share)| Share {
                id,
                kind: share.thing.kind(),
                terms: share.terms.clone(),
                rights: share.grant.rights().and(share.thing.rights()),
                expires_in: share.grant.expires_in(now),
                redeemed: share.redeemed,
                shared_by_uid: share.shared_by_uid,
            })
            .collect()
    }

    /// Revokes a share of those that `by` governs; 0: all of them.
    ///
    /// # Errors
    /// `NOT_FOUND`.
    pub(crate) fn revoke(&mut self, by: &Grant, id: u64, now: Instant) -> Result<(), Error> {
        self.prune(now);
        let mut found = id == 0;
        let governed = self.all.iter().filter(|(_, share)| share.grant.is_under(by));
        for (_, share) in governed.filter(|(of, _)| id == 0 || **of == id) {
            share.grant.revoke();
            found = true;
        }
        self.prune(now);
        match found {
            true => Ok(()),
            false => {
                let message = format!("nothing that is shared of this guest has the id {id}");
                Err(Error::new(Kind::NotFound, message).about("id"))
            }
        }
    }
}

#[cfg(test)]
mod tests;

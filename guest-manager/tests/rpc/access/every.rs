//! Every facet, every method: what a revoked capability permits is nothing, what one without a right permits is all but that.

use std::{collections::BTreeSet, path::Path, time::Duration};

use sepal_schema::{
    error::{Error, Kind},
    facet::{Bounds, Rights, Terms, right_name},
    facet_capnp::{facet, revoker},
    guest_capnp::guest,
};

use super::{
    all_but, describe, lasting, launch,
    methods::{Ends, METHODS, Method, PARTS, Part, cast},
    narrow, narrow_guest, redeem, revoke, revoke_share, share, user,
};
use crate::world::{Caller, World, run};

/// The methods of a part.
fn methods(part: Part) -> impl Iterator<Item = &'static Method> {
    let of = move |method: &&Method| part.interfaces().contains(&method.interface());
    METHODS.iter().filter(of)
}

/// What the schema says: all methods of interfaces that extend `Facet`, and its own.
fn in_schema() -> BTreeSet<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../schema");
    let mut found = BTreeSet::new();
    let mut facets: BTreeSet<String> = ["Facet".to_owned()].into();
    // Twice: an interface may come before the one that it extends.
    for _ in 0..2 {
        for file in std::fs::read_dir(&folder).unwrap() {
            let path = file.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "capnp") {
                continue;
            }
            let mut within: Option<String> = None;
            for line in std::fs::read_to_string(&path).unwrap().lines() {
                let code = line.split('#').next().unwrap();
                if let Some(rest) = code.strip_prefix("interface ") {
                    let name = rest.split([' ', '(']).next().unwrap().to_owned();
                    let extends = rest
                        .split_once("extends")
                        .map(|(_, what)| what.trim_matches([' ', '{', '(', ')']));
                    if extends.is_some_and(|what| facets.contains(what)) {
                        facets.insert(name.clone());
                    }
                    within = facets.contains(&name).then_some(name);
                } else if code.starts_with('}') {
                    within = None;
                } else if let Some(interface) = &within
                    && let Some(method) = code.strip_prefix("  ")
                    && let Some((name, rest)) = method.split_once(" @")
                    && !name.starts_with(' ')
                    && rest.contains('(')
                {
                    found.insert(format!("{interface}.{name}"));
                }
            }
        }
    }
    found
}

#[test]
fn the_table_has_every_method_of_every_facet() {
    let table: BTreeSet<_> = METHODS.iter().map(|method| method.name.to_owned()).collect();
    assert_eq!(table, in_schema());
    assert!(table.len() > 50, "the schema was not understood");
    let served: BTreeSet<_> = PARTS.iter().flat_map(|part| part.interfaces()).copied().collect();
    let interfaces: BTreeSet<_> = METHODS.iter().map(Method::interface).collect();
    assert_eq!(served, interfaces);
}

/// That a method comes through: whatever it does then, it is not refused for what the capability is.
async fn comes_through(world: &World, part: Part, method: &Method, of: &facet::Client) {
    let call = (method.call)(of.clone());
    let outcome: Result<(), Error> = match method.ends {
        Ends::Soon => call.await,
        // Given up, which it minds.
        Ends::Never => {
            let soon = world.handle.timeout(Duration::from_millis(1), call).await;
            soon.unwrap_or(Ok(()))
        }
        Ends::WithGuest => call.await.or_else(|error| match error.kind {
            Kind::Revoked | Kind::PermissionDenied | Kind::NoResources => Err(error),
            _ => Ok(()),
        }),
    };
    assert_eq!(outcome, Ok(()), "{} of {part:?}", method.name);
}

async fn is_revoked(part: Part, of: &facet::Client, how: &str) {
    for method in methods(part) {
        let outcome = (method.call)(of.clone()).await;
        let error = outcome.expect_err(method.name);
        assert_eq!(error.kind, Kind::Revoked, "{} of {part:?}: {error}", method.name);
        assert!(error.message.contains(how), "{}: {error}", method.name);
    }
}

/// That all of a part still works which leaves the guest as it is.
async fn works(world: &World, part: Part, of: &facet::Client) {
    for method in methods(part).filter(|method| method.ends != Ends::WithGuest) {
        comes_through(world, part, method, of).await;
    }
}

/// How a capability is taken back.
#[derive(Debug, Clone, Copy)]
enum Way {
    ByItsRevoker,
    WithItsParent,
    WithTheGuestItIsOf,
    ByTheGuestsShares,
    ByTheSharesRevoker,
    WithTheSharersGuest,
}

/// Takes a part back, after which nothing works through it and what came of it, and all else does.
async fn take_back(world: &World, part: Part, way: Way, root: &guest::Client, other: &Caller) {
    let (guest, guest_revoker) = narrow_guest(root, &Bounds::default()).await;
    let facet = part.of(&guest);
    let (parent, parent_revoker) = narrow(&facet, &Bounds::default()).await.unwrap();
    let (mut taken, revoker) = narrow(&parent, &Bounds::default()).await.unwrap();
    let (sibling, _) = narrow(&facet, &Bounds::default()).await.unwrap();
    let terms = Terms::default();
    let mut shared = None;
    if matches!(
        way,
        Way::ByTheGuestsShares | Way::ByTheSharesRevoker | Way::WithTheSharersGuest
    ) {
        let made = share(&parent, &Bounds::default(), &terms).await.unwrap();
        (taken, ..) = redeem(other, &made.token).await.unwrap();
        shared = Some(made);
    }
    let (derived, _) = narrow(&taken, &Bounds::default()).await.unwrap();
    works(world, part, &derived).await;

    // One that is in progress ends at once.
    let waits = methods(part).find(|method| method.ends == Ends::Never);
    let pending = waits.map(|method| (method.call)(derived.clone()));
    let taking = async {
        match way {
            Way::ByItsRevoker => revoke(&revoker).await,
            Way::WithItsParent => revoke(&parent_revoker).await,
            Way::WithTheGuestItIsOf | Way::WithTheSharersGuest => revoke(&guest_revoker).await,
            Way::ByTheGuestsShares => revoke_share(root, shared.as_ref().unwrap().id).await.unwrap(),
            Way::ByTheSharesRevoker => revoke(&shared.as_ref().unwrap().revoker).await,
        }
    };
    match pending {
        Some(pending) => {
            let (outcome, ()) = futures::join!(pending, taking);
            assert_eq!(outcome.unwrap_err().kind, Kind::Revoked);
        }
        None => taking.await,
    }
    is_revoked(part, &taken, "revoked").await;
    is_revoked(part, &derived, "was derived from one that was revoked").await;
    let whole = matches!(way, Way::WithTheGuestItIsOf | Way::WithTheSharersGuest);
    if whole {
        is_revoked(part, &sibling, "was derived from one that was revoked").await;
        is_revoked(Part::Guest, &cast(guest), "was revoked").await;
    } else {
        works(world, part, &sibling).await;
        works(world, part, &facet).await;
    }
    works(world, part, &part.of(root)).await;
    if let Some(shared) = shared {
        assert_eq!(redeem(other, &shared.token).await.err().unwrap().kind, Kind::NotFound);
    }
}

fn all_are_taken_back(way: Way) {
    run(async |world| {
        let (caller, other) = (world.caller(), user(&world, 7));
        let launched = launch(&world, &caller, "web").await;
        for part in PARTS {
            take_back(&world, part, way, &launched.guest, &other).await;
        }
    });
}

#[test]
fn nothing_works_through_what_its_revoker_took_back() {
    all_are_taken_back(Way::ByItsRevoker);
}

#[test]
fn nothing_works_through_what_came_of_something_revoked() {
    all_are_taken_back(Way::WithItsParent);
}

#[test]
fn nothing_works_through_parts_of_a_guest_that_was_revoked() {
    all_are_taken_back(Way::WithTheGuestItIsOf);
}

#[test]
fn nothing_works_through_what_was_redeemed_of_a_share_that_the_guest_revoked() {
    all_are_taken_back(Way::ByTheGuestsShares);
}

#[test]
fn nothing_works_through_what_was_redeemed_of_a_share_that_its_revoker_took_back() {
    all_are_taken_back(Way::ByTheSharesRevoker);
}

#[test]
fn nothing_works_through_what_was_redeemed_of_a_share_whose_guest_was_revoked() {
    all_are_taken_back(Way::WithTheSharersGuest);
}

#[test]
fn nothing_works_through_what_has_expired() {
    run(async |world| {
        let caller = world.caller();
        let launched = launch(&world, &caller, "web").await;
        let mut expiring = Vec::new();
        for part in PARTS {
            // Sent ahead, so that one is derived while there is something to derive it from, or fails as what it came from.
            let mut call = part.of(&launched.guest).narrow_request();
            lasting(Duration::from_millis(1)).write(call.get().init_bounds());
            let short = call.send().pipeline.get_facet();
            let derived = short.narrow_request().send().pipeline.get_facet();
            expiring.push((part, short, derived));
        }
        let (guest, _) = narrow_guest(&launched.guest, &lasting(Duration::from_secs(1000))).await;
        let lasts = describe(&cast(guest.clone())).await.unwrap().expires_in.unwrap();
        assert!(lasts <= Duration::from_secs(1000) && lasts > Duration::from_secs(900));
        world.handle.sleep(Duration::from_millis(2)).await;
        for (part, short, derived) in expiring {
            is_revoked(part, &short, "expired after 1 ms").await;
            is_revoked(part, &derived, "expired after 1 ms").await;
            works(&world, part, &part.of(&guest)).await;
        }
    });
}

/// A call that waits ends when its capability expires, without anybody calling.
#[test]
fn what_waits_ends_when_its_time_comes() {
    run(async |world| {
        let caller = world.caller();
        let launched = launch(&world, &caller, "web").await;
        let observer = Part::Observer.of(&launched.guest);
        let (observer, revoker): (facet::Client, revoker::Client) =
            narrow(&observer, &lasting(Duration::from_millis(20))).await.unwrap();
        let wait = METHODS.iter().find(|method| method.name == "Observer.wait").unwrap();
        let error = (wait.call)(observer).await.unwrap_err();
        assert_eq!(error.kind, Kind::Revoked);
        assert_eq!(error.message, "this observer capability expired after 20 ms");
        // Too late to be anything else.
        revoke(&revoker).await;
    });
}

#[test]
fn each_method_needs_its_right_and_no_other() {
    run(async |world| {
        let caller = world.caller();
        let launched = launch(&world, &caller, "web").await;
        for part in PARTS {
            for method in methods(part) {
                let only = match method.needs {
                    None => continue,
                    Some(right) => {
                        let bounds = Bounds::only(all_but(right));
                        let (without, _) = narrow(&part.of(&launched.guest), &bounds).await.unwrap();
                        let error = (method.call)(without).await.expect_err(method.name);
                        assert_eq!(error.kind, Kind::PermissionDenied, "{}: {error}", method.name);
                        let name = right_name(right);
                        assert!(
                            error.message.contains(&format!("lacks the right \"{name}\"")),
                            "{error}"
                        );
                        Rights::from(right)
                    }
                };
                let (with, _) = narrow(&part.of(&launched.guest), &Bounds::only(only)).await.unwrap();
                if method.ends != Ends::WithGuest {
                    comes_through(&world, part, method, &with).await;
                }
            }
            // What needs none works without any: only `debug` is left, which means nothing to most.
            let nothing = Bounds::only(sepal_schema::facet::Right::Debug.into());
            let (powerless, _) = narrow(&part.of(&launched.guest), &nothing).await.unwrap();
            let free = methods(part).filter(|method| method.needs.is_none() && method.name != "Serial.open");
            for method in free {
                comes_through(&world, part, method, &powerless).await;
            }
        }
        // What ends the guest, last.
        for method in methods(Part::Power).filter(|method| method.ends == Ends::WithGuest) {
            let only = Bounds::only(method.needs.unwrap().into());
            let (with, _) = narrow(&Part::Power.of(&launched.guest), &only).await.unwrap();
            comes_through(&world, Part::Power, method, &with).await;
        }
    });
}

#[test]
fn a_capability_tells_what_it_is() {
    run(async |world| {
        let caller = world.caller();
        let launched = launch(&world, &caller, "web").await;
        for part in PARTS {
            let facet = part.of(&launched.guest);
            let before = describe(&facet).await.unwrap();
            assert_eq!((&before.guest[..], before.expires_in), ("web", None));
            // All that one of its methods needs, and what every facet has.
            let needed: Rights = methods(part).filter_map(|method| method.needs).collect();
            assert_eq!(before.rights.and(needed), needed, "{part:?}");
            assert_eq!(before.bounds.only, Some(before.rights));
            let (narrowed, _) = narrow(&facet, &Bounds::default()).await.unwrap();
            assert_eq!(describe(&narrowed).await.unwrap(), before, "{part:?}");
        }
    });
}

//! Tokens: what they look like, who can redeem them, and what they turn into.

use std::time::Duration;

use proptest::prelude::*;
use sepal_schema::facet::{Bounds, Right, Rights};

use super::*;

fn secret(number: u8) -> Secret {
    [number; 32]
}

fn token(kind: &str, id: u64, number: u8) -> Token {
    Token {
        kind: kind.to_owned(),
        id,
        secret: secret(number),
    }
}

fn root() -> Grant {
    Grant::root(Rights::ALL, Default::default())
}

fn narrow(grant: &Grant, now: Instant) -> Grant {
    grant.narrow(&Bounds::default(), now).unwrap()
}

proptest! {
    #[test]
    fn a_token_is_read_as_it_was_written(id: u64, secret: [u8; 32]) {
        let token = Token { kind: "balloon".into(), id, secret };
        let text = token.write();
        prop_assert!(text.len() <= MAX_TOKEN && text.starts_with("balloon."));
        prop_assert!(text.bytes().all(|byte| byte.is_ascii_graphic()));
        prop_assert_eq!(Token::read(&text).unwrap(), token);
    }

    #[test]
    fn any_text_is_a_token_or_not(text: String, id: u64) {
        let _ = Token::read(&text);
        let _ = Token::read(&format!("console.{id}.{text}"));
    }
}

/// Finds a share, and has it given out.
fn redeem(shares: &mut Shares, token: &Token, uid: u32, now: Instant) -> Result<Option<Found>, Error> {
    let found = shares.find(token, uid, now)?;
    if found.is_some() {
        shares.redeemed(token.id);
    }
    Ok(found)
}

#[test]
fn a_token_is_redeemed_by_whom_it_is_for_as_often_as_it_may() {
    let now = Instant::now();
    let mut shares = Shares::default();
    let terms = Terms {
        once: true,
        uid: Some(1000),
        ..Terms::default()
    };
    let grant = narrow(&root(), now);
    let id = shares.add((Thing::Power, grant), terms, 0, secret(1), now).unwrap();
    for wrong in [
        token("power", id, 2),
        token("power", id + 1, 1),
        token("console", id, 1),
    ] {
        assert!(redeem(&mut shares, &wrong, 1000, now).unwrap().is_none());
    }
    let right = token("power", id, 1);
    assert_eq!(
        redeem(&mut shares, &right, 1001, now).err().unwrap().kind,
        Kind::PermissionDenied
    );
    let redeemed = redeem(&mut shares, &right, 1000, now).unwrap().unwrap();
    assert_eq!(redeemed.thing, Thing::Power);
    assert!(redeem(&mut shares, &right, 1000, now).unwrap().is_none());
    // It is told as long as somebody has what it gave.
    assert_eq!(shares.list(&root(), now)[0].redeemed, 1);
    drop(redeemed);
    assert!(shares.list(&root(), now).is_empty());

    let id = shares
        .add(
            (Thing::Serial, narrow(&root(), now)),
            Terms::default(),
            0,
            secret(3),
            now,
        )
        .unwrap();
    for _ in 0..3 {
        redeem(&mut shares, &token("serial", id, 3), 7, now).unwrap().unwrap();
    }
    assert_eq!(shares.list(&root(), now)[0].redeemed, 3);
}

#[test]
fn what_has_ended_is_gone_and_makes_room() {
    let now = Instant::now();
    let mut shares = Shares::default();
    let root = root();
    let hub = narrow(&root, now);
    let add = |shares: &mut Shares, grant| shares.add((Thing::Guest, grant), Terms::default(), 0, secret(0), now);
    for _ in 0..MAX_SHARES {
        add(&mut shares, narrow(&hub, now)).unwrap();
    }
    assert_eq!(
        add(&mut shares, narrow(&root, now)).unwrap_err().kind,
        Kind::NoResources
    );
    hub.revoke();
    let lasting = add(&mut shares, narrow(&root, now)).unwrap();
    let bounds = Bounds {
        lifetime: Some(Duration::from_secs(1)),
        ..Bounds::default()
    };
    let short = add(&mut shares, root.narrow(&bounds, now).unwrap()).unwrap();
    let ids = |shares: &mut Shares, now| -> Vec<_> { shares.list(&root, now).iter().map(|share| share.id).collect() };
    assert_eq!(ids(&mut shares, now), [lasting, short]);
    let later = now + Duration::from_secs(1);
    assert!(
        redeem(&mut shares, &token("guest", short, 0), 0, later)
            .unwrap()
            .is_none()
    );
    assert_eq!(ids(&mut shares, later), [lasting]);
    assert_eq!(shares.revoke(&root, short, later).unwrap_err().kind, Kind::NotFound);
    shares.revoke(&root, lasting, later).unwrap();
    assert!(
        redeem(&mut shares, &token("guest", lasting, 0), 0, later)
            .unwrap()
            .is_none()
    );
    // Nothing left is no failure.
    shares.revoke(&root, 0, later).unwrap();
}

#[test]
fn a_narrowed_guest_governs_only_what_came_of_it() {
    let now = Instant::now();
    let mut shares = Shares::default();
    let (one, other) = (narrow(&root(), now), narrow(&root(), now));
    let mut add = |grant: &Grant| {
        let grant = narrow(grant, now);
        let id = shares
            .add((Thing::Guest, grant.clone()), Terms::default(), 0, secret(0), now)
            .unwrap();
        (id, grant)
    };
    let (first, by_one) = add(&one);
    let (second, by_other) = add(&narrow(&other, now));
    let ids = |shares: &mut Shares, by| -> Vec<_> { shares.list(by, now).iter().map(|share| share.id).collect() };
    assert_eq!(ids(&mut shares, &one), [first]);
    assert_eq!(ids(&mut shares, &other), [second]);
    assert_eq!(ids(&mut shares, &root()), [first, second]);
    assert_eq!(shares.revoke(&one, second, now).unwrap_err().kind, Kind::NotFound);
    shares.revoke(&one, 0, now).unwrap();
    assert!(by_one.ended(now).is_some() && by_other.ended(now).is_none());
}

#[test]
fn the_next_manager_knows_what_was_shared() {
    let (now, root) = (Instant::now(), root());
    let mut shares = Shares::default();
    let only = |rights: &[Right]| Bounds::only(rights.iter().copied().collect());
    let mut add = |grant: &Grant, number: u8, terms: Terms| {
        shares
            .add((Thing::Power, grant.clone()), terms, 7, secret(number), now)
            .unwrap()
    };
    let lasting = root
        .narrow(&only(&[Right::Pause, Right::Kill, Right::Share]), now)
        .unwrap();
    let first = add(&lasting, 1, Terms::default());
    // Whoever redeemed the first shares it on; then that one, too.
    let second = add(
        &lasting.narrow(&only(&[Right::Kill, Right::Share]), now).unwrap(),
        2,
        Terms::default(),
    );
    let minute = Bounds {
        lifetime: Some(Duration::from_secs(60)),
        ..only(&[Right::Kill])
    };
    let third = add(&root.narrow(&minute, now).unwrap(), 3, Terms::default());
    let once = Terms {
        once: true,
        ..Terms::default()
    };
    let used_up = add(&narrow(&root, now), 4, once);
    redeem(&mut shares, &token("power", used_up, 4), 0, now)
        .unwrap()
        .unwrap();

    let kept = shares.kept(now);
    let parents: Vec<_> = kept.iter().map(|share| (share.id, share.parent)).collect();
    assert_eq!(parents, [(first, 0), (second, first), (third, 0)]);

    let mut restored = Shares::default();
    let later = now + Duration::from_secs(20);
    assert_eq!(restored.restore(kept, &root, later).len(), 3);
    let find = |id, number, at| restored.find(&token("power", id, number), 0, at).unwrap();
    let found = find(second, 2, later).unwrap();
    assert!(found.grant.rights().has(Right::Kill) && !found.grant.rights().has(Right::Pause));
    assert!(find(second, 1, later).is_none(), "the other's secret");
    assert!(find(third, 3, later).is_some());
    assert!(
        find(third, 3, now + Duration::from_secs(61)).is_none(),
        "its minute is over"
    );
    assert!(find(used_up, 4, later).is_none());
    // What is revoked takes with it what came of it.
    restored.revoke(&root, first, later).unwrap();
    assert!(restored.find(&token("power", second, 2), 0, later).unwrap().is_none());
    // Numbers are not used again.
    let next = restored.add(
        (Thing::Power, narrow(&root, later)),
        Terms::default(),
        0,
        secret(9),
        later,
    );
    assert!(next.unwrap() > third);
}

//! Tokens: who can redeem them, how often, and what they give.

use std::{io::Write, os::unix::net::UnixStream, time::Duration};

use futures::AsyncReadExt;
use sepal_guest_manager::client::Client;
use sepal_schema::{
    config::Handles,
    error::{Error, Kind},
    facet::{Bounds, FacetKind, MAX_TOKEN, Right, Rights, Terms},
    guest_capnp::{guest, serial},
};

use super::{
    describe, describe_token, lasting, launch,
    methods::{METHODS, PARTS, Part, cast},
    narrow, narrow_guest, redeem, revoke, revoke_share, share, shares, user,
};
use crate::world::{kill, run};

fn only(right: Right) -> Bounds {
    Bounds::only(right.into())
}

#[test]
fn every_facet_can_be_shared_and_is_what_it_was() {
    run(async |world| {
        let (caller, other) = (world.caller(), user(&world, 7));
        let launched = launch(&world, &caller, "web").await;
        for part in PARTS {
            let facet = part.of(&launched.guest);
            let shared = share(&facet, &Bounds::default(), &Terms::default()).await.unwrap();
            assert!(shared.token.len() <= MAX_TOKEN, "{}", shared.token);
            let (redeemed, kind, name) = redeem(&other, &shared.token).await.unwrap();
            let (before, after) = (describe(&facet).await.unwrap(), describe(&redeemed).await.unwrap());
            assert_eq!(before, after);
            assert_eq!((kind, &name[..]), (before.kind, "web"));
            let begins = format!("{}.", sepal_schema::facet::kind_name(kind));
            assert!(shared.token.starts_with(&begins));
        }
        let listed = shares(&launched.guest).await.unwrap();
        assert_eq!(listed.len(), PARTS.len());
        assert!(listed.iter().zip(&listed[1..]).all(|(one, next)| one.id < next.id));
    });
}

#[test]
fn a_token_that_would_permit_nothing_is_refused() {
    run(async |world| {
        let caller = world.caller();
        let launched = launch(&world, &caller, "web").await;
        let serial = Part::Serial.of(&launched.guest);
        let error = share(&serial, &only(Right::Kill), &Terms::default())
            .await
            .err()
            .unwrap();
        assert_eq!((error.kind, &error.about[..]), (Kind::BadConfig, "bounds.only"));
        assert!(
            error.message.contains("serial are output,input,share"),
            "{}",
            error.message
        );
        assert!(shares(&launched.guest).await.unwrap().is_empty());
    });
}

#[test]
fn describing_a_token_does_not_redeem_it() {
    run(async |world| {
        let caller = world.caller();
        let launched = launch(&world, &caller, "web").await;
        let terms = Terms {
            once: true,
            uid: Some(7),
            ..Terms::default()
        };
        let power = Part::Power.of(&launched.guest);
        let token = share(&power, &only(Right::Pause), &terms).await.unwrap().token;
        let (user, other) = (user(&world, 7), user(&world, 8));
        for _ in 0..2 {
            let told = describe_token(&user, &token).await.unwrap();
            assert_eq!((told.kind, &told.guest[..]), (FacetKind::Power, "web"));
            assert_eq!(told.rights, Rights::from(Right::Pause));
        }
        let refused = describe_token(&other, &token).await.err().unwrap();
        assert_eq!((refused.kind, &refused.about[..]), (Kind::PermissionDenied, "token"));
        assert_eq!(shares(&launched.guest).await.unwrap()[0].redeemed, 0);
        let _redeemed = redeem(&user, &token).await.unwrap();
        assert_eq!(describe_token(&user, &token).await.err().unwrap().kind, Kind::NotFound);
    });
}

#[test]
fn a_token_is_bound_to_its_user_and_its_secret_and_used_up_once() {
    run(async |world| {
        let caller = world.caller();
        let launched = launch(&world, &caller, "web").await;
        let terms = Terms {
            once: true,
            uid: Some(1001),
            label: "for the night shift".into(),
        };
        let power = Part::Power.of(&launched.guest);
        let shared = share(&power, &only(Right::Pause), &terms).await.unwrap();
        let refused = |caller, token: String| async move { redeem(&caller, &token).await.err().unwrap() };
        let wrong = {
            let mut wrong = shared.token.clone();
            let last = if wrong.pop() == Some('0') { '1' } else { '0' };
            wrong.push(last);
            wrong
        };
        let other_kind = shared.token.replacen("power", "guest", 1);
        for token in [wrong, other_kind, String::new(), "power.1".into(), "x".repeat(5000)] {
            assert_eq!(refused(user(&world, 1001), token).await.kind, Kind::NotFound);
        }
        let error = refused(user(&world, 1002), shared.token.clone()).await;
        assert_eq!((error.kind, &error.about[..]), (Kind::PermissionDenied, "token"));
        let waiting = shares(&launched.guest).await.unwrap().remove(0);
        assert_eq!(
            (waiting.redeemed, &waiting.terms, waiting.shared_by_uid),
            (0, &terms, 1000)
        );

        // Two at the same moment: one of them has it.
        let (one, two) = (user(&world, 1001), user(&world, 1001));
        let (first, second) = futures::join!(redeem(&one, &shared.token), redeem(&two, &shared.token));
        let won = match (first, second) {
            (Ok(won), Err(error)) | (Err(error), Ok(won)) => {
                assert_eq!(error.kind, Kind::NotFound);
                won
            }
            _ => panic!("not exactly one has it"),
        };
        assert_eq!(shares(&launched.guest).await.unwrap()[0].redeemed, 1);
        assert_eq!(describe(&won.0).await.unwrap().rights, Rights::from(Right::Pause));
        revoke_share(&launched.guest, shared.id).await.unwrap();
        assert_eq!(describe(&won.0).await.unwrap_err().kind, Kind::Revoked);
        assert!(shares(&launched.guest).await.unwrap().is_empty());
        assert_eq!(
            revoke_share(&launched.guest, shared.id).await.unwrap_err().kind,
            Kind::NotFound
        );
    });
}

#[test]
fn a_share_outlives_its_sharers_connection_but_not_the_grant_that_it_came_of() {
    run(async |world| {
        let (owner, other) = (world.caller(), user(&world, 7));
        let launched = launch(&world, &owner, "web").await;
        let (narrowed, revoker) = narrow_guest(&launched.guest, &Bounds::default()).await;
        let (lasting_one, of_narrowed) = {
            let sharer = world.caller();
            let found = sharer.lookup("web").await.unwrap();
            let one = share(&Part::Observer.of(&found), &Bounds::default(), &Terms::default())
                .await
                .unwrap();
            let two = share(&Part::Observer.of(&narrowed), &Bounds::default(), &Terms::default())
                .await
                .unwrap();
            sharer.connection.disconnect();
            sharer.connection.ended().await;
            (one.token, two.token)
        };
        let (kept, ..) = redeem(&other, &lasting_one).await.unwrap();
        let (lost, ..) = redeem(&other, &of_narrowed).await.unwrap();
        revoke(&revoker).await;
        assert_eq!(describe(&lost).await.unwrap_err().kind, Kind::Revoked);
        assert_eq!(redeem(&other, &of_narrowed).await.err().unwrap().kind, Kind::NotFound);
        describe(&kept).await.unwrap();
        // What was redeemed can be passed on, by who was allowed to.
        let passed = share(&kept, &Bounds::default(), &Terms::default()).await.unwrap();
        let (eighth, ninth) = (user(&world, 8), user(&world, 9));
        let (third, ..) = redeem(&eighth, &passed.token).await.unwrap();
        let without = share(&third, &only(Right::Observe), &Terms::default()).await.unwrap();
        let (last, ..) = redeem(&ninth, &without.token).await.unwrap();
        let error = share(&last, &Bounds::default(), &Terms::default()).await.err().unwrap();
        assert_eq!((error.kind, &error.about[..]), (Kind::PermissionDenied, "share"));
        // All at once.
        revoke_share(&launched.guest, 0).await.unwrap();
        for facet in [kept, third, last] {
            assert_eq!(describe(&facet).await.unwrap_err().kind, Kind::Revoked);
        }
    });
}

#[test]
fn a_narrowed_guest_knows_only_what_was_shared_through_it() {
    run(async |world| {
        let caller = world.caller();
        let launched = launch(&world, &caller, "web").await;
        let terms = Terms::default();
        let (mine, _) = narrow_guest(&launched.guest, &Bounds::default()).await;
        let through = share(&Part::Power.of(&mine), &Bounds::default(), &terms).await.unwrap();
        let beside = share(&Part::Power.of(&launched.guest), &Bounds::default(), &terms)
            .await
            .unwrap();
        let ids = |guest: guest::Client| async move {
            let listed = shares(&guest).await.unwrap();
            listed.iter().map(|share| share.id).collect::<Vec<_>>()
        };
        assert_eq!(ids(mine.clone()).await, [through.id]);
        assert_eq!(ids(launched.guest.clone()).await, [through.id, beside.id]);
        assert_eq!(revoke_share(&mine, beside.id).await.unwrap_err().kind, Kind::NotFound);
        revoke_share(&mine, 0).await.unwrap();
        assert_eq!(ids(launched.guest.clone()).await, [beside.id]);
    });
}

#[test]
fn a_share_ends_with_its_time_and_with_its_guest() {
    run(async |world| {
        let (caller, other) = (world.caller(), user(&world, 7));
        let launched = launch(&world, &caller, "web").await;
        let observer = Part::Observer.of(&launched.guest);
        let short = share(&observer, &lasting(Duration::from_millis(1)), &Terms::default())
            .await
            .unwrap();
        let stays = share(&observer, &Bounds::default(), &Terms::default()).await.unwrap();
        world.handle.sleep(Duration::from_millis(2)).await;
        assert_eq!(redeem(&other, &short.token).await.err().unwrap().kind, Kind::NotFound);
        let (redeemed, ..) = redeem(&other, &stays.token).await.unwrap();
        kill(&launched.guest).await.unwrap();
        // What was redeemed before still looks, like any observer of a guest that has ended.
        let info = METHODS.iter().find(|method| method.name == "Observer.info").unwrap();
        (info.call)(redeemed).await.unwrap();
        assert_eq!(redeem(&other, &stays.token).await.err().unwrap().kind, Kind::NotFound);
    });
}

#[test]
fn a_guest_that_begins_again_is_the_same_guest_to_those_who_hold_it() {
    run(async |world| {
        let (caller, other) = (world.caller(), user(&world, 7));
        let launched = launch(&world, &caller, "web").await;
        let shared = share(
            &Part::Balloon.of(&launched.guest),
            &Bounds::default(),
            &Terms::default(),
        )
        .await
        .unwrap();
        let (before, ..) = redeem(&other, &shared.token).await.unwrap();
        let (revoked, revoker) = narrow(&Part::Balloon.of(&launched.guest), &Bounds::default())
            .await
            .unwrap();
        revoke(&revoker).await;
        let call = |name: &str| METHODS.iter().find(|method| method.name == name).unwrap().call;
        call("Power.reset")(Part::Power.of(&launched.guest)).await.unwrap();
        assert_eq!(world.fake.count(), 2, "it has a component of its own");
        let (after, ..) = redeem(&other, &shared.token).await.unwrap();
        let size = call("BalloonController.getBalloonSize");
        for facet in [&before, &after] {
            size(facet.clone()).await.unwrap();
        }
        assert_eq!(size(revoked).await.unwrap_err().kind, Kind::Revoked);
        revoke_share(&launched.guest, shared.id).await.unwrap();
        for facet in [before, after] {
            assert_eq!(size(facet).await.unwrap_err().kind, Kind::Revoked);
        }
    });
}

/// Descriptors go with the messages of whoever redeemed, not of whoever shared.
#[test]
fn a_redeemed_console_opens_on_the_redeemers_connection() {
    run(async |world| {
        let (caller, other) = (world.caller(), user(&world, 7));
        let launched = launch(&world, &caller, "web").await;
        let console = Part::Console.of(&launched.guest);
        let shared = share(&console, &only(Right::Output), &Terms::default()).await.unwrap();
        let (redeemed, kind, _) = redeem(&other, &shared.token).await.unwrap();
        assert_eq!(kind, FacetKind::Console);
        let redeemed: serial::Client = cast(redeemed);
        let answer = redeemed.open_request().send().promise.await.unwrap();
        let Ok(serial::open_result::Fd(fd)) = answer.get().unwrap().which() else {
            panic!("no stream")
        };
        let number = fd.unwrap().get_number();
        assert!(Handles::take(&caller.connection.fds(), number).is_err());
        let stream: UnixStream = Handles::take(&other.connection.fds(), number).unwrap().into();
        world.fake.last().consoles.borrow_mut()[0]
            .write_all(b"login: ")
            .unwrap();
        let mut bytes = [0; 7];
        let stream = world.handle.register(stream).unwrap();
        (&stream).read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"login: ");
        revoke(&shared.revoker).await;
        assert_eq!((&stream).read(&mut bytes).await.unwrap(), 0);
    });
}

#[test]
fn by_the_read_only_socket_a_token_only_looks() {
    run(async |world| {
        let caller = world.caller();
        let launched = launch(&world, &caller, "web").await;
        let shared = share(&cast(launched.guest.clone()), &Bounds::default(), &Terms::default())
            .await
            .unwrap();
        let who = sepal_guest_manager::client::Who {
            uid: 7,
            gid: 7,
            pid: None,
            share: None,
        };
        let looker = world.caller_with(|fds| Client::read_only(fds, who));
        let (redeemed, ..) = redeem(&looker, &shared.token).await.unwrap();
        let rights = describe(&redeemed).await.unwrap().rights;
        assert_eq!(rights, Rights::from(Right::Observe) | Right::Output);
    });
}

#[test]
fn there_are_only_so_many_shares() {
    run(async |world| {
        let caller = world.caller();
        let launched = launch(&world, &caller, "web").await;
        let (hub, revoker) = narrow(&Part::Power.of(&launched.guest), &Bounds::default())
            .await
            .unwrap();
        let mut made = 0;
        let error: Error = loop {
            match share(&hub, &Bounds::default(), &Terms::default()).await {
                Ok(_) => made += 1,
                Err(error) => break error,
            }
        };
        assert_eq!((made, error.kind), (256, Kind::NoResources));
        revoke(&revoker).await;
        share(&Part::Power.of(&launched.guest), &Bounds::default(), &Terms::default())
            .await
            .unwrap();
    });
}

//! What is noted of calls to guests: what changes something, by whom, by which share, and what came of it; no token, and no key that was typed.

use std::time::Duration;

use sepal_schema::{
    facet::{Bounds, Right, Terms},
    facet_capnp::facet::describe_result,
    guest_capnp::{power, serial},
};
use serde_json::{Value, json};

use super::{
    describe, launch,
    methods::{Part, cast},
    narrow, redeem, revoke, revoke_share, share, user,
};
use crate::{audit::audited, world::info};

fn said(line: &Value) -> (&str, u64, &Value, &str, &str) {
    let outcome = &line["outcome"];
    (
        line["deed"].as_str().unwrap(),
        line["uid"].as_u64().unwrap(),
        &line["share"],
        line["detail"].as_str().unwrap(),
        outcome.as_str().or_else(|| outcome["kind"].as_str()).unwrap(),
    )
}

#[test]
fn what_is_done_to_a_guest_is_noted() {
    let mut tokens = Vec::new();
    let lines = audited(async |world| {
        let (alice, bob) = (world.caller(), user(&world, 7));
        let launched = launch(&world, &alice, "web").await;
        let bounds = Bounds::only([Right::Pause, Right::Nmi, Right::Input].into_iter().collect());
        // Shared twice, so that the number says something.
        for part in [Part::Serial, Part::Power] {
            let shared = share(&part.of(&launched.guest), &bounds, &Terms::default())
                .await
                .unwrap();
            tokens.push(shared.token);
        }
        let (power, ..) = redeem(&bob, &tokens[1]).await.unwrap();
        redeem(&bob, "power.2.x").await.err().unwrap();
        let power: power::Client = cast(power);
        power.pause_request().send().promise.await.unwrap();
        power.kill_request().send().promise.await.unwrap();
        let given_up = world
            .handle
            .timeout(Duration::from_millis(1), power.nmi_request().send().promise);
        assert!(given_up.await.is_err());

        let (typist, ..) = redeem(&bob, &tokens[0]).await.unwrap();
        let typist: serial::Client = cast(typist);
        for word in ["hunter2", "hunter3"] {
            let mut call = typist.write_request();
            call.get().set_bytes(word.as_bytes());
            call.send().await.unwrap();
        }
        // Looking is not noted, nor is narrowing; that a token was tried in vain is.
        info(&launched.guest).await;
        let (narrowed, revoker) = narrow(&Part::Debug.of(&launched.guest), &bounds).await.unwrap();
        describe(&narrowed).await.unwrap();
        for (token, known) in [(tokens[0].as_str(), true), ("power.2.x", false)] {
            let mut request = bob.manager.describe_request();
            request.get().set_token(token);
            let answer = request.send().promise.await.unwrap();
            let described = matches!(answer.get().unwrap().which(), Ok(describe_result::Description(_)));
            assert_eq!(described, known);
        }
        revoke(&revoker).await;
        revoke(&revoker).await;
        revoke_share(&launched.guest, 2).await.unwrap();
        power.resume_request().send().promise.await.unwrap();
    });
    // What the lease ends with the test is another matter.
    let of_manager = |deed: &str| deed == "GuestManager.launch" || deed.starts_with("Lease.");
    let of_guest: Vec<_> = lines.iter().map(said).filter(|(deed, ..)| !of_manager(deed)).collect();
    let none = Value::Null;
    let (first, second) = (json!(1), json!(2));
    let expected = [
        ("Facet.share", 1000, &none, "serial", "ok"),
        ("Facet.share", 1000, &none, "power", "ok"),
        ("GuestManager.redeem", 7, &none, "power, share 2", "ok"),
        ("GuestManager.redeem", 7, &none, "", "NOT_FOUND"),
        ("Power.pause", 7, &second, "", "ok"),
        ("Power.kill", 7, &second, "", "PERMISSION_DENIED"),
        ("Power.nmi", 7, &second, "", "CANCELLED"),
        ("GuestManager.redeem", 7, &none, "serial, share 1", "ok"),
        ("Serial.write", 7, &first, "serial", "ok"),
        ("GuestManager.describe", 7, &none, "", "NOT_FOUND"),
        ("Revoker.revoke", 1000, &none, "debug", "ok"),
        ("Guest.revokeShare", 1000, &none, "share 2", "ok"),
        ("Power.resume", 7, &second, "", "REVOKED"),
    ];
    let sorted = |mut all: Vec<_>| {
        // A call that is given up is noted when that is known.
        all.sort_by_key(|(deed, ..): &(&str, u64, &Value, &str, &str)| *deed == "Power.nmi");
        all
    };
    let noted = sorted(of_guest);
    assert_eq!(noted, sorted(expected.into()));
    let all: String = lines.iter().map(Value::to_string).collect();
    for token in tokens {
        assert!(!all.contains(token.rsplit('.').next().unwrap()));
    }
    assert!(!all.contains("hunter"));
}

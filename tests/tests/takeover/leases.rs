//! Leases: by their tokens they are redeemed, by the next manager too; what nobody redeems is stopped.

use sepal_schema::{
    error::{Error, Outcome},
    info::GuestStatus,
    manager_capnp::guest_manager::lease::{self, token_result},
};
use sepal_tests::{Rpc, kvm_missing, rpc::Launched};

use crate::scene::Scene;

#[track_caller]
fn token(rpc: &mut Rpc, lease: &lease::Client) -> String {
    let asked = lease.token_request().send().promise;
    let answer = rpc.wait("the token", asked).unwrap();
    match answer.get().unwrap().which().unwrap() {
        token_result::Token(token) => token.unwrap().to_string().unwrap(),
        token_result::Error(error) => panic!("{:?}", Error::read(error.unwrap())),
    }
}

#[track_caller]
fn redeem(rpc: &mut Rpc, token: &str) -> Result<Launched, Error> {
    let mut request = rpc.manager.redeem_lease_request();
    request.get().set_token(token);
    let answer = rpc.wait("redeeming", request.send().promise).unwrap();
    let launched = answer.get().unwrap().outcome()?;
    Ok(Launched {
        guest: launched.get_guest().unwrap(),
        lease: launched.get_lease().unwrap(),
        name: launched.get_name().unwrap().to_string().unwrap(),
    })
}

#[test]
fn who_redeems_a_lease_has_it_and_who_does_not_loses_the_guest() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    let redeemed = scene.rpc.launch(Scene::config("redeemed"), false).unwrap();
    let forgotten = scene.rpc.launch(Scene::config("forgotten"), false).unwrap();
    scene.until_running("forgotten");
    let of_redeemed = token(&mut scene.rpc, &redeemed.lease);
    assert!(
        of_redeemed.starts_with("lease.") && of_redeemed.len() <= 128,
        "{of_redeemed}"
    );
    let of_forgotten = token(&mut scene.rpc, &forgotten.lease);
    scene.kill_manager();
    drop((redeemed, forgotten));
    scene.start_manager();

    for name in ["redeemed", "forgotten"] {
        let info = scene.info(name);
        assert_eq!(info.status, GuestStatus::Running);
        assert!((1..=30_000).contains(&info.upkeep.lease_ends_ms), "{info:?}");
        assert!(!info.detached);
    }
    for wrong in [
        "",
        "lease.",
        "lease.00",
        &format!("{}0", &of_redeemed[..of_redeemed.len() - 1]),
    ] {
        if wrong != of_redeemed {
            assert!(redeem(&mut scene.rpc, wrong).is_err(), "{wrong}");
        }
    }
    let kept = redeem(&mut scene.rpc, &of_redeemed).unwrap();
    assert_eq!(kept.name, "redeemed");
    assert_eq!(scene.info("redeemed").upkeep.lease_ends_ms, 0);
    // The other one is waited for in vain.
    let info = scene.until("forgotten", "it is stopped", |info| info.stop.is_some());
    let detail = info.stop.unwrap().detail;
    assert!(detail.contains("lease was not redeemed within 30 s"), "{detail}");
    assert!(redeem(&mut scene.rpc, &of_forgotten).is_err());
    assert_eq!(scene.info("redeemed").status, GuestStatus::Running);
    scene.end();
}

#[test]
fn a_lease_moves_to_whoever_redeems_it_last() {
    if kvm_missing() {
        return;
    }
    let mut scene = Scene::new();
    let mut config = Scene::config("bee");
    config.durable = false;
    let first = scene.rpc.launch(config, false).unwrap();
    let token = token(&mut scene.rpc, &first.lease);
    let mut other = scene.world.connect();
    let second = redeem(&mut other, &token).unwrap();
    // The first one keeps nothing any more.
    drop(first);
    scene.rpc.list();
    assert_eq!(scene.info("bee").upkeep.lease_ends_ms, 0);
    // The second one is waited for, because there is a token.
    drop((second, other));
    scene.until("bee", "it is waited for", |info| info.upkeep.lease_ends_ms > 0);
    let third = redeem(&mut scene.rpc, &token).unwrap();
    assert_eq!(scene.info("bee").upkeep.lease_ends_ms, 0);
    let detach = third.lease.detach_request().send().promise;
    scene.rpc.wait("detach", detach).unwrap();
    drop(third);
    assert!(
        redeem(&mut scene.rpc, &token).is_err(),
        "nothing depends on it any more"
    );
    assert_eq!(scene.info("bee").status, GuestStatus::Running);
    scene.end();
}

//! Leases: what keeps a guest, by whom they are redeemed, and what becomes of the guest of one that nobody has.

use std::time::Duration;

use sepal_guest_manager::{
    client::{Client, Who},
    manager::Settings,
    roles::Role,
};
use sepal_schema::{
    error::{Error, Kind, read_completion},
    guest_capnp::guest,
    info::GuestStatus,
    manager_capnp::guest_manager::lease::{self, token_result},
    report::Reason,
};

use crate::world::{Caller, Launched, info, run, status, wait, with};

/// A manager that does not wait long.
pub(crate) fn hasty() -> Settings {
    Settings {
        lease_grace: Duration::from_millis(20),
        ..Settings::default()
    }
}

pub(crate) async fn token(lease: &lease::Client) -> Result<String, Error> {
    let answer = lease.token_request().send().promise.await?;
    match answer.get()?.which().unwrap() {
        token_result::Token(token) => Ok(token?.to_string().map_err(capnp::Error::from)?),
        token_result::Error(error) => Err(Error::read(error?)?),
    }
}

pub(crate) async fn detach(lease: &lease::Client) -> Result<(), Error> {
    read_completion(lease.detach_request().send().promise.await?.get()?)
}

impl Caller {
    pub(crate) async fn redeem_lease(&self, token: &str) -> Result<Launched, Error> {
        let mut request = self.manager.redeem_lease_request();
        request.get().set_token(token);
        Launched::read(request.send().promise.await?.get()?)
    }
}

/// Milliseconds until it is stopped; 0: its lease is not waited for.
pub(crate) async fn ends_in(guest: &guest::Client) -> u32 {
    info(guest).await.upkeep.lease_ends_ms
}

#[test]
fn a_lease_that_nobody_can_redeem_takes_its_guest_along_at_once() {
    run(async |world| {
        let caller = world.caller();
        let launched = caller.launch("web").await.unwrap();
        let guest = launched.guest;
        drop(launched.lease);
        let report = wait(&guest).await;
        assert_eq!(report.reason, Reason::Killed);
        assert!(report.detail.contains("lease"), "{}", report.detail);
    });
}

#[test]
fn a_lease_that_somebody_could_redeem_is_waited_for() {
    with(hasty(), async |world| {
        let caller = world.caller();
        let launched = caller.launch("web").await.unwrap();
        let token = token(&launched.lease).await.unwrap();
        assert!(token.starts_with("lease.") && token.len() <= 128, "{token}");
        assert_eq!(ends_in(&launched.guest).await, 0);
        drop(launched.lease);
        let report = wait(&launched.guest).await;
        assert_eq!(report.reason, Reason::Killed);
        assert!(
            report.detail.contains("not redeemed within 0.02 s"),
            "{}",
            report.detail
        );
        let error = caller.redeem_lease(&token).await.err().unwrap();
        assert_eq!((error.kind, &error.about[..]), (Kind::NotFound, "token"));
    });
}

#[test]
fn a_lease_is_whoevers_who_redeemed_it_last() {
    run(async |world| {
        let (alice, bob) = (world.caller(), world.caller_as(false));
        let first = alice.launch("web").await.unwrap();
        let token = token(&first.lease).await.unwrap();
        let second = bob.redeem_lease(&token).await.unwrap();
        assert_eq!(second.name, "web");
        // Who had it before can neither let the guest go nor give tokens, nor end it by going.
        assert_eq!(detach(&first.lease).await.unwrap_err().kind, Kind::NotSupported);
        assert_eq!(
            super::leases::token(&first.lease).await.unwrap_err().kind,
            Kind::NotSupported
        );
        drop(first);
        assert_eq!(ends_in(&second.guest).await, 0);
        assert!(!info(&second.guest).await.detached);

        drop(second.lease);
        let left = ends_in(&second.guest).await;
        assert!((1..=30_000).contains(&left), "{left}");
        let third = alice.redeem_lease(&token).await.unwrap();
        assert_eq!(ends_in(&third.guest).await, 0);
        // Twice by the same one: the last one counts.
        let fourth = alice.redeem_lease(&token).await.unwrap();
        drop(third);
        assert_eq!(ends_in(&fourth.guest).await, 0);
        detach(&fourth.lease).await.unwrap();
        detach(&fourth.lease).await.unwrap();
        assert_eq!(alice.redeem_lease(&token).await.err().unwrap().kind, Kind::NotFound);
        drop(fourth.lease);
        assert_eq!(status(&fourth.guest).await, GuestStatus::Running);
        assert_eq!(ends_in(&fourth.guest).await, 0);
    });
}

#[test]
fn what_is_no_token_is_refused_and_so_is_who_may_not_launch() {
    run(async |world| {
        let caller = world.caller();
        let launched = caller.launch("web").await.unwrap();
        let token = token(&launched.lease).await.unwrap();
        let (half, other) = (&token[..token.len() - 1], format!("{}0", &token[..token.len() - 1]));
        let other = if other == token { format!("{half}1") } else { other };
        for wrong in ["", "lease.", "lease.00", "power.1.00", half, &other] {
            let error = caller.redeem_lease(wrong).await.err().unwrap();
            assert_eq!((error.kind, &error.about[..]), (Kind::NotFound, "token"), "{wrong}");
        }
        let who = Who {
            uid: 7,
            gid: 7,
            pid: None,
            share: None,
        };
        let looker = world.caller_with(|fds| Client::new(fds, who, Role::Observe));
        let error = looker.redeem_lease(&token).await.err().unwrap();
        assert_eq!(error.kind, Kind::PermissionDenied);
        // It is still whoever's who launched it.
        self::detach(&launched.lease).await.unwrap();
    });
}

#[test]
fn of_many_tokens_the_last_ones_count() {
    run(async |world| {
        let caller = world.caller();
        let launched = caller.launch("web").await.unwrap();
        let mut tokens = Vec::new();
        for _ in 0..17 {
            tokens.push(token(&launched.lease).await.unwrap());
        }
        let error = caller.redeem_lease(&tokens[0]).await.err().unwrap();
        assert_eq!(error.kind, Kind::NotFound);
        let mut held = launched.lease;
        for token in &tokens[1..] {
            held = caller.redeem_lease(token).await.unwrap().lease;
        }
        detach(&held).await.unwrap();
    });
}

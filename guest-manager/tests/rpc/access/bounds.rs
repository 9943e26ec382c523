//! Bounds: ranges, ports, rates; they are enforced before the component hears of a call, and told as they are.

use std::time::Duration;

use sepal_schema::{
    config::device::AGENT_PORT,
    device_capnp::{balloon_controller, mem_controller},
    error::{Error, Kind, read_completion},
    facet::{Bounds, CallRate, Range, Right, Rights},
    facet_capnp::facet,
    guest_capnp::power,
    vsock_capnp::host_vsock_endpoint,
};

use super::{
    describe, lasting, launch,
    methods::{Part, cast},
    narrow,
};
use crate::{
    vsock::{Taker, connect, listen},
    world::run,
};

async fn set_balloon(of: &facet::Client, pages: u32) -> Result<(), Error> {
    let balloon: balloon_controller::Client = cast(of.clone());
    let mut call = balloon.request_balloon_size_request();
    call.get().set_pages(pages);
    read_completion(call.send().promise.await?.get()?)
}

async fn plug(of: &facet::Client, bytes: u64) -> Result<(), Error> {
    let memory: mem_controller::Client = cast(of.clone());
    let mut call = memory.request_size_request();
    call.get().set_bytes(bytes);
    read_completion(call.send().promise.await?.get()?)
}

async fn pause(of: &facet::Client) -> Result<(), Error> {
    let power: power::Client = cast(of.clone());
    read_completion(power.pause_request().send().promise.await?.get()?)
}

fn range(min: u64, max: u64) -> Option<Range> {
    Some(Range { min, max })
}

#[test]
fn sizes_stay_within_their_ranges() {
    run(async |world| {
        let caller = world.caller();
        let launched = launch(&world, &caller, "web").await;
        let bounds = |min, max| Bounds {
            balloon_pages: range(min, max),
            memory_bytes: range(min << 20, max << 20),
            ..Bounds::default()
        };
        let told = world.fake.last().told.clone();
        let (wide, _) = narrow(&Part::Balloon.of(&launched.guest), &bounds(0, 200))
            .await
            .unwrap();
        let (tight, _) = narrow(&wide, &bounds(100, 300)).await.unwrap();
        for (pages, fits) in [(99, false), (100, true), (200, true), (201, false), (u32::MAX, false)] {
            told.pages.set(7);
            let outcome = set_balloon(&tight, pages).await;
            assert_eq!(told.pages.get(), if fits { pages } else { 7 });
            match outcome {
                Ok(()) => assert!(fits),
                Err(error) => {
                    assert_eq!(error.kind, Kind::PermissionDenied);
                    assert!(!fits && error.message.contains("100 to 200 pages, not"), "{error}");
                }
            }
        }
        let (memory, _) = narrow(&Part::Memory.of(&launched.guest), &bounds(1, 2)).await.unwrap();
        assert_eq!(plug(&memory, 0).await.unwrap_err().kind, Kind::PermissionDenied);
        plug(&memory, 2 << 20).await.unwrap();
        assert_eq!(told.plugged.get(), 2 << 20);
        // What leaves nothing is a mistake.
        let error = narrow(&tight, &bounds(201, 300)).await.err().unwrap();
        assert_eq!((error.kind, &error.about[..]), (Kind::BadConfig, "bounds.balloonPages"));
    });
}

#[test]
fn only_the_ports_that_are_named_are_connected_to_and_listened_on() {
    run(async |world| {
        let caller = world.caller();
        let launched = launch(&world, &caller, "web").await;
        let bounds = Bounds {
            vsock_ports: vec![22, 52],
            ..Bounds::default()
        };
        let (narrowed, _) = narrow(&Part::Vsock.of(&launched.guest), &bounds).await.unwrap();
        let endpoint: host_vsock_endpoint::Client = cast(narrowed);
        connect(&world, &caller, &endpoint, 22).await.unwrap();
        let _listener = listen(&endpoint, 52, Taker::default()).await.unwrap();
        let refused = [
            connect(&world, &caller, &endpoint, 23).await.err().unwrap(),
            // Every port is more than those two.
            listen(&endpoint, u32::MAX, Taker::default()).await.err().unwrap(),
        ];
        for error in refused {
            assert_eq!((error.kind, &error.about[..]), (Kind::PermissionDenied, "port"));
            assert!(error.message.ends_with("only 22, 52"), "{error}");
        }
    });
}

#[test]
fn who_may_connect_but_not_use_the_agent_does_not_reach_it_by_its_port() {
    run(async |world| {
        let caller = world.caller();
        let launched = launch(&world, &caller, "web").await;
        let bounds = Bounds::only(Rights::from(Right::Connect));
        let (narrowed, _) = narrow(&Part::Vsock.of(&launched.guest), &bounds).await.unwrap();
        let endpoint: host_vsock_endpoint::Client = cast(narrowed);
        let error = connect(&world, &caller, &endpoint, AGENT_PORT).await.err().unwrap();
        assert_eq!(error.kind, Kind::PermissionDenied);
        assert!(error.message.contains("\"agent\""), "{error}");
        connect(&world, &caller, &endpoint, AGENT_PORT + 1).await.unwrap();
    });
}

#[test]
fn more_changing_calls_than_its_rate_are_refused_and_looking_is_free() {
    run(async |world| {
        let caller = world.caller();
        let launched = launch(&world, &caller, "web").await;
        let bounds = Bounds {
            // So seldom that no third call is taken while the test runs.
            rate: Some(CallRate {
                per_second: 1,
                burst: 2,
            }),
            ..Bounds::default()
        };
        let (guest, _) = super::narrow_guest(&launched.guest, &bounds).await;
        let power = Part::Power.of(&guest);
        let (again, _) = narrow(&power, &Bounds::default()).await.unwrap();
        pause(&power).await.unwrap();
        pause(&again).await.unwrap();
        // All that is derived from it shares the rate.
        let mut refused = None;
        for _ in 0..3 {
            refused = refused.or(pause(&again).await.err());
        }
        let error = refused.unwrap();
        assert_eq!(error.kind, Kind::NoResources);
        assert!(
            error
                .message
                .contains("1 changing calls a second, 2 at once; try again in"),
            "{error}"
        );
        for _ in 0..20 {
            describe(&power).await.unwrap();
            crate::world::info(&guest).await;
        }
        // Others have a rate of their own.
        pause(&Part::Power.of(&launched.guest)).await.unwrap();
    });
}

#[test]
fn the_tightest_bounds_are_told() {
    run(async |world| {
        let caller = world.caller();
        let launched = launch(&world, &caller, "web").await;
        let first = Bounds {
            only: Some(Rights::from(Right::Observe) | Right::Balloon | Right::Kill),
            rate: Some(CallRate {
                per_second: 10,
                burst: 3,
            }),
            balloon_pages: range(10, 100),
            vsock_ports: vec![1, 2, 3],
            ..lasting(Duration::from_secs(3600))
        };
        let second = Bounds {
            only: Some(Rights::from(Right::Balloon) | Right::Kill | Right::Share),
            rate: Some(CallRate {
                per_second: 5,
                burst: 50,
            }),
            balloon_pages: range(0, 50),
            memory_bytes: range(0, 1 << 20),
            vsock_ports: vec![3, 4],
            ..lasting(Duration::from_secs(7200))
        };
        let (guest, _) = super::narrow_guest(&launched.guest, &first).await;
        let (guest, _) = super::narrow_guest(&guest, &second).await;
        let of_guest = describe(&cast(guest.clone())).await.unwrap();
        assert_eq!(of_guest.rights, Rights::from(Right::Balloon) | Right::Kill);
        let lasts = of_guest.expires_in.unwrap();
        assert!(
            lasts <= Duration::from_secs(3600) && lasts > Duration::from_secs(3000),
            "{lasts:?}"
        );
        let expected = Bounds {
            only: Some(of_guest.rights),
            lifetime: of_guest.bounds.lifetime,
            rate: Some(CallRate {
                per_second: 5,
                burst: 3,
            }),
            balloon_pages: range(10, 50),
            memory_bytes: range(0, 1 << 20),
            vsock_ports: vec![3],
        };
        assert_eq!(of_guest.bounds, expected);
        // Of a part, only the rights that mean something for it.
        let of_balloon = describe(&Part::Balloon.of(&guest)).await.unwrap();
        assert_eq!(of_balloon.rights, Rights::from(Right::Balloon));
    });
}

#[test]
fn a_lifetime_of_ages_is_one() {
    run(async |world| {
        let caller = world.caller();
        let launched = launch(&world, &caller, "web").await;
        let ages = Duration::from_millis(u64::MAX);
        let (power, revoker) = narrow(&Part::Power.of(&launched.guest), &lasting(ages)).await.unwrap();
        // Its timer does not keep others from theirs.
        let short = lasting(Duration::from_millis(1));
        let (observer, _) = narrow(&Part::Observer.of(&launched.guest), &short).await.unwrap();
        world.handle.sleep(Duration::from_millis(2)).await;
        assert_eq!(describe(&observer).await.unwrap_err().kind, Kind::Revoked);
        pause(&power).await.unwrap();
        super::revoke(&revoker).await;
        assert_eq!(pause(&power).await.unwrap_err().kind, Kind::Revoked);
    });
}

#[test]
fn bounds_that_make_no_sense_are_refused() {
    run(async |world| {
        let caller = world.caller();
        let launched = launch(&world, &caller, "web").await;
        let power = Part::Power.of(&launched.guest);
        let mut call = power.narrow_request();
        call.get().init_bounds().set_burst(1);
        let answer = call.send().promise.await.unwrap();
        let error = Error::read(answer.get().unwrap().get_error().unwrap()).unwrap();
        assert_eq!((error.kind, &error.about[..]), (Kind::BadConfig, "bounds.burst"));
        let mut deep = power;
        let error = loop {
            match narrow(&deep, &Bounds::default()).await {
                Ok((next, _)) => deep = next,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind, Kind::NoResources);
        describe(&deep).await.unwrap();
    });
}

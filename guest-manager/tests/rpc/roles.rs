//! What each role may do, and how refusals are worded.

use capnp::capability::FromClientHook;
use sepal_guest_manager::{
    client::{Client, Who},
    roles::Role,
};
use sepal_schema::{
    config::{
        File, GuestConfig,
        device::{Link, Network, RateLimit},
    },
    error::{Error, Kind, Outcome, read_completion},
    facet::{Description, Right, Rights},
    facet_capnp::facet,
    guest_capnp::guest,
    info::GuestStatus,
    manager_capnp,
};

use crate::world::{Caller, World, info, kill, named, run};

const WHO: Who = Who {
    uid: 1234,
    gid: 100,
    pid: None,
    share: None,
};

fn caller(world: &World, role: Role) -> Caller {
    world.caller_with(|fds| Client::new(fds, WHO, role))
}

/// A refusal that names both roles and the caller.
fn assert_refused<T>(outcome: Result<T, Error>, needed: &str, had: &str) {
    let error = outcome.err().expect("it is refused");
    assert_eq!(error.kind, Kind::PermissionDenied, "{error}");
    for part in [
        format!("needs the role {needed}"),
        format!("has the role {had}"),
        "uid 1234, gid 100".to_owned(),
    ] {
        assert!(error.message.contains(&part), "{part}: {error}");
    }
}

/// An exception that says the same.
fn assert_exception<T>(outcome: Result<T, capnp::Error>, needed: &str, had: &str) {
    let error = outcome.err().expect("it is refused").to_string();
    for part in [
        "PERMISSION_DENIED: ",
        &format!("needs the role {needed}"),
        &format!("has the role {had}"),
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

async fn upload(caller: &Caller) -> Result<(), Error> {
    let answer = caller.manager.upload_request().send().promise.await?;
    answer.get()?.outcome().map(drop)
}

async fn shutdown(caller: &Caller) -> Result<(), Error> {
    read_completion(caller.manager.shutdown_request().send().promise.await?.get()?)
}

async fn redeem(caller: &Caller, token: &str) -> Result<(), Error> {
    let mut request = caller.manager.redeem_request();
    request.get().set_token(token);
    request.send().promise.await?.get()?.outcome().map(drop)
}

/// Role, and whether it came by the read-only socket.
async fn who_am_i(caller: &Caller) -> (u32, u32, manager_capnp::Role, bool) {
    let answer = caller.manager.who_am_i_request().send().promise.await.unwrap();
    let who = answer.get().unwrap();
    (
        who.get_uid(),
        who.get_gid(),
        who.get_role().unwrap(),
        who.get_read_only(),
    )
}

#[test]
fn without_a_role_there_are_only_tokens() {
    run(async |world| {
        let admin = world.caller();
        let _web = admin.launch("web").await.unwrap();
        let nobody = caller(&world, Role::None);
        assert_eq!(who_am_i(&nobody).await, (1234, 100, manager_capnp::Role::None, false));
        let version = nobody.manager.version_request().send().promise.await.unwrap();
        assert_eq!(version.get().unwrap().get_pid(), std::process::id());
        assert_eq!(
            redeem(&nobody, "power.1.nonsense").await.unwrap_err().kind,
            Kind::NotFound
        );

        assert_refused(nobody.lookup("web").await, "observe", "none");
        assert_exception(nobody.manager.list_request().send().promise.await, "observe", "none");
        assert_exception(nobody.manager.stats_request().send().promise.await, "observe", "none");
        assert_exception(
            nobody.manager.subscribe_request().send().promise.await,
            "observe",
            "none",
        );
        assert_refused(nobody.launch("mine").await, "operate", "none");
    });
}

#[test]
fn an_observer_changes_nothing() {
    run(async |world| {
        let admin = world.caller();
        let web = admin.launch("web").await.unwrap();
        let observer = caller(&world, Role::Observe);
        assert_eq!(observer.list().await.len(), 1);
        assert_eq!(info(&observer.lookup("web").await.unwrap()).await.name, "web");

        assert_refused(observer.new_guest("mine").await, "operate", "observe");
        assert_refused(observer.launch("mine").await, "operate", "observe");
        assert_refused(observer.force_shutdown("web").await, "operate", "observe");
        assert_refused(observer.remove("web").await, "operate", "observe");
        assert_refused(upload(&observer).await, "operate", "observe");
        assert_refused(shutdown(&observer).await, "admin", "observe");
        // What is not there is not told apart from what may not be touched.
        assert_refused(observer.force_shutdown("missing").await, "operate", "observe");
        assert_eq!(info(&web.guest).await.status, GuestStatus::Running);
        assert_eq!(admin.list().await.len(), 1);
    });
}

/// What a guest that a client found permits.
async fn rights(guest: &guest::Client) -> Rights {
    let facet: facet::Client = guest.clone().cast_to();
    let answer = facet.describe_request().send().promise.await.unwrap();
    match answer.get().unwrap().which().unwrap() {
        facet::describe_result::Description(description) => Description::read(description.unwrap()).unwrap().rights,
        facet::describe_result::Error(error) => panic!("{}", Error::read(error.unwrap()).unwrap()),
    }
}

#[test]
fn guests_permit_what_the_role_does() {
    run(async |world| {
        let admin = world.caller();
        let _web = admin.launch("web").await.unwrap();
        let observer = caller(&world, Role::Observe);
        let reader = world.caller_with(|fds| Client::read_only(fds, WHO));
        for caller in [&observer, &reader] {
            let web = caller.lookup("web").await.unwrap();
            assert_eq!(rights(&web).await, Rights::from(Right::Observe) | Right::Output);
            let error = kill(&web).await.unwrap_err();
            assert_eq!(error.kind, Kind::PermissionDenied);
            assert!(error.message.contains("kill"), "{error}");
        }
        let operator = caller(&world, Role::Operate);
        let web = operator.lookup("web").await.unwrap();
        assert_eq!(rights(&web).await, Rights::ALL.without(Right::Debug));
        let mine = operator.launch("mine").await.unwrap();
        assert_eq!(rights(&mine.guest).await, Rights::ALL.without(Right::Debug));
        let lifecycle = operator.new_guest("driven").await.unwrap();
        operator.create(&lifecycle, GuestConfig::default()).await.unwrap();
        let bound = lifecycle.bind_request().send().pipeline.get_guest();
        assert_eq!(rights(&bound).await, Rights::ALL.without(Right::Debug));
        kill(&web).await.unwrap();
        assert_eq!(rights(&admin.lookup("mine").await.unwrap()).await, Rights::ALL);
    });
}

#[test]
fn by_the_read_only_socket_everyone_is_an_observer() {
    run(async |world| {
        let admin = world.caller();
        let _web = admin.launch("web").await.unwrap();
        let root = Who { uid: 0, gid: 0, ..WHO };
        let reader = world.caller_with(|fds| Client::read_only(fds, root));
        assert_eq!(who_am_i(&reader).await, (0, 0, manager_capnp::Role::Observe, true));
        assert_eq!(reader.list().await.len(), 1);
        let error = reader.launch("mine").await.err().unwrap();
        assert_eq!(error.kind, Kind::PermissionDenied);
        assert!(
            error.message.contains("uid 0, gid 0, by the read-only socket"),
            "{error}"
        );
    });
}

#[test]
fn an_operator_launches_from_what_it_brings_and_stops_what_is_there() {
    run(async |world| {
        let admin = world.caller();
        let _web = admin.launch("web").await.unwrap();
        let operator = caller(&world, Role::Operate);
        let config = GuestConfig {
            kernel: File::Bytes(b"kernel".to_vec()),
            ..named("mine")
        };
        let mine = operator.launch_config(config, false).await.unwrap();
        assert_eq!(info(&mine.guest).await.status, GuestStatus::Running);
        operator.force_shutdown("web").await.unwrap();
        operator.remove("web").await.unwrap();
        assert!(upload(&operator).await.is_ok());
        assert_refused(shutdown(&operator).await, "admin", "operate");
    });
}

#[test]
fn what_needs_the_managers_authority_needs_an_admin() {
    run(async |world| {
        let operator = caller(&world, Role::Operate);
        let path = GuestConfig {
            kernel: File::Path("/boot/vmlinuz".into()),
            ..named("mine")
        };
        let network = GuestConfig {
            networks: vec![Network {
                mac: None,
                link: Link::User,
                mtu: 0,
                rate_limit: RateLimit::default(),
                queue_pairs: 0,
                offloads: None,
                link_down: false,
            }],
            ..named("mine")
        };
        let waived = GuestConfig {
            waived_layers: vec!["cgroup".into()],
            ..named("mine")
        };
        for (config, field) in [
            (path, "kernel"),
            (network, "networks[0].user"),
            (waived, "waivedLayers"),
        ] {
            let refused = operator.launch_config(config, false).await;
            assert_eq!(refused.as_ref().err().unwrap().about, field);
            assert_refused(refused, "admin", "operate");
        }
        let lifecycle = operator.new_guest("mine").await.unwrap();
        let path = GuestConfig {
            kernel: File::Bytes(vec![0; 8]),
            initrd: File::Path("/boot/initrd".into()),
            ..GuestConfig::default()
        };
        assert_refused(operator.create(&lifecycle, path).await, "admin", "operate");
        operator.create(&lifecycle, GuestConfig::default()).await.unwrap();
        assert_eq!(world.fake.count(), 1, "the refused ones came to no component");
    });
}

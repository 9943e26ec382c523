//! `GuestManager.check`: it says what create would say, and leaves no trace.

use std::{fs, io::Write, path::Path};

use sepal_guest_manager::{
    client::{Client, Who},
    roles::Role,
};
use sepal_schema::{
    config::{
        File, GuestConfig, OnReset,
        device::{Backend, Disk, DiskMode, Link, Network, Share, Vsock},
    },
    error::{Error, Kind},
};

use crate::{
    fake::{Behaviour, Does},
    world::{Caller, World, kill, named, run},
};

fn path(path: &Path) -> File {
    File::Path(path.to_str().unwrap().to_owned())
}

fn with_disks(images: &[&Path], mode: DiskMode) -> GuestConfig {
    GuestConfig {
        disks: images.iter().map(|image| Disk::new(path(image), mode)).collect(),
        ..named("web")
    }
}

fn with_backend(backend: &Path) -> GuestConfig {
    let share = Share {
        tag: "home".into(),
        backend: Backend::Path(backend.to_str().unwrap().to_owned()),
        queues: 0,
    };
    GuestConfig {
        shares: vec![share],
        ..named("web")
    }
}

fn with_vsock(cid: u32, path: &Path) -> GuestConfig {
    GuestConfig {
        vsock: Some(Vsock {
            cid,
            listeners: Vec::new(),
            socket_path: path.to_str().unwrap().to_owned(),
        }),
        agent: false,
        ..named("web")
    }
}

fn with_network(link: Link) -> GuestConfig {
    GuestConfig {
        networks: vec![Network::new(link)],
        ..named("web")
    }
}

/// Kind and field of the refusal that both check and launch answer with.
async fn refused(caller: &Caller, config: impl Fn() -> GuestConfig) -> (Kind, String) {
    let checked = caller.check(config()).await.unwrap_err();
    let launched = caller.launch_config(config(), false).await.err().unwrap();
    assert_eq!(checked, launched);
    (checked.kind, checked.about)
}

/// Nothing was started, and no guest was ever there.
async fn nothing_happened(world: &World, caller: &Caller) {
    let guests = caller.list().await.len();
    assert_eq!((world.fake.requests.borrow().len(), guests), (0, 0));
}

#[test]
fn what_create_takes_is_fit_and_nothing_is_made_of_it() {
    run(async |world| {
        let caller = world.caller();
        let folder = tempfile::tempdir().unwrap();
        let (image, socket) = (folder.path().join("image"), folder.path().join("vsock"));
        fs::write(&image, [0; 4096]).unwrap();
        caller.check(GuestConfig::default()).await.unwrap();
        for mode in [DiskMode::ReadWrite, DiskMode::ReadOnly, DiskMode::VolatileWrite] {
            caller.check(with_disks(&[&image], mode)).await.unwrap();
        }
        caller
            .check(GuestConfig {
                kernel: File::Bytes(b"kernel".into()),
                ..with_vsock(0x7000_0000 + std::process::id(), &socket)
            })
            .await
            .unwrap();
        let left: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
        nothing_happened(&world, &caller).await;
    });
}

#[test]
fn what_create_refuses_is_refused_in_the_same_words() {
    run(async |world| {
        let caller = world.caller();
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let missing = at("missing");
        let kernel = || GuestConfig {
            kernel: path(&missing),
            ..named("web")
        };
        assert_eq!(refused(&caller, kernel).await, (Kind::NotFound, "kernel".into()));
        let name = || named("no such name");
        assert_eq!(refused(&caller, name).await, (Kind::BadConfig, "name".into()));
        let memory = || GuestConfig {
            memory_mib: i32::MAX,
            ..named("web")
        };
        let too_much = (Kind::GuestInitializationFailure, "memoryMib".into());
        // How much the host has left changes from one call to the next, and with it the words.
        let error = caller.check(memory()).await.unwrap_err();
        assert_eq!((error.kind, error.about), too_much);

        fs::write(at("odd"), [0; 777]).unwrap();
        let odd = || with_disks(&[&at("odd")], DiskMode::ReadWrite);
        assert_eq!(refused(&caller, odd).await, (Kind::BadConfig, "disks[0].image".into()));
        fs::write(at("image"), [0; 4096]).unwrap();
        let twice = || with_disks(&[&at("image"), &at("image")], DiskMode::ReadWrite);
        assert_eq!(
            refused(&caller, twice).await,
            (Kind::AlreadyRunning, "disks[1].image".into())
        );
        let nowhere = || with_vsock(0, &at("nowhere/vsock"));
        assert_eq!(
            refused(&caller, nowhere).await,
            (Kind::NotFound, "vsock.socketPath".into())
        );
        let backend = (Kind::FailedServiceConnect, "shares[0].backend".into());
        assert_eq!(refused(&caller, || with_backend(&missing)).await, backend);
        let file = || with_backend(&at("image"));
        let error = caller.check(file()).await.unwrap_err();
        assert_eq!((error.kind, error.about), backend);
        let tap = || with_network(Link::TapNamed("a/b".into()));
        assert_eq!(
            refused(&caller, tap).await,
            (Kind::BadConfig, "networks[0].tapNamed".into())
        );
        let again = || {
            let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
            GuestConfig {
                on_reset: OnReset::Restart,
                ..with_network(Link::Socket(socket.into()))
            }
        };
        assert_eq!(
            refused(&caller, again).await,
            (Kind::NotSupported, "networks[0].socket".into())
        );
        let protected = || GuestConfig {
            protected_vm: true,
            ..named("web")
        };
        assert_eq!(
            refused(&caller, protected).await,
            (Kind::NotSupported, "protectedVm".into())
        );
        let sentence = caller.check(protected()).await.unwrap_err().message;
        assert!(sentence.contains("this host c"), "{sentence}");
        world.fake.behaviour.set(Behaviour {
            start: Does::Fails(Kind::StartFailure),
            ..Behaviour::default()
        });
        assert_eq!(
            refused(&caller, || named("web")).await,
            (Kind::StartFailure, String::new())
        );
    });
}

#[test]
fn what_others_use_is_told_and_left_alone() {
    run(async |world| {
        let caller = world.caller();
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        let socket = folder.path().join("vsock");
        fs::File::create(&image).unwrap().write_all(&[0; 4096]).unwrap();
        let cid = 0x7100_0000 + std::process::id();
        let config = || GuestConfig {
            disks: with_disks(&[&image], DiskMode::ReadWrite).disks,
            ..with_vsock(cid, &socket)
        };
        let other = GuestConfig {
            name: "db".into(),
            ..config()
        };
        let launched = caller.launch_config(other, false).await.unwrap();
        let told = async |config: GuestConfig| {
            let error: Error = caller.check(config).await.unwrap_err();
            (error.kind, error.about, error.message)
        };
        let (kind, about, message) = told(config()).await;
        assert_eq!((kind, &about[..]), (Kind::AlreadyRunning, "disks[0].image"));
        assert!(message.contains("guest \"db\""), "{message}");
        let (kind, about, message) = told(with_vsock(cid, &socket)).await;
        assert_eq!((kind, &about[..]), (Kind::AlreadyBound, "vsock.cid"));
        assert!(message.contains("guest \"db\""), "{message}");
        let (kind, about, _) = told(with_vsock(0, &socket)).await;
        assert_eq!((kind, &about[..]), (Kind::AlreadyBound, "vsock.socketPath"));
        // A name that is taken is no fault of the configuration.
        caller.check(named("db")).await.unwrap();
        kill(&launched.guest).await.unwrap();
        // A real component's files go with it.
        world.fake.last().config.take();
        caller.check(config()).await.unwrap();
    });
}

#[test]
fn it_needs_what_create_needs() {
    run(async |world| {
        let who = Who {
            uid: 1000,
            gid: 100,
            pid: None,
            share: None,
        };
        let observer = world.caller_with(|fds| Client::new(fds, who, Role::Observe));
        let error = observer.check(GuestConfig::default()).await.unwrap_err();
        assert_eq!(error.kind, Kind::PermissionDenied);
        assert!(error.message.contains("check needs the role operate"), "{error}");
        let operator = world.caller_as(false);
        operator.check(GuestConfig::default()).await.unwrap();
        let kernel = || GuestConfig {
            kernel: File::Path("/etc/hostname".into()),
            ..named("web")
        };
        assert_eq!(
            refused(&operator, kernel).await,
            (Kind::PermissionDenied, "kernel".into())
        );
    });
}

//! Devices: what the manager makes of a client's wishes before its component sees them, and what clients get of a guest's devices.

use std::{fs, io::Write, os::fd::OwnedFd, path::Path};

use rustix::fs::OFlags;
use sepal_guest_manager::manager::Settings;
use sepal_schema::{
    config::{
        File, GuestConfig,
        device::{Backend, Balloon, Console, Disk, DiskMode, Link, Network, Share, Vsock},
    },
    error::{Error, Kind, Outcome},
    guest_capnp::{console, guest, serial},
    report::Reason,
};

use crate::world::{Caller, World, info, kill, named, run, wait, with};

fn disk(path: &Path, mode: DiskMode) -> Disk {
    Disk::new(File::Path(path.to_str().unwrap().to_owned()), mode)
}

fn with_disks(name: &str, disks: Vec<Disk>) -> GuestConfig {
    GuestConfig { disks, ..named(name) }
}

fn with_vsock(name: &str, cid: u32) -> GuestConfig {
    let vsock = Vsock {
        cid,
        ..Vsock::default()
    };
    GuestConfig {
        vsock: Some(vsock),
        ..named(name)
    }
}

async fn refused(caller: &Caller, config: GuestConfig) -> Error {
    caller.launch_config(config, false).await.err().unwrap()
}

/// How the component got the images of its disks.
fn access(world: &World) -> Vec<OFlags> {
    let process = world.fake.last();
    let config = process.config.borrow();
    let flags = |disk: &Disk| match &disk.image {
        File::Fd(fd) => rustix::fs::fcntl_getfl(fd).unwrap() & OFlags::ACCMODE,
        _ => panic!("a component gets descriptors only"),
    };
    config.as_ref().unwrap().disks.iter().map(flags).collect()
}

#[test]
fn images_are_opened_for_what_the_disk_may_do_and_used_by_one_who_writes() {
    run(async |world| {
        let caller = world.caller();
        let folder = tempfile::tempdir().unwrap();
        let (data, base) = (folder.path().join("data"), folder.path().join("base"));
        fs::write(&data, [0; 4096]).unwrap();
        fs::write(&base, [0; 4096]).unwrap();
        let disks = |mode| vec![disk(&data, mode), disk(&base, DiskMode::VolatileWrite)];
        let web = caller
            .launch_config(with_disks("web", disks(DiskMode::ReadWrite)), false)
            .await
            .unwrap();
        assert_eq!(access(&world), [OFlags::RDWR, OFlags::RDONLY]);

        for mode in [DiskMode::ReadWrite, DiskMode::ReadOnly] {
            let error = refused(&caller, with_disks("db", disks(mode))).await;
            assert_eq!((error.kind, &error.about[..]), (Kind::AlreadyRunning, "disks[0].image"));
            assert!(error.message.contains("guest \"web\""), "{error}");
        }
        // What nobody writes to is anybody's.
        let shared = vec![disk(&base, DiskMode::ReadOnly)];
        let _db = caller.launch_config(with_disks("db", shared), false).await.unwrap();
        kill(&web.guest).await.unwrap();
        // The component has let go of it: its end of the descriptor is gone with its configuration.
        world.fake.processes.borrow()[0].config.take();
        let again = with_disks("web", vec![disk(&data, DiskMode::ReadWrite)]);
        caller.launch_config(again, false).await.unwrap();
    });
}

#[test]
fn volatile_disks_get_a_file_without_a_name_and_memory_where_there_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    fs::write(&image, [0; 4096]).unwrap();
    let modes = [DiskMode::VolatileWrite, DiskMode::ReadOnly];
    let config = || with_disks("web", modes.map(|mode| disk(&image, mode)).into());
    let with_scratch = |scratch: &Path, test: &dyn Fn(Vec<File>, Vec<String>)| {
        let settings = Settings {
            scratch: scratch.to_owned(),
            ..Settings::default()
        };
        with(settings, async |world| {
            let caller = world.caller();
            caller.launch_config(config(), true).await.unwrap();
            let seen = world.fake.last().config.take().unwrap();
            let files = seen.disks.into_iter().map(|disk| disk.scratch).collect();
            test(files, caller.list().await[0].problems.clone());
        });
    };

    with_scratch(folder.path(), &|files, problems| {
        let [File::Fd(kept), File::None] = &files[..] else {
            panic!("only the volatile disk has one");
        };
        let status = rustix::fs::fstat(kept).unwrap();
        assert_eq!((status.st_nlink, status.st_size), (0, 0));
        assert_eq!(rustix::fs::fcntl_getfl(kept).unwrap() & OFlags::ACCMODE, OFlags::RDWR);
        let told = problems.iter().any(|problem| problem.contains("in memory"));
        assert!(!told, "{problems:?}");
    });
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);

    with_scratch(&folder.path().join("missing"), &|files, problems| {
        assert!(files.iter().all(File::is_none));
        let told = problems
            .iter()
            .any(|problem| problem.contains("disks[0] is kept in memory"));
        assert!(told, "{problems:?}");
    });
}

#[test]
fn what_needs_the_managers_authority_is_not_for_strangers() {
    run(async |world| {
        let stranger = world.caller_as(false);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let name = path.to_str().unwrap().to_owned();
        let network = |link| GuestConfig {
            networks: vec![Network::new(link)],
            ..named("web")
        };
        let share = Share {
            tag: "home".into(),
            backend: Backend::Path(name.clone()),
            queues: 0,
        };
        let vsock = Vsock {
            socket_path: name.clone(),
            ..Vsock::default()
        };
        let wishes = [
            (
                with_disks("web", vec![disk(&path, DiskMode::ReadOnly)]),
                "disks[0].image",
            ),
            (network(Link::TapNamed("tap7".into())), "networks[0].tapNamed"),
            (network(Link::Bridge("br7".into())), "networks[0].bridge"),
            (
                GuestConfig {
                    shares: vec![share],
                    ..named("web")
                },
                "shares[0].backend",
            ),
            (
                GuestConfig {
                    vsock: Some(vsock),
                    ..named("web")
                },
                "vsock.socketPath",
            ),
        ];
        for (config, about) in wishes {
            let error = refused(&stranger, config).await;
            assert_eq!(
                (error.kind, &error.about[..]),
                (Kind::PermissionDenied, about),
                "{error}"
            );
        }
        assert_eq!(world.fake.count(), 0, "no component was started for nothing");
    });
}

#[test]
fn a_back_end_that_nobody_serves_is_told() {
    run(async |world| {
        let share = Share {
            tag: "home".into(),
            backend: Backend::Path("/nonexistent/fs.sock".into()),
            queues: 0,
        };
        let config = GuestConfig {
            shares: vec![share],
            ..named("web")
        };
        let error = refused(&world.caller(), config).await;
        assert_eq!(
            (error.kind, &error.about[..]),
            (Kind::FailedServiceConnect, "shares[0].backend")
        );
    });
}

#[test]
fn addresses_are_chosen_once_and_for_all() {
    run(async |world| {
        let caller = world.caller();
        let mut macs = Vec::new();
        for _ in 0..2 {
            let socket = || Link::Socket(OwnedFd::from(std::os::unix::net::UnixStream::pair().unwrap().0));
            let mut fixed = Network::new(socket());
            fixed.mac = Some([2, 0, 0, 0, 0, 9]);
            let config = GuestConfig {
                networks: vec![Network::new(socket()), Network::new(socket()), fixed],
                ..named("web")
            };
            let launched = caller.launch_config(config, false).await.unwrap();
            let process = world.fake.last();
            let config = process.config.take().unwrap();
            macs.push(
                config
                    .networks
                    .iter()
                    .map(|network| network.mac.unwrap())
                    .collect::<Vec<_>>(),
            );
            kill(&launched.guest).await.unwrap();
        }
        assert_eq!(macs[0], macs[1]);
        assert!(macs[0][0] != macs[0][1] && macs[0][2] == [2, 0, 0, 0, 0, 9]);
    });
}

#[test]
fn no_two_guests_have_a_context_id() {
    run(async |world| {
        let caller = world.caller();
        // Far from those that are chosen on a host that others test on.
        let cid = 0x5000_0000 + std::process::id();
        let web = caller.launch_config(with_vsock("web", cid), false).await.unwrap();
        let error = refused(&caller, with_vsock("db", cid)).await;
        assert_eq!((error.kind, &error.about[..]), (Kind::AlreadyBound, "vsock.cid"));
        assert!(error.message.contains("guest \"web\""), "{error}");
        kill(&web.guest).await.unwrap();
        caller.launch_config(with_vsock("db", cid), false).await.unwrap();
    });
}

async fn console(guest: &guest::Client, port: u32) -> Result<console::Client, Error> {
    let mut request = guest.console_request();
    request.get().set_port(port);
    let answer = request.send().promise.await?;
    Ok(answer.get()?.outcome()?.get_console()?)
}

async fn printed(console: &console::Client) -> (Vec<u8>, bool) {
    let output: sepal_schema::guest_capnp::output::Client =
        capnp::capability::FromClientHook::new(console.client.hook.clone());
    let answer = output.read_request().send().promise.await.unwrap();
    let answer = answer.get().unwrap();
    (answer.get_bytes().unwrap().to_vec(), answer.get_ended())
}

#[test]
fn each_port_of_a_console_is_a_capability_of_its_own() {
    run(async |world| {
        let caller = world.caller();
        let config = GuestConfig {
            console: Some(Console {
                ports: 2,
                ..Console::default()
            }),
            ..named("web")
        };
        let launched = caller.launch_config(config, false).await.unwrap();
        let ports = [0, 1].map(|port| console(&launched.guest, port));
        let ports: Vec<_> = futures::future::join_all(ports)
            .await
            .into_iter()
            .map(Result::unwrap)
            .collect();
        let error = console(&launched.guest, 2).await.err().unwrap();
        assert_eq!((error.kind, &error.about[..]), (Kind::DeviceNotPresent, "console"));
        let process = world.fake.last();
        for (i, text) in [(0, b"login: "), (1, b"metrics")] {
            process.consoles.borrow_mut()[i].write_all(text).unwrap();
            assert_eq!(printed(&ports[i]).await.0, text);
        }
        // The serial port is another thing altogether, and its holder cannot resize a console.
        let serial = launched.guest.serial_request().send().pipeline.get_serial();
        let as_console: console::Client = capnp::capability::FromClientHook::new(serial.client.hook);
        assert!(as_console.resize_request().send().promise.await.is_err());
        let _: serial::Client = capnp::capability::FromClientHook::new(ports[0].client.hook.clone());
        process.consoles.borrow_mut().clear();
        process.end(Reason::Shutdown);
        wait(&launched.guest).await;
        assert_eq!(printed(&ports[1]).await, (b"metrics".to_vec(), true));
    });
}

#[test]
fn a_device_that_was_left_out_is_said_not_to_be_there() {
    run(async |world| {
        let caller = world.caller();
        let launched = caller.launch("web").await.unwrap();
        let answer = launched.guest.agent_request().send().promise.await.unwrap();
        let error = answer.get().unwrap().outcome().err().unwrap();
        assert_eq!(error.kind, Kind::DeviceNotPresent);
        assert_eq!(
            console(&launched.guest, 0).await.err().unwrap().kind,
            Kind::DeviceNotPresent
        );
    });
}

#[test]
fn wishes_reach_the_component_as_they_were() {
    run(async |world| {
        let balloon = Balloon {
            deflate_on_oom: true,
            free_page_reporting: true,
        };
        let config = GuestConfig {
            balloon: Some(balloon),
            generation_id: true,
            panic_device: true,
            ..named("web")
        };
        let caller = world.caller();
        let launched = caller.launch_config(config, false).await.unwrap();
        let process = world.fake.last();
        let config = process.config.take().unwrap();
        assert_eq!(
            (config.balloon, config.generation_id, config.panic_device),
            (Some(balloon), true, true)
        );
        assert_eq!(info(&launched.guest).await.name, "web");
    });
}

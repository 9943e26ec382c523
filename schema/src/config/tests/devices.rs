//! Devices through the wire and back, and every refusal.

use super::*;
use crate::{
    config::device::{
        Backend, Backing, Balloon, Console, Disk, DiskFormat, DiskMode, Link, Listener, MemoryDevice, Network,
        RateLimit, Rng, Share, VhostUser, Vsock, WatchdogAction,
    },
    vsock_capnp::vsock_acceptor,
};

struct Nobody;

impl vsock_acceptor::Server for Nobody {}

fn number(table: &Table) -> u32 {
    table.send(some_fd()).unwrap()
}

/// Configures one disk that has an image.
fn disk(about: &str, fill: impl FnOnce(guest_config::disk::Builder<'_>, &Table)) {
    refused(Kind::BadConfig, about, |c, t| {
        let mut disk = c.init_disks(1).get(0);
        disk.reborrow().init_image().init_fd().set_number(number(t));
        fill(disk, t);
    });
}

/// Configures one network device, with user-mode networking unless told otherwise.
fn network(about: &str, fill: impl FnOnce(guest_config::network::Builder<'_>, &Table)) {
    refused(Kind::BadConfig, about, |c, t| fill(c.init_networks(1).get(0), t));
}

fn limit() -> RateLimit {
    RateLimit {
        bytes_per_second: 1 << 20,
        operations_per_second: 100,
        burst_bytes: 1 << 21,
        burst_operations: 200,
    }
}

fn everything() -> GuestConfig {
    let mut qcow2 = Disk::new(File::Fd(some_fd()), DiskMode::VolatileWrite);
    qcow2.id = "root-1".into();
    qcow2.format = DiskFormat::Qcow2;
    qcow2.direct = true;
    qcow2.block_size = 4096;
    qcow2.rate_limit = limit();
    qcow2.queues = 4;
    qcow2.backing = vec![
        Backing {
            file: File::Fd(some_fd()),
            format: DiskFormat::Qcow2,
        },
        Backing {
            file: File::Path("/images/base".into()),
            format: DiskFormat::Raw,
        },
    ];
    qcow2.scratch = File::Fd(some_fd());
    let mut tap = Network::new(Link::Tap(vec![some_fd(), some_fd()]));
    tap.mac = Some([2, 0, 0, 0, 0, 1]);
    tap.mtu = 9000;
    tap.rate_limit = limit();
    tap.offloads = Some(false);
    tap.link_down = true;
    let mut named = Network::new(Link::TapNamed("tap0".into()));
    named.queue_pairs = 2;
    GuestConfig {
        disks: vec![qcow2, Disk::new(File::Path("/images/data".into()), DiskMode::ReadOnly)],
        networks: vec![
            tap,
            named,
            Network::new(Link::Bridge("br0".into())),
            Network::new(Link::Socket(some_fd())),
            Network::new(Link::User),
        ],
        console: Some(Console {
            ports: 3,
            console_ports: 2,
        }),
        rng: Some(Rng { rate_limit: limit() }),
        balloon: Some(Balloon {
            deflate_on_oom: true,
            free_page_reporting: true,
        }),
        vsock: Some(Vsock {
            cid: 7,
            listeners: vec![Listener {
                port: 80,
                acceptor: crate::transport::guard::new_client(Nobody),
            }],
            socket_path: "/run/guest.vsock".into(),
        }),
        memory_device: Some(MemoryDevice {
            block_size: 4 << 20,
            region_size: 1 << 30,
            region_alignment: 8 << 20,
            requested: 8 << 20,
        }),
        shares: vec![Share {
            tag: "home".into(),
            backend: Backend::Socket(some_fd()),
            queues: 2,
        }],
        vhost_user: vec![VhostUser {
            device_type: 25,
            backend: Backend::Path("/run/sound.sock".into()),
            queues: 4,
            queue_size: 64,
        }],
        watchdog: Some(WatchdogAction::Stop),
        generation_id: true,
        panic_device: true,
        on_panic: OnPanic::Restart,
        agent: true,
        ..GuestConfig::default()
    }
}

/// All of the devices that can be compared, in words.
fn words(config: &GuestConfig) -> String {
    let file = |file: &File| match file {
        File::Fd(_) => "fd".to_owned(),
        File::Path(path) => path.clone(),
        _ => "another".to_owned(),
    };
    let mut words = String::new();
    for d in &config.disks {
        let backing: Vec<_> = d.backing.iter().map(|b| (file(&b.file), b.format)).collect();
        let plain = (&d.id, file(&d.image), d.mode, d.format, d.direct, d.block_size);
        words += &format!("{plain:?} {:?} {backing:?} {}\n", d.rate_limit, d.queues);
    }
    for n in &config.networks {
        let link = match &n.link {
            Link::User => "user".to_owned(),
            Link::Tap(queues) => format!("tap {}", queues.len()),
            Link::TapNamed(name) => format!("named {name}"),
            Link::Bridge(name) => format!("bridge {name}"),
            Link::Socket(_) => "socket".to_owned(),
        };
        let plain = (n.mac, n.mtu, n.queue_pairs, n.offloads, n.link_down);
        words += &format!("{link} {plain:?} {:?}\n", n.rate_limit);
    }
    words += &format!("{:?} {:?} {:?}", config.console, config.rng, config.balloon);
    if let Some(vsock) = &config.vsock {
        let ports: Vec<_> = vsock.listeners.iter().map(|listener| listener.port).collect();
        words += &format!("{} {ports:?} {}", vsock.cid, vsock.socket_path);
    }
    let backend = |backend: &Backend| match backend {
        Backend::Socket(_) => "socket".to_owned(),
        Backend::Path(path) => path.clone(),
    };
    for share in &config.shares {
        words += &format!("{} {} {}", share.tag, backend(&share.backend), share.queues);
    }
    for d in &config.vhost_user {
        words += &format!(
            "{} {} {} {}",
            d.device_type,
            backend(&d.backend),
            d.queues,
            d.queue_size
        );
    }
    let rest = (config.watchdog, config.generation_id, config.panic_device, config.agent);
    let rest = (rest, config.on_panic);
    words + &format!("{:?} {rest:?}", config.memory_device)
}

#[test]
fn a_copy_is_the_same_with_descriptors_of_its_own() {
    use std::os::fd::AsRawFd;
    let config = everything();
    let copy = config.try_clone().unwrap();
    assert_eq!(words(&copy), words(&config));
    let descriptor = |config: &GuestConfig| match &config.disks[0].image {
        File::Fd(fd) => fd.as_raw_fd(),
        _ => panic!("the first disk's image is a descriptor"),
    };
    assert_ne!(descriptor(&copy), descriptor(&config));
}

#[test]
fn every_device_survives_the_wire() {
    let table = Table::default();
    let sent = words(&everything());
    let mut message = message();
    let mut config: guest_config::Builder<'_> = message.get_root().unwrap();
    everything().encode(config.reborrow(), &table).unwrap();
    let back = GuestConfig::decode(config.into_reader(), &table).unwrap();
    assert_eq!(words(&back), sent);
    assert_eq!(back.bus_devices(), 14);
    assert_eq!(table.left(), 0);
}

#[test]
fn defaults_are_resolved_in_one_place() {
    let disk = Disk::new(File::None, DiskMode::ReadOnly);
    assert_eq!((disk.block_size(), disk.queues()), (512, 1));
    let mut network = Network::new(Link::Tap(vec![some_fd(), some_fd()]));
    assert_eq!((network.mtu(), network.queue_pairs()), (1500, 2));
    network.link = Link::User;
    assert_eq!(network.queue_pairs(), 1);
    assert_eq!(Console::default().ports(), 1);
    assert_eq!(Rng::default().rate_limit().bytes_per_second, 1 << 20);
    let memory = MemoryDevice::default();
    assert_eq!((memory.block_size(), memory.region_alignment()), (2 << 20, 2 << 20));
}

#[test]
fn a_default_network_comes_after_the_others() {
    let config = decode(&Table::default(), |mut c, _| {
        c.set_default_network(Toggle::On);
        c.init_networks(1).get(0).set_bridge("br0");
    })
    .unwrap();
    assert!(matches!(&config.networks[..], [first, last]
        if matches!(first.link, Link::Bridge(_)) && matches!(last.link, Link::User)));
}

#[test]
fn disks_are_refused_by_name() {
    refused(Kind::BadConfig, "disks", |c, _| {
        c.init_disks(33);
    });
    refused(Kind::BadConfig, "disks[0].image", |c, _| {
        c.init_disks(1);
    });
    disk("disks[0].id", |mut d, _| d.set_id("x".repeat(21)));
    disk("disks[0].id", |mut d, _| d.set_id("tür"));
    disk("disks[0].id", |mut d, _| d.set_id("a b"));
    disk("disks[0].blockSize", |mut d, _| d.set_block_size(1024));
    disk("disks[0].queues", |mut d, _| d.set_queues(17));
    disk("disks[0].rateLimit.burstBytes", |d, _| {
        d.init_rate_limit().set_burst_bytes(1)
    });
    disk("disks[0].rateLimit.operationsPerSecond", |d, _| {
        d.init_rate_limit().set_operations_per_second(u64::MAX);
    });
    disk("disks[0].backing", |d, t| {
        d.init_backing(1).get(0).init_fd().set_number(number(t))
    });
    disk("disks[0].backing", |d, _| {
        d.init_backing(9);
    });
    disk("disks[0].backing[1]", |mut d, t| {
        d.set_format(DiskFormat::Qcow2);
        d.init_backing(2).get(0).init_fd().set_number(number(t));
    });
    disk("disks[0].backingFormat", |d, _| {
        d.init_backing_format(1);
    });
    refused(Kind::BadConfig, "disks[0].image", |c, _| {
        c.init_disks(1).get(0).init_image().set_bytes(b"content");
    });
    disk("disks[0].scratch", |d, t| {
        d.init_scratch().init_fd().set_number(number(t))
    });
    disk("disks[0].scratch", |mut d, _| {
        d.set_mode(DiskMode::VolatileWrite);
        d.init_scratch().set_bytes(b"content");
    });
    refused(Kind::BadConfig, "disks[1].id", |c, t| {
        let mut disks = c.init_disks(2);
        for i in 0..2 {
            let mut disk = disks.reborrow().get(i);
            disk.set_id("same");
            disk.init_image().init_fd().set_number(number(t));
        }
    });
    // The second one's descriptor is taken although the first is refused.
    refused(Kind::BadConfig, "disks[0].image", |c, t| {
        let mut disks = c.init_disks(2);
        disks.reborrow().get(1).init_image().init_fd().set_number(number(t));
    });
}

#[test]
fn networks_are_refused_by_name() {
    network("networks[0].mac", |mut n, _| n.set_mac(&[2; 5]));
    network("networks[0].mac", |mut n, _| n.set_mac(&[1, 0, 0, 0, 0, 1]));
    network("networks[0].mac", |mut n, _| n.set_mac(&[0; 6]));
    network("networks[0].mtu", |mut n, _| n.set_mtu(67));
    network("networks[0].mtu", |mut n, _| n.set_mtu(65521));
    network("networks[0].tap", |n, _| {
        n.init_tap(0);
    });
    network("networks[0].tap", |n, _| {
        n.init_tap(9);
    });
    network("networks[0].tap", |n, t| {
        let mut queues = n.init_tap(2);
        queues.reborrow().get(1).set_number(number(t));
        queues.get(0).set_number(99);
    });
    network("networks[0].queuePairs", |mut n, t| {
        n.set_queue_pairs(2);
        n.init_tap(1).get(0).set_number(number(t));
    });
    network("networks[0].queuePairs", |mut n, _| n.set_queue_pairs(2));
    network("networks[0].queuePairs", |mut n, _| {
        n.set_bridge("br0");
        n.set_queue_pairs(9);
    });
    network("networks[0].bridge", |mut n, _| n.set_bridge(""));
    network("networks[0].tapNamed", |mut n, _| n.set_tap_named("a/b"));
    network("networks[0].tapNamed", |mut n, _| n.set_tap_named(".."));
    network("networks[0].tapNamed", |mut n, _| n.set_tap_named("x".repeat(16)));
    refused(Kind::BadConfig, "networks[1].mac", |c, _| {
        let mut networks = c.init_networks(2);
        for i in 0..2 {
            networks.reborrow().get(i).set_mac(&[2, 0, 0, 0, 0, 9]);
        }
    });
}

#[test]
fn other_devices_are_refused_by_name() {
    let bad = |about: &str, fill: &dyn Fn(guest_config::Builder<'_>)| refused(Kind::BadConfig, about, |c, _| fill(c));
    bad("console.ports", &|c| {
        let mut console = c.init_console();
        console.set_enabled(Toggle::On);
        console.set_ports(33);
    });
    bad("console.ports", &|c| c.init_console().set_ports(2));
    bad("console.consolePorts", &|c| c.init_console().set_console_ports(1));
    bad("console.consolePorts", &|c| {
        let mut console = c.init_console();
        console.set_enabled(Toggle::On);
        console.set_console_ports(2);
    });
    bad("balloon.deflateOnOom", &|c| c.init_balloon().set_deflate_on_oom(true));
    bad("vsock.cid", &|c| c.init_vsock().set_cid(3));
    for cid in [1, 2, u32::MAX] {
        bad("vsock.cid", &|c| {
            let mut vsock = c.init_vsock();
            vsock.set_enabled(Toggle::On);
            vsock.set_cid(cid);
        });
    }
    for path in ["relative", &format!("/{}", "x".repeat(90))] {
        bad("vsock.socketPath", &|c| {
            let mut vsock = c.init_vsock();
            vsock.set_enabled(Toggle::On);
            vsock.set_socket_path(path);
        });
    }
    bad("vsock.listeners[0].acceptor", &|c| {
        let mut vsock = c.init_vsock();
        vsock.set_enabled(Toggle::On);
        vsock.init_listeners(1);
    });
    bad("vsock.listeners", &|c| {
        let mut vsock = c.init_vsock();
        vsock.set_enabled(Toggle::On);
        vsock.init_listeners(65);
    });
    bad("vsock.listeners[1].port", &|c| {
        let mut vsock = c.init_vsock();
        vsock.set_enabled(Toggle::On);
        let mut listeners = vsock.init_listeners(2);
        for i in 0..2 {
            let mut listener = listeners.reborrow().get(i);
            listener.set_port(80);
            listener.set_acceptor(crate::transport::guard::new_client(Nobody));
        }
    });
    bad("agent", &|mut c| c.set_agent(Toggle::On));
    bad("watchdogAction", &|mut c| c.set_watchdog_action(WatchdogAction::None));
    bad("onPanic", &|mut c| c.set_on_panic(OnPanic::Stop));
    bad("shares[0].tag", &|c| {
        c.init_shares(1).get(0).init_backend().set_path("/x");
    });
    bad("shares[0].backend", &|c| {
        c.init_shares(1).get(0).init_backend().set_path("x");
    });
    bad("vhostUser[0].deviceType", &|c| {
        c.init_vhost_user(1).get(0).init_backend().set_path("/x");
    });
    bad("vhostUser[0].queueSize", &|c| {
        let mut device = c.init_vhost_user(1).get(0);
        device.set_device_type(25);
        device.set_queue_size(48);
        device.init_backend().set_path("/x");
    });
    for (about, block, region, alignment, requested) in [
        ("memoryDevice.regionSize", 0, 0, 0, 0),
        ("memoryDevice.regionSize", 0, 1 << 41, 0, 0),
        ("memoryDevice.regionSize", 0, 3 << 20, 0, 0),
        ("memoryDevice.blockSize", 1 << 20, 1 << 30, 0, 0),
        ("memoryDevice.blockSize", 3 << 20, 3 << 30, 0, 0),
        ("memoryDevice.regionAlignment", 4 << 20, 1 << 30, 2 << 20, 0),
        ("memoryDevice.requested", 0, 1 << 30, 0, 1 << 31),
        ("memoryDevice.requested", 0, 1 << 30, 0, 1),
    ] {
        bad(about, &|c| {
            let mut device = c.init_memory_device();
            device.set_enabled(Toggle::On);
            device.set_block_size(block);
            device.set_region_size(region);
            device.set_region_alignment(alignment);
            device.set_requested(requested);
        });
    }
}

#[test]
fn all_devices_share_one_bus() {
    let fill = |count: u32| {
        decode(&Table::default(), |mut c, _| {
            c.reborrow().init_networks(count);
            c.reborrow().init_rng().set_enabled(Toggle::On);
        })
    };
    assert_eq!(fill(31).unwrap().bus_devices(), 32);
    assert_eq!(fill(32).err().unwrap().about, "devices");
}

proptest! {
    #[test]
    fn a_disk_is_accepted_exactly_if_it_follows_the_rules(
        id in ".{0,24}", block_size in prop_oneof![Just(0), Just(512), Just(4096), any::<u32>()],
        queues in 0u16..32, bytes in any::<u64>(), burst in prop_oneof![Just(0), any::<u64>()],
    ) {
        let decoded = decode(&Table::default(), |c, t| {
            let mut disk = c.init_disks(1).get(0);
            disk.reborrow().init_image().init_fd().set_number(number(t));
            disk.set_id(&id);
            disk.set_block_size(block_size);
            disk.set_queues(queues);
            let mut limit = disk.init_rate_limit();
            limit.set_bytes_per_second(bytes);
            limit.set_burst_bytes(burst);
        });
        let good = id.len() <= 20 && id.bytes().all(|byte| (0x21..=0x7e).contains(&byte))
            && [0, 512, 4096].contains(&block_size) && queues <= 16
            && bytes <= 1 << 40 && burst <= 1 << 40 && (burst == 0 || bytes != 0);
        match decoded {
            Ok(config) => prop_assert!(good && config.disks[0].id == id),
            Err(error) => prop_assert!(!good && error.about.starts_with("disks[0]."), "{error:?}"),
        }
    }

    #[test]
    fn a_network_is_accepted_exactly_if_it_follows_the_rules(
        mac in proptest::collection::vec(any::<u8>(), 0..8), mtu in any::<u16>(), name in "[a-z./_ -]{0,17}", pairs in 0u16..12,
    ) {
        let decoded = decode(&Table::default(), |c, _| {
            let mut network = c.init_networks(1).get(0);
            network.set_mac(&mac);
            network.set_mtu(mtu);
            network.set_queue_pairs(pairs);
            network.set_bridge(&name);
        });
        let good_mac = mac.is_empty() || (mac.len() == 6 && mac[0] & 1 == 0 && mac != [0; 6]);
        let good_name = (1..=15).contains(&name.len()) && !name.contains(['/', ' ']) && !name.starts_with(['.', '-']);
        let good = good_mac && good_name && pairs <= 8 && (mtu == 0 || (68..=65520).contains(&mtu));
        match decoded {
            Ok(config) => prop_assert!(good && config.networks[0].queue_pairs == pairs),
            Err(error) => prop_assert!(!good && error.about.starts_with("networks[0]."), "{error:?}"),
        }
    }
}

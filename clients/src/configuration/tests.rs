//! Files that are right, files that are not, and files that were written.

use capnp::message::Builder;
use proptest::prelude::*;
use sepal_schema::{
    config::{
        File, GuestConfig, Handles, Limits, OnPanic, OnReset, Pin, Restart, RestartPolicy, Uuid,
        device::{
            Backend, Backing, Balloon, Console, Disk, DiskFormat, DiskMode, Link, MemoryDevice, Network, RateLimit,
            Rng, Share, VhostUser, Vsock, WatchdogAction,
        },
    },
    config_capnp::guest_config,
    error::{Error, Kind},
};

mod fields;
mod numbers;

use super::*;

fn naming() -> Naming {
    Naming {
        folder: "/etc/sepal".into(),
        files: true,
        sockets: true,
    }
}

fn parse(text: &str) -> Result<FileConfig, String> {
    read("web.toml", text.to_owned(), &naming())
}

fn refused(text: &str) -> String {
    match parse(text) {
        Err(message) => message,
        Ok(_) => panic!("accepted: {text}"),
    }
}

/// No descriptor goes anywhere.
struct Never;

impl Handles for Never {
    fn send(&self, _: std::os::fd::OwnedFd) -> Result<u32, Error> {
        Err(Error::new(Kind::InternalError, "a descriptor"))
    }
    fn take(&self, _: u32) -> Result<std::os::fd::OwnedFd, Error> {
        Err(Error::new(Kind::InternalError, "a descriptor"))
    }
}

/// The message that a configuration is, to be compared.
fn message(config: GuestConfig) -> Vec<u8> {
    let mut message = Builder::new_default();
    config.encode(message.init_root(), &Never).unwrap();
    let root = message.get_root_as_reader::<guest_config::Reader<'_>>().unwrap();
    let mut canonical = Builder::new_default();
    canonical.set_root_canonical(root).unwrap();
    capnp::serialize::write_message_to_words(&canonical)
}

/// What is left to defaults, resolved as [`crate::assemble`] does.
fn resolved(said: FileConfig) -> GuestConfig {
    let mut config = said.config;
    config.agent = config.vsock.is_some() && said.agent.unwrap_or(true);
    config.panic_device = said.panic_device.unwrap_or(config.on_panic != OnPanic::Leave);
    config
}

#[test]
fn however_long_a_line_is_its_error_can_be_read() {
    let long = "ä".repeat(50_000);
    let message = refused(&format!("x = [\"{long}\"]; memory = \"512X\"\nuuid = \"{long}\"\n"));
    assert!(message.chars().count() < 3000, "{message}");
    let message = refused(&format!("cmdline-add = [\"{long}\", 5, \"{long}\"]\n"));
    let lines: Vec<_> = message.lines().collect();
    let column = 16 + 2 + 50_000 + 2;
    assert!(lines[0].starts_with(&format!("web.toml:1:{column}: ")), "{}", lines[0]);
    let shown = lines[2].chars().position(|c| c == '5').unwrap();
    assert_eq!(lines[3].chars().position(|c| c == '^'), Some(shown), "{message}");
    assert!(
        lines[2].starts_with("1 | …ä") && lines[2].ends_with("ä…"),
        "{}",
        lines[2]
    );
    // What a terminal would take for an order comes in no part of it.
    let message = refused("\"\\u001b[31m\" = 1\n");
    assert!(!message.contains('\u{1b}') && message.contains("[31m"), "{message}");
}

#[test]
fn every_key_is_read() {
    let text = include_str!("../../../docs/configuration.md");
    let example = text.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
    let said = parse(example).unwrap();
    assert_eq!(said.autostart, Some(true));
    let config = resolved(said);
    assert_eq!((&config.name[..], config.cpus, config.memory_mib), ("web", 4, 2048));
    assert!(matches!(&config.kernel, File::Path(path) if path == "/etc/sepal/vmlinuz"));
    assert!(config.durable && config.huge_pages && config.uuid.is_some() && config.instance_id.is_some());
    assert_eq!(config.restart.policy, RestartPolicy::OnFailure);
    assert_eq!((config.restart.delay_ms, config.restart.healthy_ms), (100, 10_000));
    assert_eq!((config.limits.memory_mib, config.limits.cpu_weight), (3072, 200));
    assert_eq!(config.pins[0].cpus, [0, 1, 2, 3, 8]);
    assert_eq!((config.disks.len(), config.networks.len()), (3, 3));
    let root = &config.disks[0];
    assert_eq!(
        (root.mode, root.format, root.backing.len()),
        (DiskMode::ReadWrite, DiskFormat::Qcow2, 2)
    );
    assert_eq!(root.rate_limit.bytes_per_second, 100 << 20);
    assert!(matches!(&config.networks[1].link, Link::TapNamed(name) if name == "tap0"));
    assert_eq!(config.memory_device.unwrap().region_size, 4 << 30);
    assert_eq!((config.shares.len(), config.vhost_user[0].device_type), (1, 25));
    assert_eq!(config.watchdog, Some(WatchdogAction::Reset));
    // The example is complete: every key that there is is in it.
    let keys: Vec<_> = known_keys();
    assert!(keys.len() > 70, "{keys:?}");
    for key in keys {
        let assigned = format!(" {key} =");
        let said = |line: &str| format!(" {line}").contains(&assigned) || line.contains(&format!("[{key}]"));
        assert!(example.lines().any(said), "'{key}' is not in the example");
    }
}

/// All keys that the reader asks for, as it tells them about one that it does not know, in every table.
fn known_keys() -> Vec<String> {
    let everywhere = "zzz = 1\n[restart]\npolicy = \"never\"\nzzz = 1\n[limits]\nzzz = 1\n[console]\nzzz = 1\n[rng]\nzzz = 1\n[balloon]\nzzz = 1\n\
                      [vsock]\nzzz = 1\n[memory-device]\nsize = 1\nzzz = 1\n";
    let lists = "[[pin]]\nvcpu = 0\ncpus = \"0\"\nzzz = 1\n[[disk]]\nfile = \"a\"\nzzz = 1\nbacking = [{ file = \"b\", zzz = 1 }]\n\
                 [[net]]\nkind = \"user\"\nzzz = 1\n[[share]]\ntag = \"t\"\nsocket = \"s\"\nzzz = 1\n[[vhost-user]]\ntype = 1\nsocket = \"s\"\nzzz = 1\n";
    let told = format!("{}\n{}", refused(everywhere), refused(lists));
    let lists = told.lines().filter_map(|line| line.split_once("known are "));
    lists
        .flat_map(|(_, keys)| keys.split(", ").map(str::to_owned))
        .collect()
}

#[test]
fn an_empty_file_says_nothing() {
    let said = parse("").unwrap();
    assert_eq!((said.cmdline, said.agent, said.autostart), (None, None, None));
    assert_eq!(message(said.config), message(GuestConfig::default()));
}

#[test]
fn names_of_files_begin_in_the_folder_of_the_file() {
    let text = "kernel = \"boot/vmlinuz\"\ninitrd = \"/boot/initrd\"\n[[disk]]\nfile = \"path:/images/a\"\n";
    let config = parse(text).unwrap().config;
    assert!(matches!(&config.kernel, File::Path(path) if path == "/etc/sepal/boot/vmlinuz"));
    assert!(matches!(&config.initrd, File::Path(path) if path == "/boot/initrd"));
    assert!(matches!(&config.disks[0].image, File::Path(path) if path == "path:/images/a"));
    let elsewhere = Naming {
        files: false,
        sockets: false,
        ..naming()
    };
    let Err(error) = read("web.toml", "kernel = \"vmlinuz\"".to_owned(), &elsewhere) else {
        panic!("accepted");
    };
    assert!(
        error.contains("web.toml:1:10:") && error.contains("guest manager's machine"),
        "{error}"
    );
}

#[test]
fn what_is_wrong_is_shown_where_it_is() {
    assert_eq!(
        refused("cpus = 2\n\tmemory = \"512X\" # much\n"),
        "web.toml:2:11: 'X' is no unit of memory; M, G and T are (MiB, GiB, TiB)\n  |\n2 | \tmemory = \"512X\" # much\n  | \t         ^^^^^^"
    );
    assert_eq!(
        refused("mamory = 1"),
        "web.toml:1:1: 'mamory' is not known here; did you mean 'memory'?\n  |\n1 | mamory = 1\n  | ^^^^^^"
    );
    // Columns are characters.
    let error = refused("cmdline = \"ü\", x");
    assert!(error.starts_with("web.toml:1:14:"), "{error}");
}

#[test]
fn everything_that_is_wrong_is_told_in_the_order_of_the_file() {
    let error =
        refused("[[disk]]\nid = 7\n[[disk]]\nfile = \"\"\nqueues = 17\n[restart]\npolicy = \"sometimes\"\nfoo = 1\n");
    let places: Vec<&str> = error.lines().filter(|line| line.starts_with("web.toml")).collect();
    let begins = [
        "web.toml:1:1: 'file' is missing",
        "web.toml:2:6: 'id' needs a string, and this is a number",
        "web.toml:4:8: the name of a file is missing",
        "web.toml:5:10: 'queues' is one of 1 to 16",
        "web.toml:7:10: 'sometimes' is no restart policy",
        "web.toml:8:1: 'foo' is not known here; known are ",
    ];
    assert_eq!(places.len(), begins.len(), "{error}");
    for (place, begin) in places.iter().zip(begins) {
        assert!(place.starts_with(begin), "{place}");
    }
    let many = "x = 1\n"
        .repeat(30)
        .lines()
        .enumerate()
        .map(|(i, line)| format!("x{i}{line}\n"))
        .collect::<String>();
    assert!(refused(&many).ends_with("and 20 more"));
}

#[test]
fn values_of_the_wrong_kind_are_told_by_name() {
    for (text, words) in [
        ("cpus = \"2\"", "'cpus' needs a whole number, and this is a string"),
        ("name = 1979-05-27", "this is a date"),
        ("durable = 1", "'durable' needs true or false"),
        ("uuid = \"web\"", "is no UUID"),
        ("disk = \"a.img\"", "an array of tables ([[disk]])"),
        (
            "[disk]\nfile = \"a\"",
            "'disk' needs an array of tables ([[disk]]), and this is a table",
        ),
        ("limits = 1", "a table: [limits]"),
        ("console = 1", "a table ([console]), true or false"),
        ("watchdog = 1", "a string, true or false"),
        ("watchdog = \"bark\"", "'bark'"),
        ("cmdline-add = [1]", "'cmdline-add' needs strings"),
        ("[restart]\ndelay = 1", "'policy' is missing"),
        ("[restart]\npolicy = \"always\"\ndelay = inf", "web.toml:3:9"),
        ("[[net]]\nkind = \"bridge\"", "the bridge's 'name'"),
        ("[[net]]\nkind = \"user\"\nname = \"x\"", "has no 'name'"),
        ("[[net]]\nkind = \"user\"\nmac = \"1\"", "is no address"),
        ("[[pin]]\nvcpu = 0\ncpus = [0.5]", "numbers of processors"),
        ("[[pin]]\nvcpu = 0", "'cpus' is missing"),
        (
            "[[vhost-user]]\ntype = \"toaster\"\nsocket = \"/x\"",
            "'toaster' is no type",
        ),
        ("[memory-device]\nrequested = 1", "'size' is missing"),
        ("a = 1\na = 2", "duplicate key"),
        ("name = \"x", "web.toml:1:"),
        ("= 1", "web.toml:1:1"),
        ("[", "web.toml:1:"),
    ] {
        let error = refused(text);
        assert!(error.contains(words), "{text}: {error}");
        assert!(error.starts_with("web.toml:"), "{text}: {error}");
    }
}

#[test]
fn an_error_about_a_field_finds_its_line() {
    let said =
        parse("name = \"web\"\n[[disk]]\nfile = \"a\"\n[[disk]]\nfile = \"b\"\nbps = 7\n[limits]\ncpu = 5\n").unwrap();
    let mut source = said.source;
    let place = |source: &Source, field: &str| {
        let error = source.explain(Error::bad_config(field, "no"));
        error.message.lines().next().unwrap().to_owned()
    };
    for (field, line) in [
        ("name", "web.toml:1:8: no"),
        ("disks[1].image", "web.toml:5:8: no"),
        ("disks[1].rateLimit.bytesPerSecond", "web.toml:6:7: no"),
        ("disks[1].id", "web.toml:4:1: no"),
        ("disks[0].id", "web.toml:2:1: no"),
        ("limits.cpuPercent", "web.toml:8:7: no"),
        ("limits.tasks", "web.toml:7:1: no"),
        ("networks[0].mtu", "no"),
        ("", "no"),
    ] {
        assert_eq!(place(&source, field), line, "{field}");
    }
    source.forget("disks[1]");
    source.forget("name");
    assert_eq!(place(&source, "name"), "no");
    assert_eq!(place(&source, "disks[0].image"), "web.toml:3:8: no");
    assert!(!place(&source, "disks[1].image").contains(":5:"));
}

#[test]
fn what_is_missing_is_left_out_and_told() {
    let config = GuestConfig {
        kernel: File::Path("/".into()),
        disks: vec![Disk::new(File::Path("/".into()), DiskMode::ReadOnly)],
        networks: vec![Network::new(Link::User)],
        ..GuestConfig::default()
    };
    let missing = ["kernel", "disks[0].image", "networks[0].tap"].map(str::to_owned);
    let text = write(&config, true, &missing, false).unwrap();
    for field in &missing {
        assert!(
            text.contains(&format!("# has no name that could be written down: {field}\n")),
            "{text}"
        );
    }
    let error = refused(&text);
    assert!(
        error.contains("'file' is missing") && error.contains("'kind' is missing"),
        "{error}"
    );
    assert!(!text.contains("kernel ="), "{text}");
}

#[test]
fn paths_of_another_machine_are_told_as_such() {
    let config = GuestConfig {
        kernel: File::Path("/boot/vmlinuz".into()),
        ..GuestConfig::default()
    };
    let text = write(&config, false, &[], true).unwrap();
    assert!(text.contains("kernel = \"path:/boot/vmlinuz\""), "{text}");
}

/// A value that has no words of its own; what was made of it is shown with a test that fails.
struct Made<T>(T);

impl<T> std::fmt::Debug for Made<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(std::any::type_name::<T>())
    }
}

fn text() -> impl Strategy<Value = String> {
    // Whatever can be in a message, also what no field takes.
    "(?s).{0,20}"
}

fn path() -> impl Strategy<Value = String> {
    "(?s)/.{0,20}"
}

fn rate() -> impl Strategy<Value = RateLimit> {
    let bytes = || prop_oneof![Just(0), 1u64..=1 << 40, (0u32..40).prop_map(|shift| 1 << shift)];
    (bytes(), 0u64..=1 << 32, bytes(), 0u64..=1 << 32).prop_map(|(bytes, operations, burst, burst_operations)| {
        RateLimit {
            bytes_per_second: bytes,
            operations_per_second: operations,
            burst_bytes: burst,
            burst_operations,
        }
    })
}

fn disk() -> impl Strategy<Value = Made<Disk>> {
    let mode = prop::sample::select(vec![DiskMode::ReadWrite, DiskMode::ReadOnly, DiskMode::VolatileWrite]);
    let format = || prop::sample::select(vec![DiskFormat::Unspecified, DiskFormat::Raw, DiskFormat::Qcow2]);
    let backing = prop::collection::vec((path(), format()), 0..3);
    let scratch = proptest::option::of(path());
    let numbers = (0u16..=16, prop::sample::select(vec![0u32, 512, 4096]), any::<bool>());
    (path(), "[!-~]{0,20}", mode, format(), backing, scratch, rate(), numbers).prop_map(
        |(image, id, mode, format, backing, scratch, rate_limit, (queues, block_size, direct))| {
            Made(Disk {
                id,
                image: File::Path(image),
                mode,
                format,
                direct,
                block_size,
                rate_limit,
                backing: backing
                    .into_iter()
                    .map(|(path, format)| Backing {
                        file: File::Path(path),
                        format,
                    })
                    .collect(),
                queues,
                scratch: scratch.map_or(File::None, File::Path),
            })
        },
    )
}

fn network() -> impl Strategy<Value = Made<Network>> {
    let link = prop_oneof![
        Just(None),
        "[a-z]{0,15}".prop_map(|name| Some((true, name))),
        "[a-z]{1,15}".prop_map(|name| Some((false, name))),
    ];
    let mtu = prop_oneof![Just(0u16), 68u16..=65520];
    let mac = proptest::option::of(any::<[u8; 6]>());
    (link, mtu, mac, rate(), 0u16..=8, any::<Option<bool>>(), any::<bool>()).prop_map(
        |(link, mtu, mac, rate_limit, queue_pairs, offloads, link_down)| {
            Made(Network {
                mac,
                link: match link {
                    None => Link::User,
                    Some((true, name)) => Link::TapNamed(name),
                    Some((false, name)) => Link::Bridge(name),
                },
                mtu,
                rate_limit,
                queue_pairs,
                offloads,
                link_down,
            })
        },
    )
}

fn devices() -> impl Strategy<Value = Made<GuestConfig>> {
    let console = proptest::option::of((0u16..=32, 0u16..=32));
    let balloon = proptest::option::of(any::<(bool, bool)>());
    let vsock = proptest::option::of((
        prop_oneof![Just(0), 3..u32::MAX],
        proptest::option::of(path()),
        any::<bool>(),
    ));
    let memory = proptest::option::of((0u64..=1 << 40, 0u64..=1 << 40, 0u64..=1 << 30, 0u64..=1 << 30));
    let share = ("\\PC{1,9}", path(), 0u16..=16);
    let other = (0u16..=63, path(), 0u16..=64, 0u16..=1024);
    let lists = (
        prop::collection::vec(disk(), 0..3),
        prop::collection::vec(network(), 0..3),
        prop::collection::vec(share, 0..3),
        prop::collection::vec(other, 0..3),
    );
    (console, balloon, vsock, memory, proptest::option::of(rate()), lists).prop_map(
        |(console, balloon, vsock, memory, rng, (disks, networks, shares, others))| {
            Made(GuestConfig {
                console: console.map(|(ports, console_ports)| Console { ports, console_ports }),
                rng: rng.map(|rate_limit| Rng { rate_limit }),
                balloon: balloon.map(|(deflate_on_oom, free_page_reporting)| Balloon {
                    deflate_on_oom,
                    free_page_reporting,
                }),
                agent: vsock.as_ref().is_some_and(|(_, _, agent)| *agent),
                vsock: vsock.map(|(cid, socket, _)| Vsock {
                    cid,
                    listeners: Vec::new(),
                    socket_path: socket.unwrap_or_default(),
                }),
                memory_device: memory.map(|(region_size, requested, block_size, region_alignment)| MemoryDevice {
                    block_size,
                    region_size,
                    region_alignment,
                    requested,
                }),
                disks: disks.into_iter().map(|Made(disk)| disk).collect(),
                networks: networks.into_iter().map(|Made(network)| network).collect(),
                shares: shares
                    .into_iter()
                    .map(|(tag, path, queues)| Share {
                        tag,
                        backend: Backend::Path(path),
                        queues,
                    })
                    .collect(),
                vhost_user: others
                    .into_iter()
                    .map(|(device_type, path, queues, queue_size)| VhostUser {
                        device_type,
                        backend: Backend::Path(path),
                        queues,
                        queue_size,
                    })
                    .collect(),
                ..GuestConfig::default()
            })
        },
    )
}

fn kept() -> impl Strategy<Value = Made<GuestConfig>> {
    let policy = prop::sample::select(vec![
        RestartPolicy::Never,
        RestartPolicy::OnFailure,
        RestartPolicy::Always,
    ]);
    let restart = (policy, any::<[u32; 4]>());
    let pins = prop::collection::btree_map(0u8..64, prop::collection::btree_set(any::<u16>(), 1..9), 0..4);
    let limits = (0u64..1 << 43, 0u32..=100_000, 0u32..=10_000, any::<u32>());
    let uuid = proptest::option::of(1u128..);
    (uuid, restart, pins, limits, any::<bool>()).prop_map(|(uuid, (policy, times), pins, limits, durable)| {
        Made(GuestConfig {
            uuid: uuid.map(Uuid::from_u128),
            restart: Restart {
                policy,
                attempts: times[0],
                delay_ms: times[1],
                max_delay_ms: times[2],
                healthy_ms: times[3],
            },
            pins: pins
                .into_iter()
                .map(|(vcpu, cpus)| Pin {
                    vcpu,
                    cpus: cpus.into_iter().collect(),
                })
                .collect(),
            limits: Limits {
                memory_mib: limits.0,
                cpu_percent: limits.1,
                cpu_weight: limits.2,
                tasks: limits.3,
            },
            durable,
            ..GuestConfig::default()
        })
    })
}

fn guest() -> impl Strategy<Value = Made<GuestConfig>> {
    let files = (proptest::option::of(path()), proptest::option::of(path()));
    let lines = (
        text(),
        prop::collection::vec(text(), 0..3),
        prop::collection::vec(text(), 0..3),
    );
    let resets = prop::sample::select(vec![OnReset::Stop, OnReset::Restart, OnReset::Pause]);
    let panics = prop::sample::select(vec![OnPanic::Leave, OnPanic::Stop, OnPanic::Restart, OnPanic::Pause]);
    let dogs = vec![WatchdogAction::Reset, WatchdogAction::Stop, WatchdogAction::None];
    let dogs = proptest::option::of(prop::sample::select(dogs));
    let numbers = (
        0u8..=64,
        0i32..,
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
    );
    let id = proptest::option::of(prop::collection::vec(any::<u8>(), 64));
    (
        (text(), id),
        files,
        lines,
        (resets, panics, dogs),
        numbers,
        (devices(), kept()),
    )
        .prop_map(
            |((name, id), files, lines, (on_reset, on_panic, watchdog), numbers, (Made(devices), Made(kept)))| {
                Made(GuestConfig {
                    name,
                    instance_id: id.and_then(|id| id.try_into().ok()),
                    kernel: files.0.map_or(File::None, File::Path),
                    initrd: files.1.map_or(File::None, File::Path),
                    cmdline: lines.0,
                    cmdline_add: lines.1,
                    waived_layers: lines.2,
                    cpus: numbers.0,
                    memory_mib: numbers.1,
                    huge_pages: numbers.2,
                    protected_vm: numbers.3,
                    generation_id: numbers.4,
                    panic_device: numbers.5 || on_panic != OnPanic::Leave,
                    on_reset,
                    on_panic,
                    watchdog,
                    uuid: kept.uuid,
                    restart: kept.restart,
                    pins: kept.pins,
                    limits: kept.limits,
                    durable: kept.durable,
                    ..devices
                })
            },
        )
}

proptest! {
    #[test]
    fn what_was_written_is_read_as_it_was(Made(config) in guest(), autostart: bool) {
        let text = write(&config, autostart, &[], false).unwrap();
        let said = match parse(&text) {
            Ok(said) => said,
            Err(error) => return Err(TestCaseError::fail(format!("{error}\n---\n{text}"))),
        };
        prop_assert_eq!(said.autostart.unwrap_or_default(), autostart);
        // A kernel's command line is written also where it is empty.
        prop_assert_eq!(said.cmdline.is_some(), !config.kernel.is_none() || !config.cmdline.is_empty());
        prop_assert_eq!(message(resolved(said)), message(config), "{}", text);
    }

    #[test]
    fn any_text_is_read_or_refused_with_a_place(text in "(\\PC|\n|\t|\r){0,200}") {
        if let Err(error) = parse(&text) {
            prop_assert!(error.starts_with("web.toml:"), "{}", error);
        }
    }

    #[test]
    fn text_that_is_nearly_right_is_read_or_refused_with_a_place(
        lines in prop::collection::vec("(name|cpus|disk|file|\\[\\[disk\\]\\]|\\[limits\\]|kind|=|\"a\"|1|\\[|\\]|\\{|\\}|,| ){0,6}", 0..9),
    ) {
        if let Err(error) = parse(&lines.join("\n")) {
            prop_assert!(error.starts_with("web.toml:"), "{}", error);
        }
    }
}

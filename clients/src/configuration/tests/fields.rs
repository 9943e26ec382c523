//! The fields of the schema, the keys of files and the options of the command line: nothing is left out of one of them.

use std::collections::BTreeSet;

use capnp::{
    introspect::{Introspect, TypeVariant},
    schema::StructSchema,
};
use clap::{CommandFactory, Parser};
use sepal_schema::config_capnp::guest_config;

use super::{
    super::{FileConfig, Source, decode, nameless, write},
    message, parse, refused, resolved,
};
use crate::args::{Cli, Command};

/// Fields that no key says, and why.
const UNSAID: [(&str, &str); 14] = [
    ("dtbOverlay", "not built"),
    ("firmware", "not built"),
    ("gpu", "not built"),
    ("sound", "not built"),
    ("soundInput", "not built"),
    ("hypervisorSpecificAuthMethod", "not built"),
    ("defaultNetwork", "another network of the kind user"),
    ("customMemory[].memfd", "a handle"),
    ("customMemory[].start", "of a handle"),
    ("customMemory[].end", "of a handle"),
    ("networks[].tap[]", "a handle"),
    ("networks[].socket", "a handle"),
    ("vsock.listeners[].port", "of a capability"),
    ("vsock.listeners[].acceptor", "a capability"),
];

/// Fields that a key says which is known by the name of another field.
const SAID_WITH: [(&str, &str); 8] = [
    ("watchdogAction", "watchdog"),
    ("networks[].user", "networks[].kind"),
    ("disks[].backingFormat[]", "disks[].backing[]"),
    ("console.enabled", "console"),
    ("rng.enabled", "rng"),
    ("balloon.enabled", "balloon"),
    ("vsock.enabled", "vsock"),
    ("memoryDevice.enabled", "memoryDevice"),
];

/// Options that no key says, and why.
const WITHOUT_KEY: [(&str, &str); 7] = [
    ("name", "the key of that name"),
    ("file", "the file itself"),
    ("detach", "how it is launched"),
    ("check", "whether it is launched"),
    ("replace", "how it is defined"),
    ("json", "what is printed"),
    ("no-balloon", "the key is left out"),
];

/// What the options are called that say what these keys say.
const OPTIONS: [(&str, &str); 9] = [
    ("agent", "no-agent"),
    ("waive-layers", "waive-layer"),
    ("limits.cpu", "limit-cpu"),
    ("limits.memory", "limit-memory"),
    ("limits.tasks", "limit-tasks"),
    ("limits.weight", "limit-weight"),
    ("name", "name"),
    ("autostart", "autostart"),
    ("limits", "limit-memory"),
];

/// Keys, and the words that say the same.
type Words = &'static [(&'static str, &'static str)];

/// How the first word and the others of an option say what the keys of a table say; `-` for what the first word says.
const WORDS: [(&str, &str, &str, Words); 11] = [
    (
        "[[disk]]\nfile=\"a\"",
        "disk",
        "a",
        &[
            ("file", "-"),
            ("mode", "ro"),
            ("id", "id=x"),
            ("format", "format=qcow2"),
            ("backing", "backing=b,backing-format=raw"),
            ("direct", "direct"),
            ("queues", "queues=2"),
            ("block-size", "block-size=512"),
            ("scratch", "scratch=s"),
            ("bps", "bps=1"),
            ("burst-bytes", "burst-bytes=1"),
            ("iops", "iops=1"),
            ("burst-ops", "burst-ops=1"),
        ],
    ),
    (
        "[[net]]\nkind=\"user\"",
        "net",
        "tap=tap0",
        &[
            ("kind", "-"),
            ("name", "-"),
            ("mac", "mac=02:00:5e:10:00:01"),
            ("mtu", "mtu=1500"),
            ("queues", "queues=2"),
            ("offloads", "offloads=on"),
            ("link", "link=down"),
            ("bps", "bps=1"),
            ("burst-bytes", "burst-bytes=1"),
            ("iops", "iops=1"),
            ("burst-ops", "burst-ops=1"),
        ],
    ),
    (
        "[[share]]\ntag=\"t\"\nsocket=\"s\"",
        "share",
        "t=s",
        &[("tag", "-"), ("socket", "-"), ("queues", "queues=1")],
    ),
    (
        "[[vhost-user]]\ntype=1\nsocket=\"s\"",
        "vhost-user",
        "net=s",
        &[
            ("type", "-"),
            ("socket", "-"),
            ("queues", "queues=1"),
            ("queue-size", "queue-size=64"),
        ],
    ),
    (
        "[[pin]]\nvcpu=0\ncpus=\"0\"",
        "pin",
        "0=0",
        &[("vcpu", "-"), ("cpus", "-")],
    ),
    (
        "[restart]\npolicy=\"never\"",
        "restart",
        "always",
        &[
            ("policy", "-"),
            ("attempts", "attempts=1"),
            ("delay", "delay=1s"),
            ("max-delay", "max-delay=1s"),
            ("healthy", "healthy=1s"),
        ],
    ),
    (
        "[memory-device]\nsize=1",
        "memory-device",
        "1G",
        &[
            ("size", "-"),
            ("requested", "requested=1G"),
            ("block", "block=2M"),
            ("alignment", "alignment=2M"),
        ],
    ),
    (
        "[console]",
        "console",
        "2",
        &[("ports", "-"), ("consoles", "consoles=2")],
    ),
    (
        "[rng]",
        "rng",
        "bps=2",
        &[
            ("bps", "bps=1"),
            ("burst-bytes", "burst-bytes=1"),
            ("iops", "iops=1"),
            ("burst-ops", "burst-ops=1"),
        ],
    ),
    (
        "[balloon]",
        "balloon",
        "reporting",
        &[("deflate-on-oom", "deflate-on-oom"), ("reporting", "reporting")],
    ),
    ("[vsock]", "vsock", "3", &[("cid", "-"), ("socket", "socket=s")]),
];

/// The example of the documentation, which has every key; none with what it would be without it.
fn example() -> FileConfig {
    let text = include_str!("../../../../docs/configuration.md");
    let example = text.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
    let example = example
        .replace("protected = false", "protected = true")
        .replace("agent = true", "agent = false")
        .replace("link = \"up\"", "link = \"down\"");
    parse(&example).unwrap()
}

/// Every field that is no structure with fields of its own: `disks[].rateLimit.bytesPerSecond`.
fn fields(schema: StructSchema, at: &str, to: &mut BTreeSet<String>) {
    for field in schema.get_fields().unwrap() {
        let name = field.get_proto().get_name().unwrap().to_str().unwrap();
        let name = if at.is_empty() {
            name.to_owned()
        } else {
            format!("{at}.{name}")
        };
        let (of, name) = match field.get_type().which() {
            TypeVariant::List(of) => (of.which(), format!("{name}[]")),
            of => (of, name),
        };
        match of {
            TypeVariant::Struct(of) => {
                let of: StructSchema = of.into();
                let called = of.get_proto().get_display_name().unwrap().to_str().unwrap();
                match ["File", "FdRef", "Backend"].iter().any(|leaf| called.ends_with(leaf)) {
                    true => drop(to.insert(name)),
                    false => fields(of, &name, to),
                }
            }
            _ => drop(to.insert(name)),
        }
    }
}

/// Without the numbers of what is in lists.
fn without_numbers(field: &str) -> String {
    let mut parts = field.split('[');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |field, part| {
        field + "[" + part.trim_start_matches(|c: char| c.is_ascii_digit())
    })
}

fn said(source: &Source) -> BTreeSet<String> {
    source.fields().map(without_numbers).collect()
}

#[test]
fn every_field_of_the_schema_has_a_key() {
    let TypeVariant::Struct(schema) = guest_config::Owned::introspect().which() else {
        panic!("a configuration is a structure");
    };
    let mut all = BTreeSet::new();
    fields(schema.into(), "", &mut all);
    assert!(all.len() > 80, "{all:?}");
    // What the example only tells in words.
    let rates = "bps = 1\niops = 1\nburst-bytes = 1\nburst-ops = 1\n";
    let rates = parse(&format!("[rng]\n{rates}[[net]]\nkind = \"user\"\n{rates}")).unwrap();
    let mut said = said(&example().source);
    said.extend(self::said(&rates.source));
    for field in &all {
        let with = SAID_WITH
            .iter()
            .find(|(one, _)| one == field)
            .map_or(&field[..], |(_, with)| with);
        // A list of what has no parts is known by its own name, too.
        let is_said = said.contains(with) || said.contains(with.trim_end_matches("[]"));
        let is_excused = UNSAID.iter().any(|(unsaid, _)| unsaid == field);
        assert!(is_said != is_excused, "{field}: said {is_said}, excused {is_excused}");
    }
    for name in UNSAID
        .iter()
        .map(|(name, _)| name)
        .chain(SAID_WITH.iter().map(|(name, _)| name))
    {
        assert!(all.contains(*name), "the schema has no {name}");
    }
}

#[test]
fn the_example_survives_being_written() {
    let before = example();
    let text = write(&resolved(example()), true, &[], false).unwrap();
    let after = parse(&text).unwrap();
    // What a network is, and how it is called, is told by the same key.
    assert_eq!(said(&after.source), said(&before.source), "{text}");
    assert_eq!(message(resolved(after)), message(resolved(before)), "{text}");
}

/// The keys that can follow `text`, as the reader tells them about one that it does not know.
fn keys(text: &str) -> BTreeSet<String> {
    let told = refused(&format!("{text}\nzzzzzz = 1"));
    let keys = told.lines().find_map(|line| line.split_once("known are ")).unwrap().1;
    keys.split(", ").map(str::to_owned).collect()
}

/// The long options of what makes guests; a name without dashes stands for itself.
fn options() -> BTreeSet<String> {
    let cli = Cli::command();
    let commands = ["launch", "define"].map(|name| cli.find_subcommand(name).unwrap().clone());
    let all = commands.iter().flat_map(clap::Command::get_arguments);
    let named = all.filter(|argument| !argument.is_global_set());
    named
        .map(|argument| argument.get_long().unwrap_or(argument.get_id().as_str()).to_owned())
        .filter(|name| name != "help")
        .collect()
}

#[test]
fn every_key_has_an_option_and_every_option_a_key() {
    let mut of_keys: BTreeSet<String> = WITHOUT_KEY.iter().map(|(option, _)| (*option).to_owned()).collect();
    let nested = keys("[limits]").into_iter().map(|key| format!("limits.{key}"));
    for key in keys("").into_iter().chain(nested) {
        let option = OPTIONS
            .iter()
            .find(|(of, _)| *of == key)
            .map_or(&key[..], |(_, option)| option);
        assert!(options().contains(option), "no option says '{key}'");
        of_keys.insert(option.to_owned());
    }
    assert_eq!(options(), of_keys);
}

#[test]
fn every_key_of_a_table_has_a_word_of_its_option() {
    for (table, option, first, words) in WORDS {
        let of_words: BTreeSet<String> = words.iter().map(|(key, _)| (*key).to_owned()).collect();
        assert_eq!(keys(table), of_words, "{option}");
        for word in words.iter().map(|(_, word)| *word).filter(|word| *word != "-") {
            let specification = format!("--{option}={first},{word}");
            let parsed = Cli::try_parse_from(["guest", "launch", &specification]);
            assert!(
                matches!(parsed.map(|cli| cli.command), Ok(Command::Launch(_))),
                "{specification}"
            );
        }
    }
}

#[test]
fn what_is_given_by_its_content_is_told_to_be_missing() {
    use sepal_schema::config::{
        File, GuestConfig,
        device::{Disk, DiskMode},
    };
    let config = GuestConfig {
        kernel: File::Bytes(b"image".to_vec()),
        initrd: File::Path("/boot/initrd".into()),
        disks: vec![Disk::new(File::Bytes(Vec::new()), DiskMode::ReadOnly)],
        ..GuestConfig::default()
    };
    let missing = nameless(&config, &["kernel".to_owned()]);
    assert_eq!(missing, ["kernel", "disks[0].image"]);
    let text = write(&config, false, &missing, false).unwrap();
    for field in missing {
        let comment = format!("# has no name that could be written down: {field}\n");
        assert!(text.contains(&comment), "{text}");
    }
}

#[test]
fn columns_are_counted_behind_the_mark_that_some_editors_write() {
    let place = |bytes: &[u8]| match decode("web.toml", bytes.to_vec()) {
        Ok(text) => refused(&text).lines().next().unwrap().to_owned(),
        Err(error) => error.to_string(),
    };
    assert!(place(b"\xef\xbb\xbfmamory = 1").starts_with("web.toml:1:1: 'mamory'"));
    assert!(place(b"\xef\xbb\xbfname = \"\xff\"").starts_with("web.toml:1:9: what is here is not UTF-8"));
    assert!(
        place(
            "cpus = 1\r\n\tname = \"ü"
                .as_bytes()
                .iter()
                .copied()
                .chain([0xff])
                .collect::<Vec<_>>()
                .as_slice()
        )
        .starts_with("web.toml:2:11: what is here is not UTF-8")
    );
    assert!(place(b"cpus = 1\r\n\tmamory = 1\r\n").starts_with("web.toml:2:2: 'mamory'"));
}

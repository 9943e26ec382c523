//! Tests of the guest's pure modules, above all that nothing the VMM or the user sends makes them panic or run on.

use proptest::prelude::*;

use crate::acpi::{Acpi, Port};
use crate::boot_info::{BootInfo, MAX_COMMAND_LINE, MAX_RANGES, PhysicalMemory, Range};
use crate::clock::{DateTime, PvClock};
use crate::command::{Command, HELP, Options, ResetWay, parse};
use crate::line::{Event, LineEditor, MAX_LINE};

/// Memory with `bytes` at `base` and nothing else.
struct Memory {
    base: u64,
    bytes: Vec<u8>,
}

impl PhysicalMemory for Memory {
    fn read(&self, address: u64, into: &mut [u8]) -> bool {
        let found = address.checked_sub(self.base).and_then(|start| {
            let start = usize::try_from(start).ok()?;
            self.bytes.get(start..start.checked_add(into.len())?)
        });
        found.map(|bytes| into.copy_from_slice(bytes)).is_some()
    }
}

fn checksummed(mut bytes: Vec<u8>, at: usize, length: usize) -> Vec<u8> {
    bytes[at] = 0;
    bytes[at] = bytes[..length]
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg();
    bytes
}

fn table(signature: &[u8; 4], body: &[u8]) -> Vec<u8> {
    let mut bytes = signature.to_vec();
    bytes.extend((36 + body.len() as u32).to_le_bytes());
    bytes.resize(36, 0);
    bytes.extend(body);
    let length = bytes.len();
    checksummed(bytes, 9, length)
}

/// RSDP at 0xe0000, XSDT at +0x100 naming what follows at +0x200, +0x400, ...
fn tables(bodies: &[(&[u8; 4], &[u8])]) -> Memory {
    const BASE: u64 = 0xe_0000;
    let mut rsdp = b"RSD PTR \0SEPAL \x02\0\0\0\0\x24\0\0\0".to_vec();
    rsdp.extend((BASE + 0x100).to_le_bytes());
    rsdp.extend([0; 4]);
    let rsdp = checksummed(checksummed(rsdp, 8, 20), 32, 36);
    let pointers: Vec<u8> = (0..bodies.len() as u64)
        .flat_map(|index| (BASE + 0x200 * (index + 1)).to_le_bytes())
        .collect();
    let mut bytes = rsdp;
    bytes.resize(0x100, 0);
    bytes.extend(table(b"XSDT", &pointers));
    for (index, (signature, body)) in bodies.iter().enumerate() {
        bytes.resize(0x200 * (index + 1), 0);
        bytes.extend(table(signature, body));
    }
    Memory { base: BASE, bytes }
}

fn madt(entries: &[u8]) -> Vec<u8> {
    [&[0; 8], entries].concat()
}

#[test]
fn acpi_tables_are_read() {
    let madt = madt(
        &[
            &[0, 8, 0, 3, 1, 0, 0, 0][..],
            &[0, 8, 1, 4, 0, 0, 0, 0],
            &[9, 16, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
            &[200, 3, 0],
            &[1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0],
        ]
        .concat(),
    );
    let mut fadt = vec![0; 276 - 36];
    fadt[116 - 36..129 - 36].copy_from_slice(&[1, 8, 0, 1, 0xf9, 0x0c, 0, 0, 0, 0, 0, 0, 6]);
    fadt[244 - 36..252 - 36].copy_from_slice(&[1, 8, 0, 1, 0x10, 6, 0, 0]);
    let mcfg = [&[0; 8][..], &0xe000_0000u64.to_le_bytes(), &[0, 0, 0, 255, 0, 0, 0, 0]].concat();
    let memory = tables(&[(b"APIC", &madt), (b"FACP", &fadt), (b"MCFG", &mcfg)]);
    for rsdp in [Some(0xe_0000), None] {
        let acpi = Acpi::read(&memory, rsdp).expect("sound tables");
        assert_eq!(acpi.apic_ids(), [3, 256]);
        assert_eq!((acpi.processors, acpi.ioapic), (2, Some(0xfec0_0000)));
        assert_eq!(acpi.ecam, Some((0xe000_0000, 255)));
        assert_eq!(
            (acpi.sleep_control, acpi.reset),
            (Some(Port(0x610)), Some((Port(0xcf9), 6)))
        );
    }
}

#[test]
fn unsound_acpi_tables_are_missing() {
    let mut memory = tables(&[(b"APIC", &madt(&[0, 8, 0, 0, 1, 0, 0, 0]))]);
    memory.bytes[0x210] ^= 1;
    assert_eq!(Acpi::read(&memory, Some(0xe_0000)).map(|acpi| acpi.processors), Some(0));
    memory.bytes[0x110] ^= 1;
    assert_eq!(Acpi::read(&memory, Some(0xe_0000)), None);
    assert_eq!(Acpi::read(&memory, Some(u64::MAX)), None);
    // An entry of length 0 must not be walked for ever, nor one that leaves the table.
    for entry in [[0, 0, 0, 0, 1, 0, 0, 0], [0, 9, 0, 0, 1, 0, 0, 0]] {
        assert_eq!(
            Acpi::read(&tables(&[(b"APIC", &madt(&entry))]), None).map(|acpi| acpi.processors),
            Some(0)
        );
    }
}

#[test]
fn start_info_is_read() {
    let mut bytes = Vec::new();
    for word in [0x336e_c578u32, 1, 0, 0] {
        bytes.extend(word.to_le_bytes());
    }
    for long in [0u64, 0x1100, 0xe_0000, 0x1040, 3] {
        bytes.extend(long.to_le_bytes());
    }
    bytes.resize(0x40, 0);
    for (start, size, kind) in [(0u64, 0x1000u64, 1u64), (0x1000, 0, 1), (u64::MAX - 1, 9, 2)] {
        [start, size, kind]
            .iter()
            .for_each(|long| bytes.extend(long.to_le_bytes()));
    }
    bytes.resize(0x100, 0);
    bytes.extend(b"run=x\x1b[2J\0tail");
    let memory = Memory { base: 0x1000, bytes };
    let info = BootInfo::from_pvh(&memory, 0x1000);
    assert_eq!(info.command_line(), "run=x?[2J");
    assert_eq!(info.rsdp, Some(0xe_0000));
    let expected = [
        Range {
            start: 0,
            end: 0x1000,
            kind: 1,
        },
        Range {
            start: u64::MAX - 1,
            end: u64::MAX,
            kind: 2,
        },
    ];
    assert_eq!(info.ranges(), expected);
    assert_eq!((info.usable_bytes(), info.more_ranges), (0x1000, 0));
    assert!(info.is_usable(0xff0, 0x1000) && !info.is_usable(0xff0, 0x1001));
}

#[test]
fn commands_are_understood() {
    for (line, expected) in [
        ("", Command::Nothing),
        ("   ", Command::Nothing),
        (" help ", Command::Help),
        ("help me", Command::Usage("this command takes no argument")),
        ("echo", Command::Echo("")),
        ("echo   a  b", Command::Echo("a  b")),
        ("mem", Command::Mem(None)),
        ("mem 12", Command::Mem(Some(12))),
        ("sleep 2", Command::Sleep(2000)),
        ("sleep 5ms", Command::Sleep(5)),
        ("sleep 86400", Command::Sleep(86_400_000)),
        ("reset", Command::Reset(ResetWay::Acpi)),
        ("reset i8042", Command::Reset(ResetWay::I8042)),
        ("reset triple", Command::Reset(ResetWay::TripleFault)),
        ("resett", Command::Unknown("resett")),
    ] {
        assert_eq!(parse(line), expected, "{line:?}");
    }
    for line in [
        "mem 0",
        "mem -1",
        "mem +1",
        "mem 18446744073709551616",
        "sleep",
        "sleep ms",
        "sleep 86401",
        "reset x",
    ] {
        assert!(matches!(parse(line), Command::Usage(_)), "{line:?}");
    }
    for (usage, _) in HELP.iter().filter(|(usage, _)| !usage.is_empty()) {
        let name = usage.split(' ').next().unwrap_or_default();
        assert!(
            !matches!(parse(name), Command::Unknown(_)),
            "{name} is in the help and unknown"
        );
    }
}

#[test]
fn command_line_options_are_found() {
    let run = |line| Options::parse(line).run;
    assert_eq!(
        Options::parse(" a quiet  b nobutton"),
        Options {
            quiet: true,
            no_button: true,
            run: ""
        }
    );
    assert_eq!(Options::parse("quieter =quiet"), Options::default());
    assert_eq!(run("x run=a;b y"), "a;b");
    assert_eq!(run("x run=\"mem 8;shutdown\" quiet"), "mem 8;shutdown");
    assert_eq!(run("\"run=mem 8;shutdown\""), "mem 8;shutdown");
    assert_eq!(run("run=\"mem 8"), "mem 8");
    assert!(!Options::parse("run=\"echo quiet\"").quiet);
}

#[test]
fn dates_are_decoded() {
    let date = |values| DateTime::from_cmos(values).map(|date| date.to_string());
    // Binary and 24 hours; BCD and 12 hours, at noon, midnight and in the evening.
    assert_eq!(
        date([56, 34, 12, 29, 2, 24, 20, 6, 0]).as_deref(),
        Some("2024-02-29T12:34:56Z")
    );
    assert_eq!(
        date([0x56, 0x34, 0x92, 0x29, 0x02, 0x24, 0x20, 0, 0]).as_deref(),
        Some("2024-02-29T12:34:56Z")
    );
    assert_eq!(
        date([0x56, 0x34, 0x12, 0x29, 0x02, 0x24, 0x20, 0, 0]).as_deref(),
        Some("2024-02-29T00:34:56Z")
    );
    assert_eq!(
        date([0x56, 0x34, 0x91, 0x29, 0x02, 0x99, 0x19, 0, 0]).as_deref(),
        Some("1999-02-29T23:34:56Z")
    );
    // No century register.
    assert_eq!(
        date([0, 0, 0, 1, 1, 30, 0, 6, 0]).as_deref(),
        Some("2030-01-01T00:00:00Z")
    );
    assert_eq!((date([0xff; 9]), date([0; 9])), (None, None));
}

#[test]
fn pv_clock_scales_both_ways() {
    let clock = PvClock {
        tsc: 1000,
        nanoseconds: 5,
        multiplier: 1 << 31,
        shift: 0,
    };
    assert_eq!((clock.at(1000), clock.at(3000), clock.at(0)), (5, 1005, 5));
    assert_eq!(PvClock { shift: -1, ..clock }.at(3000), 505);
    assert_eq!(PvClock { shift: 1, ..clock }.at(3000), 2005);
}

/// Feeds bytes to a new editor; returns the lines, the echo, and how many cancels there were.
fn edit(bytes: &[u8]) -> (Vec<String>, String, usize) {
    let (mut editor, mut lines, mut echo, mut cancels) = (LineEditor::new(), Vec::new(), String::new(), 0);
    for &byte in bytes {
        match editor.feed(byte, &mut echo) {
            Some(Event::Line) => lines.push(editor.line().to_owned()),
            Some(Event::Cancelled) => cancels += 1,
            None => {}
        }
        assert!(editor.line().len() <= MAX_LINE);
    }
    (lines, echo, cancels)
}

#[test]
fn line_ends_escapes_and_limits() {
    assert_eq!(edit(b"a\rb\nc\r\nd\n\r").0, ["a", "b", "c", "d", ""]);
    assert_eq!(
        edit(b"a\x1b[A\x1b[1;5Cb\x1bOPc\x1bxd\r"),
        (vec!["abcd".into()], "abcd\n".into(), 0)
    );
    assert_eq!(
        edit(b"ab\x15cd\x03ef\x08\r"),
        (vec!["e".into()], "ab\x08 \x08\x08 \x08cd^C\nef\x08 \x08\n".into(), 1)
    );
    let (lines, echo, _) = edit(&[&[b'x'; MAX_LINE + 2][..], b"\r"].concat());
    assert_eq!(lines, ["x".repeat(MAX_LINE)]);
    assert_eq!(echo, "x".repeat(MAX_LINE) + "\x07\x07\n");
}

proptest! {
    #[test]
    fn any_bytes_make_lines_of_printable_text(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let (lines, echo, _) = edit(&bytes);
        prop_assert!(lines.iter().all(|line| line.bytes().all(|byte| (b' '..=b'~').contains(&byte))));
        prop_assert!(echo.bytes().all(|byte| matches!(byte, b' '..=b'~' | b'\n' | 0x07 | 0x08)));
        for line in &lines {
            parse(line);
        }
    }

    #[test]
    fn any_text_is_parsed(text in "\\PC{0,300}") {
        parse(&text);
        prop_assert!(text.contains(Options::parse(&text).run));
    }

    #[test]
    fn any_memory_is_read_as_boot_information(bytes in proptest::collection::vec(any::<u8>(), 0..4096), zeroes in any::<bool>()) {
        let mut bytes = bytes;
        if let Some(magic) = bytes.get_mut(..8).filter(|_| zeroes) {
            magic.copy_from_slice(&[0x78, 0xc5, 0x6e, 0x33, 1, 0, 0, 0]);
        }
        let memory = Memory { base: 0, bytes };
        for info in [BootInfo::from_pvh(&memory, 0), BootInfo::from_zero_page(&memory, 0)] {
            prop_assert!(info.ranges().len() <= MAX_RANGES && info.command_line().len() <= MAX_COMMAND_LINE);
            prop_assert!(info.ranges().iter().all(|range| range.start < range.end));
            info.usable_bytes();
        }
    }

    #[test]
    fn any_table_contents_are_read(madt in proptest::collection::vec(any::<u8>(), 0..400), other in proptest::collection::vec(any::<u8>(), 0..300)) {
        let memory = tables(&[(b"APIC", &madt), (b"FACP", &other), (b"MCFG", &other)]);
        let acpi = Acpi::read(&memory, None);
        prop_assert!(acpi.is_some_and(|acpi| acpi.apic_ids().len() <= 64));
    }

    #[test]
    fn any_clock_values_are_taken(values in any::<[u8; 9]>(), tsc in any::<u64>(), now in any::<u64>(), multiplier in any::<u32>(), shift in any::<i8>()) {
        if let Some(date) = DateTime::from_cmos(values) {
            prop_assert_eq!(date.to_string().len(), 20);
        }
        PvClock { tsc, nanoseconds: now, multiplier, shift }.at(now);
    }
}

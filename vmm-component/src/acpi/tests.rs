//! Tests: the tables as a guest walks them, and as `iasl` reads them.

use std::process::Command;

use proptest::prelude::*;

use super::*;

/// A guest with a window above its memory and a function in each slot.
fn config(vcpus: u8) -> AcpiConfig {
    AcpiConfig {
        vcpus,
        pci_window_64: layout::pci_window_64(6 << 30, 40),
        pci_functions: (0..62).filter_map(|n| PciAddress::spread(n, 62)).collect(),
        panic_device: true,
        generation_id: true,
        instance_id: Some(std::array::from_fn(|n| n as u8 * 3)),
    }
}

fn word32(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

fn word64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The table at a guest physical address, of the length that it claims.
fn table(all: &[u8], address: u64) -> &[u8] {
    let start = (address - layout::ACPI) as usize;
    &all[start..start + word32(all, start + 4)]
}

/// Every table that the RSDP leads to, by signature.
fn walk(all: &[u8]) -> Vec<&[u8]> {
    let xsdt = table(all, word64(all, 24));
    let mut tables = vec![xsdt];
    for entry in xsdt[36..].chunks_exact(8) {
        let found = table(all, u64::from_le_bytes(entry.try_into().unwrap()));
        tables.push(found);
        if found.starts_with(b"FACP") {
            tables.push(table(all, word64(found, 140)));
        }
    }
    tables
}

fn find<'a>(tables: &[&'a [u8]], signature: &[u8]) -> &'a [u8] {
    tables.iter().find(|table| table.starts_with(signature)).unwrap()
}

proptest! {
    #[test]
    fn checksums_and_sizes_hold(vcpus in 1..=layout::MAX_VCPUS) {
        let all = build(&config(vcpus)).unwrap();
        prop_assert!(all.len() as u64 <= layout::ACPI_SIZE);
        prop_assert_eq!(&all[..8], b"RSD PTR ");
        prop_assert_eq!((sum(&all[..20]), sum(&all[..36])), (0, 0));
        let tables = walk(&all);
        prop_assert_eq!(tables.len(), 5);
        for table in &tables {
            prop_assert_eq!(sum(table), 0, "{}", String::from_utf8_lossy(&table[..4]));
        }

        // One local APIC a vCPU, numbered from 0.
        let madt = find(&tables, b"APIC");
        let (mut at, mut cpus, mut others) = (44, Vec::new(), Vec::new());
        while at < madt.len() {
            let (kind, length) = (madt[at], usize::from(madt[at + 1]));
            match kind {
                0 => cpus.push((madt[at + 2], madt[at + 3], word32(madt, at + 4))),
                _ => others.push(kind),
            }
            at += length;
        }
        prop_assert_eq!(at, madt.len());
        prop_assert_eq!(cpus, (0..vcpus).map(|cpu| (cpu, cpu, 1)).collect::<Vec<_>>());
        prop_assert_eq!(others, vec![1, 2, 2, 2]);
    }
}

#[test]
fn refuses_vcpus_out_of_range() {
    for vcpus in [0, layout::MAX_VCPUS + 1, u8::MAX] {
        let error = build(&config(vcpus)).unwrap_err().to_string();
        assert!(
            error.contains(&vcpus.to_string()) && error.contains("1 to 64"),
            "{error}"
        );
    }
}

#[test]
fn written_where_the_guest_looks() {
    let ram = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
    assert_eq!(write(&ram, &config(2)).unwrap(), layout::ACPI);
    let mut signature = [0; 8];
    ram.read_slice(&mut signature, GuestAddress(layout::ACPI)).unwrap();
    assert_eq!(&signature, b"RSD PTR ");

    let none = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0xe_0000)]).unwrap();
    assert!(matches!(write(&none, &config(1)), Err(AcpiError::Memory(_))));
}

#[test]
fn fadt_tells_how_to_stop() {
    let all = build(&config(1)).unwrap();
    let tables = walk(&all);
    let fadt = find(&tables, b"FACP");
    let register = |at: usize| (fadt[at], fadt[at + 1], word64(fadt, at + 4));
    assert_eq!((fadt[8], fadt.len()), (6, 276));
    assert_ne!(word32(fadt, 112) & 1 << 20, 0, "hardware-reduced");
    assert_ne!(word32(fadt, 112) & 1 << 10, 0, "reset register supported");
    assert_eq!((register(116), fadt[128]), ((1, 8, 0x602), 1));
    assert_eq!((register(244), register(256)), ((1, 8, 0x600), (1, 8, 0x601)));
    // VGA absent; 8042 not to be probed, RTC present.
    assert_eq!(fadt[109] & 0b10_0110, 0b00_0100);
}

/// The compiler of the ACPI project disassembles every table, and compiles the DSDT that comes out without a warning.
#[test]
fn iasl_accepts_every_table() {
    if Command::new("iasl").arg("-v").output().is_err() {
        println!("skipped: iasl (acpica-tools) is not installed");
        return;
    }
    for vcpus in [1, layout::MAX_VCPUS] {
        let all = build(&config(vcpus)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let run = |arguments: &[&str]| {
            let output = Command::new("iasl")
                .args(arguments)
                .current_dir(folder.path())
                .output()
                .unwrap();
            let text = [output.stdout, output.stderr]
                .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
                .concat();
            assert!(output.status.success(), "{arguments:?}: {text}");
            text
        };
        for table in walk(&all) {
            let name = String::from_utf8_lossy(&table[..4]).into_owned();
            std::fs::write(folder.path().join(format!("{name}.dat")), table).unwrap();
            let text = run(&["-d", &format!("{name}.dat")]);
            assert!(!text.contains("rror") && !text.contains("arning"), "{name}: {text}");
        }
        let source = std::fs::read_to_string(folder.path().join("DSDT.dsl")).unwrap();
        for part in [
            "PNP0501",
            "PNP0B00",
            "PNP0C0C",
            "ACPI0013",
            "ACPI0007",
            "PNP0A08",
            "PNP0C02",
            "_PRT",
            "_S5",
            "SEPL0002",
            "\"000306090c0f",
            "Notify (\\_SB.PWRB, 0x80)",
        ] {
            assert!(source.contains(part), "{part} is missing in {source}");
        }
        assert_eq!(source.matches("ACPI0007").count(), usize::from(vcpus));
        let text = run(&["-p", "again", "DSDT.dsl"]);
        assert!(text.contains("0 Errors, 0 Warnings"), "{text}");
    }
}

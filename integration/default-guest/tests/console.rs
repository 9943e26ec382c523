//! The default guest on the least machine that runs it (`support`): what a user sees on the serial console, and how it ends.

#![expect(
    clippy::expect_used,
    reason = "the support code, outside #[test] functions, is test code as well"
)]

mod support;

use support::{End, Machine, Options, Protocol, kvm_missing};

const PROMPT: &str = "sepal> ";

fn options(command_line: &str) -> Options {
    Options {
        command_line: command_line.into(),
        ..Options::default()
    }
}

/// A guest at its first prompt.
fn at_prompt(command_line: &str) -> Machine {
    let mut machine = Machine::start(&options(command_line));
    machine.expect(PROMPT);
    machine
}

/// Types a command; returns what is seen up to the next prompt.
fn command(machine: &mut Machine, line: &str) -> String {
    machine.type_in(format!("{line}\r"));
    machine.expect(PROMPT)
}

#[test]
fn banner_tells_what_the_machine_has() {
    if kvm_missing() {
        return;
    }
    let mut machine = Machine::start(&Options {
        vcpus: 2,
        ..options("console=ttyS0 one two")
    });
    let banner = machine.expect(PROMPT);
    let name = format!("Sepal default guest {}\r\n", env!("CARGO_PKG_VERSION"));
    assert!(banner.starts_with(&name), "{banner}");
    for line in [
        "memory: 31 MiB",
        "  0x0000000000-0x000009fbff usable",
        "  0x00000e0000-0x00000fffff reserved",
        "  0x0000100000-0x0001ffffff usable",
        "vcpus: 2",
        "command line: console=ttyS0 one two",
        "serial: 16550 at 0x3f8",
        "rtc: 2024-02-29T12:34:56Z",
        "ioapic: 24 pins",
        "pci: none",
    ] {
        assert!(
            banner.contains(&format!("\r\n{line}\r\n")),
            "{line:?} is not in {banner}"
        );
    }
    let info = command(&mut machine, "info");
    assert!(
        info.contains("vcpus: 2\r\n") && info.contains("memory: 31 MiB\r\n"),
        "{info}"
    );
}

#[test]
fn first_byte_leaves_before_anything_else_is_done() {
    if kvm_missing() {
        return;
    }
    let mut machine = Machine::start(&options(""));
    machine.expect("S");
    let first = machine.time_to_first_byte();
    machine.expect(PROMPT);
    let prompt = machine.age();
    println!(
        "image {} bytes; to the first byte {first:?}; to the prompt {prompt:?}",
        sepal_default_guest::IMAGE.len()
    );
}

#[test]
fn quiet_leaves_one_line() {
    if kvm_missing() {
        return;
    }
    let mut machine = Machine::start(&options("quiet"));
    let name = format!("Sepal default guest {}\r\nsepal> ", env!("CARGO_PKG_VERSION"));
    assert_eq!(machine.expect(PROMPT), name);
    println!("to the quiet prompt {:?}", machine.age());
}

#[test]
fn entered_by_linux_boot_protocol_it_tells_the_same() {
    if kvm_missing() {
        return;
    }
    let banner = |protocol| {
        Machine::start(&Options {
            protocol,
            ..options("abc")
        })
        .expect(PROMPT)
    };
    assert_eq!(banner(Protocol::Linux64), banner(Protocol::Pvh));
}

#[test]
fn without_acpi_tables_it_says_so_and_still_shuts_down() {
    if kvm_missing() {
        return;
    }
    let mut machine = Machine::start(&Options {
        acpi: false,
        ..options("")
    });
    assert!(machine.expect(PROMPT).contains("vcpus: unknown, no ACPI tables\r\n"));
    assert!(command(&mut machine, "cpus").contains("there are no ACPI tables to find vCPUs in"));
    machine.type_in("shutdown\r");
    assert_eq!(machine.wait_for_end().0, End::SleepControl(0x34));
}

#[test]
fn without_a_serial_port_the_power_button_still_works() {
    if kvm_missing() {
        return;
    }
    // The test machine shows output all the same.
    let mut machine = Machine::start(&Options {
        serial: false,
        ..options("quiet")
    });
    machine.expect(PROMPT);
    machine.press_power_button();
    assert_eq!(machine.wait_for_end().0, End::SleepControl(0x34));
}

#[test]
fn two_mebibytes_are_enough() {
    if kvm_missing() {
        return;
    }
    let mut machine = Machine::start(&Options {
        memory_mib: 2,
        ..options("")
    });
    assert!(machine.expect(PROMPT).contains("\r\nmemory: 1 MiB\r\n"));
    let touched = command(&mut machine, "mem");
    assert!(
        touched.contains("touched 0 MiB (2") && !touched.contains("WRONG"),
        "{touched}"
    );
}

#[test]
fn help_is_echoed_and_lists_every_command() {
    if kvm_missing() {
        return;
    }
    let mut machine = at_prompt("");
    let help = command(&mut machine, "help");
    assert!(help.starts_with("help\r\n"), "{help}");
    for name in [
        "help", "info", "echo", "time", "uptime", "sleep", "mem", "cpus", "pci", "shutdown", "reset", "crash", "spin",
    ] {
        assert!(help.contains(&format!("\r\n  {name}")), "{name} is not in {help}");
    }
}

#[test]
fn lines_are_edited() {
    if kvm_missing() {
        return;
    }
    let mut machine = at_prompt("");
    assert_eq!(command(&mut machine, "echo  a b "), "echo  a b \r\na b\r\nsepal> ");
    assert_eq!(
        command(&mut machine, "ecgi\x7f\x7fho hi"),
        "ecgi\x08 \x08\x08 \x08ho hi\r\nhi\r\nsepal> "
    );
    assert_eq!(
        command(&mut machine, "abc\x15echo x"),
        "abc\x08 \x08\x08 \x08\x08 \x08echo x\r\nx\r\nsepal> "
    );
    machine.type_in("half\x03");
    assert_eq!(machine.expect(PROMPT), "half^C\r\nsepal> ");
    machine.type_in("echo lf\n");
    assert_eq!(machine.expect(PROMPT), "echo lf\r\nlf\r\nsepal> ");
    machine.type_in("echo crlf\r\necho next\r\n");
    assert_eq!(machine.expect(PROMPT), "echo crlf\r\ncrlf\r\nsepal> ");
    assert_eq!(machine.expect(PROMPT), "echo next\r\nnext\r\nsepal> ");
    let unknown = command(&mut machine, "frob");
    assert_eq!(
        unknown,
        "frob\r\nunknown command \"frob\"; help lists the commands\r\nsepal> "
    );
}

#[test]
fn shutdown_writes_the_sleep_control_register() {
    if kvm_missing() {
        return;
    }
    let mut machine = at_prompt("");
    machine.type_in("shutdown\r");
    assert_eq!(machine.wait_for_end(), (End::SleepControl(0x34), "shutdown\r\n".into()));
}

#[test]
fn commands_of_the_command_line_run_after_the_banner() {
    if kvm_missing() {
        return;
    }
    let mut machine = Machine::start(&options("quiet run=\"echo a b; ;echo c;shutdown\" tail"));
    machine.expect("\r\n");
    let (end, output) = machine.wait_for_end();
    assert_eq!(end, End::SleepControl(0x34));
    assert_eq!(
        output,
        "sepal> echo a b\r\na b\r\nsepal> echo c\r\nc\r\nsepal> shutdown\r\n"
    );
}

#[test]
fn reset_has_three_ways() {
    if kvm_missing() {
        return;
    }
    for (way, expected) in [
        ("", End::AcpiReset(1)),
        (" acpi", End::AcpiReset(1)),
        (" i8042", End::I8042Reset),
        (" triple", End::TripleFault),
    ] {
        let mut machine = at_prompt("quiet");
        machine.type_in(format!("reset{way}\r"));
        assert_eq!(machine.wait_for_end().0, expected, "reset{way}");
    }
}

#[test]
fn crash_is_an_internal_error_of_kvm() {
    if kvm_missing() {
        return;
    }
    let mut machine = at_prompt("quiet");
    machine.type_in("crash\r");
    // Suberror 1: KVM_INTERNAL_ERROR_EMULATION.
    assert_eq!(machine.wait_for_end().0, End::InternalError(1));
}

#[test]
fn spin_goes_on_until_it_is_stopped_from_outside() {
    if kvm_missing() {
        return;
    }
    let mut machine = at_prompt("quiet");
    machine.type_in("spin\r");
    machine.expect("spinning\r\n");
    machine.type_in("help\r");
    machine.press_power_button();
    drop(machine);
}

#[test]
fn mem_touches_memory_and_says_how_much() {
    if kvm_missing() {
        return;
    }
    let mut machine = at_prompt("");
    assert!(command(&mut machine, "mem 8").contains("touched 8 MiB (2048 pages) in "));
    assert!(command(&mut machine, "mem 1").contains("touched 1 MiB (256 pages) in "));
    let more = command(&mut machine, "mem 1000");
    assert!(
        more.contains("there is less free memory than that\r\ntouched 30 MiB ("),
        "{more}"
    );
    assert!(!command(&mut machine, "mem").contains("WRONG"));
    assert!(command(&mut machine, "mem x").contains("usage: mem [MIB]"));
}

#[test]
fn mem_reaches_memory_above_the_hole() {
    if kvm_missing() {
        return;
    }
    let mut machine = Machine::start(&Options {
        memory_mib: 3072 + 64,
        ..options("")
    });
    assert!(
        machine
            .expect(PROMPT)
            .contains("  0x0100000000-0x0103ffffff usable\r\n")
    );
    // Maps the GiBs above the first; touching all of it would take long.
    assert!(command(&mut machine, "mem 4").contains("touched 4 MiB (1024 pages)"));
}

#[test]
fn cpus_start_and_say_hello() {
    if kvm_missing() {
        return;
    }
    let mut machine = Machine::start(&Options {
        vcpus: 3,
        ..options("quiet")
    });
    machine.expect(PROMPT);
    for _ in 0..2 {
        let said = command(&mut machine, "cpus");
        assert_eq!(
            said,
            "cpus\r\ncpu 0: hello (boot processor)\r\ncpu 1: hello\r\ncpu 2: hello\r\n3 of 3 vCPUs said hello\r\nsepal> "
        );
    }
}

#[test]
fn clocks_tell_the_time() {
    if kvm_missing() {
        return;
    }
    let mut machine = at_prompt("");
    assert_eq!(command(&mut machine, "time"), "time\r\n2024-02-29T12:34:56Z\r\nsepal> ");
    let mut milliseconds = || {
        let up = command(&mut machine, "uptime");
        let (_, after) = up.split_once("\r\nup ").expect("an answer");
        let (number, _) = after.split_once(" s\r\n").expect("a number");
        number.replace('.', "").parse::<u64>().expect("digits")
    };
    let (first, second) = (milliseconds(), milliseconds());
    assert!(first <= second && second < 3_600_000, "{first} {second}");
}

#[test]
fn an_idle_guest_makes_no_exits() {
    if kvm_missing() {
        return;
    }
    let mut machine = at_prompt("quiet");
    // Reading and echoing make some exits, whatever the time slept; waiting for it must make none.
    let exits = |machine: &mut Machine, milliseconds: u32| {
        let before = machine.exits();
        command(machine, &format!("sleep {milliseconds}ms"));
        machine.exits() - before
    };
    let (short, long) = (exits(&mut machine, 100), exits(&mut machine, 900));
    // One line and one prompt each; the port is read in chunks of what has come, so a few more or fewer looks at it.
    println!("{short} exits for 100 ms, {long} for 900 ms");
    assert!(long <= short + 4, "{short} exits for 100 ms, {long} for 900 ms");
}

#[test]
fn sleep_ends_at_control_c() {
    if kvm_missing() {
        return;
    }
    let mut machine = at_prompt("quiet");
    machine.type_in("sleep 86400\r");
    machine.expect("\r\n");
    machine.type_in("lost\x03echo kept\r");
    assert_eq!(machine.expect(PROMPT), "^C\r\nsepal> ");
    assert_eq!(machine.expect(PROMPT), "echo kept\r\nkept\r\nsepal> ");
}

#[test]
fn power_button_shuts_down() {
    if kvm_missing() {
        return;
    }
    let mut machine = at_prompt("quiet");
    machine.press_power_button();
    assert_eq!(
        machine.wait_for_end(),
        (End::SleepControl(0x34), "\r\npower button: shutting down\r\n".into())
    );
    // Pressed before the guest listens, and while a command runs.
    let mut machine = Machine::start(&options("quiet"));
    machine.press_power_button();
    machine.expect("power button: shutting down\r\n");
    assert_eq!(machine.wait_for_end().0, End::SleepControl(0x34));
    let mut machine = at_prompt("quiet");
    machine.type_in("sleep 86400\r");
    machine.expect("\r\n");
    machine.press_power_button();
    machine.expect("power button: shutting down\r\n");
    assert_eq!(machine.wait_for_end().0, End::SleepControl(0x34));
}

#[test]
fn power_button_can_be_ignored() {
    if kvm_missing() {
        return;
    }
    let mut machine = at_prompt("nobutton quiet");
    machine.type_in("ab");
    machine.expect("ab");
    machine.press_power_button();
    assert_eq!(
        machine.expect("sepal> ab"),
        "\r\npower button: ignored (nobutton)\r\nsepal> ab"
    );
    assert!(command(&mut machine, "").contains("unknown command \"ab\""));
}

#[test]
fn an_exception_is_reported_and_resets() {
    if kvm_missing() {
        return;
    }
    let mut machine = Machine::start(&Options {
        broken_clock: true,
        ..options("quiet")
    });
    machine.expect(PROMPT);
    machine.type_in("uptime\r");
    machine.expect("uptime\r\n");
    let (end, output) = machine.wait_for_end();
    assert_eq!(end, End::AcpiReset(1));
    let report = "\r\nexception 13, error code 0x0, at 0x10";
    assert!(
        output.starts_with(report) && output.contains(", CPL 0, CR2 "),
        "{output}"
    );
    assert!(output.ends_with(": resetting\r\n"), "{output}");
}

#[test]
fn garbage_never_kills_it() {
    if kvm_missing() {
        return;
    }
    let mut machine = at_prompt("quiet");
    // A linear congruential generator; no byte that ends a line, so that no command can come together.
    let mut state = 1u64;
    let garbage: Vec<u8> = std::iter::repeat_with(|| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
    .filter(|byte| !matches!(byte, b'\r' | b'\n'))
    .take(100 * 1024)
    .collect();
    machine.type_in(garbage);
    machine.type_in("\x03x\r");
    machine.expect("unknown command \"x\"");
    machine.expect(PROMPT);
    assert!(command(&mut machine, "echo alive").ends_with("\r\nalive\r\nsepal> "));
}

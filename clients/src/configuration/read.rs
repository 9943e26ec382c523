//! What a configuration file says about the guest as a whole.

use sepal_schema::config::{File, GuestConfig, Limits, MAX_CPUS, OnPanic, Pin, Restart, device::WatchdogAction};
use toml::de::DeTable;

use super::{
    FileConfig, Source, devices,
    section::{Reading, Section},
};
use crate::specs;

/// Most MiB of a guest: what the protocol's field can hold.
const MAX_MEMORY_MIB: u64 = i32::MAX as u64;
/// Most MiB that a limit can have: its bytes fit into a signed 64-bit number.
const MAX_LIMIT_MIB: u64 = (1 << 43) - 1;

/// Reads a text; what is wrong in it is told to `reading`.
pub(super) fn guest(text: &str, reading: &Reading<'_>) -> FileConfig {
    let (table, errors) = DeTable::parse_recoverable(text);
    if errors.is_empty() {
        return from(&Section::guest(reading, table.get_ref()));
    }
    // Half a table would be full of things that are missing.
    for error in errors {
        reading.wrong(error.span().unwrap_or(0..0), error.message());
    }
    FileConfig::default()
}

fn from(guest: &Section<'_>) -> FileConfig {
    let cmdline = guest.text("cmdline", "cmdline");
    let mut config = GuestConfig {
        name: guest.text("name", "name").unwrap_or_default(),
        uuid: guest.word("uuid", "uuid", specs::parse_uuid),
        instance_id: guest.word("instance-id", "instanceId", specs::parse_instance_id),
        kernel: guest.file("kernel", "kernel").map_or(File::None, File::Path),
        initrd: guest.file("initrd", "initrd").map_or(File::None, File::Path),
        cmdline: cmdline.clone().unwrap_or_default(),
        cmdline_add: guest.texts("cmdline-add", "cmdlineAdd"),
        cpus: guest.number("cpus", "cpus", 1..=MAX_CPUS.into()).unwrap_or(0),
        memory_mib: guest
            .mib("memory", "memoryMib", MAX_MEMORY_MIB)
            .and_then(|mib| i32::try_from(mib).ok())
            .unwrap_or(0),
        huge_pages: guest.flag("huge-pages", "hugePages").unwrap_or_default(),
        protected_vm: guest.flag("protected", "protectedVm").unwrap_or_default(),
        limits: limits(guest),
        waived_layers: guest.texts("waive-layers", "waivedLayers"),
        watchdog: guest.word_or_flag("watchdog", "watchdog", WatchdogAction::Reset, specs::parse_watchdog),
        generation_id: guest.flag("generation-id", "generationId").unwrap_or_default(),
        restart: restart(guest),
        durable: guest.flag("durable", "durable").unwrap_or_default(),
        pins: pins(guest),
        ..GuestConfig::default()
    };
    config.on_reset = guest
        .word("on-reset", "onReset", specs::parse_on_reset)
        .unwrap_or(config.on_reset);
    config.on_panic = guest
        .word("on-panic", "onPanic", specs::parse_on_panic)
        .unwrap_or(OnPanic::Leave);
    devices::read(guest, &mut config);
    FileConfig {
        config,
        cmdline,
        agent: guest.flag("agent", "agent"),
        panic_device: guest.flag("panic-device", "panicDevice"),
        autostart: guest.flag("autostart", ""),
        source: Source::default(),
    }
}

fn limits(guest: &Section<'_>) -> Limits {
    let Some(limits) = guest.section("limits", "limits") else {
        return Limits::default();
    };
    Limits {
        memory_mib: limits.mib("memory", "memoryMib", MAX_LIMIT_MIB).unwrap_or(0),
        cpu_percent: limits.number("cpu", "cpuPercent", 1..=100_000).unwrap_or(0),
        cpu_weight: limits.number("weight", "cpuWeight", 1..=10_000).unwrap_or(0),
        tasks: limits.number("tasks", "tasks", 1..=u32::MAX.into()).unwrap_or(0),
    }
}

fn restart(guest: &Section<'_>) -> Restart {
    let Some(restart) = guest.section("restart", "restart") else {
        return Restart::default();
    };
    let policy = restart.needed("policy", |key| restart.word(key, "policy", specs::parse_restart_policy));
    Restart {
        policy: policy.unwrap_or(Restart::default().policy),
        attempts: restart.number("attempts", "attempts", 1..=u32::MAX.into()).unwrap_or(0),
        delay_ms: restart.milliseconds("delay", "delayMs").unwrap_or(0),
        max_delay_ms: restart.milliseconds("max-delay", "maxDelayMs").unwrap_or(0),
        healthy_ms: restart.milliseconds("healthy", "healthyMs").unwrap_or(0),
    }
}

fn pins(guest: &Section<'_>) -> Vec<Pin> {
    let pin = |section: Section<'_>| {
        let vcpu = section.needed("vcpu", |key| section.number(key, "vcpu", 0..=u64::from(MAX_CPUS) - 1));
        let cpus = section.needed("cpus", |key| section.word_or_numbers(key, "cpus", specs::parse_cpus));
        Some(Pin {
            vcpu: vcpu?,
            cpus: cpus?,
        })
    };
    guest.sections("pin", "pins").into_iter().filter_map(pin).collect()
}

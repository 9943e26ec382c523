//! Configurations through the wire and back, and every refusal.

use std::{
    cell::RefCell,
    collections::HashMap,
    fs,
    os::fd::{AsFd, OwnedFd},
};

use capnp::message::HeapAllocator;
use capnp_rpc::ImbuedMessageBuilder;
use proptest::prelude::*;

mod devices;
mod upkeep;

use super::*;
use crate::{
    config_capnp::{Toggle, guest_config},
    error::Kind,
};

/// Descriptors that a message carries, without a socket.
#[derive(Default)]
struct Table(RefCell<(u32, HashMap<u32, OwnedFd>)>);

impl Table {
    fn left(&self) -> usize {
        self.0.borrow().1.len()
    }
}

impl Handles for Table {
    fn send(&self, fd: OwnedFd) -> Result<u32, Error> {
        let (next, table) = &mut *self.0.borrow_mut();
        table.insert(*next, fd);
        *next += 1;
        Ok(*next - 1)
    }
    fn take(&self, number: u32) -> Result<OwnedFd, Error> {
        let taken = self.0.borrow_mut().1.remove(&number);
        taken.ok_or_else(|| Error::new(Kind::BadConfig, format!("descriptor {number} did not arrive")))
    }
}

fn some_fd() -> OwnedFd {
    fs::File::open("/dev/null").unwrap().into()
}

/// A message that can carry capabilities.
fn message() -> ImbuedMessageBuilder<HeapAllocator> {
    ImbuedMessageBuilder::new(HeapAllocator::new())
}

fn decode(table: &Table, fill: impl FnOnce(guest_config::Builder<'_>, &Table)) -> Result<GuestConfig, Error> {
    let mut message = message();
    let mut config: guest_config::Builder<'_> = message.get_root().unwrap();
    fill(config.reborrow(), table);
    GuestConfig::decode(config.into_reader(), table)
}

fn refused(kind: Kind, about: &str, fill: impl FnOnce(guest_config::Builder<'_>, &Table)) {
    let table = Table::default();
    let Err(error) = decode(&table, fill) else {
        panic!("{about} was accepted");
    };
    assert_eq!((error.kind, error.about.as_str()), (kind, about), "{error}");
    assert_eq!(table.left(), 0, "{about}: a descriptor stayed behind");
}

#[test]
fn an_empty_configuration_is_valid() {
    let config = decode(&Table::default(), |_, _| {}).unwrap();
    assert_eq!((config.cpus(), config.memory_mib()), (1, DEFAULT_MEMORY_MIB));
    assert!(config.kernel.is_none() && config.initrd.is_none());
    assert_eq!(config.full_cmdline(), "");
}

#[test]
fn a_configuration_survives_the_wire() {
    let table = Table::default();
    let config = GuestConfig {
        name: "web-1".into(),
        instance_id: Some([7; INSTANCE_ID]),
        kernel: File::Fd(some_fd()),
        initrd: File::Path("/boot/initrd".into()),
        cmdline: "console=ttyS0".into(),
        cmdline_add: vec!["quiet".into(), "panic=-1".into()],
        cpus: 3,
        memory_mib: 512,
        huge_pages: true,
        protected_vm: true,
        custom_memory: vec![MemoryBacking {
            memfd: some_fd(),
            start: 0x20_0000,
            end: 0x40_0000,
        }],
        limits: Limits {
            memory_mib: 1024,
            cpu_percent: 150,
            cpu_weight: 100,
            tasks: 64,
        },
        waived_layers: vec!["landlock".into()],
        on_reset: OnReset::Pause,
        ..GuestConfig::default()
    };
    let limits = config.limits;
    let mut message = capnp::message::Builder::new_default();
    config.encode(message.init_root(), &table).unwrap();
    let back = GuestConfig::decode(message.get_root_as_reader().unwrap(), &table).unwrap();
    assert_eq!((&back.name[..], back.instance_id), ("web-1", Some([7; INSTANCE_ID])));
    assert!(matches!(back.kernel, File::Fd(fd) if fd.as_fd().try_clone_to_owned().is_ok()));
    assert!(matches!(back.initrd, File::Path(path) if path == "/boot/initrd"));
    assert_eq!((back.cmdline.as_str(), back.cmdline_add.len()), ("console=ttyS0", 2));
    assert_eq!((back.cpus, back.memory_mib, back.huge_pages), (3, 512, true));
    assert!(back.protected_vm);
    assert_eq!(
        (back.custom_memory[0].start, back.custom_memory[0].end),
        (0x20_0000, 0x40_0000)
    );
    assert_eq!((back.limits, back.waived_layers), (limits, vec!["landlock".to_owned()]));
    assert_eq!((back.on_reset, back.on_panic), (OnReset::Pause, OnPanic::Leave));
    assert_eq!(table.left(), 0);
}

#[test]
fn what_is_out_of_range_is_refused_by_name() {
    refused(Kind::BadConfig, "name", |mut c, _| c.set_name("a b"));
    refused(Kind::BadConfig, "name", |mut c, _| c.set_name("-a"));
    refused(Kind::BadConfig, "name", |mut c, _| c.set_name("x".repeat(65)));
    refused(Kind::BadConfig, "instanceId", |mut c, _| c.set_instance_id(&[1; 63]));
    refused(Kind::BadConfig, "cpus", |mut c, _| c.set_cpus(65));
    refused(Kind::BadConfig, "cmdline", |mut c, _| c.set_cmdline("a\nb"));
    refused(Kind::BadConfig, "cmdline", |mut c, _| {
        c.set_cmdline("x".repeat(2000));
        c.set_cmdline_add(&["y".repeat(47)][..]).unwrap();
    });
    refused(Kind::BadConfig, "cmdlineAdd", |c, _| {
        c.init_cmdline_add(65);
    });
    refused(Kind::BadConfig, "kernel", |c, _| c.init_kernel().set_path("vmlinux"));
    refused(Kind::BadConfig, "kernel", |c, _| {
        c.init_kernel().set_bytes(&[0; MAX_INLINE_FILE + 1])
    });
    refused(Kind::BadConfig, "kernel", |c, _| {
        c.init_kernel().init_fd().set_number(7)
    });
    refused(Kind::BadConfig, "customMemory[0]", |c, t| {
        let mut range = c.init_custom_memory(1).get(0);
        range.set_start(4096);
        range.set_end(4096);
        range.init_memfd().set_number(t.send(some_fd()).unwrap());
    });
    for (start, end) in [
        (DEVICE_HOLE.start - 4096, DEVICE_HOLE.start + 4096),
        (DEVICE_HOLE.end - 4096, DEVICE_HOLE.end),
        (0, 5 << 30),
        (MAX_GUEST_ADDRESS, MAX_GUEST_ADDRESS + 4096),
        (4096, u64::MAX - 4095),
    ] {
        refused(Kind::BadConfig, "customMemory[0]", |c, t| {
            let mut range = c.init_custom_memory(1).get(0);
            range.set_start(start);
            range.set_end(end);
            range.init_memfd().set_number(t.send(some_fd()).unwrap());
        });
    }
    refused(Kind::BadConfig, "customMemory[1]", |c, t| {
        let mut ranges = c.init_custom_memory(2);
        for (i, (start, end)) in [(4096, 3 * 4096), (2 * 4096, 4 * 4096)].into_iter().enumerate() {
            let mut range = ranges.reborrow().get(i as u32);
            range.set_start(start);
            range.set_end(end);
            range.init_memfd().set_number(t.send(some_fd()).unwrap());
        }
    });
    refused(Kind::BadConfig, "initrd", |c, t| {
        c.init_initrd().init_fd().set_number(t.send(some_fd()).unwrap())
    });
    refused(Kind::BadConfig, "shares", |c, _| {
        c.init_shares(17);
    });
    refused(Kind::BadConfig, "limits.cpuWeight", |c, _| {
        c.init_limits().set_cpu_weight(10_001)
    });
    refused(Kind::BadConfig, "limits.memoryMib", |c, _| {
        c.init_limits().set_memory_mib(1 << 43)
    });
    refused(Kind::BadConfig, "limits.cpuPercent", |c, _| {
        c.init_limits().set_cpu_percent(100_001)
    });
    refused(Kind::BadConfig, "limits.memoryMib", |c, _| {
        c.init_limits().set_memory_mib(1)
    });
    refused(Kind::BadConfig, "limits.tasks", |c, _| c.init_limits().set_tasks(1));
    refused(Kind::BadConfig, "limits.tasks", |c, _| {
        c.init_limits().set_tasks((4 << 20) + 1)
    });
}

#[test]
fn what_is_not_built_is_refused_by_name() {
    refused(Kind::NotSupported, "dtbOverlay", |c, t| {
        c.init_dtb_overlay().init_fd().set_number(t.send(some_fd()).unwrap())
    });
    refused(Kind::NotSupported, "firmware", |c, _| c.init_firmware().set_path("/x"));
    refused(Kind::NotSupported, "gpu", |mut c, _| c.set_gpu(Toggle::On));
    refused(Kind::NotSupported, "sound", |mut c, _| c.set_sound(Toggle::On));
    refused(Kind::NotSupported, "soundInput", |mut c, _| {
        c.set_sound_input(Toggle::On)
    });
    refused(Kind::NotSupported, "hypervisorSpecificAuthMethod", |mut c, _| {
        c.set_hypervisor_specific_auth_method(true)
    });
}

#[test]
fn a_device_that_is_switched_off_is_no_request_for_one() {
    decode(&Table::default(), |mut c, _| {
        c.set_gpu(Toggle::Off);
        c.init_balloon().set_enabled(Toggle::Off);
    })
    .unwrap();
}

#[test]
fn a_refused_message_keeps_no_descriptor() {
    refused(Kind::BadConfig, "cpus", |mut c, t| {
        c.set_cpus(200);
        c.reborrow()
            .init_kernel()
            .init_fd()
            .set_number(t.send(some_fd()).unwrap());
        c.reborrow()
            .init_initrd()
            .init_fd()
            .set_number(t.send(some_fd()).unwrap());
    });
}

proptest! {
    #[test]
    fn a_name_is_accepted_exactly_if_it_follows_the_rule(name in ".{0,80}") {
        let rule = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        let good = (1..=MAX_NAME).contains(&name.chars().count())
            && name.chars().all(rule)
            && name.starts_with(|c: char| c.is_ascii_alphanumeric());
        prop_assert_eq!(check_name(&name).is_ok(), good);
    }

    #[test]
    fn any_bytes_decode_or_fail_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        let mut segment = bytes;
        segment.resize(segment.len().next_multiple_of(8), 0);
        let segments = [&segment[..]];
        let message = capnp::message::Reader::new(
            capnp::message::SegmentArray::new(&segments),
            capnp::message::ReaderOptions::new(),
        );
        if let Ok(config) = message.get_root::<guest_config::Reader<'_>>() {
            let _ = GuestConfig::decode(config, &Table::default());
        }
    }
}

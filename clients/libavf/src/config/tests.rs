//! What becomes of what is set.

use std::{
    cell::RefCell,
    os::fd::{AsRawFd, IntoRawFd},
};

use rustix::fs::MemfdFlags;

use super::*;

/// Descriptors that were handed over.
#[derive(Default)]
struct Sent(RefCell<Vec<OwnedFd>>);

impl Handles for Sent {
    fn send(&self, fd: OwnedFd) -> Result<u32, Error> {
        self.0.borrow_mut().push(fd);
        Ok(u32::try_from(self.0.borrow().len() - 1).unwrap())
    }

    fn take(&self, number: u32) -> Result<OwnedFd, Error> {
        Ok(self.0.borrow()[number as usize].try_clone().unwrap())
    }
}

fn file() -> OwnedFd {
    tempfile::tempfile().unwrap().into()
}

fn memfd(flags: MemfdFlags) -> OwnedFd {
    rustix::fs::memfd_create("test", flags).unwrap()
}

#[test]
fn a_number_is_taken_if_it_is_a_descriptor() {
    // SAFETY: numbers that are no descriptors.
    unsafe {
        assert!(take_fd(-1).is_none() && take_fd(i32::MIN).is_none() && take_fd(i32::MAX).is_none());
    }
    let number = file().into_raw_fd();
    // SAFETY: it was just given away.
    let taken = unsafe { take_fd(number) }.unwrap();
    assert_eq!(taken.as_raw_fd(), number);
}

#[test]
fn a_name_and_a_kernel_are_needed() {
    let mut config = RawConfig::default();
    assert_eq!(config.complete().unwrap_err().to_string(), "it has no name");
    config.name = Some("a b".into());
    assert_eq!(config.complete().unwrap_err().to_string(), "it has no kernel");
    config.kernel = Some(file());
    assert_eq!(config.complete().unwrap(), "a b");
    assert!(config.kernel.is_some());
}

#[test]
fn a_memfd_is_sealed_if_it_lets_itself_be() {
    let seals = |fd: &OwnedFd| rustix::fs::fcntl_get_seals(fd).unwrap();
    let sealable = memfd(MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
    seal(&sealable);
    assert!(seals(&sealable).contains(SealFlags::SHRINK));
    let other = memfd(MemfdFlags::CLOEXEC);
    seal(&other);
    assert_eq!(seals(&other), SealFlags::SEAL);
}

#[test]
fn the_guest_is_what_was_set() {
    let config = RawConfig {
        name: Some("x".into()),
        instance_id: Some([9; INSTANCE_ID]),
        kernel: Some(file()),
        disks: [true, false]
            .map(|writable| Disk {
                image: file(),
                writable,
            })
            .into(),
        memory_mib: 512,
        protected_vm: true,
        balloon: true,
        memory: vec![MemoryBacking {
            memfd: file(),
            start: 4096,
            end: 8192,
        }],
        ..RawConfig::default()
    };
    let mut message = capnp::message::Builder::new_default();
    let sent = Sent::default();
    config.write("x", message.init_root(), &sent).unwrap();
    assert_eq!(sent.0.borrow().len(), 4);
    let read: guest_config::Reader<'_> = message.get_root_as_reader().unwrap();
    assert_eq!(read.get_instance_id().unwrap(), [9; INSTANCE_ID]);
    assert!(read.get_protected_vm());

    let guest = config.guest("x").unwrap();
    assert_eq!((guest.memory_mib(), guest.custom_memory[0].start), (512, 4096));
    assert_eq!(guest.disks[0].mode, DiskMode::ReadWrite);
    assert_eq!(guest.disks[1].mode, DiskMode::ReadOnly);
    assert!(guest.balloon.is_some() && guest.initrd.is_none() && !guest.agent);
    assert_eq!(guest.watchdog, Some(WatchdogAction::Stop));
    assert!(RawConfig::default().guest("x").unwrap().balloon.is_none());
}

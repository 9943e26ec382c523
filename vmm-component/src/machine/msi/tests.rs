//! Messages through KVM into a local APIC, looked at in its interrupt request register. Needs /dev/kvm; prints "skipped" without it.

use std::path::Path;
use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VcpuFd};
use sepal_devices::legacy::ioapic::IoApic;

use super::*;
use crate::machine::vm::{KvmMsi, create};

const PATIENCE: Duration = Duration::from_secs(60);
/// Offsets in the local APIC's page (Intel SDM volume 3, table "Local APIC Register Address Map").
const SPURIOUS: usize = 0xf0;
const REQUESTED: usize = 0x200;

fn message(vector: u8) -> Msi {
    Msi {
        address: 0xfee0_0000,
        data: vector.into(),
    }
}

fn is_requested(vcpu: &VcpuFd, vector: u8) -> bool {
    let registers = vcpu.get_lapic().unwrap().regs;
    let byte = registers[REQUESTED + 16 * usize::from(vector / 32) + usize::from(vector % 32 / 8)];
    byte.cast_unsigned() >> (vector % 8) & 1 == 1
}

/// Waits for a message that is on its way.
fn await_request(vcpu: &VcpuFd, vector: u8) {
    let deadline = Instant::now() + PATIENCE;
    while !is_requested(vcpu, vector) {
        assert!(Instant::now() < deadline, "vector {vector:#x} never came");
        std::thread::yield_now();
    }
}

#[test]
fn an_eventfd_that_is_held_back_keeps_what_was_written() {
    if !Path::new("/dev/kvm").exists() {
        println!("skipped: no /dev/kvm");
        return;
    }
    let vm = Arc::new(create(&Kvm::new().unwrap()).unwrap());
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut lapic = vcpu.get_lapic().unwrap();
    // Software-enabled, with 0xff as the spurious vector.
    (lapic.regs[SPURIOUS], lapic.regs[SPURIOUS + 1]) = (-1, 1);
    vcpu.set_lapic(&lapic).unwrap();

    let ioapic = IoApic::new(Arc::new(KvmMsi::new(Arc::clone(&vm))));
    let routes = Arc::new(Routes::new(Arc::clone(&vm), &ioapic));
    let vectors = KvmVectors::new(vm, routes);
    let (held, open) = (vectors.allocate().unwrap(), vectors.allocate().unwrap());
    let bell = held.event_fd().unwrap();
    vectors.route(&[(Arc::clone(&held), message(0x50)), (Arc::clone(&open), message(0x51))]);

    held.hold(true);
    bell.write(1).unwrap();
    open.trigger();
    await_request(&vcpu, 0x51);
    assert!(!is_requested(&vcpu, 0x50));
    held.hold(false);
    await_request(&vcpu, 0x50);

    // What was taken as pending does not come by itself; what comes after that does.
    vectors.route(&[(Arc::clone(&held), message(0x60)), (Arc::clone(&open), message(0x61))]);
    held.hold(true);
    assert!(!held.take_held());
    bell.write(1).unwrap();
    assert!(held.take_held());
    assert!(!held.take_held());
    held.hold(false);
    open.trigger();
    await_request(&vcpu, 0x61);
    assert!(!is_requested(&vcpu, 0x60));
    held.trigger();
    await_request(&vcpu, 0x60);
}

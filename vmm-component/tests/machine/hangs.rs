//! A device that does not come back: the guest and its owner go on.

use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sepal_devices::virtio::device::{Context, DeviceKind, Fault, VirtioDevice};
use sepal_vmm_component::machine::{DeviceSpec, Happening, Machine, ThreadRole};

use crate::registers;
use crate::rig::{self, PATIENCE, Rig, kvm};
use crate::virtio::kernel_of_requests;

/// Enough for threads that do end.
const PATIENCE_WITH_STUCK: Duration = Duration::from_secs(1);

/// Tells that it was notified, and does not come back until the test lets go.
struct Hangs {
    entered: Sender<()>,
    released: Mutex<Receiver<()>>,
}

impl VirtioDevice for Hangs {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![8]
    }

    fn notify(&mut self, _: u16, _: &mut Context<'_>) -> Result<(), Fault> {
        // Both fail only when the test is over.
        let _ = self.entered.send(());
        let _ = self.released.lock().expect("one device").recv();
        Ok(())
    }

    fn reset(&mut self, _: &mut Context<'_>) {}
}

#[test]
fn while_a_device_hangs_the_guest_and_its_owner_go_on() {
    let Some(kvm) = kvm() else { return };
    let (entered, entry) = channel();
    let (release, released) = channel();
    let released = Mutex::new(released);
    let mut rig = Rig::make(&kvm, &kernel_of_requests(), 1, |config| {
        config.devices = vec![DeviceSpec {
            name: "hangs".to_owned(),
            device: Box::new(Hangs { entered, released }),
        }];
    })
    .expect("the machine is made");
    rig.machine.start().expect("the machine starts");
    entry.recv_timeout(PATIENCE).expect("the guest rings");
    assert_eq!(rig.machine.stats().vcpus.len(), 1);
    rig.machine.press_power_button().expect("the machine runs");
    rig.machine.pause();
    assert!(matches!(rig.next(), Happening::Paused));
    rig.machine.resume();
    // It waits for its device, by its own loop.
    assert!(!registers(&rig, 0).halted);
    assert_eq!(rig.machine.read_memory(0x13_0000, 1).expect("memory"), [0]);
    // A vCPU may need longer to end than that.
    let stuck = rig.machine.join(Duration::from_millis(1)).stuck;
    assert!(stuck.contains(&"hangs".to_owned()), "{stuck:?}");
    drop(release);
}

#[test]
fn devices_whose_threads_never_get_ready_are_told_of_when_the_machine_ends() {
    let Some(kvm) = kvm() else { return };
    let (release, released) = channel::<()>();
    let released = Mutex::new(released);
    let (hooks, _events) = rig::hooks_with(move |role| {
        if matches!(role, ThreadRole::Device(_)) {
            // Fails only when the test is over.
            let _ = released.lock().map(|released| released.recv());
        }
        Ok(())
    });
    let (_ours, serial) = UnixStream::pair().expect("a socket pair");
    let config = rig::config(&kernel_of_requests(), 1, Some(serial.into()));
    let machine = Machine::create(&kvm, config, hooks, &Arc::default()).expect("the machine is made");
    let stuck = machine.join(PATIENCE_WITH_STUCK).stuck;
    assert_eq!(stuck, ["serial", "rtc"]);
    drop(release);
}

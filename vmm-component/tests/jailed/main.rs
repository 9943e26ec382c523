//! Devices that break in the real jail, each on its thread with its filter: this binary is both the test and the component that it jails.
//!
//! ```text
//!   test --runner--> this binary again: seals itself, runs a machine with a good device and bad ones --control socket--> "ok", or what went wrong
//! ```

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test, with a harness of its own"
)]

#[path = "../machine/guests.rs"]
#[allow(dead_code, reason = "shared with the tests of the machine")]
mod guests;
#[path = "../machine/rig.rs"]
#[allow(dead_code, reason = "shared with the tests of the machine")]
mod rig;
#[path = "../machine/virtio.rs"]
#[allow(dead_code, unused_imports, reason = "shared with the tests of the machine")]
mod virtio;

use std::any::Any;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;

use event_manager::EventSet;
use kvm_ioctls::Kvm;
use libtest_mimic::{Arguments, Trial};
use sepal_devices::dispatch::DeviceError;
use sepal_devices::virtio::device::{Context, DeviceKind, Fault, VirtioDevice};
use sepal_runner::inner::{self, StartupHandles, ThreadRole};
use sepal_runner::outer::{ComponentSpec, Program, Runner};
use sepal_runner::startup::{self, HandleKind};
use sepal_vmm_component::machine::{
    DeviceSpec, Happening, HostKind, Machine, MachineConfig, ResetCause, ThreadRole as Role,
};
use vmm_sys_util::eventfd::EventFd;

use rig::PATIENCE;

fn main() {
    if std::env::var_os(startup::STARTUP_VARIABLE).is_some() {
        component();
        return;
    }
    let arguments = Arguments::from_args();
    let test = || {
        broken_devices_are_quarantined();
        Ok(())
    };
    let trial = Trial::test("devices_that_break_are_quarantined_and_the_guest_goes_on", test);
    libtest_mimic::run(&arguments, vec![trial]).exit();
}

fn broken_devices_are_quarantined() {
    let Ok(kvm) = File::options().read(true).write(true).open("/dev/kvm") else {
        println!("skipped: no /dev/kvm");
        return;
    };
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let (mut errors, stderr) = UnixStream::pair().unwrap();
    let program = Program::open(std::env::current_exe().unwrap()).unwrap();
    let mut spec = ComponentSpec::new(program, c"component".to_owned());
    // The jail does not show what tells.
    if matches!(rig::host(), HostKind::Unassisted) {
        spec.args.push(c"unassisted".to_owned());
    }
    spec.stderr = Some(stderr.into());
    spec.handles
        .add(startup::CONTROL, HandleKind::Socket, theirs.into())
        .unwrap();
    spec.handles.add(startup::KVM, HandleKind::Kvm, kvm.into()).unwrap();
    let mut runner = Runner::new().unwrap();
    let mut component = runner.spawn(spec).unwrap();
    let mut outcome = String::new();
    ours.read_to_string(&mut outcome).unwrap();
    let status = component.wait().unwrap();
    let mut said = String::new();
    errors.read_to_string(&mut said).unwrap();
    assert!(outcome == "ok" && status.success(), "{outcome}\n{status:?}\n{said}");
}

/// What runs in the jail.
fn component() {
    let mut handles = StartupHandles::take().unwrap();
    let mut control = UnixStream::from(handles.remove(startup::CONTROL).unwrap());
    let kvm: OwnedFd = handles.remove(startup::KVM).unwrap();
    // SAFETY: owned, and /dev/kvm, as the startup handles have checked.
    let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
    let unassisted = std::env::args().any(|argument| argument == "unassisted");
    let host = if unassisted {
        HostKind::Unassisted
    } else {
        HostKind::Hardware
    };
    // Before the jail closes, since it looks for what kind of host this is.
    let config = MachineConfig {
        host,
        ..rig::config(&virtio::kernel_of_requests(), 1, None)
    };
    inner::seal(handles.seal_spec()).unwrap();
    let outcome = catch_unwind(AssertUnwindSafe(|| machine_with_bad_devices(&kvm, config)));
    let words = outcome.map_or_else(|panic| message(&*panic), |()| "ok".to_owned());
    control.write_all(words.as_bytes()).unwrap();
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
        .unwrap_or_default()
}

fn narrow(role: Role) -> std::io::Result<()> {
    let role = match role {
        Role::Vcpu(_) => ThreadRole::Vcpu,
        Role::Device(_) | Role::Virtio(_) => ThreadRole::DeviceLoop,
        Role::Loader => ThreadRole::Helper,
    };
    inner::narrow(role).map_err(std::io::Error::other)
}

/// A device that breaks when it is told to.
struct Bad {
    trigger: EventFd,
    panics: bool,
}

impl VirtioDevice for Bad {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![8]
    }

    fn start(&mut self, context: &mut Context<'_>) -> Result<(), DeviceError> {
        context.watch(&self.trigger, 0, EventSet::IN)
    }

    fn notify(&mut self, _: u16, _: &mut Context<'_>) -> Result<(), Fault> {
        Ok(())
    }

    fn ready(&mut self, _: u32, _: EventSet, _: &mut Context<'_>) -> Result<(), Fault> {
        assert!(!self.panics, "on purpose");
        Err(Fault::Host("its host broke".into()))
    }

    fn reset(&mut self, _: &mut Context<'_>) {}
}

/// The guest drives one device, two others break: both are reported, and the guest does all that it has to do.
fn machine_with_bad_devices(kvm: &Kvm, config: MachineConfig) {
    let (mut serial, guest_end) = UnixStream::pair().unwrap();
    let served = Arc::new(AtomicU64::new(0));
    let triggers = [EventFd::new(0).unwrap(), EventFd::new(0).unwrap()];
    let stamp = virtio::Stamp {
        served: Arc::clone(&served),
    };
    let spec = |name: &str, device| DeviceSpec {
        name: name.to_owned(),
        device,
    };
    let bad = |n: usize| Bad {
        trigger: triggers[n].try_clone().unwrap(),
        panics: n == 0,
    };
    let config = MachineConfig {
        serial: Some(guest_end.into()),
        devices: vec![
            spec("stamp", Box::new(stamp)),
            spec("panics", Box::new(bad(0))),
            spec("fails", Box::new(bad(1))),
        ],
        ..config
    };
    let (hooks, events) = rig::hooks_with(narrow);
    // On a thread of its own, which narrows itself to load the kernel.
    let create = || Machine::create(kvm, config, hooks, &Arc::default());
    let created = std::thread::scope(|scope| scope.spawn(create).join());
    let mut machine = created.unwrap().unwrap();
    machine.pause();
    machine.start().unwrap();
    // Looking at registers takes more of the filter than running.
    let (show, shown) = channel();
    machine.registers(0, move |dump| show.send(dump).unwrap()).unwrap();
    let dump = shown.recv_timeout(PATIENCE).unwrap().unwrap();
    assert_eq!(dump.regs.rip, guests::BASE);
    machine.resume();
    for trigger in &triggers {
        trigger.write(1).unwrap();
    }
    let (mut failures, mut ended) = (Vec::new(), false);
    while failures.len() < 2 || !ended {
        match events.recv_timeout(PATIENCE).unwrap().what {
            Happening::DeviceFailed { device, reason } => failures.push((device, reason)),
            Happening::Reset { how: ResetCause::I8042 } => ended = true,
            Happening::Paused => {}
            other => panic!("{other:?}"),
        }
    }
    failures.sort();
    let expected = [("fails", "its host broke"), ("panics", "on purpose")];
    assert_eq!(
        failures,
        expected.map(|(device, reason)| (device.into(), reason.into()))
    );
    assert_eq!(served.load(Ordering::Relaxed), virtio::REQUESTS);
    let stopped = machine.join(PATIENCE);
    assert_eq!(stopped.stuck, Vec::<String>::new());
    let mut output = Vec::new();
    serial.read_to_end(&mut output).unwrap();
    assert_eq!(output, b"V");
}

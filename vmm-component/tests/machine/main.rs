//! Guests of a few instructions on real machines. Needs /dev/kvm, with or without hardware virtualization; prints "skipped" without it.

#![allow(clippy::expect_used, reason = "what is not as expected fails the program")]

mod guards;
#[allow(
    dead_code,
    reason = "shared with the other tests of the machine, which use all of it"
)]
mod guests;
mod hangs;
mod looking;
mod nmi;
mod rig;
mod virtio;

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use rig::{PATIENCE, Rig, config, hooks, hooks_with, kvm};
use sepal_schema::error::Kind;
use sepal_vmm_component::machine::{
    Happening, Machine, MachineError, RegisterDump, ResetCause, Spare, ThreadRole, ThreadSetup,
};
use sepal_vmm_component::memory::MIB;

fn is_reset(what: &Happening, cause: ResetCause) -> bool {
    matches!(what, Happening::Reset { how } if *how == cause)
}

/// A vCPU's registers, by way of its thread.
fn registers(rig: &Rig, vcpu: u8) -> RegisterDump {
    let (sender, receiver) = channel();
    rig.machine
        .registers(vcpu, move |dump| sender.send(dump).expect("the test waits"))
        .expect("the machine runs");
    let dump = receiver.recv_timeout(PATIENCE).expect("an answer");
    dump.expect("registers")
}

#[test]
fn first_byte_then_reset_by_i8042() {
    let Some(kvm) = kvm() else { return };
    let (ending, output) = Rig::start(&kvm, &guests::hello(), 1).finish();
    assert!(is_reset(&ending, ResetCause::I8042), "{ending:?}");
    assert_eq!(output, b"S");
}

#[test]
fn a_first_vcpu_that_was_made_ahead_is_narrowed_before_it_has_a_machine() {
    let (Some(kvm), Some(own)) = (kvm(), kvm()) else {
        return;
    };
    let (narrowed, roles) = channel();
    let setup: ThreadSetup = Arc::new(move |role| {
        // The test is over otherwise.
        let _ = narrowed.send(role);
        Ok(())
    });
    let (made, spare) = channel();
    let server = thread::spawn(move || Spare::serve(&own, &setup, |spare| drop(made.send(spare))));
    let spare = spare
        .recv_timeout(PATIENCE)
        .expect("an answer")
        .expect("a spare machine");
    let mut first: Vec<_> = (0..2)
        .map(|_| roles.recv_timeout(PATIENCE).expect("a thread"))
        .collect();
    first.sort_by_key(|role| *role == ThreadRole::Loader);
    assert_eq!(first, [ThreadRole::Vcpu(0), ThreadRole::Loader]);

    let (mut serial, guests_end) = UnixStream::pair().expect("a socket pair");
    let (hooks, events) = hooks();
    let config = config(&guests::hello(), 2, Some(guests_end.into()));
    let mut machine = Machine::create_from(&kvm, spare, config, hooks, &Arc::default()).expect("the machine is made");
    server.join().expect("the loader ends with its kernel");
    machine.start().expect("the machine starts");
    let ended = events.recv_timeout(PATIENCE).expect("an event").what;
    assert!(is_reset(&ended, ResetCause::I8042), "{ended:?}");
    assert_eq!(machine.join(PATIENCE).stuck, Vec::<String>::new());
    let mut output = Vec::new();
    serial.read_to_end(&mut output).expect("its output");
    assert_eq!(output, b"S");
}

#[test]
fn a_spare_machine_that_nobody_wants_leaves_no_thread() {
    thread_local! { static UNTIL_ITS_END: RefCell<Option<Sender<()>>> = const { RefCell::new(None) } }
    let Some(kvm) = kvm() else { return };
    let (alive, threads) = channel();
    let setup: ThreadSetup = Arc::new(move |_| {
        UNTIL_ITS_END.set(Some(alive.clone()));
        Ok(())
    });
    let server = thread::spawn(move || Spare::serve(&kvm, &setup, drop));
    server.join().expect("there is no kernel to load");
    let ended = threads.recv_timeout(PATIENCE);
    assert_eq!(
        ended,
        Err(RecvTimeoutError::Disconnected),
        "the vCPU's thread waits for ever"
    );
}

#[test]
fn acpi_shutdown() {
    let Some(kvm) = kvm() else { return };
    let (ending, _) = Rig::start(&kvm, &guests::acpi_off(), 1).finish();
    assert!(matches!(ending, Happening::Shutdown), "{ending:?}");
}

#[test]
fn acpi_reset() {
    let Some(kvm) = kvm() else { return };
    let (ending, _) = Rig::start(&kvm, &guests::acpi_reset(), 1).finish();
    assert!(is_reset(&ending, ResetCause::Acpi), "{ending:?}");
}

#[test]
fn triple_fault_is_a_reset() {
    let Some(kvm) = kvm() else { return };
    let (ending, _) = Rig::start(&kvm, &guests::triple_fault(), 1).finish();
    assert!(is_reset(&ending, ResetCause::TripleFault), "{ending:?}");
}

#[test]
fn a_spinning_guest_is_kicked() {
    let Some(kvm) = kvm() else { return };
    let mut rig = Rig::start(&kvm, &guests::count(), 2);
    rig.await_byte(b'c');
    rig.machine.kick();
    let (stopped, _) = rig.stop();
    assert_eq!(stopped.stats.vcpus.len(), 2);
}

#[test]
fn an_idle_guest_is_kicked() {
    let Some(kvm) = kvm() else { return };
    let mut rig = Rig::start(&kvm, &guests::idle(), 3);
    rig.await_byte(b'i');
    rig.machine.kick();
    rig.stop();
}

#[test]
fn a_string_instruction_writes_every_byte() {
    let Some(kvm) = kvm() else { return };
    let (ending, output) = Rig::start(&kvm, &guests::string_out(), 1).finish();
    assert!(is_reset(&ending, ResetCause::I8042), "{ending:?}");
    let expected: Vec<u8> = (0..5000u32).map(|n| n as u8).collect();
    assert_eq!(output, expected);
}

#[test]
fn a_string_instruction_reads_every_element() {
    let Some(kvm) = kvm() else { return };
    let (_, output) = Rig::start(&kvm, &guests::string_in(), 1).finish();
    assert_eq!(output, b"1");
}

fn start_others(vcpus: u8) {
    let Some(kvm) = kvm() else { return };
    let others = vcpus - 1;
    let (ending, output) = Rig::start(&kvm, &guests::smp(others), vcpus).finish();
    assert!(is_reset(&ending, ResetCause::I8042), "{ending:?}");
    assert_eq!(output, vec![b'a'; others.into()]);
}

#[test]
fn two_vcpus_start() {
    start_others(2);
}

#[test]
fn four_vcpus_start() {
    start_others(4);
}

#[test]
fn an_instruction_that_cannot_run_fails_the_vcpu_with_its_registers() {
    let Some(kvm) = kvm() else { return };
    let rig = Rig::start(&kvm, &guests::jump_to_nowhere(), 2);
    let ending = rig.next();
    let Happening::VcpuFailed {
        vcpu: 0,
        reason,
        registers,
    } = ending
    else {
        panic!("{ending:?}")
    };
    // The one that failed, and the one that was never started.
    let (stopped, _) = rig.stop();
    let last: Vec<_> = stopped
        .registers
        .iter()
        .map(|(vcpu, at)| (*vcpu, at.regs.rip))
        .collect();
    assert_eq!(last, [(0, 0xd000_0000), (1, 0xfff0)]);
    assert_eq!(registers.regs.rip, 0xd000_0000, "{reason}\n{registers}");
    assert_eq!(registers.regs.rax, 0xd000_0000);
    assert!(registers.to_string().contains("rip=00000000d0000000"), "{registers}");
}

#[test]
fn memory_continues_above_the_hole() {
    let Some(kvm) = kvm() else { return };
    let mut rig = Rig::make(&kvm, &guests::above_the_hole(), 1, |config| {
        config.memory.size_bytes = 3074 * MIB
    })
    .expect("the machine is made");
    rig.machine.start().expect("the machine starts");
    assert_eq!(rig.finish().1, b"H");
}

#[test]
fn host_input_reaches_the_guest() {
    let Some(kvm) = kvm() else { return };
    let mut rig = Rig::start(&kvm, &guests::echo(), 1);
    rig.await_byte(b'r');
    rig.serial.write_all(b"x").expect("input");
    assert_eq!(rig.finish().1, b"x");
}

#[test]
fn the_power_button_reaches_the_guest() {
    let Some(kvm) = kvm() else { return };
    let mut rig = Rig::start(&kvm, &guests::power_button(), 1);
    rig.await_byte(b'r');
    rig.machine.press_power_button().expect("the machine runs");
    assert!(matches!(rig.finish().0, Happening::Shutdown));
}

#[test]
fn a_paused_guest_stands_still_until_it_is_resumed() {
    let Some(kvm) = kvm() else { return };
    let mut rig = Rig::start(&kvm, &guests::count(), 2);
    rig.await_byte(b'c');
    rig.machine.pause();
    assert!(matches!(rig.next(), Happening::Paused));
    rig.machine.wait_paused(Duration::ZERO).expect("nobody is inside");
    let before = registers(&rig, 0).regs.rbx;
    assert_eq!(registers(&rig, 0).regs.rbx, before);
    rig.machine.resume();
    // It ends when the guest has counted on; if it never does, the test's time limit ends it.
    while registers(&rig, 0).regs.rbx == before {}
    rig.stop();
}

#[test]
fn a_machine_paused_before_its_start_waits_for_resume() {
    let Some(kvm) = kvm() else { return };
    let mut rig = Rig::make(&kvm, &guests::hello(), 1, |_| {}).expect("the machine is made");
    rig.machine.pause();
    assert!(matches!(rig.next(), Happening::Paused));
    rig.machine.start().expect("the machine starts");
    assert_eq!(registers(&rig, 0).regs.rip, guests::BASE);
    rig.machine.resume();
    assert_eq!(rig.finish().1, b"S");
}

#[test]
fn a_thread_that_cannot_be_confined_fails_the_start() {
    let Some(kvm) = kvm() else { return };
    let (hooks, events) = hooks_with(|role| match role {
        ThreadRole::Vcpu(1) => Err(std::io::Error::other("no filter")),
        _ => Ok(()),
    });
    let mut machine =
        Machine::create(&kvm, config(&guests::count(), 3, None), hooks, &Arc::default()).expect("a machine");
    let error = machine.start().expect_err("vCPU 1 can't start");
    assert!(matches!(error, MachineError::VcpuStart { vcpu: 1, .. }), "{error}");
    assert_eq!(error.kind(), Kind::VcpuStartFailure);
    assert!(error.to_string().contains("no filter"), "{error}");
    assert!(matches!(machine.nmi(), Err(MachineError::NotRunning)));
    assert_eq!(machine.join(PATIENCE).stuck, Vec::<String>::new());
    assert_eq!(events.try_iter().count(), 0, "a failed start is start's own result");
}

#[test]
fn a_panicking_setup_fails_the_start() {
    let Some(kvm) = kvm() else { return };
    let (hooks, _events) = hooks_with(|role| match role {
        ThreadRole::Vcpu(0) => panic!("on purpose"),
        _ => Ok(()),
    });
    let mut machine =
        Machine::create(&kvm, config(&guests::count(), 1, None), hooks, &Arc::default()).expect("a machine");
    assert!(matches!(machine.start(), Err(MachineError::VcpuStart { vcpu: 0, .. })));
}

#[test]
fn a_machine_starts_once() {
    let Some(kvm) = kvm() else { return };
    let mut rig = Rig::start(&kvm, &guests::idle(), 1);
    assert!(matches!(rig.machine.start(), Err(MachineError::AlreadyStarted)));
    rig.stop();
}

#[test]
fn impossible_numbers_of_vcpus_are_refused() {
    let Some(kvm) = kvm() else { return };
    for vcpus in [0, 65, 255] {
        let (hooks, _events) = hooks();
        let error = Machine::create(&kvm, config(&guests::hello(), vcpus, None), hooks, &Arc::default())
            .expect_err("no such machine");
        assert_eq!(error.kind(), Kind::BadConfig);
        assert_eq!(error.to_error().about, "cpus");
    }
}

#[test]
fn a_kernel_that_is_none_is_refused() {
    let Some(kvm) = kvm() else { return };
    let error = Rig::make(&kvm, &guests::hello(), 1, |config| {
        config.kernel = rig::file(b"not a kernel")
    })
    .map(|_| ())
    .expect_err("no kernel");
    assert_eq!(error.kind(), Kind::KernelLoadFailure, "{error}");
    assert_eq!(error.to_error().about, "kernel");
    assert!(
        error.to_string().contains("text that starts with \"not a kernel\""),
        "{error}"
    );
}

#[test]
fn an_initramfs_that_is_no_file_is_refused_by_its_field() {
    let Some(kvm) = kvm() else { return };
    let error = Rig::make(&kvm, &guests::hello(), 1, |config| {
        config.initrd = Some(std::fs::File::open("/").expect("a directory"))
    })
    .map(|_| ())
    .expect_err("no initramfs");
    assert_eq!(error.kind(), Kind::BadConfig, "{error}");
    assert_eq!(error.to_error().about, "initrd");
}

#[test]
fn more_memory_than_the_host_has_is_not_the_configurations_fault() {
    let Some(kvm) = kvm() else { return };
    let error = Rig::make(&kvm, &guests::hello(), 1, |config| config.memory.size_bytes = 3 << 40)
        .map(|_| ())
        .expect_err("no host that runs tests has so much");
    assert_eq!(error.kind(), Kind::GuestInitializationFailure, "{error}");
    assert_eq!(error.to_error().about, "memory");
}

#[test]
fn a_cancelled_creation_says_so() {
    let Some(kvm) = kvm() else { return };
    let (hooks, _events) = hooks();
    let result = Machine::create(
        &kvm,
        config(&guests::hello(), 1, None),
        hooks,
        &Arc::new(AtomicBool::new(true)),
    );
    assert!(matches!(result, Err(MachineError::Cancelled)), "{result:?}");
}

#[test]
fn a_creation_cancelled_at_any_moment_ends_one_way_or_the_other() {
    let Some(kvm) = kvm() else { return };
    for _ in 0..20 {
        let cancel = Arc::new(AtomicBool::new(false));
        std::thread::scope(|scope| {
            let creation = scope.spawn(|| {
                let (hooks, _events) = hooks();
                Machine::create(&kvm, config(&guests::hello(), 1, None), hooks, &cancel)
            });
            cancel.store(true, Ordering::Relaxed);
            let result = creation.join().expect("no panic");
            assert!(matches!(result, Ok(_) | Err(MachineError::Cancelled)), "{result:?}");
        });
    }
}

#[test]
fn register_readings_that_nobody_answers_are_bounded() {
    let Some(kvm) = kvm() else { return };
    let rig = Rig::start(&kvm, &guests::idle(), 1);
    assert!(matches!(
        rig.machine.registers(1, |_| {}),
        Err(MachineError::BadConfig { field: "vcpu", .. })
    ));
    // Holds up the vCPU's thread while more readings are asked for.
    let (enter, entered) = channel();
    let (release, released) = channel::<()>();
    rig.machine
        .registers(0, move |_| {
            enter.send(()).expect("the test waits");
            let _ = released.recv();
        })
        .expect("the machine runs");
    entered.recv_timeout(PATIENCE).expect("the thread is held");
    let busy = (0..1000)
        .filter(|_| matches!(rig.machine.registers(0, |_| {}), Err(MachineError::Busy { vcpu: 0 })))
        .count();
    assert!(busy > 900, "{busy}");
    drop(release);
    assert!(registers_eventually(&rig));
    rig.stop();
}

/// Whether the vCPU comes to answer again, however often it says that it is busy.
fn registers_eventually(rig: &Rig) -> bool {
    let (sender, receiver) = channel();
    loop {
        let sender = sender.clone();
        match rig
            .machine
            .registers(0, move |_| sender.send(()).expect("the test waits"))
        {
            Ok(()) => return receiver.recv_timeout(PATIENCE).is_ok(),
            Err(MachineError::Busy { .. }) => std::thread::yield_now(),
            Err(error) => panic!("{error}"),
        }
    }
}

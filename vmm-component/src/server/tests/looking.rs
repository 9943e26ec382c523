//! Looking into a guest: registers, memory, figures; also while a vCPU hangs.

use std::pin::pin;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use sepal_schema::{
    debug_capnp::debug,
    error::{Error, Kind},
    guest_capnp::{VcpuState, statistics::stats_result},
    info::GuestInfo,
};

use super::world::{Bench, bench, is_pending, kind};
use crate::machine::{MachineError, RegisterDump};

impl Bench {
    fn debug(&self) -> debug::Client {
        self.guest().debug_request().send().pipeline.get_debug()
    }
}

/// RIP, EFER, CS, base of GS, privilege level and whether it is halted.
type Shown = (u64, u64, u16, u64, u8, bool);

fn registers(debug: &debug::Client, vcpu: u8) -> impl Future<Output = Result<Shown, Error>> + use<> {
    use debug::registers_result::Which;
    let mut request = debug.registers_request();
    request.get().set_vcpu(vcpu);
    let answer = request.send().promise;
    async move {
        match answer.await.unwrap().get().unwrap().which().unwrap() {
            Which::Registers(shown) => {
                let shown = shown.unwrap();
                Ok((
                    shown.get_rip(),
                    shown.get_efer(),
                    shown.get_cs(),
                    shown.get_gs_base(),
                    shown.get_cpl(),
                    shown.get_halted(),
                ))
            }
            Which::Error(error) => Err(Error::read(error.unwrap()).unwrap()),
        }
    }
}

async fn memory(debug: &debug::Client, address: u64, length: u32) -> Result<Vec<u8>, Error> {
    use debug::memory_result::Which;
    let mut request = debug.read_physical_request();
    request.get().set_address(address);
    request.get().set_length(length);
    match request.send().promise.await.unwrap().get().unwrap().which().unwrap() {
        Which::Bytes(bytes) => Ok(bytes.unwrap().to_vec()),
        Which::Error(error) => Err(Error::read(error.unwrap()).unwrap()),
    }
}

/// What one vCPU's exits were for, and the guest's memory.
fn exits_and_memory(from: stats_result::Reader<'_>) -> (Vec<(String, u64)>, u64) {
    let Ok(stats_result::Which::Stats(stats)) = from.which() else {
        panic!("no figures");
    };
    let stats = stats.unwrap();
    assert_eq!(
        stats.get_vcpus().unwrap().get(1).get_state().unwrap(),
        VcpuState::Running
    );
    let reasons = stats.get_vcpus().unwrap().get(1).get_reasons().unwrap();
    let exits = reasons
        .iter()
        .map(|exits| (exits.get_reason().unwrap().to_string().unwrap(), exits.get_count()));
    (exits.collect(), stats.get_memory().unwrap().get_guest())
}

fn serial_dropped(from: stats_result::Reader<'_>) -> Result<u64, Error> {
    match from.which().unwrap() {
        stats_result::Which::Stats(stats) => Ok(stats.unwrap().get_serial_dropped()),
        stats_result::Which::Error(error) => Err(Error::read(error.unwrap()).unwrap()),
    }
}

#[test]
fn registers_and_memory_come_as_the_machine_tells_them() {
    bench(|bench| async move {
        let segment = |selector, base, dpl| kvm_segment {
            selector,
            base,
            dpl,
            ..kvm_segment::default()
        };
        let dump = RegisterDump {
            regs: kvm_regs {
                rip: 0x401000,
                ..kvm_regs::default()
            },
            sregs: kvm_sregs {
                cr0: 0x8000_0033,
                efer: 0xd01,
                cs: segment(0x33, 0, 3),
                ss: segment(0x2b, 0, 3),
                gs: segment(0, 0x7fff_0000, 3),
                ..kvm_sregs::default()
            },
            halted: true,
            ..RegisterDump::default()
        };
        bench.world.registers.lock().unwrap().push_back(Ok(dump));
        bench.create().await.unwrap();
        let debug = bench.debug();
        assert_eq!(kind(registers(&debug, 0).await), Kind::NotRunning);
        assert_eq!(kind(memory(&debug, 1, 1).await), Kind::NotRunning);
        let _run = bench.lifecycle.run_request().send();
        bench.until_running().await;
        let shown = registers(&debug, 1).await.unwrap();
        assert_eq!(shown, (0x401000, 0xd01, 0x33, 0x7fff_0000, 3, true));
        assert_eq!(memory(&debug, 7, 65536).await.unwrap(), vec![7; 65536]);
        let error = memory(&debug, 0, 1).await.unwrap_err();
        assert_eq!((error.kind, error.about.as_str()), (Kind::BadConfig, "address"));
    });
}

#[test]
fn memory_translations_and_stacks_come_as_the_vcpu_sees_them() {
    bench(|bench| async move {
        use debug::{memory_result, stack_result, translate_result};
        bench.create().await.unwrap();
        let debug = bench.debug();
        let virtually = |address, length| {
            let mut call = debug.read_virtual_request();
            call.get().set_address(address);
            call.get().set_length(length);
            let answer = call.send().promise;
            async move {
                match answer.await.unwrap().get().unwrap().which().unwrap() {
                    memory_result::Which::Bytes(bytes) => Ok(bytes.unwrap().to_vec()),
                    memory_result::Which::Error(error) => Err(Error::read(error.unwrap()).unwrap()),
                }
            }
        };
        assert_eq!(kind(virtually(7, 1).await), Kind::NotRunning);
        let _run = bench.lifecycle.run_request().send();
        bench.until_running().await;
        assert_eq!(virtually(7, 65536).await.unwrap(), vec![7; 65536]);
        assert_eq!(virtually(7, 0).await.unwrap(), b"");
        let error = virtually(0, 1).await.unwrap_err();
        assert_eq!((error.kind, error.about.as_str()), (Kind::BadConfig, "address"));

        let mut call = debug.translate_request();
        call.get().set_address(0x1234);
        let answer = call.send().promise.await.unwrap();
        let Ok(translate_result::Translation(found)) = answer.get().unwrap().which() else {
            panic!("no translation");
        };
        let found = found.unwrap();
        assert_eq!((found.get_physical(), found.get_page_size()), (0x234, 4096));
        assert_eq!(
            (found.get_writable(), found.get_user(), found.get_executable()),
            (false, true, true)
        );
        let answer = debug.translate_request().send().promise.await.unwrap();
        assert!(matches!(answer.get().unwrap().which(), Ok(translate_result::Error(_))));

        let answer = debug.stack_request().send().promise.await.unwrap();
        let stack = answer.get().unwrap();
        assert_eq!(stack.get_end().unwrap(), "that is all");
        let Ok(stack_result::Frames(frames)) = stack.which() else {
            panic!("no frames");
        };
        let frames: Vec<_> = frames
            .unwrap()
            .iter()
            .map(|frame| (frame.get_address(), frame.get_reliable()))
            .collect();
        assert_eq!(frames.len(), 64);
        assert_eq!(frames[..2], [(0x1000, true), (0x1001, false)]);
    });
}

#[test]
fn registers_that_cannot_be_read_are_an_error() {
    bench(|bench| async move {
        let refused = MachineError::Busy { vcpu: 1 };
        bench.world.registers.lock().unwrap().push_back(Err(refused));
        bench.create().await.unwrap();
        let _run = bench.lifecycle.run_request().send();
        bench.until_running().await;
        let error = registers(&bench.debug(), 1).await.unwrap_err();
        assert_eq!((error.kind, error.about.as_str()), (Kind::NoResources, "vcpu1"));
    });
}

#[test]
fn while_a_vcpu_hangs_everything_else_is_answered() {
    bench(|bench| async move {
        bench.create().await.unwrap();
        let observer = bench.observer();
        let statistics = bench.guest().statistics_request().send().pipeline.get_statistics();
        let answer = statistics.get_request().send().promise.await.unwrap();
        assert_eq!(kind(serial_dropped(answer.get().unwrap())), Kind::NotRunning);
        let _run = bench.lifecycle.run_request().send();
        bench.until_running().await;
        let mut stuck = pin!(registers(&bench.debug(), 1));
        assert!(is_pending(&mut stuck, &bench).await);
        let answer = statistics.get_request().send().promise.await.unwrap();
        assert_eq!(serial_dropped(answer.get().unwrap()), Ok(5));
        let (exits, memory_bytes) = exits_and_memory(answer.get().unwrap());
        assert_eq!(exits, [("io".to_owned(), 1), ("hlt".to_owned(), 8)]);
        let answer = observer.stats_request().send().promise.await.unwrap();
        assert_eq!(serial_dropped(answer.get().unwrap()), Ok(5));
        let answer = observer.info_request().send().promise.await.unwrap();
        let info = GuestInfo::read_result(answer.get().unwrap()).unwrap();
        assert!(info.uptime_ns > 0);
        assert_eq!(memory_bytes, info.descriptor.unwrap().memory_mib << 20);
        assert_eq!(memory(&bench.debug(), 1, 2).await, Ok(vec![1, 1]));
        // All that before this gave up.
        let error = stuck.await.unwrap_err();
        assert_eq!((error.kind, error.about.as_str()), (Kind::TimedOut, "vcpu1"));
    });
}

#[test]
fn who_waits_for_registers_hears_that_the_guest_ended() {
    bench(|bench| async move {
        bench.create().await.unwrap();
        let _run = bench.lifecycle.run_request().send();
        bench.until_running().await;
        let mut stuck = pin!(registers(&bench.debug(), 0));
        assert!(is_pending(&mut stuck, &bench).await);
        bench
            .wait_for("the request", |world| !world.unanswered.lock().unwrap().is_empty())
            .await;
        bench.world.unanswered.lock().unwrap().clear();
        assert_eq!(kind(stuck.await), Kind::NotRunning);
    });
}

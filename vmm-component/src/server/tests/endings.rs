//! What ended a guest: the vCPU or device is named, where there is one.

use std::sync::atomic::Ordering;

use sepal_schema::report::Reason;

use super::{ending, world::bench};
use crate::machine::{Happening, RegisterDump, ResetCause};

/// Reason and culprit of a guest that ends by `what`.
fn ends_by(what: Happening) -> (Reason, String) {
    let (sender, receiver) = std::sync::mpsc::channel();
    bench(|bench| async move {
        bench.create().await.unwrap();
        let observer = bench.observer();
        let run = bench.run();
        bench.until_running().await;
        bench.world.report(1, what);
        let report = ending(&observer).await;
        // The answer to run and what observers are told are one report.
        if let Ok(answer) = run.await {
            assert_eq!(answer, report);
        }
        sender.send((report.reason, report.about)).unwrap();
    });
    receiver.recv().unwrap()
}

#[test]
fn what_ended_a_guest_is_named() {
    let failed = Happening::VcpuFailed {
        vcpu: 1,
        reason: "emulation failure".into(),
        registers: Box::<RegisterDump>::default(),
    };
    assert_eq!(ends_by(failed), (Reason::Crash, "vcpu1".into()));
    let how = ResetCause::Watchdog;
    assert_eq!(ends_by(Happening::Reset { how }), (Reason::Reset, "watchdog".into()));
    assert_eq!(ends_by(Happening::WatchdogStop), (Reason::Killed, "watchdog".into()));
    let how = ResetCause::I8042;
    assert_eq!(ends_by(Happening::Reset { how }), (Reason::Reset, String::new()));
    assert_eq!(ends_by(Happening::Shutdown), (Reason::Shutdown, String::new()));
}

#[test]
fn where_the_vcpus_were_is_told_with_the_failure_of_one() {
    bench(|bench| async move {
        let at = |rip| {
            let mut registers = RegisterDump::default();
            (registers.regs.rip, registers.sregs.cr2) = (rip, rip + 1);
            registers
        };
        *bench.world.last_registers.lock().unwrap() = vec![(0, at(10)), (2, at(30))];
        bench.create().await.unwrap();
        let run = bench.run_and_tell();
        bench.until_running().await;
        let failed = Happening::VcpuFailed {
            vcpu: 2,
            reason: "emulation failure".into(),
            registers: Box::new(at(30)),
        };
        bench.world.report(1, failed);
        let (ended, registers) = run.await;
        assert_eq!(ended.unwrap_err().about, "vcpu2");
        let told: Vec<_> = registers.iter().map(|vcpu| (vcpu.rip, vcpu.cr2)).collect();
        assert_eq!(told, [(10, 11), (0, 0), (30, 31)]);
    });
}

#[test]
fn a_vcpu_that_cannot_start_is_named() {
    bench(|bench| async move {
        bench.world.start_fails.store(true, Ordering::SeqCst);
        bench.create().await.unwrap();
        let observer = bench.observer();
        bench.run().await.unwrap_err();
        let report = ending(&observer).await;
        assert_eq!((report.reason, report.about.as_str()), (Reason::StartFailed, "vcpu0"));
    });
}

#[test]
fn a_guest_that_is_stopped_ends_by_nobody() {
    bench(|bench| async move {
        bench.create().await.unwrap();
        let observer = bench.observer();
        bench.stop().await.unwrap();
        let report = ending(&observer).await;
        assert_eq!((report.reason, report.about.as_str()), (Reason::Killed, ""));
    });
}

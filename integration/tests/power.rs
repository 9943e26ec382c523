//! Guests that reset, pause, crash, and are stopped: what a client sees of it, and that Linux reacts to what it is told.

#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::{fs, path::Path, time::Duration};

use rustix::process::{Pid, Signal, kill_process};
use sepal_integration::{Boot, Guest, HarnessError, artifacts, initrd};
use sepal_schema::{
    config::{OnReset, device::Vsock},
    error::Kind,
    info::GuestStatus,
    news::DeviceNews,
    report::{Reason, Rung, StopReport},
};

/// Longer than any boot takes; it only ever makes a test fail.
const BOOT: Duration = Duration::from_secs(300);
/// Far more than the default guest needs for anything.
const END: Duration = Duration::from_secs(120);
/// A deadline that a guest is to let pass.
const SHORT: Duration = Duration::from_millis(300);
const PROMPT: &str = "sepal> ";

/// False, with a loud word, on a host without KVM.
fn kvm() -> bool {
    let there = Path::new("/dev/kvm").exists();
    if !there {
        println!("skipped: no /dev/kvm");
    }
    there
}

/// The default guest, at its prompt.
fn at_prompt(cmdline: &str, on_reset: OnReset) -> Guest {
    let boot = Boot::new().cmdline(cmdline);
    let mut guest = boot.configure(|config| config.on_reset = on_reset).start().unwrap();
    guest.wait_for(PROMPT, BOOT).unwrap();
    guest
}

fn kind(outcome: Result<StopReport, HarnessError>) -> Kind {
    match outcome {
        Err(HarnessError::Refused(error)) => error.kind,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_guest_that_resets_itself_begins_again() {
    if !kvm() {
        return;
    }
    let mut guest = at_prompt("", OnReset::Restart);
    for (ways, way) in ["acpi", "i8042", "triple"].into_iter().enumerate() {
        guest.type_text(&format!("reset {way}\n")).unwrap();
        guest.wait_for(PROMPT, END).unwrap();
        let info = guest.info().unwrap();
        assert_eq!((info.status, info.generation), (GuestStatus::Running, ways as u64 + 2));
        let before = info.stop.unwrap();
        assert_eq!((before.reason, before.rung), (Reason::Reset, Rung::None), "{before:?}");
    }
    // One history: each run's banner is in it.
    assert_eq!(guest.output().matches(PROMPT).count(), 4, "{}", guest.output());
    let report = guest.stop(END, false).unwrap();
    assert_eq!((report.reason, report.rung), (Reason::Shutdown, Rung::Asked));
    guest.wait(END).unwrap();
    assert!(guest.output().contains("power button"), "{}", guest.output());
}

#[test]
fn a_guest_that_does_not_listen_is_reset() {
    if !kvm() {
        return;
    }
    let mut guest = at_prompt("", OnReset::Stop);
    // Interrupts off, no exits.
    guest.type_text("spin\n").unwrap();
    guest.wait_for("spin", END).unwrap();
    guest.reset().unwrap();
    guest.wait_for(PROMPT, END).unwrap();
    guest.pause().unwrap();
    assert!(guest.info().unwrap().paused);
    guest.reset().unwrap();
    guest.wait_for(PROMPT, END).unwrap();
    let info = guest.info().unwrap();
    assert_eq!((info.generation, info.paused), (3, false));
    // By itself it does not begin again.
    guest.type_text("reset\n").unwrap();
    guest.assert_ends_with(Reason::Reset, END).unwrap();
}

#[test]
fn a_guest_waits_paused_before_its_first_instruction() {
    if !kvm() {
        return;
    }
    let mut guest = at_prompt("", OnReset::Pause);
    guest.type_text("reset\n").unwrap();
    while !guest.info().unwrap().paused {}
    let printed = guest.info().unwrap();
    assert_eq!((printed.generation, printed.uptime_ns), (2, 0));
    guest.resume().unwrap();
    guest.wait_for(PROMPT, END).unwrap();
    guest.type_text("shutdown\n").unwrap();
    let report = guest.assert_ends_with(Reason::Shutdown, END).unwrap();
    assert_eq!(report.rung, Rung::None);
}

#[test]
fn the_ladder_always_completes_and_says_how() {
    if !kvm() {
        return;
    }
    let mut deaf = at_prompt("nobutton", OnReset::Stop);
    assert_eq!(kind(deaf.stop(SHORT, false)), Kind::TimedOut);
    assert_eq!(deaf.info().unwrap().status, GuestStatus::Running);
    let report = deaf.stop(SHORT, true).unwrap();
    assert_eq!((report.reason, report.rung), (Reason::Hangup, Rung::Forced));

    // The component itself does not move any more.
    let mut stuck = at_prompt("", OnReset::Restart);
    let pid = i32::try_from(stuck.info().unwrap().component_pid).unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::STOP).unwrap();
    let report = stuck.stop(SHORT, true).unwrap();
    assert_eq!((report.reason, report.rung), (Reason::Hangup, Rung::Killed));

    let mut crashes = at_prompt("", OnReset::Restart);
    crashes.type_text("crash\n").unwrap();
    let report = crashes.assert_ends_with(Reason::Crash, END).unwrap();
    assert_eq!((&report.about[..], report.rung), ("vcpu0", Rung::None));
}

fn linux(button: &str) -> Boot {
    Boot::new()
        .kernel(artifacts::kernel().unwrap().vmlinux)
        .initrd(artifacts::initramfs().unwrap())
        .cmdline(format!("console=ttyS0 panic=-1 sepal.run=idle sepal.button={button}"))
        .memory_mib(128)
}

#[test]
fn linux_shuts_down_when_it_is_asked() {
    if !kvm() {
        return;
    }
    let mut guest = linux("poweroff").start().unwrap();
    guest.wait_for("BUTTON waiting", BOOT).unwrap();
    let report = guest.stop(END, false).unwrap();
    assert_eq!((report.reason, report.rung), (Reason::Shutdown, Rung::Asked));
    guest.wait(END).unwrap();
    assert!(guest.output().contains("power button"), "{}", guest.output());
}

#[test]
fn linux_that_ignores_the_button_gets_an_nmi_and_is_stopped() {
    if !kvm() {
        return;
    }
    let mut guest = linux("ignore").start().unwrap();
    guest.wait_for("BUTTON waiting", BOOT).unwrap();
    assert_eq!(kind(guest.stop(Duration::from_secs(2), false)), Kind::TimedOut);
    guest.wait_for("power button", END).unwrap();
    guest.nmi().unwrap();
    guest.wait_for("NMI received for unknown reason", END).unwrap();
    let report = guest.stop(Duration::from_secs(2), true).unwrap();
    assert_eq!((report.reason, report.rung), (Reason::Hangup, Rung::Forced));
}

#[test]
fn linux_that_ignores_the_button_is_turned_off_by_its_agent_after_a_reset_too() {
    if !kvm() {
        return;
    }
    let agent = fs::read(artifacts::agent().unwrap()).unwrap();
    // busybox would tell its own init, which this guest does not have.
    let poweroff = b"#!/bin/sh\nexec busybox poweroff -f\n";
    let files = [("bin/sepal-agent", agent.as_slice()), ("bin/poweroff", poweroff)];
    let initrd = initrd(&artifacts::initramfs().unwrap(), &files).unwrap();
    let mut guest = linux("ignore sepal.agent")
        .initrd(initrd.path())
        .memory_mib(192)
        .configure(|config| {
            config.vsock = Some(Vsock::default());
            config.agent = true;
        })
        .start()
        .unwrap();
    let ready = |news: &DeviceNews| *news == DeviceNews::GuestReady;
    guest.wait_for_news("the agent", BOOT, ready).unwrap();
    guest.reset().unwrap();
    assert_eq!(guest.info().unwrap().generation, 2);
    guest.wait_for_news("the next run's agent", BOOT, ready).unwrap();
    // The agent is asked after half of that.
    let report = guest.stop(Duration::from_secs(40), false).unwrap();
    assert_eq!((report.reason, report.rung), (Reason::Shutdown, Rung::Asked));
}

//! Panic port, watchdog and generation id of real machines.

use sepal_devices::dispatch::DeviceEvent;
use sepal_devices::watchdog::WatchdogAction;
use sepal_vmm_component::machine::{Guards, Happening, ResetCause};

use crate::guests::guest;
use crate::rig::{Rig, kvm};

guest!(
    /// Prints what the panic port offers, tells that it panicked, and resets.
    panics, "sepal_guest_panics", "sepal_guest_panics_end",
    [
        "mov $0x505, %edx", "in (%dx), %al", "mov $0x3f8, %edx", "out %al, (%dx)",
        "mov $0x505, %edx", "mov $1, %al", "out %al, (%dx)", "out %al, (%dx)",
        "mov $0xfe, %al", "out %al, $0x64", "1: hlt", "jmp 1b",
    ]
);

guest!(
    /// Prints the 16 bytes of the generation id, and resets.
    generation, "sepal_guest_generation", "sepal_guest_generation_end",
    [
        "mov $0xff000, %esi", "mov $16, %ecx", "mov $0x3f8, %edx",
        "1: mov (%rsi), %al", "out %al, (%dx)", "inc %rsi", "dec %ecx", "jnz 1b",
        "mov $0xfe, %al", "out %al, $0x64", "2: hlt", "jmp 2b",
    ]
);

guest!(
    /// Sets the watchdog at 00:01.0 to two stages of a millisecond, starts it, and never feeds it.
    hangs, "sepal_guest_hangs", "sepal_guest_hangs_end",
    [
        // Ticks of a microsecond.
        "mov $0xcf8, %edx", "mov $0x80000860, %eax", "out %eax, (%dx)",
        "mov $0xcfc, %edx", "mov $4, %eax", "out %ax, (%dx)",
        "mov $0xc0000000, %ebx",
        "movw $0x80, 0xc(%rbx)", "movw $0x86, 0xc(%rbx)", "movl $1000, (%rbx)",
        "movw $0x80, 0xc(%rbx)", "movw $0x86, 0xc(%rbx)", "movl $1000, 4(%rbx)",
        "mov $0xcf8, %edx", "mov $0x80000868, %eax", "out %eax, (%dx)",
        "mov $0xcfc, %edx", "mov $2, %al", "out %al, (%dx)",
        "mov $0x3f8, %edx", "mov $'h', %al", "out %al, (%dx)",
        "1: hlt", "jmp 1b",
    ]
);

fn with(code: &[u8], guards: Guards) -> Option<Rig> {
    let kvm = kvm()?;
    let mut rig = Rig::make(&kvm, code, 1, |config| config.guards = guards).expect("the machine is made");
    rig.machine.start().expect("the machine starts");
    Some(rig)
}

#[test]
fn a_panic_is_told_once() {
    let guards = Guards {
        panic_device: true,
        ..Guards::default()
    };
    let Some(rig) = with(&panics(), guards) else { return };
    let first = rig.next();
    assert!(
        matches!(
            &first,
            Happening::Device(DeviceEvent::GuestPanicked {
                crash_loaded: false,
                ..
            })
        ),
        "{first:?}"
    );
    let second = rig.next();
    assert!(matches!(second, Happening::Reset { .. }), "{second:?}");
    assert_eq!(rig.stop().1, [3]);
}

#[test]
fn without_a_panic_device_nobody_answers_its_port() {
    let Some(rig) = with(&panics(), Guards::default()) else {
        return;
    };
    let (ending, output) = rig.finish();
    assert!(matches!(ending, Happening::Reset { .. }), "{ending:?}");
    assert_eq!(output, [0xff]);
}

#[test]
fn the_generation_id_lies_where_the_tables_say() {
    let id = *b"0123456789abcdef";
    let guards = Guards {
        generation_id: Some(id),
        ..Guards::default()
    };
    let Some(rig) = with(&generation(), guards) else { return };
    assert_eq!(rig.finish().1, id);
}

/// A guest that hangs, up to its watchdog's event.
fn hung(action: WatchdogAction) -> Option<Rig> {
    let guards = Guards {
        watchdog: Some(action),
        ..Guards::default()
    };
    let rig = with(&hangs(), guards)?;
    let first = rig.next();
    assert!(
        matches!(&first, Happening::Device(DeviceEvent::WatchdogExpired { device }) if device == "watchdog"),
        "{first:?}"
    );
    Some(rig)
}

#[test]
fn a_guest_that_does_not_feed_its_watchdog_is_reset() {
    let Some(rig) = hung(WatchdogAction::Reset) else { return };
    let (ending, output) = rig.finish();
    assert!(
        matches!(
            ending,
            Happening::Reset {
                how: ResetCause::Watchdog
            }
        ),
        "{ending:?}"
    );
    assert_eq!(output, b"h");
}

#[test]
fn or_stopped() {
    let Some(rig) = hung(WatchdogAction::Stop) else { return };
    let (ending, _) = rig.finish();
    assert!(matches!(ending, Happening::WatchdogStop), "{ending:?}");
}

#[test]
fn or_left_alone() {
    let Some(rig) = hung(WatchdogAction::Nothing) else {
        return;
    };
    assert!(rig.events.try_recv().is_err());
    rig.stop();
}

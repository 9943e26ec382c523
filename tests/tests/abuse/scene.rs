//! A manager under attack, and a client that wants to be served meanwhile.

use std::{path::Path, thread};

use sepal_schema::{config::GuestConfig, guest_capnp::guest, info::GuestStatus};
use sepal_tests::{
    Rpc, World, process,
    rpc::{Launched, power},
    until,
};

/// How often an attack is repeated.
const ROUNDS: u32 = 3;
/// What the manager may grow by while it is attacked, in KiB. A connection may make it hold 16 MiB of messages and 4 MiB of replies.
const MOST_AT_ONCE: u64 = 64 * 1024;
/// What it may grow by beyond that when it is attacked again, in KiB.
const MOST_FURTHER: u64 = 16 * 1024;

/// Attacks a manager with a guest several times over; `attack` gets the socket's path.
pub(crate) fn under(attack: impl Fn(&Path) + Sync) {
    if sepal_tests::kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let mut client = world.connect();
    let config = GuestConfig {
        name: "bee".into(),
        memory_mib: 16,
        ..GuestConfig::default()
    };
    let Launched { guest, lease, .. } = client.launch(config, false).unwrap();
    let mut position = 0;
    client.read_on(&guest, &mut position, "sepal> ");

    let manager = world.manager().pid();
    let (socket, before) = (world.socket(), process::peak_kib(manager));
    let descriptors = process::descriptors(manager).len();
    let mut peaks = Vec::new();
    for round in 0..ROUNDS {
        thread::scope(|scope| {
            let attacking = scope.spawn(|| attack(&socket));
            let mut served = 0_u64;
            while served == 0 || !attacking.is_finished() {
                check(&mut client, &guest, &mut position, served);
                served += 1;
            }
            attacking.join().unwrap();
            println!("round {round}: another client was served {served} times");
        });
        until("the manager has let go of everything", || {
            client.list();
            (process::descriptors(manager).len() <= descriptors).then_some(())
        });
        peaks.push(process::peak_kib(manager));
    }
    println!("the manager's memory: {before} KiB before, at most {peaks:?} KiB");
    assert!(peaks[0] - before <= MOST_AT_ONCE, "{before} KiB before, then {peaks:?}");
    assert!(
        peaks.iter().all(|peak| *peak <= peaks[0] + MOST_FURTHER),
        "{before} KiB before, then {peaks:?}"
    );

    // Whoever comes afterwards is served as ever.
    let mut late = world.connect();
    assert_eq!(late.list().len(), 1);
    client
        .wait("kill", power(&guest).kill_request().send().promise)
        .unwrap();
    drop((guest, lease, client, late));
    world.end();
}

/// What an honest client wants: the list, and its guest to echo.
fn check(client: &mut Rpc, guest: &guest::Client, position: &mut u64, time: u64) {
    let list = client.list();
    let bee = list.iter().find(|info| info.name == "bee").unwrap();
    assert_eq!(bee.status, GuestStatus::Running);
    let serial = guest.serial_request().send().pipeline.get_serial();
    let mut request = serial.write_request();
    request.get().set_bytes(format!("echo time {time}\r").as_bytes());
    client.wait("typing", request.send()).unwrap();
    let seen = client.read_on(guest, position, &format!("\ntime {time}\r\nsepal> "));
    assert!(seen.ends_with("sepal> "), "{seen}");
}

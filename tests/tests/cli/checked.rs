//! `guest launch --check`: tells what `guest launch` would, and launches nothing.

use sepal_tests::{World, kvm_missing};

#[test]
fn what_is_only_checked_is_not_launched() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let fit = world
        .guest(&["launch", "bee", "--check", "--cmdline", "quiet"])
        .expect_code(0);
    assert_eq!((&fit.out()[..], &fit.stderr[..]), ("", ""));
    let finished = world
        .guest(&["launch", "--check", "--waive-layer", "chastity"])
        .expect_code(1);
    assert!(
        finished.stderr.contains("BAD_CONFIG") && finished.stderr.contains("chastity"),
        "{}",
        finished.stderr
    );
    let share = ["launch", "--check", "--vsock", "--share", "home=/nonexistent/fs.sock"];
    let finished = world.guest(&share).expect_code(1);
    assert!(
        finished.stderr.contains("FAILED_SERVICE_CONNECT") && finished.stderr.contains("/nonexistent/fs.sock"),
        "{}",
        finished.stderr
    );
    let list = world.guest(&["list", "--json"]).expect_code(0);
    assert_eq!(list.out().trim(), "[]");
    world.guest(&["launch", "--check", "--detach"]).expect_code(2);
    world.end();
}

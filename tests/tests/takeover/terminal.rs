//! A terminal at a guest: it stays while one manager ends and the next one takes the guest over, as far as the guest does.

use crate::scene::{PROMPT, Scene};

#[test]
fn a_terminal_outlives_the_manager_with_its_guest() {
    let mut scene = Scene::new();
    let mut owner = scene.world.pty(&["launch", "bee", "--memory=32M", "--durable"]);
    owner.expect(PROMPT);
    scene.until_running("bee");
    let mut other = scene.world.pty(&["attach", "bee"]);
    other.expect("connected to bee");
    for word in ["first", "second"] {
        scene.replace_manager();
        for terminal in [&mut owner, &mut other] {
            terminal.expect("the guest manager ended; bee goes on");
            terminal.expect("connected to bee again");
        }
        owner.type_in(&format!("echo the {word}\r"));
        owner.expect(&format!("\nthe {word}\r\n"));
        other.expect(&format!("\nthe {word}\r\n"));
    }
    let printed = owner.screen.text();
    assert_eq!(
        printed.matches("\nthe first\r\n").count(),
        1,
        "nothing comes twice: {printed}"
    );
    other.type_in("\x1d");
    assert_eq!(other.wait().code(), Some(0));
    // Who launched it still owns it, and it ends with them.
    owner.type_in("\x1d");
    assert_eq!(owner.wait().code(), Some(12));
    scene.end();
}

#[test]
fn a_terminal_at_any_other_guest_ends_with_the_manager() {
    let mut scene = Scene::new();
    let mut terminal = scene.world.pty(&["launch", "bee", "--memory=32M"]);
    terminal.expect(PROMPT);
    scene.kill_manager();
    terminal.expect("the connection to the guest manager ended");
    assert_eq!(terminal.wait().code(), Some(1));
    scene.start_manager();
    scene.end();
}

#[test]
fn who_watches_a_guest_end_with_its_manager_is_told_how_it_ended() {
    let mut scene = Scene::new();
    let owner = scene.world.pty(&["launch", "bee", "--memory=32M", "--durable"]);
    owner.expect(PROMPT);
    let other = scene.world.pty(&["launch", "cat", "--memory=32M"]);
    other.expect(PROMPT);
    scene.until_running("bee");
    let watching = scene.world.pty(&["attach", "bee"]);
    watching.expect("connected to bee");
    scene.world.guest(&["end-manager"]).expect_code(0);
    for mut terminal in [owner, other, watching] {
        terminal.expect("the manager was shut down");
        assert_eq!(terminal.wait().code(), Some(12));
    }
    scene.world.take_manager().wait().expect_code(0);
    scene.start_manager();
    scene.end();
}

//! The state folder: one manager has it, nobody else reaches it, and a manager that is killed while it writes leaves definitions that are whole.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: a failure is a panic with a message"
)]

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command};

use rustix::process::Signal;
use sepal_schema::{
    config::GuestConfig,
    error::{Error, Kind},
};
use sepal_tests::{Finished, Rpc, World, program};

/// Definitions that are sent before the first answer is waited for.
const IN_FLIGHT: usize = 24;

/// Runs a manager that listens at another place than the world's, to its end.
fn manager(world: &World, state: &Path) -> Finished {
    let mut command = Command::new(program("guest-manager"));
    command.arg("--socket").arg(world.folder().join("other.sock"));
    command.arg("--state").arg(state);
    command.env("XDG_STATE_HOME", world.state_home());
    world.start_command(command, None).wait()
}

#[test]
fn only_one_manager_has_it() {
    let world = World::with_manager();
    let owner = format!("process {}", world.manager().pid());
    let refused = manager(&world, &world.state()).expect_code(1);
    assert!(
        refused.stderr.contains(&owner) && refused.stderr.contains("--state"),
        "{}",
        refused.stderr
    );
    // The user's own manager does without: it may be that nobody needs it.
    let runtime = world.folder().join("runtime");
    fs::create_dir(&runtime).unwrap();
    let guest = |arguments: &[&str]| {
        let mut command = world.command(arguments);
        command.env("XDG_RUNTIME_DIR", &runtime);
        let mut running = world.start_command(command, None);
        running.close_input();
        running.wait()
    };
    let define = guest(&["define", "bee"]).expect_code(1);
    assert!(
        define.stderr.contains("NO_STORAGE") && define.stderr.contains(&owner),
        "{}",
        define.stderr
    );
    assert_eq!(guest(&["list", "--json"]).expect_code(0).out().trim(), "[]");
    guest(&["end-manager"]).expect_code(0);
    world.guest(&["define", "bee"]).expect_code(0);
    world.end();
}

#[test]
fn nobody_else_reaches_it() {
    let world = World::new();
    fs::create_dir_all(world.state()).unwrap();
    let mode = |mode| fs::set_permissions(world.state(), fs::Permissions::from_mode(mode)).unwrap();
    mode(0o755);
    let refused = manager(&world, &world.state()).expect_code(1);
    assert!(refused.stderr.contains("mode 755, 700 is needed"), "{}", refused.stderr);
    let refused = manager(&world, &world.folder().join("no/such/folder")).expect_code(1);
    assert!(refused.stderr.contains("no/such/folder"), "{}", refused.stderr);
    mode(0o700);
    let mut world = world;
    world.start_manager();
    world.guest(&["define", "bee"]).expect_code(0);
    let mut folders = vec![world.state()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            let metadata = entry.metadata().unwrap();
            let mode = metadata.permissions().mode() & 0o7777;
            assert_eq!(mode & 0o077, 0, "{} has the mode {mode:o}", entry.path().display());
            if metadata.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    world.end();
}

/// Sends a definition that differs from all others by its number.
fn define(rpc: &Rpc, number: usize) -> impl Future<Output = Result<(), capnp::Error>> + use<> {
    let mut request = rpc.manager.define_request();
    request.get().set_replace(true);
    let config = GuestConfig {
        name: "bee".into(),
        cmdline: format!("number={number} {}", "x".repeat(1900)),
        ..GuestConfig::default()
    };
    let to = request.get().init_definition().init_config();
    config.encode(to, &rpc.connection.fds()).unwrap();
    let answer = request.send().promise;
    async move {
        let answer = answer.await?;
        let answer = answer.get()?;
        match answer.has_error() {
            true => Err(Error::read(answer.get_error()?)?.exception()),
            false => Ok(()),
        }
    }
}

/// The number of the definition that is there; none if there is none.
fn defined(rpc: &mut Rpc) -> Option<usize> {
    let mut request = rpc.manager.definition_request();
    request.get().set_name("bee");
    let answer = rpc.wait("definition", request.send().promise).unwrap();
    let answer = answer.get().unwrap();
    if answer.has_error() {
        let error = Error::read(answer.get_error().unwrap()).unwrap();
        assert_eq!(error.kind, Kind::NotFound, "{error}");
        return None;
    }
    let config = answer.get_definition().unwrap().get_config().unwrap();
    let cmdline = config.get_cmdline().unwrap().to_str().unwrap();
    let number = cmdline.strip_prefix("number=").unwrap().split(' ').next().unwrap();
    assert!(cmdline.ends_with(&"x".repeat(1900)));
    Some(number.parse().unwrap())
}

#[test]
fn a_manager_that_is_killed_while_it_writes_leaves_one_definition_or_the_next() {
    let mut world = World::new();
    let mut last: Option<usize> = None;
    for round in 0..8 {
        world.start_manager();
        let mut rpc = world.connect();
        assert_eq!(defined(&mut rpc), last);
        let first = round * IN_FLIGHT;
        let mut answers: Vec<_> = (first..first + IN_FLIGHT).map(|number| define(&rpc, number)).collect();
        // More and more of them are certain.
        let certain = round * 2;
        for answer in answers.drain(..certain) {
            rpc.wait("define", answer).unwrap();
        }
        let manager = world.take_manager();
        manager.signal(Signal::KILL);
        assert_eq!(manager.wait().code(), 128 + 9);
        drop(answers);
        drop(rpc);
        world.assert_nothing_left();

        world.start_manager();
        let mut rpc = world.connect();
        let there = defined(&mut rpc);
        // Which of those that are under way at the same time is the last is open.
        let new = there.is_some_and(|there| (first..first + IN_FLIGHT).contains(&there));
        assert!(
            new || (certain == 0 && there == last),
            "{certain} from {first} on were kept, and there is {there:?} after {last:?}"
        );
        last = there;
        drop(rpc);
        let ended = world.take_manager();
        ended.signal(Signal::TERM);
        let ended = ended.wait().expect_code(0);
        assert!(!ended.stderr.contains("broken"), "{}", ended.stderr);
    }
    let names = fs::read_dir(world.state().join("definitions")).unwrap();
    let names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["bee.sepal"]);
    world.end();
}

//! What a guest manager holds at most, with limits of the kernel's that are really there: many guests at once, and a control group with few tasks.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use sepal_schema::{
    config::GuestConfig,
    error::{Error, Kind, Outcome},
};
use sepal_tests::{Rpc, World, kvm_missing, program, until};

/// A world whose manager was started by this script of a shell, which has the manager's program and arguments after it.
fn with_manager_by(script: &str) -> World {
    let mut world = World::new();
    let mut command = Command::new("sh");
    command.arg("-c").arg(script).arg(program("guest-manager"));
    world.start_manager_by(command, |command, socket, ready| {
        command.arg("--socket").arg(socket).arg("--ready-fd").arg(ready);
    });
    world
}

/// Asks for so many guests before the first answer can come. Their names, or why there is none.
fn launch_at_once(rpc: &mut Rpc, prefix: &str, count: usize) -> Vec<Result<String, Error>> {
    let launch = |i| {
        let config = GuestConfig {
            name: format!("{prefix}{i}"),
            memory_mib: 2,
            ..GuestConfig::default()
        };
        let mut request = rpc.manager.launch_request();
        request.get().set_detach(true);
        config
            .encode(request.get().init_config(), &rpc.connection.fds())
            .unwrap();
        request.send().promise
    };
    let asked: Vec<_> = (0..count).map(launch).collect();
    let answers = asked.into_iter().map(|asked| {
        let answer = rpc.wait("launch", asked).unwrap();
        let launched = answer.get().unwrap().outcome()?;
        Ok(launched.get_name().unwrap().to_string().unwrap())
    });
    answers.collect()
}

#[test]
fn guests_that_are_launched_at_once_do_not_take_each_others_descriptors() {
    if kvm_missing() {
        return;
    }
    let world = with_manager_by("ulimit -n 300; exec \"$0\" \"$@\"");
    let mut rpc = Rpc::connect(&world.socket());
    let answers = launch_at_once(&mut rpc, "bee", 60);
    let (launched, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
    assert!(launched.len() > 5 && refused.len() > 5, "{launched:?} {refused:?}");
    for error in refused {
        let error = error.unwrap_err();
        assert_eq!(
            (error.kind, &*error.about),
            (Kind::NoResources, "descriptors"),
            "{error}"
        );
    }
    // Those that were promised theirs have them, and who connects now is served.
    let running = until("they run", || {
        let list = Rpc::connect(&world.socket()).list();
        let running = list.iter().filter(|guest| guest.component_pid > 0).count();
        (running == launched.len()).then_some(running)
    });
    // What was promised and not needed is there for the next.
    let more = launch_at_once(&mut rpc, "wasp", 1);
    assert!(more[0].is_ok(), "{running} run: {more:?}");
    world.guest(&["end-manager"]).expect_code(0);
    world.end();
}

/// A control group with a limit of tasks, which goes with it.
struct Group(PathBuf);

impl Group {
    /// One below this process's own, as far as that may have some; else says why not.
    fn new(name: &str) -> Option<Self> {
        let own = own_group()?;
        let group = own.join(format!("sepal-test-{}-{name}", std::process::id()));
        if let Err(error) = fs::create_dir(&group) {
            println!("skipped: {}: {error}", group.display());
            return None;
        }
        let group = Self(group);
        if !group.0.join("pids.max").exists() {
            println!("skipped: {} has no limit of tasks", group.0.display());
            return None;
        }
        Some(group)
    }

    fn limit(&self, tasks: u64) {
        fs::write(self.0.join("pids.max"), tasks.to_string()).unwrap();
    }

    fn tasks(&self) -> u64 {
        let current = fs::read_to_string(self.0.join("pids.current")).unwrap();
        current.trim().parse().unwrap()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        until("the group is empty", || fs::remove_dir(&self.0).is_ok().then_some(()));
    }
}

/// This process's own control group with the controller of tasks, of version 1 or 2.
fn own_group() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap();
    let mounted = |kind: &str, option: &str| {
        mounts.lines().find_map(|line| {
            let (mount, rest) = line.split_once(" - ")?;
            let mut rest = rest.split(' ');
            let it_is = rest.next()? == kind && rest.nth(1)?.split(',').any(|one| option.is_empty() || one == option);
            it_is.then(|| Path::new(mount.split(' ').nth(4).unwrap()).to_owned())
        })
    };
    let own = |wanted: &str| {
        groups.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            (controllers == wanted).then(|| path.trim_start_matches('/').to_owned())
        })
    };
    let version_1 = mounted("cgroup", "pids").zip(own("pids"));
    let found = version_1.or_else(|| mounted("cgroup2", "").zip(own("")));
    if found.is_none() {
        println!("skipped: no control groups");
    }
    found.map(|(mount, own)| mount.join(own))
}

#[test]
fn tasks_are_counted_where_the_managers_control_group_has_few() {
    if kvm_missing() {
        return;
    }
    let Some(group) = Group::new("few") else { return };
    group.limit(40);
    let script = format!("echo $$ > {}/cgroup.procs && exec \"$0\" \"$@\"", group.0.display());
    let world = with_manager_by(&script);
    let launch = |name: &str| world.guest(&["launch", name, "--detach", "--cpus", "4"]);
    let refused = launch("bee").expect_code(1).stderr;
    assert!(
        refused.contains("NO_RESOURCES") && refused.contains("of the 40 tasks") && refused.contains("TasksMax="),
        "{refused}"
    );
    let words = world.guest(&["doctor"]).out();
    assert!(words.contains("of the 40 tasks"), "{words}");

    // As `systemctl set-property sepal.service TasksMax=` does it.
    let before = group.tasks();
    group.limit(before + 32 + 9);
    launch("bee").expect_code(0);
    // It was foreseen how many it takes.
    let taken = group.tasks() - before;
    assert!((6..=9).contains(&taken), "{taken}");
    let refused = launch("wasp").expect_code(1).stderr;
    assert!(refused.contains("TasksMax="), "{refused}");
    world.guest(&["stop", "bee", "--force"]).expect_code(0);
    launch("wasp").expect_code(0);
    world.guest(&["end-manager"]).expect_code(0);
    world.end();
}

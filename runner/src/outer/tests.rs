//! Tests of parts that a whole start reaches only on some hosts.

use std::fs;
use std::path::PathBuf;

use super::*;
use crate::cgroup::Hierarchies;

/// `CLONE_INTO_CGROUP`, on hosts whose v2 tree may offer no controller that a limit would need.
#[test]
fn a_component_starts_in_its_v2_group() {
    let mount = Hierarchies::discover().unwrap().v2_mount().map(PathBuf::from);
    let Some(mount) = mount.filter(|_| rustix::process::geteuid().is_root()) else {
        println!("skipped: no cgroup v2 tree, or not root");
        return;
    };
    let directory = mount.join(format!("sepal-test-{}", std::process::id()));
    fs::create_dir(&directory).unwrap();
    let group = Group::in_v2(directory.clone()).unwrap();

    let mut spec = ComponentSpec::new(Program::open("/bin/sleep").unwrap(), c"sleep".to_owned());
    spec.args.push(c"1000".to_owned());
    let mut runner = Runner::new().unwrap();
    let mut component = runner.start_in(spec, Some(group)).unwrap();
    component.finish_start().unwrap();
    let members = fs::read_to_string(directory.join("cgroup.procs")).unwrap();
    assert_eq!(members.trim(), component.pid().to_string());
    component.kill().unwrap();
    assert_eq!(component.wait().unwrap(), ExitStatus::Signal(libc::SIGKILL));
    assert!(!directory.exists());
}

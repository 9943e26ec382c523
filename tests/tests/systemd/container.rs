//! A container whose first process is systemd.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use rustix::process::Signal;
use sepal_tests::{program, until};
use tempfile::TempDir;

/// Where the units have the manager listen.
pub(crate) const SOCKET: &str = "/run/sepal/manager.sock";

/// Where systemd is, by distribution.
const PLACES: [&str; 2] = ["/lib/systemd/systemd", "/usr/lib/systemd/systemd"];

/// The container. Dropping it ends all that is in it.
pub(crate) struct Container {
    unshare: Child,
    /// systemd, by its number outside.
    init: u32,
    group: PathBuf,
    _folder: TempDir,
}

impl Container {
    /// Begins one, and waits until systemd has done what comes first; none, with the reason printed, where that is not possible.
    pub(crate) fn start() -> Option<Self> {
        match Self::try_start() {
            Ok(container) => Some(container),
            Err(why) => {
                println!("skipped: systemd cannot run here: {why}");
                None
            }
        }
    }

    fn try_start() -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("a container of it needs root".into());
        }
        let systemd = PLACES.into_iter().find(|place| Path::new(place).exists());
        let systemd = systemd.ok_or("it is not installed")?;
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let group = own_group()?.join(format!("sepal-test-{}-{count}", std::process::id()));
        fs::create_dir(&group).map_err(|error| format!("{}: {error}", group.display()))?;
        let folder = tempfile::tempdir().unwrap();
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let script = "echo $$ > \"$GROUP/cgroup.procs\" && \
                      exec unshare --mount --pid --cgroup --net --uts --ipc --fork --kill-child sh \"$SCRIPT\"";
        let mut command = Command::new("sh");
        command
            .args(["-c", script])
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("GROUP", &group)
            .env("SCRIPT", here.join("tests/systemd/container.sh"))
            .env("SYSTEMD", systemd)
            .env("FOLDER", folder.path())
            .env("PROGRAMS", program("guest").parent().unwrap())
            .env("PACKAGING", here.join("../packaging"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let with_me = || Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?);
        // SAFETY: between fork and exec it makes one system call, which is async-signal-safe.
        unsafe { command.pre_exec(with_me) };
        let mut unshare = command.spawn().unwrap();
        let (mut said, mut wrong) = (String::new(), String::new());
        BufReader::new(unshare.stdout.take().unwrap())
            .read_line(&mut said)
            .unwrap();
        if said != "container made\n" {
            unshare.stderr.take().unwrap().read_to_string(&mut wrong).unwrap();
            unshare.wait().unwrap();
            fs::remove_dir(&group).unwrap();
            return Err(wrong.trim().to_owned());
        }
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let init = fs::read_to_string(children).unwrap().trim().parse().unwrap();
        let container = Self {
            unshare,
            init,
            group,
            _folder: folder,
        };
        until("systemd runs", || {
            let (active, _) = container.try_run("systemctl is-active basic.target");
            active.then_some(())
        });
        Ok(container)
    }

    /// Whether a command of the shell succeeds in the container, and what it prints.
    pub(crate) fn try_run(&self, command: &str) -> (bool, String) {
        let output = Command::new("nsenter")
            .args([
                "--target",
                &self.init.to_string(),
                "--all",
                "env",
                "-i",
                "--chdir=/srv/sepal",
            ])
            .args(["PATH=/usr/sbin:/usr/bin:/sbin:/bin", &format!("SEPAL_MANAGER={SOCKET}")])
            .args(["sh", "-c", &format!("exec 2>&1; {command}")])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let printed = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        (output.status.success(), printed)
    }

    /// What a command of the shell prints in the container, in the folder that has what is to be installed.
    #[track_caller]
    pub(crate) fn run(&self, command: &str) -> String {
        let (done, printed) = self.try_run(command);
        assert!(done, "{command}: {printed}");
        printed
    }

    /// What `guest` prints.
    #[track_caller]
    pub(crate) fn guest(&self, arguments: &str) -> String {
        self.run(&format!("guest {arguments}"))
    }

    /// A property of the service.
    #[track_caller]
    pub(crate) fn property(&self, name: &str) -> String {
        self.run(&format!("systemctl show --value --property {name} sepal.service"))
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // With its first process, all of its others end.
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
        until("the container's control groups are empty", || {
            remove(&self.group).then_some(())
        });
    }
}

/// Removes a control group with those below it; false if something is still in one.
fn remove(group: &Path) -> bool {
    let below = fs::read_dir(group).into_iter().flatten().flatten();
    let mut folders = below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    folders.all(|entry| remove(&entry.path())) && fs::remove_dir(group).is_ok()
}

/// This process's own control group of version 2.
fn own_group() -> Result<PathBuf, String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mount = mounts
        .lines()
        .find_map(|line| line.contains(" - cgroup2 ").then(|| line.split(' ').nth(4))?)
        .ok_or("there is no cgroup version 2")?;
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap();
    let own = groups
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .unwrap_or_default();
    Ok(Path::new(mount).join(own))
}

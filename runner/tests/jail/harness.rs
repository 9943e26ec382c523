//! Runs the tests as root and as an ordinary user, and starts jailed components for them.
//!
//! Started by root, every test runs twice: as it is, and (named `user::…`) in a child of this process that has become a
//! uid nobody else has. Started by a user, each runs once, under that user.

use std::ffi::CString;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;

use libtest_mimic::{Arguments, Failed, Trial};
use sepal_runner::LayerStatus;
use sepal_runner::outer::{Component, ComponentSpec, ExitStatus, Program, Runner, SpawnError};
use sepal_runner::startup::HandleKind;

/// Set for the child that runs a test as an ordinary user: the number of its descriptor on `/dev/kvm`, or -1.
const AS_USER: &str = "SEPAL_TEST_KVM";

/// Set for the child in a user namespace of its own.
pub(crate) const INSIDE: &str = "SEPAL_TEST_INSIDE";

pub(crate) type Test = (String, fn());

pub(crate) fn main() -> ! {
    let arguments = Arguments::from_args();
    let mut tests = crate::layers::tests();
    tests.extend(crate::outside::tests());
    tests.extend(crate::keeper::tests());
    tests.extend(crate::succession::tests());
    tests.extend(crate::missing::tests());
    if std::env::var_os(INSIDE).is_some() {
        tests = crate::missing::inside();
    }
    let mut trials = Vec::new();
    for (name, test) in tests {
        if is_root() {
            let as_user = name.clone();
            trials.push(Trial::test(format!("user::{name}"), move || run_as_user(&as_user)));
        }
        trials.push(Trial::test(name, move || {
            test();
            Ok(())
        }));
    }
    for attempt in crate::attempts::ATTEMPTS {
        let name = format!("attempt::{}", attempt.name);
        if is_root() {
            let as_user = name.clone();
            trials.push(Trial::test(format!("user::{name}"), move || run_as_user(&as_user)));
        }
        trials.push(Trial::test(name, || {
            crate::layers::attempt_in_every_role(attempt);
            Ok(())
        }));
    }
    trials.push(
        Trial::test("figures", || {
            crate::figures::print();
            Ok(())
        })
        .with_ignored_flag(true),
    );
    if is_root() {
        trials.push(Trial::test("user::figures", || run_as_user("figures")).with_ignored_flag(true));
    }
    libtest_mimic::run(&arguments, trials).exit()
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn run_as_user(test: &str) -> Result<(), Failed> {
    // A range that nothing has (systemd.io/UIDS-GIDS), other than the one that components come from.
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let next = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let uid = 0x7800_0000 + std::process::id() * 8 % 0x0700_0000 + next % 0x1000;
    let kvm = File::options().read(true).write(true).open("/dev/kvm").ok();
    let number = kvm.as_ref().map_or(-1, |kvm| {
        rustix::io::fcntl_dupfd_cloexec(kvm, 100).map_or(-1, std::os::fd::IntoRawFd::into_raw_fd)
    });
    let mut command = Command::new(std::env::current_exe()?);
    command
        .uid(uid)
        .gid(uid)
        .current_dir("/")
        .env(AS_USER, number.to_string());
    command.args(["--exact", "--include-ignored", "--nocapture", test]);
    // SAFETY: one fcntl between fork and exec.
    unsafe {
        command.pre_exec(move || {
            libc::fcntl(number, libc::F_SETFD, 0);
            Ok(())
        });
    }
    let output = command.output();
    if number >= 0 {
        // SAFETY: made above, and owned by nothing.
        drop(unsafe { OwnedFd::from_raw_fd(number) });
    }
    let output = output?;
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    for line in out
        .lines()
        .filter(|line| line.starts_with("figure") || line.contains("skipped"))
    {
        println!("{line} (as an ordinary user)");
    }
    if output.status.success() && out.contains("1 passed") {
        return Ok(());
    }
    Err(format!("as uid {uid}: {}\n{out}\n{err}", output.status).into())
}

/// A handle on KVM: given by the parent, or opened. `None`, out loud, where there is none.
pub(crate) fn kvm() -> Option<OwnedFd> {
    if let Some(number) = std::env::var(AS_USER)
        .ok()
        .and_then(|number| number.parse::<i32>().ok())
        .filter(|n| *n >= 0)
    {
        // SAFETY: the parent left it open for the whole life of this process.
        let given = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
        return given.try_clone_to_owned().ok();
    }
    let opened = File::options().read(true).write(true).open("/dev/kvm").ok();
    if opened.is_none() {
        println!("skipped: no /dev/kvm");
    }
    opened.map(OwnedFd::from)
}

/// A component under test.
pub(crate) struct Jailed {
    pub component: Component,
    pub control: BufReader<UnixStream>,
    /// Held because the component's lifeline ends with it.
    _runner: Runner,
}

pub(crate) fn program() -> Program {
    Program::open(std::env::current_exe().unwrap()).unwrap()
}

/// A specification that runs this binary with these arguments, and the other end of its control socket.
pub(crate) fn spec(arguments: &[&str]) -> (ComponentSpec, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut spec = ComponentSpec::new(program(), c"component".to_owned());
    spec.args
        .extend(arguments.iter().map(|argument| CString::new(*argument).unwrap()));
    spec.handles.add("control", HandleKind::Socket, theirs.into()).unwrap();
    (spec, ours)
}

impl Jailed {
    pub(crate) fn start(spec: (ComponentSpec, UnixStream)) -> Result<Self, SpawnError> {
        let mut runner = Runner::new()?;
        let component = runner.spawn(spec.0)?;
        Ok(Self {
            component,
            control: BufReader::new(spec.1),
            _runner: runner,
        })
    }

    /// The next line that it writes; empty if it is gone.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        // A killed peer resets the connection where it left something unread.
        let _ = self.control.read_line(&mut line);
        line.trim_end().to_owned()
    }

    /// What it reports after sealing.
    pub(crate) fn report(&mut self) -> Vec<LayerStatus> {
        let line = self.line();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }

    /// Lets one that waits end.
    pub(crate) fn release(mut self) -> ExitStatus {
        let _ = self.control.get_mut().write_all(b"x");
        self.component.wait().unwrap()
    }
}

/// The lines of `/proc/PID/status`.
pub(crate) fn status_of(pid: u32, field: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let value = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    value.unwrap_or_else(|| panic!("no {field}")).trim().to_owned()
}

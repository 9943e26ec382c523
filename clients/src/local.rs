//! The guest manager of this machine: a running one by its socket, or one that is started.

use std::{
    env,
    ffi::OsString,
    fs,
    io::{self, BufReader, ErrorKind, Read},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use sepal_schema::{state, transport::PeerCredentials};

use crate::{ending, left, place::Otherwise, terminal};

/// Most bytes that are told of what a manager says that does not start.
const MAX_WORDS: u64 = 4096;

/// A connection to a guest manager of this machine.
pub(crate) struct Local {
    pub(crate) socket: UnixStream,
    /// The process, if it was started for this connection.
    pub(crate) child: Option<Private>,
}

/// Connects to the manager that listens at `socket`, or at the user's own; `otherwise` says what to do if nobody listens at the user's own. One is never started
/// elsewhere: a path that was mistyped would get a manager of its own.
pub(crate) fn connect(socket: Option<&Path>, otherwise: Otherwise) -> Result<Local> {
    let found = |stream| Local {
        socket: stream,
        child: None,
    };
    if let Some(stream) = find(socket)? {
        return Ok(found(stream));
    }
    let path = path_of(socket);
    if let Some(pid) = without_socket(&path) {
        bail!(
            "nobody listens at {}, but a guest manager runs for it (process {pid}): its socket was removed. `kill {pid}` ends it, and guests that are durable go \
             on with the next one",
            path.display()
        );
    }
    let path = path.display();
    let otherwise = match otherwise {
        Otherwise::Resume if socket.is_none() && left::waits() => Otherwise::Daemon,
        otherwise => otherwise,
    };
    match otherwise {
        Otherwise::Private | Otherwise::Daemon if socket.is_some() => bail!(
            "no guest manager runs (nobody listens at {path}); `guest launch` starts one only where no address is given"
        ),
        Otherwise::Fail | Otherwise::Resume if socket.is_some() => {
            bail!("no guest manager runs (nobody listens at {path}, the address that was given)")
        }
        Otherwise::Fail | Otherwise::Resume => {
            bail!(
                "no guest manager runs (nobody listens at {path}); `guest launch --detach` starts one that stays, and so does `guest start` for a guest that is defined"
            )
        }
        Otherwise::Private => start_private(),
        Otherwise::Daemon => {
            let started = start_daemon();
            // Also where it did not start: another may have been quicker.
            match (find(None)?, started) {
                (Some(stream), _) => Ok(found(stream)),
                (None, Err(error)) => Err(error),
                (None, Ok(())) => bail!("the guest manager started, but nobody listens at {path}"),
            }
        }
    }
}

/// A manager that was started for this command.
pub(crate) struct Private {
    process: Child,
    /// Passes on what it says on its standard error.
    relay: JoinHandle<String>,
}

impl Private {
    /// Waits until it has ended, and all that it said has been passed on.
    pub(crate) fn wait(mut self) -> io::Result<ExitStatus> {
        let status = self.process.wait();
        // It only copies, and has nothing to tell if it could not.
        let _ = self.relay.join();
        status
    }
}

/// Starts a manager that ends with the connection.
fn start_private() -> Result<Local> {
    let (ours, theirs) = UnixStream::pair().context("making a socket pair")?;
    let mut command = command()?;
    command.arg("--fd").arg(theirs.as_raw_fd().to_string());
    command.stderr(Stdio::piped());
    let mut process = spawn(command, theirs.into())?;
    let stderr = process.stderr.take();
    let relay = terminal::spawn("log", || {
        stderr.map_or_else(String::new, |stderr| terminal::relay(BufReader::new(stderr)))
    });
    let relay = relay.context("starting a thread for the guest manager's log")?;
    Ok(Local {
        socket: ours,
        child: Some(Private { process, relay }),
    })
}

/// The process of the manager whose socket would be here, if that was removed: the file with its number is still there.
fn without_socket(socket: &Path) -> Option<u32> {
    let pid = fs::read_to_string(state::lock_of(socket)).ok()?.trim().parse().ok()?;
    let runs = || ending::is_manager(pid);
    // It may just begin, or end.
    (!socket.exists() && runs() && !comes_to_be(|| socket.exists() || !runs())).then_some(pid)
}

/// Whether this comes to be within a second.
fn comes_to_be(it_is: impl Fn() -> bool) -> bool {
    (0..20).any(|_| {
        thread::sleep(Duration::from_millis(50));
        it_is()
    })
}

/// Connects to the manager that listens at `socket`, or at the user's own; none if nobody listens there.
fn find(socket: Option<&Path>) -> Result<Option<UnixStream>> {
    let path = path_of(socket);
    let context = || format!("connecting to the guest manager at {}", path.display());
    let stream = match UnixStream::connect(&path) {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(error) => return Err(error).with_context(context),
    };
    if socket.is_none() {
        // Where there is no folder of the user's own, anybody could have put a socket there.
        let own = rustix::process::getuid().as_raw();
        let peer = PeerCredentials::of(&stream).with_context(context)?;
        check_listener(peer.uid, own).with_context(context)?;
    }
    Ok(Some(stream))
}

/// Where the manager listens that is meant.
fn path_of(socket: Option<&Path>) -> PathBuf {
    socket.map_or_else(sepal_schema::socket::default_path, Path::to_owned)
}

/// Whether a process of the user `uid` may be the manager of the user `own`.
fn check_listener(uid: u32, own: u32) -> Result<()> {
    if uid != own && uid != 0 {
        bail!("it belongs to the user {uid}; if that is meant, name it with --manager");
    }
    Ok(())
}

/// The manager's program: beside this one.
fn command() -> Result<Command> {
    let own = env::current_exe().context("finding this program's own file")?;
    let path = own.with_file_name("guest-manager");
    if !path.exists() {
        bail!(
            "the program {} is missing; it is built and installed together with guest",
            path.display()
        );
    }
    let mut command = Command::new(path);
    // What a service manager means for whoever runs this program is not the guest manager's.
    for variable in ["NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"] {
        command.env_remove(variable);
    }
    Ok(command)
}

/// Starts a process that inherits `fd` under its own number, and no other descriptor but the standard ones: a manager that stays must not keep
/// open what this program happened to be started with.
fn spawn(mut command: Command, fd: OwnedFd) -> Result<Child> {
    let program: OsString = command.get_program().to_owned();
    let number = fd.as_raw_fd();
    // SAFETY: between fork and exec only system calls are made; the descriptor is open until the command has been started.
    unsafe {
        command.pre_exec(move || {
            let all = libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
            if all != 0 || libc::fcntl(number, libc::F_SETFD, 0) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let child = command.stdin(Stdio::null()).spawn();
    drop(fd);
    child.with_context(|| format!("starting {}", Path::new(&program).display()))
}

/// How many components a manager that stays keeps waiting: who launches one guest after the other finds one each time, and one costs less than 2 MiB (docs/decisions/0011).
const POOL: &str = "1";

/// Starts the user's own manager in a session of its own, and returns when it listens.
fn start_daemon() -> Result<()> {
    let (mut ready, theirs) = io::pipe().context("making a pipe")?;
    let mut command = command()?;
    command
        .arg("--log-to-file")
        .arg("--pool")
        .arg(POOL)
        .arg("--ready-fd")
        .arg(theirs.as_raw_fd().to_string());
    // Without --socket it finds the user's own, and sees to it that the folder is nobody else's.
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    // SAFETY: setsid is async-signal-safe, and nothing else happens between fork and exec.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(())
        });
    }
    let mut child = spawn(command, theirs.into())?;
    // It closes its standard error when it listens, or ends.
    let mut words = String::new();
    if let Some(stderr) = child.stderr.take() {
        // What cannot be read cannot be told; the byte counts.
        let _ = stderr.take(MAX_WORDS).read_to_string(&mut words);
    }
    // End of file without a byte: it ended before it listened.
    if ready.read(&mut [0]).context("waiting for the guest manager")? == 0 {
        let status = child.wait().context("waiting for the guest manager")?;
        let words = words.trim().trim_start_matches("guest-manager: ");
        bail!("the guest manager did not start ({status}): {words}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_user_and_root_may_be_found_at_the_users_own_socket() {
        check_listener(7, 7).unwrap();
        check_listener(0, 7).unwrap();
        let error = check_listener(8, 7).unwrap_err().to_string();
        assert!(error.contains("user 8") && error.contains("--manager"), "{error}");
        assert!(check_listener(7, 0).is_err());
    }
}

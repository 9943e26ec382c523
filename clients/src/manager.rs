//! Finding the guest manager: a running one by its socket, or one that is started for this command.

use std::{
    env,
    ffi::OsString,
    fs::File,
    io::{self, ErrorKind, Read},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use sepal_schema::{
    config::Handles,
    manager_capnp::guest_manager,
    transport::{Connection, Handle, Limits, connect},
};

/// A connection to a guest manager.
pub(crate) struct Manager {
    pub(crate) client: guest_manager::Client,
    pub(crate) connection: Connection,
    /// The process, if it was started for this command.
    child: Option<Child>,
}

impl Manager {
    /// Connects to the manager that runs.
    pub(crate) fn running(handle: &Handle, socket: Option<&Path>) -> Result<Self> {
        let path = socket_path(socket)?;
        match Self::at(handle, &path)? {
            Some(manager) => Ok(manager),
            None => bail!(
                "no guest manager runs (nobody listens at {}); `guest launch --detach` starts one that stays",
                path.display()
            ),
        }
    }

    /// Connects to the manager that runs, or starts a private one that ends with this connection.
    pub(crate) fn running_or_private(handle: &Handle, socket: Option<&Path>) -> Result<Self> {
        if let Some(manager) = Self::at(handle, &socket_path(socket)?)? {
            return Ok(manager);
        }
        let (ours, theirs) = UnixStream::pair().context("making a socket pair")?;
        let mut command = command()?;
        command.arg("--fd").arg(theirs.as_raw_fd().to_string());
        // Its log goes to the user's terminal: what is as it should be is not worth a line there.
        if env::var_os("RUST_LOG").is_none() {
            command.env("RUST_LOG", "warn");
        }
        if env::var_os("RUST_LOG").is_none() {
            // Its log goes to the user's own standard error, where only what is wrong belongs.
            command.env("RUST_LOG", "warn");
        }
        let child = spawn(command, theirs.into())?;
        Self::over(handle, ours, Some(child))
    }

    /// Connects to the manager that runs, or starts one that stays.
    pub(crate) fn running_or_daemon(handle: &Handle, socket: Option<&Path>) -> Result<Self> {
        let path = socket_path(socket)?;
        if let Some(manager) = Self::at(handle, &path)? {
            return Ok(manager);
        }
        start_daemon(&path)?;
        match Self::at(handle, &path)? {
            Some(manager) => Ok(manager),
            None => bail!("the guest manager started, but nobody listens at {}", path.display()),
        }
    }

    fn at(handle: &Handle, path: &Path) -> Result<Option<Self>> {
        match UnixStream::connect(path) {
            Ok(socket) => Self::over(handle, socket, None).map(Some),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("connecting to the guest manager at {}", path.display())),
        }
    }

    fn over(handle: &Handle, socket: UnixStream, child: Option<Child>) -> Result<Self> {
        let (client, connection) =
            connect(handle, socket, Limits::default()).context("talking to the guest manager")?;
        Ok(Self {
            client,
            connection,
            child,
        })
    }

    /// The descriptors that travel with the connection's messages.
    pub(crate) fn fds(&self) -> impl Handles + use<> {
        self.connection.fds()
    }

    /// Why a call failed, as far as the end of a private manager explains it.
    pub(crate) async fn explain(&mut self, handle: &Handle, error: anyhow::Error) -> anyhow::Error {
        let broken = |error: &capnp::Error| error.kind == capnp::ErrorKind::Disconnected;
        if !error.downcast_ref().is_some_and(broken) {
            return error;
        }
        let Some(mut child) = self.child.take() else {
            return error;
        };
        // Calls fail a moment before the connection has ended. If it does not, the capability broke for another reason.
        if handle
            .timeout(Duration::from_secs(1), self.connection.ended())
            .await
            .is_err()
        {
            self.child = Some(child);
            return error;
        }
        // Its connection ends with it, or it ends with its connection.
        match handle.spawn_blocking(move || child.wait()).await {
            Ok(Ok(status)) => error.context(format!("the guest manager ended ({status})")),
            _ => error,
        }
    }

    /// Lets go of the manager; a private one has ended when this returns, and cleaned up behind itself.
    pub(crate) async fn close(self, handle: &Handle) {
        let Self {
            client,
            connection,
            child,
        } = self;
        drop(client);
        drop(connection);
        if let Some(mut child) = child {
            // Not on this thread: its loop is what closes the connection.
            let _ = handle.spawn_blocking(move || child.wait()).await;
        }
    }
}

/// The socket of the user's manager; the same rule as the manager's own.
fn socket_path(given: Option<&Path>) -> Result<PathBuf> {
    Ok(given.map_or_else(sepal_schema::socket::default_path, Path::to_owned))
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
    Ok(Command::new(path))
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

/// Starts a manager in a session of its own, and returns when it listens.
fn start_daemon(socket: &Path) -> Result<()> {
    let (mut ready, theirs) = io::pipe().context("making a pipe")?;
    let log = log_file(socket)?;
    let mut command = command()?;
    command
        .arg("--socket")
        .arg(socket)
        .arg("--ready-fd")
        .arg(theirs.as_raw_fd().to_string());
    command.stdout(Stdio::null()).stderr(log.1);
    // SAFETY: setsid is async-signal-safe, and nothing else happens between fork and exec.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(())
        });
    }
    let mut child = spawn(command, theirs.into())?;
    // End of file without a byte: it ended before it listened.
    let mut byte = [0];
    if ready.read(&mut byte).context("waiting for the guest manager")? == 0 {
        let status = child.wait()?;
        bail!(
            "the guest manager did not start ({status}); its log is {}",
            log.0.display()
        );
    }
    Ok(())
}

fn log_file(socket: &Path) -> Result<(PathBuf, File)> {
    let path = socket.with_extension("log");
    if let Some(folder) = path.parent() {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .with_context(|| format!("making the folder {}", folder.display()))?;
    }
    let file = File::options()
        .append(true)
        .create(true)
        .open(&path)
        .with_context(|| format!("opening the log {}", path.display()))?;
    Ok((path, file))
}

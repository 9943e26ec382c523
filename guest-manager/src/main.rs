//! The guest manager's process: command line, log, signals, and the order in which things begin and end.
//!
//! ```text
//!   signals blocked -> log started -> socket taken -> keeper started -> listening ("ready") -> serve
//!     -> SIGTERM, SIGINT, shutdown(), or the end of the connection given with --fd
//!     -> guests stopped by force -> socket removed -> keeper ended
//! ```

use std::{
    fs::File,
    io::Write,
    os::{
        fd::{AsFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    process::ExitCode,
    rc::Rc,
};

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use futures::future::{LocalBoxFuture, select_all};
use sepal_guest_manager::{
    host::Host,
    listener::{self, Listening},
    log::{self, Writer},
    manager::{Manager, Settings},
    server::{self, Connections},
    starter::{KeeperStarter, Programs},
};
use sepal_schema::transport::{Reactor, reactor::Direction};
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

/// Runs guests, each in a jailed process of its own, for clients that connect to its socket.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Listen at this path. Default: sepal/manager.sock in the user's runtime folder, or /run/sepal/manager.sock
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,

    /// Serve the connected Unix socket with this number, and end with it; do not listen unless --socket is given too
    #[arg(long, value_name = "N")]
    fd: Option<RawFd>,

    /// Write a byte to the descriptor with this number when the manager listens, and close it
    #[arg(long, value_name = "N")]
    ready_fd: Option<RawFd>,

    /// Folder of the programs vmm-component and sepal-keeper. Default: this program's own
    #[arg(long, value_name = "DIR")]
    libexec: Option<PathBuf>,

    /// Folder that keeps what guests write to volatile disks, in files without names. Default: $TMPDIR, or /var/tmp
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,

    /// How to write the log, to standard error; RUST_LOG says how much
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,

    /// Append the log to a file beside the socket (manager.log for manager.sock); standard error is told why the manager does not start, and
    /// is closed when it listens
    #[arg(long)]
    log_to_file: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    /// Lines for people
    Text,
    /// One JSON object a line
    Json,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Before any thread is made, the log's included, so that none takes them.
    let signals = block_signals().context("taking signals");
    let started = socket_path(&arguments).and_then(|socket| {
        let (log, caller) = start_log(&arguments, socket.as_deref())?;
        Ok((socket, log, caller))
    });
    let (socket, log, mut caller) = match started {
        Ok(started) => started,
        Err(error) => {
            eprintln!("guest-manager: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = signals.and_then(|signals| run(&arguments, signals, socket.as_deref(), &mut caller));
    if let Err(error) = &outcome {
        tracing::error!("{error:#}");
        if let Some(mut caller) = caller {
            // It may not want to know any more.
            let _ = writeln!(caller, "guest-manager: {error:#}");
        }
    }
    log.finish();
    if outcome.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Serves until the end. `caller` is where whoever started the manager hears why it does not start; taken when it has.
fn run(arguments: &Arguments, signals: OwnedFd, socket: Option<&Path>, caller: &mut Option<File>) -> Result<()> {
    let inherited = |number: Option<RawFd>, what| number.map(|number| inherit(number).context(what)).transpose();
    let connection = inherited(arguments.fd, "--fd")?.map(UnixStream::from);
    let ready = inherited(arguments.ready_fd, "--ready-fd")?;
    raise_descriptor_limit();

    let programs = Programs::find(&libexec(arguments.libexec.as_deref())?)?;
    let listening = socket.map(Listening::new).transpose()?;

    let mut reactor = Reactor::new().context("making the event loop")?;
    let handle = reactor.handle();
    let files = listening.as_ref().map(Listening::files).unwrap_or_default();
    let starter = KeeperStarter::new(&handle, programs, files)?;
    let host = Host::detect();
    if host.unassisted {
        tracing::info!("the host's CPU gives KVM no hardware virtualization: guests get help, and run slowly");
    }
    let defaults = Settings::default();
    let settings = Settings {
        host,
        scratch: arguments.scratch.clone().unwrap_or(defaults.scratch),
        ..defaults
    };
    let manager = Manager::new(handle.clone(), settings, Box::new(starter.clone()))?;

    let connections = Rc::new(Connections::default());
    let mut ends: Vec<LocalBoxFuture<'_, &str>> = vec![Box::pin(async {
        manager.shutdown_asked().await;
        "a client asked for it"
    })];
    let signals = handle.register(signals).context("waiting for signals")?;
    ends.push(Box::pin(async move {
        let take = |signals: &OwnedFd| {
            Ok(rustix::io::read(
                signals,
                &mut [0; size_of::<libc::signalfd_siginfo>()],
            )?)
        };
        let _ = signals.io(Direction::Read, take).await;
        "a signal asked for it"
    }));
    if let Some(listening) = &listening {
        let socket = listening.socket().try_clone().context("listening")?;
        let listener = handle.register(socket).context("listening")?;
        let (manager, connections) = (manager.clone(), connections.clone());
        handle.spawn(async move { server::accept(&manager, &connections, listener).await });
        tracing::info!(pid = std::process::id(), "listening at {}", listening.path().display());
    }
    if let Some(socket) = connection {
        let Some(connection) = server::serve(&manager, socket).context("--fd")? else {
            bail!("--fd: the other end belongs to another user");
        };
        ends.push(Box::pin(async {
            connections.keep(connection).await;
            "its client is gone"
        }));
    }
    *caller = None;
    if let Some(ready) = ready {
        File::from(ready).write_all(b"\n").context("--ready-fd")?;
    }

    let why = reactor.run_until(select_all(ends))?.0;
    tracing::info!("ending: {why}");
    reactor.run_until(async {
        manager.stop_all("the manager ended").await;
        connections.end().await;
    })?;
    drop(listening);
    starter.close();
    Ok(())
}

/// Where to listen, if at all; the folder is there, and ours alone unless it was chosen by whoever started the manager.
fn socket_path(arguments: &Arguments) -> Result<Option<PathBuf>> {
    if arguments.socket.is_some() || arguments.fd.is_some() {
        return Ok(arguments.socket.clone());
    }
    let path = sepal_schema::socket::default_path();
    if let Some(folder) = path.parent() {
        listener::make_folder(folder, rustix::process::getuid().as_raw())?;
    }
    Ok(Some(path))
}

/// Where the programs are that this one starts.
fn libexec(given: Option<&Path>) -> Result<PathBuf> {
    if let Some(folder) = given {
        return Ok(folder.to_owned());
    }
    let own = std::env::current_exe().context("finding this program's own file")?;
    let folder = own.parent().context("finding this program's own folder")?;
    Ok(folder.to_owned())
}

/// Takes over a descriptor that was inherited under this number.
fn inherit(number: RawFd) -> Result<OwnedFd> {
    if number <= 2 {
        bail!("the descriptors 0 to 2 have other uses");
    }
    // SAFETY: only asks about the number.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if flags < 0 || flags & libc::FD_CLOEXEC != 0 {
        bail!("no descriptor {number} was inherited");
    }
    // SAFETY: it is open, and was before this process opened any: those are close-on-exec, which this one was not. Once it is taken it is, too,
    // so that no number is taken twice.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok(fd)
}

/// Takes the signals that ask for the end, to be read from the returned descriptor.
fn block_signals() -> std::io::Result<OwnedFd> {
    // SAFETY: the set is a local that the calls fill; the mask concerns this thread and those that it will make.
    let fd = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&raw mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: fresh, and owned by nothing else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes use of all descriptors that the system allows: each guest needs some.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // Where this fails, what there is must do.
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: maximum,
            maximum,
        },
    );
}

/// Starts the log. Where it goes to a file, standard error does from now on; returned is what it was before.
fn start_log(arguments: &Arguments, socket: Option<&Path>) -> Result<(Writer, Option<File>)> {
    let caller = match (arguments.log_to_file, socket) {
        (false, _) => None,
        (true, Some(socket)) => {
            let file = listener::open_log(socket)?;
            let before = std::io::stderr().as_fd().try_clone_to_owned();
            let before = before.context("keeping standard error")?;
            rustix::stdio::dup2_stderr(&file).context("redirecting standard error")?;
            Some(File::from(before))
        }
        (true, None) => bail!("--log-to-file: there is no socket beside which the file could be"),
    };
    let (lines, writer) = log::start(std::io::stderr()).context("starting the log's thread")?;
    // What a private manager does is the business of its only client, which is told; its log may well go to the client's terminal.
    let level = if socket.is_none() {
        LevelFilter::WARN
    } else {
        LevelFilter::INFO
    };
    let filter = EnvFilter::builder()
        .with_default_directive(level.into())
        .from_env_lossy();
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(move || lines.clone());
    match arguments.log_format {
        LogFormat::Text => subscriber.with_ansi(false).with_target(false).init(),
        LogFormat::Json => subscriber.json().flatten_event(true).init(),
    }
    Ok((writer, caller))
}

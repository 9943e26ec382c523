//! The guest manager's process: command line, log, signals, and the order in which things begin and end.
//!
//! ```text
//!   sockets of a service manager taken -> signals blocked -> log started -> sockets and state folder taken -> keeper started -> listening ("ready") -> serve
//!     -> SIGTERM, SIGINT, SIGHUP (with --audit that reopens its file; a service manager may mean that), shutdown(), or the end of the connection given with --fd
//!     -> guests stopped by force, but for those that go on without a manager -> socket removed -> keeper ended, or left with them
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
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use futures::future::{LocalBoxFuture, select_all};
use sepal_guest_manager::{
    audit::Audit,
    definitions::autostart,
    durable,
    host::{self, Host},
    journal::{self, Prefixed},
    listener::{self, Listening, Reach},
    log::{self, Writer},
    manager::{Manager, Settings},
    pool::{self, Pool},
    registry::{Limits, MAX_GUESTS},
    roles::{Allowance, Roles},
    server::{self, Connections, Door},
    service::{self, Notifier, Passed, Purpose},
    starter::{KeeperStarter, Programs},
    state::{State, StateFolder},
};
use sepal_schema::transport::{
    Reactor,
    reactor::{self, Direction},
};
use tracing_subscriber::{EnvFilter, filter::LevelFilter, fmt::format};

/// Runs guests, each in a jailed process of its own, for clients that connect to its socket.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Listen at this path. Default: what a service manager passes, or sepal/manager.sock in the user's runtime folder, or /run/sepal/manager.sock
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

    /// Folder of what the manager keeps across its own restarts and the host's: definitions of guests, settings. Nobody else may reach it. Default:
    /// $XDG_STATE_HOME/sepal, ~/.local/state/sepal, or /var/lib/sepal for root; none with --socket or --fd, or where a service manager passes the socket
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,

    /// Folder that keeps what guests write to volatile disks, in files without names. Default: $TMPDIR, or /var/tmp
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,

    /// Most guests at a time that have not ended, 1 to 65535
    #[arg(long, value_name = "N", default_value_t = MAX_GUESTS as u16, value_parser = clap::value_parser!(u16).range(1..))]
    max_guests: u16,

    /// Most memory that guests may be promised in all, in MiB, or with a unit (64G); a guest that would exceed it is refused. Default: each guest may have
    /// what the host has left when it is created
    #[arg(long, value_name = "SIZE", value_parser = parse_memory)]
    max_memory: Option<u64>,

    /// Let others use the manager: SUBJECT is uid:NUMBER, gid:NUMBER, user:NAME, group:NAME or everyone; ROLE is none (only redeem tokens),
    /// observe, operate or admin. May be repeated; the highest role counts. Needs --socket, in a folder that they can reach
    #[arg(long, value_name = "SUBJECT=ROLE")]
    allow: Vec<Allowance>,

    /// Listen at this path, too: everyone who can reach it may look at all guests, and nobody may do more
    #[arg(long, value_name = "PATH")]
    read_only_socket: Option<PathBuf>,

    /// Append who changed what, and what came of it, to this file, a line of JSON each; SIGHUP has it opened again. Default: to the log
    #[arg(long, value_name = "FILE")]
    audit: Option<PathBuf>,

    /// Keep this many components started and jailed, waiting for guests, so that launching takes less time; each costs memory while it waits
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u8).range(..=pool::MOST as i64))]
    pool: u8,

    /// Go on looking for calls for at most this many microseconds (0 to 1000) after the last one before sleeping, as long as more come in that time:
    /// calls one after the other take less time, and more of the processor's
    #[arg(long, value_name = "MICROSECONDS", default_value_t = LINGER, value_parser = clap::value_parser!(u16).range(..=1000))]
    linger: u16,

    /// How to write the log, to standard error; RUST_LOG says how much. Where that is systemd's journal, lines have a priority and no time
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

/// About what waking a processor takes twice (`reactor::LINGER`).
const LINGER: u16 = reactor::LINGER.as_micros() as u16;

/// Descriptors that there is room for from the start: what 256 guests with some devices each take.
const DESCRIPTORS: u32 = 4096;

/// Where the manager listens.
#[derive(Debug)]
struct Places {
    /// A path to listen at.
    socket: Option<PathBuf>,
    /// Sockets that listen already.
    passed: Vec<Passed>,
}

impl Places {
    /// Whether there is a client whose business alone it is what the manager does.
    fn is_private(&self) -> bool {
        self.socket.is_none() && self.passed.is_empty()
    }

    /// Begins to listen.
    fn listen(self, arguments: &Arguments, reach: Reach) -> Result<Vec<(Listening, Door)>> {
        let mut listening = Vec::new();
        if let Some(path) = &self.socket {
            listening.push((Listening::new(path, reach)?, Door::Main));
        }
        if let Some(path) = &arguments.read_only_socket {
            listening.push((Listening::new(path, Reach::Everyone)?, Door::ReadOnly));
        }
        let passed = self.passed.into_iter().map(|Passed { socket, path, purpose }| {
            let door = match purpose {
                Purpose::Main => Door::Main,
                Purpose::ReadOnly => Door::ReadOnly,
            };
            (Listening::passed(socket, path), door)
        });
        listening.extend(passed);
        Ok(listening)
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Before anything else is opened under their numbers.
    let passed = service::passed().context("taking sockets");
    // Before any thread is made, the log's included, so that none takes them.
    let signals = block_signals().context("taking signals");
    sepal_runner::descriptors::raise_limit();
    let descriptors = DESCRIPTORS.max(u32::from(arguments.max_guests) * 16);
    if let Err(error) = sepal_runner::descriptors::reserve(descriptors) {
        eprintln!("guest-manager: making room for descriptors: {error}");
    }
    let started = passed.and_then(|passed| {
        let socket = socket_path(&arguments, !passed.is_empty())?;
        let places = Places { socket, passed };
        let (log, caller) = start_log(&arguments, &places)?;
        Ok((places, log, caller))
    });
    let (places, log, mut caller) = match started {
        Ok(started) => started,
        Err(error) => {
            eprintln!("guest-manager: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = open_audit(&arguments).and_then(|(audit, writer)| {
        let outcome = signals.and_then(|signals| run(&arguments, signals, places, audit, &mut caller));
        if let Some(writer) = writer {
            writer.finish();
        }
        outcome
    });
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
fn run(arguments: &Arguments, signals: OwnedFd, places: Places, audit: Audit, caller: &mut Option<File>) -> Result<()> {
    let inherited = |number: Option<RawFd>, what| number.map(|number| inherit(number).context(what)).transpose();
    let connection = inherited(arguments.fd, "--fd")?.map(UnixStream::from);
    let ready = inherited(arguments.ready_fd, "--ready-fd")?;

    let programs = Programs::find(&libexec(arguments.libexec.as_deref())?)?;
    let roles = Roles::new(rustix::process::geteuid().as_raw(), arguments.allow.iter().copied());
    let reach = if roles.names_others() {
        Reach::Everyone
    } else {
        Reach::Owner
    };
    let serviced = !places.passed.is_empty();
    let listening = places.listen(arguments, reach)?;
    let state = open_state(arguments, serviced)?;
    let notifier = match arguments.fd {
        None => Notifier::from_environment(),
        // Whoever started it is told otherwise; what the environment names is told about somebody else.
        Some(_) => Notifier::default(),
    };

    let linger = Duration::from_micros(arguments.linger.into());
    let mut reactor = Reactor::new().context("making the event loop")?.lingering(linger);
    let handle = reactor.handle();
    let files = listening.iter().flat_map(|(listening, _)| listening.files()).collect();
    let starter = KeeperStarter::new(&handle, programs, files, state.clone())?;
    let pool = Pool::new(&handle, Rc::new(starter.clone()), arguments.pool.into());
    if arguments.pool > 0 {
        tracing::info!("keeping {} components waiting for guests", arguments.pool);
    }
    let host = Host::detect();
    if host.unassisted {
        tracing::info!("the host's CPU gives KVM no hardware virtualization: guests get help, and run slowly");
    }
    let defaults = Settings::default();
    let settings = Settings {
        host,
        cpuid: host::supported_cpuid().into(),
        scratch: arguments.scratch.clone().unwrap_or(defaults.scratch),
        audit: audit.clone(),
        roles,
        state,
        max_memory: arguments.max_memory,
        limits: Limits {
            guests: arguments.max_guests.into(),
            ..defaults.limits
        },
        ..defaults
    };
    let manager = Manager::new(handle.clone(), settings, Box::new(pool.clone()))?;

    durable::take_over(&manager, reactor.run_until(starter.inherit())?);
    reactor.run_until(manager.guests_reached())?;

    let connections = Rc::new(Connections::default());
    let mut ends: Vec<LocalBoxFuture<'_, &str>> = vec![Box::pin(async {
        manager.shutdown_asked().await;
        "a client asked for it"
    })];
    let signals = handle.register(signals).context("waiting for signals")?;
    let (reloads, reloaded) = (arguments.audit.is_some() || notifier.is_heard(), &notifier);
    ends.push(Box::pin(async move {
        while signals
            .io(Direction::Read, next_signal)
            .await
            .is_ok_and(|signal| signal == libc::SIGHUP)
            && reloads
        {
            reloaded.reloading();
            audit.reopen();
            reloaded.ready(SERVING);
        }
        "a signal asked for it"
    }));
    for (listening, door) in &listening {
        let socket = listening.socket().try_clone().context("listening")?;
        let listener = handle.register(socket).context("listening")?;
        let (manager, connections, door) = (manager.clone(), connections.clone(), *door);
        handle.spawn(async move { server::accept(&manager, &connections, listener, door).await });
        tell_listening(listening, door, reach);
    }
    handle.spawn(autostart::start_all(manager.clone()));
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
    notifier.ready(SERVING);

    let why = reactor.run_until(select_all(ends))?.0;
    tracing::info!("ending: {why}");
    notifier.stopping(why);
    reactor.run_until(async {
        manager.end("the manager ended").await;
        connections.end().await;
    })?;
    drop(listening);
    starter.close();
    Ok(())
}

/// What a service manager is told of a manager that serves.
const SERVING: &str = "serving guests; `guest list` shows them";

/// Logs where the manager listens, and what keeps those out that it listens for.
fn tell_listening(listening: &Listening, door: Door, reach: Reach) {
    let path = listening.path().display();
    match door {
        Door::Main => tracing::info!(pid = std::process::id(), "listening at {path}"),
        Door::ReadOnly => tracing::info!("listening at {path}, for whoever wants to look"),
    }
    let for_others = door == Door::ReadOnly || reach == Reach::Everyone;
    if let Some((folder, mode)) = listener::closed_folder(listening.path()).filter(|_| for_others) {
        let folder = folder.display();
        tracing::warn!("not everyone can reach {path}: the folder {folder} has the mode {mode:o}");
    }
}

/// The number of the next signal.
fn next_signal(signals: &OwnedFd) -> std::io::Result<i32> {
    let mut signal = [0; size_of::<libc::signalfd_siginfo>()];
    rustix::io::read(signals, &mut signal)?;
    // Its first field, ssi_signo (signalfd(2)).
    let [a, b, c, d, ..] = signal;
    Ok(i32::from_ne_bytes([a, b, c, d]))
}

/// Where what is to outlive the manager is kept; `serviced`: a service manager passed the socket. The user's own folder is used where that can be: a manager runs without it, and says so to whoever
/// needs it.
fn open_state(arguments: &Arguments, serviced: bool) -> Result<State> {
    if let Some(path) = &arguments.state {
        let folder = StateFolder::open(path).with_context(|| format!("--state {}", path.display()))?;
        return Ok(State::Kept(Rc::new(folder)));
    }
    if arguments.socket.is_some() || arguments.fd.is_some() || serviced {
        return Ok(State::default());
    }
    Ok(match StateFolder::open_default() {
        Ok(folder) => State::Kept(Rc::new(folder)),
        Err(error) => {
            tracing::warn!("keeping no definitions: {error}");
            State::Nowhere(format!("this manager keeps no definitions: {error}").into())
        }
    })
}

/// Where it goes who changed what.
fn open_audit(arguments: &Arguments) -> Result<(Audit, Option<Writer>)> {
    let Some(path) = &arguments.audit else {
        return Ok((Audit::to_log(), None));
    };
    let opened = Audit::to_file(path).with_context(|| format!("--audit {}", path.display()))?;
    Ok((opened.0, Some(opened.1)))
}

/// Where to listen, if at all; the folder is there, and ours alone unless it was chosen by whoever started the manager.
fn socket_path(arguments: &Arguments, passed: bool) -> Result<Option<PathBuf>> {
    if passed {
        return Ok(arguments.socket.clone());
    }
    if arguments.socket.is_some() || arguments.fd.is_some() {
        if arguments.socket.is_none() && !arguments.allow.is_empty() {
            bail!("--allow: nobody else can reach a manager that does not listen: --socket says where it is to");
        }
        return Ok(arguments.socket.clone());
    }
    if !arguments.allow.is_empty() {
        bail!("--allow: nobody else can reach the folder of the user's own socket: choose another path with --socket");
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

/// Reads a size of memory as bytes: MiB, or a number with M, G or T.
fn parse_memory(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(format!("'{unit}' is no unit of memory; M, G and T are")),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "a size starts with a number: 512M, 64G".to_owned())?;
    match number.checked_mul(1 << shift) {
        Some(0) | None => Err(format!("{text} is no memory that guests could be promised")),
        Some(bytes) => Ok(bytes),
    }
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

/// Starts the log. Where it goes to a file, standard error does from now on; returned is what it was before.
fn start_log(arguments: &Arguments, places: &Places) -> Result<(Writer, Option<File>)> {
    let caller = match (arguments.log_to_file, &places.socket) {
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
    let level = if places.is_private() {
        LevelFilter::WARN
    } else {
        LevelFilter::INFO
    };
    let filter = EnvFilter::builder()
        .with_default_directive(level.into())
        .from_env_lossy();
    let journal = journal::takes(std::io::stderr());
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(move || lines.clone());
    let text = format().with_ansi(false).with_target(false);
    match (arguments.log_format, journal) {
        (LogFormat::Text, false) => subscriber.with_ansi(false).event_format(text).init(),
        (LogFormat::Text, true) => subscriber
            .with_ansi(false)
            .event_format(Prefixed(text.without_time()))
            .init(),
        (LogFormat::Json, false) => subscriber.json().flatten_event(true).init(),
        (LogFormat::Json, true) => {
            let json = subscriber.json().flatten_event(true).without_time();
            json.map_event_format(Prefixed).init();
        }
    }
    Ok((writer, caller))
}

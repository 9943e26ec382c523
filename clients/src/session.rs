//! A terminal connected to a guest's serial port, by `launch` and `attach`.
//!
//! ```text
//!   standard input  --(thread)-->  stream  --> guest
//!   standard output <--(thread)--  stream  <-- guest      end of file: the guest is gone
//! ```
//!
//! The stream is a socket of the guest manager's, which never makes the guest wait: a terminal that stands still loses the oldest output. Two threads
//! copy, because a terminal or a file cannot be waited for by an event loop in every case.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    thread,
};

use anyhow::{Context, Result, bail};
use capnp::capability::FromClientHook;
use futures::{FutureExt, channel::oneshot, future, select};
use sepal_schema::{
    config::Handles,
    error::{Error, Kind},
    guest_capnp::{guest, output, serial},
    info::{GuestInfo, GuestStatus},
    report::Reason,
    transport::Handle,
};

use crate::{
    args::{Attach, ConsoleAt},
    calls,
    manager::Manager,
    place::Place,
    status,
    terminal::{self, Raw},
};

/// Bytes copied at a time.
const CHUNK: usize = 16 * 1024;

/// How the session came about, which decides what detaching means.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// The guest lives as long as the session.
    Launched,
    /// The guest lives on.
    Attached,
}

/// Connects the terminal to a guest that runs.
pub(crate) async fn attach(handle: &Handle, place: &Place, args: &Attach) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    let guest = calls::lookup(&manager.client, &args.name).await?;
    check_live(&calls::info(&calls::observer(&guest)).await?)?;
    run(&manager, &guest, &args.name, Mode::Attached).await
}

/// Connects the terminal to a port of the console of a guest that runs.
pub(crate) async fn console(handle: &Handle, place: &Place, args: &ConsoleAt) -> Result<u8> {
    let (name, port) = &args.at;
    let manager = Manager::running(handle, place)?;
    let guest = calls::lookup(&manager.client, name).await?;
    check_live(&calls::info(&calls::observer(&guest)).await?)?;
    let console = calls::console(&guest, *port).await?;
    let sizes = console.clone();
    let resized = handle.spawn_owned({
        let changes = terminal::size_changes(handle)?;
        async move {
            // Whoever has no terminal has no size; a guest that cannot be told does without.
            if let Some((columns, rows)) = terminal::size() {
                let _ = calls::resize(&sizes, columns, rows).await;
            }
            while changes.next().await.is_ok() {
                if let Some((columns, rows)) = terminal::size() {
                    let _ = calls::resize(&sizes, columns, rows).await;
                }
            }
        }
    });
    let end = console.clone().cast_to::<output::Client>().end_request().send().promise;
    let position = end.await?.get()?.get_position();
    let ended = converse(&manager, &guest, name, Mode::Attached, console.cast_to(), position).await;
    drop(resized);
    ended
}

/// Whether there is something to connect to: a guest that has ended would give an empty session.
fn check_live(info: &GuestInfo) -> Result<(), Error> {
    match (&info.stop, info.status) {
        (Some(stop), GuestStatus::Stopped | GuestStatus::VmmUnexpectedTermination) => {
            let message = format!("guest \"{}\" has ended: {}", info.name, stop.detail);
            Err(Error::new(Kind::NotRunning, message))
        }
        _ => Ok(()),
    }
}

/// Copies until the guest ends or the user detaches. Returns the exit status.
pub(crate) async fn run(manager: &Manager, guest: &guest::Client, name: &str, mode: Mode) -> Result<u8> {
    let observer = calls::observer(guest);
    let position = match mode {
        Mode::Launched => 0,
        Mode::Attached => calls::output(&observer)
            .end_request()
            .send()
            .promise
            .await?
            .get()?
            .get_position(),
    };
    converse(manager, guest, name, mode, calls::serial(guest), position).await
}

/// Copies between the terminal and a port, from `position` of its output on.
async fn converse(
    manager: &Manager,
    guest: &guest::Client,
    name: &str,
    mode: Mode,
    port: serial::Client,
    position: u64,
) -> Result<u8> {
    let observer = calls::observer(guest);
    let stream = open(manager, &port, position).await?;
    let raw = Raw::enter().context("making the terminal raw")?;
    let terminal = raw.is_some();
    if terminal {
        let leaving = if mode == Mode::Launched {
            "stops the guest"
        } else {
            "detaches"
        };
        eprint!("connected to {name}; Ctrl-] {leaving}\r\n");
    }

    let printed = copy_output(stream.try_clone()?)?;
    let escape = copy_input(stream, terminal)?;
    let ended = async {
        // All output has been printed before the end is told; output that cannot be printed ends the session.
        printed.await.unwrap_or(Ok(())).context("writing the guest's output")?;
        calls::wait(&observer).await
    }
    .fuse();
    let escaped = async {
        // Input that ends is no wish to leave.
        if escape.await.is_err() {
            future::pending::<()>().await;
        }
    }
    .fuse();
    futures::pin_mut!(ended, escaped);
    let report = select! {
        report = ended => report,
        () = escaped => {
            drop(raw);
            eprintln!();
            if mode == Mode::Attached {
                eprintln!("detached from {name}, which runs on");
                return Ok(status::SUCCESS);
            }
            calls::kill(&calls::power(guest)).await
        }
        reason = manager.connection.ended().fuse() => {
            bail!("the connection to the guest manager ended: {reason}")
        }
    };
    let report = report?;
    terminal::restore();
    // Redirected, a guest that simply shut down is not worth a word; at a terminal, a session that is suddenly over is.
    if terminal || report.reason != Reason::Shutdown {
        eprintln!("{name}: {}", report.detail);
    }
    Ok(status::of(&report))
}

async fn open(manager: &Manager, serial: &serial::Client, position: u64) -> Result<UnixStream> {
    use serial::open_result::Which;
    let mut request = serial.open_request();
    request.get().set_position(position);
    let response = request.send().promise.await?;
    match response.get()?.which()? {
        Which::Fd(fd) => Ok(UnixStream::from(manager.fds().take(fd?.get_number())?)),
        Which::Error(error) => Err(Error::read(error?)?.into()),
    }
}

/// Copies the guest's output to standard output on a thread of its own, until the guest is gone.
fn copy_output(mut from: UnixStream) -> Result<oneshot::Receiver<io::Result<()>>> {
    let (done, copied) = oneshot::channel();
    let work = move || {
        let mut buffer = [0; CHUNK];
        let mut out = io::stdout().lock();
        let result = loop {
            match from.read(&mut buffer) {
                Ok(0) => break Ok(()),
                Ok(length) => {
                    if let Err(error) = out.write_all(&buffer[..length]).and_then(|()| out.flush()) {
                        break Err(error);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
        };
        // Nobody listens any more if the session is over.
        let _ = done.send(result);
    };
    thread::Builder::new()
        .name("output".into())
        .spawn(work)
        .context("starting a thread for the output")?;
    Ok(copied)
}

/// Copies standard input to the guest on a thread of its own; tells when the escape is typed on a terminal.
fn copy_input(mut to: UnixStream, terminal: bool) -> Result<oneshot::Receiver<()>> {
    let (escape, escaped) = oneshot::channel();
    let work = move || {
        let mut buffer = [0; CHUNK];
        loop {
            let length = match io::stdin().lock().read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            let typed = &buffer[..length];
            let position = terminal
                .then(|| typed.iter().position(|&byte| byte == terminal::ESCAPE))
                .flatten();
            // A guest that is gone takes no more input; the end is noticed where its output ends.
            if to.write_all(&typed[..position.unwrap_or(length)]).is_err() {
                break;
            }
            if position.is_some() {
                // Nobody listens any more if the session is over.
                let _ = escape.send(());
                break;
            }
        }
    };
    thread::Builder::new()
        .name("input".into())
        .spawn(work)
        .context("starting a thread for the input")?;
    Ok(escaped)
}

#[cfg(test)]
mod tests {
    use sepal_schema::report::StopReport;

    use super::*;

    #[test]
    fn only_what_has_not_ended_can_be_attached_to() {
        let stop = StopReport {
            reason: Reason::Shutdown,
            detail: "the guest shut down".into(),
            error: None,
            uptime_ns: 0,
            time_ns: 0,
            about: String::new(),
            rung: sepal_schema::report::Rung::None,
        };
        let mut info = GuestInfo {
            name: "bee".into(),
            status: GuestStatus::Running,
            generation: 2,
            uptime_ns: 0,
            descriptor: None,
            stop: None,
            problems: Vec::new(),
            layers: Vec::new(),
            component_pid: 0,
            paused: false,
            detached: false,
        };
        check_live(&info).unwrap();
        info.stop = Some(stop);
        info.status = GuestStatus::Stopped;
        let error = check_live(&info).unwrap_err();
        assert_eq!(error.kind, Kind::NotRunning);
        assert!(
            error.message.contains("bee") && error.message.contains("shut down"),
            "{}",
            error.message
        );
    }
}

//! A terminal connected to a guest's serial port, by `launch` and `attach`.
//!
//! ```text
//!   standard input  --(thread)-->  stream  --> guest
//!   standard output <--(thread)--  stream  <-- guest      end of file: the guest is gone
//! ```
//!
//! The stream is a socket of the guest manager's, or leads to one (`streams`), which never makes the guest wait: a terminal that stands still loses the oldest output. Two threads
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
    error::{Error, Kind},
    facet_capnp::facet,
    guest_capnp::{console, guest, output, serial},
    info::{GuestInfo, GuestStatus},
    report::{Reason, StopReport},
    transport::Handle,
};

use crate::{
    args::{Attach, ConsoleAt},
    calls,
    manager::Manager,
    place::Place,
    say::words,
    status, streams,
    terminal::{self, Raw},
};

/// Bytes copied at a time.
const CHUNK: usize = 16 * 1024;

/// Whose session it is, which decides what detaching means, and who tells how it ended.
pub(crate) enum Holder {
    /// Who launched the guest: it lives as long as the session.
    Launched(guest::Client),
    /// Who holds the guest, which lives on.
    Attached(guest::Client),
    /// Who holds the port alone.
    Port,
}

/// A port of a guest that a terminal is to be connected to.
pub(crate) struct Port<'a> {
    pub(crate) handle: &'a Handle,
    pub(crate) manager: &'a Manager,
    /// The guest's name.
    pub(crate) name: &'a str,
    pub(crate) port: serial::Client,
    pub(crate) holder: Holder,
}

/// Connects the terminal to a guest that runs.
pub(crate) async fn attach(handle: &Handle, place: &Place, args: &Attach) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    let guest = calls::lookup(&manager.client, &args.name).await?;
    attach_to(handle, &manager, guest, &args.name).await
}

/// Connects the terminal to the serial port of this guest.
pub(crate) async fn attach_to(handle: &Handle, manager: &Manager, guest: guest::Client, name: &str) -> Result<u8> {
    check_live(&calls::info(&calls::observer(&guest)).await?)?;
    let session = Port {
        handle,
        manager,
        name,
        port: calls::serial(&guest),
        holder: Holder::Attached(guest),
    };
    let position = end_of(&session.port).await?;
    session.converse(position).await
}

/// Connects the terminal to a guest that was just launched.
pub(crate) async fn launched(handle: &Handle, manager: &Manager, guest: &guest::Client, name: &str) -> Result<u8> {
    let session = Port {
        handle,
        manager,
        name,
        port: calls::serial(guest),
        holder: Holder::Launched(guest.clone()),
    };
    session.converse(0).await
}

/// Connects the terminal to a guest that was just started, and goes on without it.
pub(crate) async fn started(handle: &Handle, manager: &Manager, guest: guest::Client, name: &str) -> Result<u8> {
    let session = Port {
        handle,
        manager,
        name,
        port: calls::serial(&guest),
        holder: Holder::Attached(guest),
    };
    session.converse(0).await
}

/// Connects the terminal to a port of the console of a guest that runs.
pub(crate) async fn console(handle: &Handle, place: &Place, args: &ConsoleAt) -> Result<u8> {
    let (name, port) = &args.at;
    let manager = Manager::running(handle, place)?;
    let guest = calls::lookup(&manager.client, name).await?;
    check_live(&calls::info(&calls::observer(&guest)).await?)?;
    let console = calls::console(&guest, *port).await?;
    let session = Port {
        handle,
        manager: &manager,
        name,
        port: console.clone().cast_to(),
        holder: Holder::Attached(guest),
    };
    session.console(console).await
}

/// The position after what a port printed so far; the beginning where that cannot be told.
async fn end_of(port: &serial::Client) -> Result<u64> {
    let end = port.clone().cast_to::<output::Client>().end_request().send().promise;
    let end = end.await?;
    let end = end.get()?;
    match end.has_error() {
        false => Ok(end.get_position()),
        // Who may only type sees nothing.
        true => match Error::read(end.get_error()?)? {
            error if error.kind == Kind::PermissionDenied => Ok(0),
            error => Err(error.into()),
        },
    }
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

impl Port<'_> {
    /// Connects the terminal to a port of the console, which is told the terminal's size. Returns the exit status.
    pub(crate) async fn console(self, console: console::Client) -> Result<u8> {
        let changes = terminal::size_changes(self.handle)?;
        let resized = self.handle.spawn_owned({
            let console = console.clone();
            async move {
                // Whoever has no terminal has no size; a guest that cannot be told does without.
                if let Some((columns, rows)) = terminal::size() {
                    let _ = calls::resize(&console, columns, rows).await;
                }
                while changes.next().await.is_ok() {
                    if let Some((columns, rows)) = terminal::size() {
                        let _ = calls::resize(&console, columns, rows).await;
                    }
                }
            }
        });
        let position = end_of(&self.port).await?;
        let ended = self.converse(position).await;
        drop(resized);
        ended
    }

    /// Connects the terminal to the serial port, from its present end on. Returns the exit status.
    pub(crate) async fn serial(self) -> Result<u8> {
        let position = end_of(&self.port).await?;
        self.converse(position).await
    }

    /// Copies between the terminal and the port, from `position` of its output on, until the guest ends or the user detaches. Returns the exit
    /// status.
    async fn converse(self, position: u64) -> Result<u8> {
        let Self { name, holder, .. } = &self;
        let stream = streams::port(self.handle, self.manager, &self.port, position).await?;
        let raw = Raw::enter().context("making the terminal raw")?;
        let terminal = raw.is_some();
        if terminal {
            let leaving = match holder {
                Holder::Launched(_) => "stops the guest",
                Holder::Attached(_) | Holder::Port => "detaches",
            };
            words(format_args!("connected to {name}; Ctrl-] {leaving}\r\n"));
        }

        let printed = copy_output(stream.try_clone()?)?;
        let escape = copy_input(stream, terminal)?;
        let ended = async {
            // All output has been printed before the end is told; output that cannot be printed ends the session.
            printed.await.unwrap_or(Ok(())).context("writing the guest's output")?;
            self.ended().await
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
                words(format_args!("\n"));
                match holder {
                    Holder::Launched(guest) => calls::kill(&calls::power(guest)).await.map(Some),
                    Holder::Attached(_) | Holder::Port => {
                        say!("detached from {name}, which runs on");
                        return Ok(status::SUCCESS);
                    }
                }
            }
            reason = self.manager.connection.ended().fuse() => {
                bail!("the connection to the guest manager ended: {reason}")
            }
        };
        let report = report?;
        terminal::restore();
        let Some(report) = report else {
            say!("{name}: the guest has ended");
            return Ok(status::SUCCESS);
        };
        // Redirected, a guest that simply shut down is not worth a word; at a terminal, a session that is suddenly over is.
        if terminal || report.reason != Reason::Shutdown {
            say!("{name}: {}", report.detail);
        }
        Ok(status::of(&report))
    }

    /// Why there is no more output: the guest's end, which who holds the port alone is not told about.
    async fn ended(&self) -> Result<Option<StopReport>> {
        match &self.holder {
            Holder::Launched(guest) | Holder::Attached(guest) => calls::wait(&calls::observer(guest)).await.map(Some),
            Holder::Port => {
                let port: facet::Client = self.port.clone().cast_to();
                // A capability that was taken back says so.
                calls::describe(&port).await.map(|_| None)
            }
        }
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
            component: None,
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
            upkeep: sepal_schema::info::Upkeep::default(),
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

//! A terminal connected to a guest's serial port, by `launch` and `attach`.
//!
//! ```text
//!   standard input  --(thread)-->  stream  --> guest
//!   standard output <--(thread)--  stream  <-- guest      end of file: the guest is gone
//! ```
//!
//! The stream is a socket of the guest manager's, or leads to one (`streams`), which never makes the guest wait: a terminal that stands still loses the oldest output. Two threads
//! copy, because a terminal or a file cannot be waited for by an event loop in every case.

use std::{future::Future, net::Shutdown, os::unix::net::UnixStream};

use anyhow::{Context, Result, bail};
use capnp::capability::FromClientHook;
use futures::{FutureExt, future, future::FusedFuture, select};
use sepal_schema::{
    error::{Error, Kind},
    facet_capnp::facet,
    guest_capnp::{console, guest, output, serial},
    info::{GuestInfo, GuestStatus},
    report::{Reason, StopReport},
    transport::{Connection, Handle},
};

use crate::{
    again::Back,
    args::{Attach, ConsoleAt},
    calls,
    copying::{Typing, copy_output},
    launch::Launched,
    manager::Manager,
    place::Place,
    say::words,
    status, streams,
    terminal::{self, Raw},
};

/// Whose session it is, which decides what detaching means, and who tells how it ended.
pub(crate) enum Holder {
    /// Who launched the guest: it lives as long as the session.
    Launched(guest::Client),
    /// Who holds the guest, which lives on.
    Attached(guest::Client),
    /// Who holds the port alone.
    Port,
}

impl Holder {
    /// Holds the same guest by another connection.
    fn hold(&mut self, found: guest::Client) {
        match self {
            Self::Launched(guest) | Self::Attached(guest) => *guest = found,
            Self::Port => {}
        }
    }
}

/// Why copying has ended.
enum Over {
    /// The guest has; how, if that can be told.
    Ended(Option<StopReport>),
    /// The user wants to leave.
    Left,
    /// The guest manager has.
    Lost(String),
}

/// A port of a guest that a terminal is to be connected to.
pub(crate) struct Port<'a> {
    pub(crate) handle: &'a Handle,
    pub(crate) manager: &'a Manager,
    /// The guest's name.
    pub(crate) name: &'a str,
    pub(crate) port: serial::Client,
    pub(crate) holder: Holder,
    /// What leads to the guest again if its manager ends; none if the guest ends with it.
    pub(crate) back: Option<Back<'a>>,
}

/// Connects the terminal to a guest that runs.
pub(crate) async fn attach(handle: &Handle, place: &Place, args: &Attach) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    let guest = calls::lookup(&manager.client, &args.name).await?;
    let name = &args.name;
    attach_to(handle, &manager, guest, name, || Back::of_name(place, name, None)).await
}

/// Connects the terminal to the serial port of this guest; `back` leads to it again if it outlives its manager.
pub(crate) async fn attach_to<'a>(
    handle: &'a Handle,
    manager: &'a Manager,
    guest: guest::Client,
    name: &'a str,
    back: impl FnOnce() -> Option<Back<'a>>,
) -> Result<u8> {
    let info = calls::info(&calls::observer(&guest)).await?;
    check_live(&info)?;
    let session = Port {
        handle,
        manager,
        name,
        port: calls::serial(&guest),
        holder: Holder::Attached(guest),
        back: if info.upkeep.durable { back() } else { None },
    };
    let position = end_of(&session.port).await?;
    session.converse(position).await
}

/// Connects the terminal to a guest that was just launched, and ends with this.
pub(crate) async fn launched(
    handle: &Handle,
    manager: &Manager,
    launched: &Launched,
    back: Option<Back<'_>>,
) -> Result<u8> {
    let session = Port {
        handle,
        manager,
        name: &launched.name,
        port: calls::serial(&launched.guest),
        holder: Holder::Launched(launched.guest.clone()),
        back,
    };
    session.converse(0).await
}

/// Connects the terminal to a guest that was just started, and goes on without it.
pub(crate) async fn started(handle: &Handle, place: &Place, manager: &Manager, started: Launched) -> Result<u8> {
    let info = calls::info(&calls::observer(&started.guest)).await?;
    let back = Back::of_name(place, &started.name, None).filter(|_| info.upkeep.durable);
    let session = Port {
        handle,
        manager,
        name: &started.name,
        port: calls::serial(&started.guest),
        holder: Holder::Attached(started.guest),
        back,
    };
    session.converse(0).await
}

/// Connects the terminal to a port of the console of a guest that runs.
pub(crate) async fn console(handle: &Handle, place: &Place, args: &ConsoleAt) -> Result<u8> {
    let (name, port) = &args.at;
    let manager = Manager::running(handle, place)?;
    let guest = calls::lookup(&manager.client, name).await?;
    let info = calls::info(&calls::observer(&guest)).await?;
    check_live(&info)?;
    let console = calls::console(&guest, *port).await?;
    let session = Port {
        handle,
        manager: &manager,
        name,
        port: console.clone().cast_to(),
        holder: Holder::Attached(guest),
        back: Back::of_name(place, name, Some(*port)).filter(|_| info.upkeep.durable),
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
    async fn converse(mut self, mut position: u64) -> Result<u8> {
        let mut stream = streams::port(self.handle, self.manager, &self.port, position).await?;
        let raw = Raw::enter().context("making the terminal raw")?;
        let terminal = raw.is_some();
        if terminal {
            let leaving = match self.holder {
                Holder::Launched(_) => "stops the guest",
                Holder::Attached(_) | Holder::Port => "detaches",
            };
            words(format_args!("connected to {}; Ctrl-] {leaving}\r\n", self.name));
        }
        let typing = Typing::to(stream.try_clone()?, self.back.is_some());
        let escape = typing.begin(terminal)?;
        let escaped = async {
            // Input that ends is no wish to leave.
            if escape.await.is_err() {
                future::pending::<()>().await;
            }
        }
        .fuse();
        futures::pin_mut!(escaped);
        // Those of the manager that took the guest over, and what keeps the guest running.
        let (mut next, mut _lease) = (None::<Manager>, None);
        let report = loop {
            let connection = &next.as_ref().unwrap_or(self.manager).connection;
            match self
                .until_over(connection, &stream, escaped.as_mut(), &mut position)
                .await?
            {
                Over::Ended(report) => break report,
                Over::Left => {
                    drop(raw);
                    words(format_args!("\n"));
                    match &self.holder {
                        Holder::Launched(guest) => break Some(calls::kill(&calls::power(guest)).await?),
                        Holder::Attached(_) | Holder::Port => {
                            say!("detached from {}, which runs on", self.name);
                            return Ok(status::SUCCESS);
                        }
                    }
                }
                Over::Lost(reason) => {
                    let Some(back) = &self.back else {
                        bail!("the connection to the guest manager ended: {reason}");
                    };
                    let (begin, end) = if terminal { ("\r\n", "\r\n") } else { ("", "\n") };
                    words(format_args!(
                        "{begin}the guest manager ended; {} goes on, and waits for the next{end}",
                        self.name
                    ));
                    let found = {
                        let finding = back.find(self.handle).fuse();
                        futures::pin_mut!(finding);
                        select! {
                            found = finding => Some(found?),
                            () = escaped.as_mut() => None,
                        }
                    };
                    let Some(found) = found else {
                        drop(raw);
                        words(format_args!("\n"));
                        bail!("left {} while no guest manager ran", self.name);
                    };
                    stream = streams::port(self.handle, &found.manager, &found.port, position).await?;
                    typing.go_on(stream.try_clone()?);
                    words(format_args!("connected to {} again{end}", self.name));
                    self.holder.hold(found.guest);
                    self.port = found.port;
                    (next, _lease) = (Some(found.manager), found.lease);
                }
            }
        };
        terminal::restore();
        let name = self.name;
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

    /// Copies from the port until something is over; `position` is then where its output is to be gone on with.
    async fn until_over(
        &self,
        connection: &Connection,
        stream: &UnixStream,
        mut escaped: impl FusedFuture<Output = ()> + Unpin,
        position: &mut u64,
    ) -> Result<Over> {
        let printed = copy_output(stream.try_clone()?)?;
        // All output has been printed before the end is told; output that cannot be printed ends the session.
        let printed = async { printed.await.unwrap_or(Ok(0)).context("writing the guest's output") };
        let ended = self.ended(printed).fuse();
        futures::pin_mut!(ended);
        let (copied, report, reason) = select! {
            ended = ended => {
                let (copied, report) = ended?;
                (copied, report, None)
            }
            () = escaped => return Ok(Over::Left),
            reason = connection.ended().fuse() => {
                // What has arrived is printed still. Its other end may be kept by nobody who would close it.
                let _ = stream.shutdown(Shutdown::Both);
                let (copied, report) = ended.await?;
                (copied, report, Some(reason.to_string()))
            }
        };
        // What a reader was too slow for is not counted, and comes again.
        *position += copied;
        match report {
            Ok(report) => Ok(Over::Ended(report)),
            Err(error) => match (reason, error.downcast_ref::<capnp::Error>()) {
                (Some(reason), _) => Ok(Over::Lost(reason)),
                (None, Some(broken)) if broken.kind == capnp::ErrorKind::Disconnected => {
                    Ok(Over::Lost(broken.to_string()))
                }
                (None, _) => Err(error),
            },
        }
    }

    /// What `printed` comes to, and why there is no more output: the guest's end, which who holds the port alone is not told about.
    async fn ended(&self, printed: impl Future<Output = Result<u64>>) -> Result<(u64, Result<Option<StopReport>>)> {
        match &self.holder {
            Holder::Launched(guest) | Holder::Attached(guest) => {
                // Asked from the beginning: a manager that ends with its guests answers that, and nothing that comes later.
                let report = async { Ok(calls::wait(&calls::observer(guest)).await.map(Some)) };
                future::try_join(printed, report).await
            }
            Holder::Port => {
                let copied = printed.await?;
                let port: facet::Client = self.port.clone().cast_to();
                // A capability that was taken back says so.
                Ok((copied, calls::describe(&port).await.map(|_| None)))
            }
        }
    }
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

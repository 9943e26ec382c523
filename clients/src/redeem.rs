//! `guest redeem`: what somebody has shared, used on a connection of one's own.
//!
//! ```text
//!   token --(its kind, which it begins with)--> does the action fit? --no--> say which do
//!                                                    | yes
//!                                                 describe --> is it permitted? --no--> say what is
//!                                                    | yes
//!                                                 redeem --> facet --> action
//! ```
//!
//! Until it is redeemed, a token that can be used once is as good as before.

use anyhow::Result;
use capnp::capability::FromClientHook;
use sepal_schema::{
    error::{Error, Kind, Outcome},
    facet::{Description, FacetKind, Right, kind_name, kind_of, right_name},
    facet_capnp::facet,
    guest_capnp::{guest, output, serial},
    transport::Handle,
};

use crate::{
    agent,
    args::{Action, Redeem},
    calls,
    control::{self, Press},
    cpu, devices, events, inspect,
    manager::Manager,
    place::Place,
    registers,
    session::{self, Holder, Port},
    sharing::{bound_facts, description, facet_of, left, spaced},
    show, stats, status, table, vsock,
};

/// What was redeemed.
struct Redeemed<'a> {
    handle: &'a Handle,
    manager: &'a Manager,
    facet: facet::Client,
    kind: FacetKind,
    /// The guest's name.
    guest: String,
}

/// `guest redeem`.
pub(crate) async fn redeem(handle: &Handle, place: &Place, args: &Redeem) -> Result<u8> {
    // What is no token is for the manager to refuse.
    let told = args.token.split('.').next().and_then(kind_of);
    let action = args.action.as_ref();
    if let Some(kind) = told
        && let Some(status) = refuse(kind, action)
    {
        return Ok(status);
    }
    let manager = Manager::running(handle, place)?;
    let description = calls::describe_token(&manager.client, args.token.trim()).await?;
    if let Some(Action::Describe { json }) = action {
        return describe(&description, *json);
    }
    permitted(&description, action)?;
    let mut request = manager.client.redeem_request();
    request.get().set_token(args.token.trim());
    let response = request.send().promise.await?;
    let redeemed = response.get()?.outcome()?;
    let unknown = |_| Error::not_supported("kind", "the token is for something that this version does not know");
    let redeemed = Redeemed {
        handle,
        manager: &manager,
        facet: redeemed.get_facet()?,
        kind: redeemed.get_kind().map_err(unknown)?,
        guest: redeemed.get_guest()?.to_string()?,
    };
    redeemed.act(action).await
}

/// The rights without which an action, or what is done where none is named, would be refused.
fn needed(kind: FacetKind, action: Option<&Action>) -> &'static [Right] {
    match (action, kind) {
        (None | Some(Action::Attach), FacetKind::Serial | FacetKind::Console) => &[Right::Output],
        (None, _) => &[Right::Observe],
        (Some(Action::Describe { .. } | Action::Attach), _) => &[],
        // The port that it reads may be one of the guest's.
        (Some(Action::Read { .. }), FacetKind::Serial | FacetKind::Console) => &[Right::Output],
        (Some(Action::Read { .. }), _) => &[Right::Observe, Right::Output],
        (Some(Action::Info { .. } | Action::Wait(_) | Action::Events(_) | Action::Stats { .. }), _) => {
            &[Right::Observe]
        }
        (Some(Action::Size { .. } | Action::Disks { .. } | Action::Networks { .. }), _) => &[Right::Observe],
        (Some(Action::Shutdown), _) => &[Right::Shutdown],
        (Some(Action::Stop(options)), _) => match (options.kill, options.force, options.timeout) {
            (false, false, _) => &[Right::Shutdown],
            (false, true, Some(_)) => &[Right::Shutdown, Right::Kill],
            _ => &[Right::Kill],
        },
        (Some(Action::Kill), _) => &[Right::Kill],
        (Some(Action::Pause | Action::Resume), _) => &[Right::Pause],
        (Some(Action::Reset), _) => &[Right::Reset],
        (Some(Action::Nmi), _) => &[Right::Nmi],
        (Some(Action::Set { .. }), FacetKind::MemController) => &[Right::Memory],
        (Some(Action::Set { .. }), _) => &[Right::Balloon],
        (Some(Action::Resize { .. }), _) => &[Right::Disk],
        (Some(Action::Link { .. }), _) => &[Right::Network],
        (Some(Action::Connect { .. }), _) => &[Right::Connect],
        (Some(Action::Listen { .. }), _) => &[Right::Listen],
        (Some(Action::Exec(_)), _) => &[Right::Agent],
        (Some(Action::Registers(_) | Action::Peek(_) | Action::Stack(_)), _) => &[Right::Debug],
        (Some(Action::Cpus(options)), _) => match (options.weight, options.limit) {
            (None, None) => &[Right::Observe],
            (Some(_), Some(_)) => &[Right::Cpu],
            // The other one is asked for.
            _ => &[Right::Observe, Right::Cpu],
        },
        (Some(Action::Pin(options)), _) => {
            let all = options.pins.iter().any(|pin| pin.vcpu.is_none());
            match (options.pins.is_empty(), all) {
                (true, _) => &[Right::Observe],
                (false, true) => &[Right::Observe, Right::Cpu],
                (false, false) => &[Right::Cpu],
            }
        }
    }
}

/// Whether what was shared permits an action.
///
/// # Errors
/// `PERMISSION_DENIED`, as the manager would answer once the token was redeemed.
fn permitted(description: &Description, action: Option<&Action>) -> Result<(), Error> {
    let needed = needed(description.kind, action);
    let Some(&missing) = needed.iter().find(|&&right| !description.rights.has(right)) else {
        return Ok(());
    };
    let message = format!(
        "this needs the right {}, and the token permits {}; it has not been used up",
        right_name(missing),
        description.rights
    );
    Err(Error::new(Kind::PermissionDenied, message))
}

/// The actions that fit a kind of facet, `describe` left out; the first without arguments is what is done where none is named.
fn actions(kind: FacetKind) -> &'static [&'static str] {
    match kind {
        FacetKind::Guest => &[
            "attach",
            "read",
            "info",
            "wait",
            "events",
            "stats",
            "shutdown",
            "stop",
            "kill",
            "pause",
            "resume",
            "reset",
            "nmi",
            "disks",
            "resize",
            "networks",
            "link",
            "connect",
            "listen",
            "exec",
            "registers",
            "peek",
            "stack",
            "cpus",
            "pin",
        ],
        FacetKind::Serial | FacetKind::Console => &["attach", "read"],
        FacetKind::Power => &["shutdown", "stop", "kill", "pause", "resume", "reset", "nmi"],
        FacetKind::BalloonController | FacetKind::MemController => &["size", "set"],
        FacetKind::DiskController => &["disks", "resize"],
        FacetKind::NetController => &["networks", "link"],
        FacetKind::HostVsockEndpoint => &["connect", "listen"],
        FacetKind::Agent => &["exec"],
        FacetKind::Observer => &["info", "read", "wait", "events", "stats"],
        FacetKind::Statistics => &["stats"],
        FacetKind::Debug => &["registers", "peek", "stack"],
        FacetKind::CpuController => &["cpus", "pin"],
    }
}

/// Whether there is something that a token of this kind is naturally for.
fn is_plain(kind: FacetKind) -> bool {
    matches!(
        kind,
        FacetKind::Serial | FacetKind::Console | FacetKind::Observer | FacetKind::Statistics
    )
}

/// The name of an action on the command line.
fn name_of(action: &Action) -> &'static str {
    match action {
        Action::Describe { .. } => "describe",
        Action::Attach => "attach",
        Action::Read { .. } => "read",
        Action::Info { .. } => "info",
        Action::Wait(_) => "wait",
        Action::Events(_) => "events",
        Action::Stats { .. } => "stats",
        Action::Shutdown => "shutdown",
        Action::Stop(_) => "stop",
        Action::Kill => "kill",
        Action::Pause => "pause",
        Action::Resume => "resume",
        Action::Reset => "reset",
        Action::Nmi => "nmi",
        Action::Size { .. } => "size",
        Action::Set { .. } => "set",
        Action::Disks { .. } => "disks",
        Action::Resize { .. } => "resize",
        Action::Networks { .. } => "networks",
        Action::Link { .. } => "link",
        Action::Connect { .. } => "connect",
        Action::Listen { .. } => "listen",
        Action::Exec(_) => "exec",
        Action::Registers(_) => "registers",
        Action::Peek(_) => "peek",
        Action::Stack(_) => "stack",
        Action::Cpus(_) => "cpus",
        Action::Pin(_) => "pin",
    }
}

/// Why this cannot be done with a token of this kind, told; none if it can.
fn refuse(kind: FacetKind, action: Option<&Action>) -> Option<u8> {
    let fits = match action {
        None => is_plain(kind),
        Some(Action::Describe { .. }) => true,
        Some(action) => actions(kind).contains(&name_of(action)),
    };
    if fits {
        return None;
    }
    let kind_name = kind_name(kind);
    match action {
        None => say!("guest: a token for the {kind_name} of a guest: say what to do with it"),
        Some(action) => say!(
            "guest: {} is nothing that a token for the {kind_name} of a guest is for",
            name_of(action)
        ),
    }
    let all: Vec<_> = actions(kind).iter().copied().chain(["describe"]).collect();
    say!("hint: guest redeem TOKEN {}", all.join("|"));
    say!("hint: the token has not been used up; `guest redeem --help` says more");
    Some(status::USAGE)
}

impl Redeemed<'_> {
    /// The facet of this kind: what was redeemed, or a facet of the guest that was.
    async fn of<C: FromClientHook>(&self, kind: FacetKind) -> Result<C> {
        if self.kind == kind {
            return Ok(self.facet.clone().cast_to());
        }
        let guest: guest::Client = self.facet.clone().cast_to();
        Ok(facet_of(&guest, kind, 0).await?.cast_to())
    }

    async fn act(&self, action: Option<&Action>) -> Result<u8> {
        match action {
            None => match self.kind {
                FacetKind::Observer => show::info_of(&self.facet.clone().cast_to(), false).await,
                FacetKind::Statistics => stats::show(&self.facet.clone().cast_to(), false).await,
                _ => self.attach().await,
            },
            // Done before anything is redeemed.
            Some(Action::Describe { .. }) => Ok(status::SUCCESS),
            Some(Action::Attach) => self.attach().await,
            Some(Action::Read { follow }) => show::logs_of(&self.output().await?, *follow).await,
            Some(Action::Info { json }) => show::info_of(&self.of(FacetKind::Observer).await?, *json).await,
            Some(Action::Wait(options)) => {
                let observer = self.of(FacetKind::Observer).await?;
                control::wait_by(self.handle, &observer, &self.guest, options).await
            }
            Some(Action::Events(options)) => {
                events::of_guest(self.manager, &self.of(FacetKind::Observer).await?, options).await
            }
            Some(Action::Stats { json }) => self.stats(*json).await,
            Some(Action::Shutdown) => self.press(Press::Shutdown).await,
            Some(Action::Pause) => self.press(Press::Pause).await,
            Some(Action::Resume) => self.press(Press::Resume).await,
            Some(Action::Reset) => self.press(Press::Reset).await,
            Some(Action::Nmi) => self.press(Press::Nmi).await,
            Some(Action::Stop(options)) => {
                let power = self.of(FacetKind::Power).await?;
                control::stop_by(self.handle, &power, &self.guest, options).await
            }
            Some(Action::Kill) => control::kill(&self.of(FacetKind::Power).await?, &self.guest).await,
            Some(Action::Size { json }) => match self.kind {
                FacetKind::MemController => devices::show_memory(&self.facet.clone().cast_to(), *json).await,
                _ => devices::show_balloon(&self.facet.clone().cast_to(), *json).await,
            },
            Some(Action::Set { size }) => match self.kind {
                FacetKind::MemController => devices::set_memory(&self.facet.clone().cast_to(), *size).await,
                _ => devices::set_balloon(&self.facet.clone().cast_to(), *size).await,
            },
            Some(Action::Disks { json }) => {
                done(devices::list_disks(&self.of(FacetKind::DiskController).await?, *json).await)
            }
            Some(Action::Resize { disk, size, shrink }) => {
                done(devices::resize(&self.of(FacetKind::DiskController).await?, disk, *size, *shrink).await)
            }
            Some(Action::Networks { json }) => {
                done(devices::list_networks(&self.of(FacetKind::NetController).await?, *json).await)
            }
            Some(Action::Link { network, state }) => {
                done(devices::set_link(&self.of(FacetKind::NetController).await?, network, *state).await)
            }
            Some(Action::Connect { port }) => {
                let endpoint = self.of(FacetKind::HostVsockEndpoint).await?;
                vsock::connect(self.handle, self.manager, &endpoint, *port).await
            }
            Some(Action::Listen { port }) => {
                let endpoint = self.of(FacetKind::HostVsockEndpoint).await?;
                vsock::listen(self.handle, self.manager, &endpoint, *port).await
            }
            Some(Action::Exec(options)) => {
                agent::run(self.handle, self.manager, &self.of(FacetKind::Agent).await?, options).await
            }
            Some(Action::Registers(options)) => registers::show(&self.of(FacetKind::Debug).await?, options).await,
            Some(Action::Peek(options)) => inspect::memory(&self.of(FacetKind::Debug).await?, options).await,
            Some(Action::Stack(options)) => inspect::calls_of(&self.of(FacetKind::Debug).await?, options).await,
            Some(Action::Cpus(options)) => cpu::share(&self.of(FacetKind::CpuController).await?, options).await,
            Some(Action::Pin(options)) => cpu::pin_vcpus(&self.of(FacetKind::CpuController).await?, options).await,
        }
    }

    async fn press(&self, what: Press) -> Result<u8> {
        control::press_on(&self.of(FacetKind::Power).await?, what).await
    }

    async fn attach(&self) -> Result<u8> {
        if self.kind == FacetKind::Guest {
            let guest = self.facet.clone().cast_to();
            return session::attach_to(self.handle, self.manager, guest, &self.guest, || None).await;
        }
        let port: serial::Client = self.facet.clone().cast_to();
        let session = Port {
            handle: self.handle,
            manager: self.manager,
            name: &self.guest,
            port: port.clone(),
            holder: Holder::Port,
            back: None,
        };
        match self.kind {
            FacetKind::Console => session.console(port.cast_to()).await,
            _ => session.serial().await,
        }
    }

    /// What the port has printed that this is, or the serial port of the guest.
    async fn output(&self) -> Result<output::Client> {
        match self.kind {
            FacetKind::Serial | FacetKind::Console => Ok(self.facet.clone().cast_to()),
            _ => Ok(calls::output(&self.of(FacetKind::Observer).await?)),
        }
    }

    async fn stats(&self, json: bool) -> Result<u8> {
        match self.kind {
            FacetKind::Observer => stats::show_seen(&self.facet.clone().cast_to(), json).await,
            _ => stats::show(&self.of(FacetKind::Statistics).await?, json).await,
        }
    }
}

/// Shows what a token stands for.
fn describe(found: &Description, json: bool) -> Result<u8> {
    if json {
        show::print_json(&description(found))?;
        return Ok(status::SUCCESS);
    }
    let mut facts = vec![
        ("facet", kind_name(found.kind).to_owned()),
        ("guest", found.guest.clone()),
        ("permits", spaced(found.rights)),
        ("expires in", found.expires_in.map_or("- (with the guest)".into(), left)),
    ];
    facts.extend(bound_facts(&found.bounds));
    facts.push(("actions", actions(found.kind).join(", ")));
    show::print(table::facts(&facts).as_bytes())?;
    Ok(status::SUCCESS)
}

fn done(outcome: Result<()>) -> Result<u8> {
    outcome.map(|()| status::SUCCESS)
}

#[cfg(test)]
mod tests {
    use clap::Subcommand;
    use sepal_schema::facet::{Bounds, KINDS};

    use super::*;

    #[test]
    fn every_action_is_for_something_and_there_is() {
        let command = Action::augment_subcommands(clap::Command::new("redeem"));
        let known: Vec<_> = command.get_subcommands().map(clap::Command::get_name).collect();
        for kind in KINDS {
            for action in actions(kind) {
                assert!(known.contains(action), "{action}");
            }
        }
        for action in known {
            let fits = KINDS.into_iter().any(|kind| actions(kind).contains(&action));
            assert!(fits || action == "describe", "{action}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let json = false;
        assert_eq!(refuse(FacetKind::Console, None), None);
        assert_eq!(refuse(FacetKind::Power, None), Some(status::USAGE));
        assert_eq!(refuse(FacetKind::Power, Some(&Action::Pause)), None);
        assert_eq!(refuse(FacetKind::Power, Some(&Action::Describe { json })), None);
        assert_eq!(refuse(FacetKind::Statistics, Some(&Action::Pause)), Some(status::USAGE));
    }

    #[test]
    fn what_is_not_permitted_is_refused_before_anything_is_redeemed() {
        let description = |rights: Right| Description {
            kind: FacetKind::Power,
            guest: "web".into(),
            rights: rights.into(),
            expires_in: None,
            bounds: Bounds::default(),
        };
        permitted(&description(Right::Kill), Some(&Action::Kill)).unwrap();
        let error = permitted(&description(Right::Pause), Some(&Action::Kill)).unwrap_err();
        assert_eq!(error.kind, Kind::PermissionDenied);
        assert!(error.message.contains("the right kill") && error.message.contains("permits pause"));
    }
}

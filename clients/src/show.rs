//! `guest list`, `info`, `logs` and `version`: what only looks.

use std::{
    io::{self, Write},
    time::Duration,
};

use anyhow::{Context, Result};
use sepal_schema::{
    config::{Restart, RestartPolicy},
    crash::CrashReport,
    error::{Outcome, kind_name},
    guest_capnp::{observer, output},
    info::{GuestInfo, GuestStatus, LayerState, status_name},
    report::{ComponentEnd, Rung, StopReport, reason_name, rung_name},
    transport::Handle,
};
use serde::Serialize;

use crate::{
    args::{Info, Json, Logs},
    calls,
    crashes::{self, Crash},
    define,
    manager::Manager,
    place::{Otherwise, Place},
    recreate,
    specs::restart_policy_name,
    status, table,
};

/// A guest as JSON; the names are the protocol's.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Guest<'a> {
    name: &'a str,
    status: &'static str,
    generation: u64,
    uptime_seconds: f64,
    cpus: Option<u8>,
    memory_mib: Option<u64>,
    kernel: Option<&'a str>,
    cmdline: Option<&'a str>,
    devices: &'a [String],
    stop: Option<Ending<'a>>,
    problems: &'a [String],
    layers: Vec<Layer<'a>>,
    component_pid: Option<u32>,
    paused: bool,
    detached: bool,
    uuid: Option<String>,
    defined: bool,
    autostart: bool,
    durable: bool,
    restart: Rules,
    restarts: u32,
    failures: u32,
    lease_ends_seconds: Option<f64>,
}

/// A restart policy as JSON, with its defaults.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Rules {
    policy: &'static str,
    attempts: u32,
    delay_seconds: f64,
    max_delay_seconds: f64,
    healthy_seconds: f64,
}

impl From<&Restart> for Rules {
    fn from(restart: &Restart) -> Self {
        Self {
            policy: restart_policy_name(restart.policy),
            attempts: restart.attempts(),
            delay_seconds: restart.delay().as_secs_f64(),
            max_delay_seconds: restart.max_delay().as_secs_f64(),
            healthy_seconds: restart.healthy().as_secs_f64(),
        }
    }
}

/// All about one guest as JSON.
#[derive(Serialize)]
struct Whole<'a> {
    #[serde(flatten)]
    guest: Guest<'a>,
    crashes: Vec<Crash<'a>>,
}

/// A layer of the jail as JSON.
#[derive(Serialize)]
struct Layer<'a> {
    name: &'a str,
    state: &'static str,
    detail: &'a str,
}

/// How a guest ended, as JSON.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Ending<'a> {
    reason: &'static str,
    detail: &'a str,
    error: Option<&'static str>,
    uptime_seconds: f64,
    time_unix_seconds: f64,
    about: &'a str,
    rung: &'static str,
    component_exit_status: Option<u8>,
    component_signal: Option<u8>,
}

impl<'a> From<&'a StopReport> for Ending<'a> {
    fn from(report: &'a StopReport) -> Self {
        Self {
            reason: reason_name(report.reason),
            detail: &report.detail,
            error: report.error.as_ref().map(|error| kind_name(error.kind)),
            uptime_seconds: seconds(report.uptime_ns),
            time_unix_seconds: seconds(report.time_ns),
            about: &report.about,
            rung: rung_name(report.rung),
            component_exit_status: match report.component {
                Some(ComponentEnd::Exited(status)) => Some(status),
                _ => None,
            },
            component_signal: match report.component {
                Some(ComponentEnd::Killed(signal)) => Some(signal),
                _ => None,
            },
        }
    }
}

impl<'a> From<&'a GuestInfo> for Guest<'a> {
    fn from(info: &'a GuestInfo) -> Self {
        let descriptor = info.descriptor.as_ref();
        Self {
            name: &info.name,
            status: status_name(info.status),
            generation: info.generation,
            uptime_seconds: seconds(info.uptime_ns),
            cpus: descriptor.map(|d| d.cpus),
            memory_mib: descriptor.map(|d| d.memory_mib),
            kernel: descriptor.map(|d| d.kernel.as_str()),
            cmdline: descriptor.map(|d| d.cmdline.as_str()),
            devices: descriptor.map_or(&[], |d| &d.devices),
            stop: info.stop.as_ref().map(Ending::from),
            problems: &info.problems,
            layers: info
                .layers
                .iter()
                .map(|layer| Layer {
                    name: &layer.name,
                    state: layer_state(layer.state),
                    detail: &layer.detail,
                })
                .collect(),
            component_pid: Some(info.component_pid).filter(|&pid| pid != 0),
            paused: info.paused,
            detached: info.detached,
            uuid: info.upkeep.uuid.map(|uuid| uuid.to_string()),
            defined: info.upkeep.defined,
            autostart: info.upkeep.autostart,
            durable: info.upkeep.durable,
            restart: Rules::from(&info.upkeep.restart),
            restarts: info.upkeep.restarts,
            failures: info.upkeep.failures,
            lease_ends_seconds: match info.upkeep.lease_ends_ms {
                0 => None,
                milliseconds => Some(Duration::from_millis(milliseconds.into()).as_secs_f64()),
            },
        }
    }
}

/// Lists all guests.
pub(crate) async fn list(handle: &Handle, place: &Place, args: &Json) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    let guests = calls::browse(&manager.client).await?;
    if args.json {
        let guests: Vec<Guest<'_>> = guests.iter().map(Guest::from).collect();
        print_json(&guests)?;
        return Ok(status::SUCCESS);
    }
    let rows = guests.iter().map(|guest| {
        let descriptor = guest.descriptor.as_ref();
        [
            guest.name.clone(),
            condition(guest),
            descriptor.map_or("-".into(), |it| it.cpus.to_string()),
            descriptor.map_or("-".into(), |it| format!("{}M", it.memory_mib)),
            if guest.status == GuestStatus::Running {
                table::duration(guest.uptime_ns)
            } else {
                "-".into()
            },
            if guest.component_pid == 0 {
                "-".into()
            } else {
                guest.component_pid.to_string()
            },
            kept(guest).into(),
        ]
    });
    let headings = ["NAME", "STATUS", "CPUS", "MEMORY", "UPTIME", "PID", "DEFINED"];
    print(table::table(&headings, rows).as_bytes())?;
    Ok(status::SUCCESS)
}

/// Shows one guest.
pub(crate) async fn info(handle: &Handle, place: &Place, args: &Info) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    match (calls::lookup(&manager.client, &args.name).await, args.toml) {
        (Ok(guest), true) => {
            let observer = calls::observer(&guest);
            match is_to_be_started(&calls::info(&observer).await?) {
                true => define::definition(handle, place, &args.name).await,
                false => recreate::print(&observer, !place.is_here()).await,
            }
        }
        (Ok(guest), false) => info_of(&calls::observer(&guest), args.json).await,
        (Err(error), toml) => {
            // One that only is defined has nobody who observes it.
            let all = calls::browse(&manager.client).await?;
            match (all.iter().find(|info| info.name == args.name), toml) {
                (None, _) => Err(error),
                (Some(_), true) => define::definition(handle, place, &args.name).await,
                (Some(info), false) => tell(info, &[], args.json),
            }
        }
    }
}

/// Whether it is what its definition says that there is to know of a guest: it has one, and does not run.
fn is_to_be_started(info: &GuestInfo) -> bool {
    let rests = match info.status {
        GuestStatus::NotStarted
        | GuestStatus::Stopped
        | GuestStatus::VmmUnexpectedTermination
        | GuestStatus::CrashLoop => true,
        GuestStatus::Starting | GuestStatus::Running | GuestStatus::Stopping => false,
    };
    info.upkeep.defined && rests
}

/// Shows what an observer sees.
pub(crate) async fn info_of(observer: &observer::Client, json: bool) -> Result<u8> {
    let info = calls::info(observer).await?;
    tell(&info, &crashes::of(observer).await?, json)
}

/// Shows what there is to know about a guest.
fn tell(info: &GuestInfo, crashes: &[CrashReport], json: bool) -> Result<u8> {
    if json {
        print_json(&Whole {
            guest: Guest::from(info),
            crashes: crashes.iter().map(Crash::from).collect(),
        })?;
        return Ok(status::SUCCESS);
    }
    let mut facts = vec![("name", info.name.clone()), ("status", condition(info))];
    if let Some(descriptor) = &info.descriptor {
        facts.push(("vCPUs", descriptor.cpus.to_string()));
        facts.push(("memory", format!("{} MiB", descriptor.memory_mib)));
        facts.push(("kernel", descriptor.kernel.clone()));
        // What only is defined may have none yet.
        if !descriptor.cmdline.is_empty() {
            facts.push(("cmdline", descriptor.cmdline.clone()));
        }
        if !descriptor.devices.is_empty() {
            facts.push(("devices", descriptor.devices.join(", ")));
        }
    }
    if info.status == GuestStatus::Running {
        facts.push(("uptime", table::duration(info.uptime_ns)));
    }
    if let Some(stop) = &info.stop {
        facts.push(("ended", format!("{}: {}", reason_name(stop.reason), stop.detail)));
        if stop.rung != Rung::None {
            facts.push(("made to stop", rung_name(stop.rung).into()));
        }
        facts.push(("had run", table::duration(stop.uptime_ns)));
    }
    if info.component_pid != 0 {
        facts.push(("component", format!("process {}", info.component_pid)));
    }
    match (info.status, info.detached) {
        (GuestStatus::NotStarted, _) => {}
        (_, true) => facts.push(("owner", "none (detached)".into())),
        (_, false) => facts.push(("owner", "the client that launched it".into())),
    }
    facts.extend(upkeep(info));
    let mut text = table::facts(&facts);
    if !info.layers.is_empty() {
        let rows = info.layers.iter().map(|layer| {
            [
                format!("  {}", layer.name),
                layer_state(layer.state).to_owned(),
                layer.detail.clone(),
            ]
        });
        text.push_str("jail\n");
        text.push_str(&table::table(&["  LAYER", "STATE", "DETAIL"], rows));
    }
    for problem in &info.problems {
        text.push_str(&table::indented(0, &format!("problem: {problem}")));
    }
    text.push_str(&crashes::show(crashes));
    print(text.as_bytes())?;
    Ok(status::SUCCESS)
}

/// Prints the kept history of the serial port, and what follows if that is wanted.
pub(crate) async fn logs(handle: &Handle, place: &Place, args: &Logs) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    let guest = calls::lookup(&manager.client, &args.name).await?;
    logs_of(&calls::output(&calls::observer(&guest)), args.follow).await
}

/// Prints what a port has printed.
pub(crate) async fn logs_of(output: &output::Client, follow: bool) -> Result<u8> {
    let mut position = 0;
    loop {
        let mut request = output.read_request();
        request.get().set_position(position);
        request.get().set_wait(follow);
        let response = request.send().promise.await?;
        let piece = response.get()?.outcome()?;
        if piece.get_dropped() > 0 {
            say!("[{} bytes are no longer kept]", piece.get_dropped());
        }
        let bytes = piece.get_bytes()?;
        if !print(bytes)? {
            return Ok(status::SUCCESS);
        }
        position = piece.get_position() + bytes.len() as u64;
        let over = piece.get_ended() || !follow;
        if bytes.is_empty() && over {
            return Ok(status::SUCCESS);
        }
    }
}

/// Prints both versions.
pub(crate) async fn version(handle: &Handle, place: &Place, args: &Json) -> Result<u8> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Versions {
        guest: &'static str,
        manager: Option<String>,
        manager_pid: Option<u32>,
        protocol: Option<u32>,
    }
    let own = env!("CARGO_PKG_VERSION");
    let mut versions = Versions {
        guest: own,
        manager: None,
        manager_pid: None,
        protocol: None,
    };
    // Who asks for versions wants nothing to be started.
    if let Ok(manager) = Manager::connect(handle, place, Otherwise::Fail) {
        // A manager that does not answer is no reason not to tell our own version.
        let answer = handle
            .timeout(Duration::from_secs(5), manager.client.version_request().send().promise)
            .await;
        if let Ok(Ok(response)) = answer {
            let answer = response.get()?;
            versions.manager = Some(answer.get_version()?.to_string()?);
            versions.manager_pid = Some(answer.get_pid());
            versions.protocol = Some(answer.get_protocol());
        }
    }
    if args.json {
        print_json(&versions)?;
        return Ok(status::SUCCESS);
    }
    let manager = match (&versions.manager, versions.manager_pid, versions.protocol) {
        (Some(version), Some(pid), Some(protocol)) => format!("{version} (process {pid}, protocol {protocol})"),
        _ => "not running".into(),
    };
    print(table::facts(&[("guest", own.to_owned()), ("manager", manager)]).as_bytes())?;
    Ok(status::SUCCESS)
}

/// Prints a value as JSON.
pub(crate) fn print_json(value: &impl Serialize) -> Result<()> {
    print(format!("{}\n", serde_json::to_string_pretty(value)?).as_bytes())?;
    Ok(())
}

/// Prints to standard output; false if nobody reads it any more, which is no failure: `guest list | head -1`.
pub(crate) fn print(bytes: &[u8]) -> Result<bool> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("writing to standard output"),
    }
}

/// How the guest is kept, as far as there is something to tell.
fn upkeep(info: &GuestInfo) -> Vec<(&'static str, String)> {
    let upkeep = &info.upkeep;
    let mut facts = Vec::new();
    if let Some(uuid) = upkeep.uuid {
        facts.push(("UUID", uuid.to_string()));
    }
    facts.push(("defined", kept_in_words(info).to_owned()));
    let durable = match upkeep.durable {
        true => "yes: it goes on without its manager",
        false => "no: it ends with its manager",
    };
    facts.push(("durable", durable.to_owned()));
    facts.push(("restart", restart_in_words(&upkeep.restart)));
    if upkeep.lease_ends_ms != 0 {
        let left = table::duration(u64::from(upkeep.lease_ends_ms) * 1_000_000);
        facts.push(("lease", format!("stops in {left} unless it is redeemed")));
    }
    if upkeep.restarts != 0 || upkeep.failures != 0 {
        facts.push((
            "restarts",
            format!("{}, with {} in a row", upkeep.restarts, failures(info)),
        ));
    }
    facts
}

/// Whether there is a definition, in a word.
fn kept(info: &GuestInfo) -> &'static str {
    match (info.upkeep.defined, info.upkeep.autostart) {
        (false, _) => "-",
        (true, false) => "yes",
        (true, true) => "autostart",
    }
}

fn kept_in_words(info: &GuestInfo) -> &'static str {
    match kept(info) {
        "-" => "no: it cannot be started again once it has ended",
        "yes" => "yes",
        _ => "yes, and started whenever the guest manager starts",
    }
}

/// What follows when it ends by itself.
fn restart_in_words(restart: &Restart) -> String {
    let policy = restart_policy_name(restart.policy);
    match restart.policy {
        RestartPolicy::Never => policy.to_owned(),
        RestartPolicy::OnFailure | RestartPolicy::Always => {
            let time = |time: Duration| table::duration(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
            format!(
                "{policy}: after {}, and up to {} if it goes on failing; given up after {} failures in a row, which a run of {} ends",
                time(restart.delay()),
                time(restart.max_delay()),
                restart.attempts().saturating_add(1),
                time(restart.healthy()),
            )
        }
    }
}

/// The status in one word or two.
fn condition(info: &GuestInfo) -> String {
    match (&info.stop, info.status) {
        (_, GuestStatus::Starting | GuestStatus::Running) if info.paused => "paused".into(),
        (_, GuestStatus::CrashLoop) => format!("crash-loop ({})", failures(info)),
        (Some(_), GuestStatus::Starting) if info.upkeep.failures != 0 => format!("starting (after {})", failures(info)),
        (Some(stop), GuestStatus::Stopped) => format!("stopped ({})", reason_name(stop.reason)),
        (_, status) => status_name(status).into(),
    }
}

/// How many runs in a row have failed, in words.
fn failures(info: &GuestInfo) -> String {
    match info.upkeep.failures {
        1 => "1 failure".to_owned(),
        failures => format!("{failures} failures"),
    }
}

fn layer_state(state: LayerState) -> &'static str {
    match state {
        LayerState::Holds => "holds",
        LayerState::Waived => "waived",
        LayerState::NotRequested => "not-requested",
    }
}

pub(crate) fn seconds(ns: u64) -> f64 {
    Duration::from_nanos(ns).as_secs_f64()
}

//! `guest share`, `shares`, `revoke` and `whoami`: who else may do what.

use anyhow::{Context, Result};
use capnp::capability::FromClientHook;
use sepal_schema::{
    error::{Error, Kind, Outcome, read_completion},
    facet::{self, Bounds, CallRate, FacetKind, Range, Rights, Terms, kind_name, right_name},
    facet_capnp,
    guest_capnp::guest,
    manager_capnp::Role,
    transport::Handle,
};
use serde::Serialize;
use serde_json::json;

use crate::{
    args::{Json, Limits, Named, Revoke, Share},
    calls,
    manager::Manager,
    place::Place,
    show, status, table, users,
};

/// Bytes of a balloon's page.
const PAGE: u64 = 4096;

/// `guest share`: the token on standard output, all other words on standard error.
pub(crate) async fn share(handle: &Handle, place: &Place, args: &Share) -> Result<u8> {
    let terms = Terms {
        once: args.once,
        uid: args.uid.as_deref().map(users::uid).transpose()?,
        label: args.label.clone(),
    };
    let bounds = bounds(&args.bounds)?;
    let manager = Manager::running(handle, place)?;
    let guest = calls::lookup(&manager.client, &args.name).await?;
    let facet = facet_of(&guest, args.kind, args.port).await?;
    let mut request = facet.share_request();
    bounds.write(request.get().init_bounds());
    terms.write(request.get().init_terms());
    let response = request.send().promise.await?;
    let shared = response.get()?.outcome()?;
    let (token, id) = (shared.get_token()?.to_str()?, shared.get_id());
    if args.json {
        let shared = json!({"token": token, "id": id, "guest": args.name, "kind": kind_name(args.kind)});
        show::print_json(&shared)?;
        return Ok(status::SUCCESS);
    }
    show::print(format!("{token}\n").as_bytes())?;
    let once = if args.once { " once" } else { "" };
    let name = &args.name;
    say!("share {id} of {name}: used{once} by `guest redeem TOKEN`, taken back by `guest revoke {name} {id}`");
    Ok(status::SUCCESS)
}

/// The bounds that the command line asks for.
fn bounds(limits: &Limits) -> Result<Bounds, Error> {
    let pages = |range: Range| {
        let page = |bytes: u64| match (bytes, bytes % PAGE) {
            (u64::MAX, _) => Ok(u64::MAX),
            (_, 0) => Ok(bytes / PAGE),
            _ => {
                let message = format!("a balloon has whole pages: {bytes} is no multiple of {PAGE}");
                Err(Error::bad_config("bounds.balloonPages", message))
            }
        };
        let (min, max) = (page(range.min)?, page(range.max)?);
        Ok::<_, Error>(Range { min, max })
    };
    Ok(Bounds {
        only: (!limits.only.is_empty()).then(|| limits.only.iter().copied().collect()),
        lifetime: limits.expires,
        rate: limits.rate,
        balloon_pages: limits.balloon.map(pages).transpose()?,
        memory_bytes: limits.memory,
        vsock_ports: limits.ports.clone(),
    })
}

/// A facet of a guest; `port` is the console's.
pub(crate) async fn facet_of(guest: &guest::Client, kind: FacetKind, port: u32) -> Result<facet_capnp::facet::Client> {
    macro_rules! at_once {
        ($request:ident, $get:ident) => {
            guest.$request().send().pipeline.$get().cast_to()
        };
    }
    macro_rules! if_there {
        ($request:ident, $get:ident) => {
            guest
                .$request()
                .send()
                .promise
                .await?
                .get()?
                .outcome()?
                .$get()?
                .cast_to()
        };
    }
    Ok(match kind {
        FacetKind::Guest => guest.clone().cast_to(),
        FacetKind::Serial => at_once!(serial_request, get_serial),
        FacetKind::Power => at_once!(power_request, get_power),
        FacetKind::Observer => at_once!(observer_request, get_observer),
        FacetKind::Statistics => at_once!(statistics_request, get_statistics),
        FacetKind::Debug => at_once!(debug_request, get_debug),
        FacetKind::Console => calls::console(guest, port).await?.cast_to(),
        FacetKind::BalloonController => if_there!(balloon_controller_request, get_controller),
        FacetKind::MemController => if_there!(mem_controller_request, get_controller),
        FacetKind::DiskController => if_there!(disk_controller_request, get_controller),
        FacetKind::NetController => if_there!(net_controller_request, get_controller),
        FacetKind::HostVsockEndpoint => if_there!(host_vsock_endpoint_request, get_endpoint),
        FacetKind::Agent => if_there!(agent_request, get_agent),
        FacetKind::CpuController => if_there!(cpu_controller_request, get_controller),
    })
}

/// A share as JSON; the names are the protocol's.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Shared<'a> {
    id: u64,
    kind: &'static str,
    label: &'a str,
    rights: Vec<&'static str>,
    expires_in_seconds: Option<f64>,
    once: bool,
    uid: Option<u32>,
    redeemed: u32,
    shared_by_uid: u32,
}

/// `guest shares`.
pub(crate) async fn shares(handle: &Handle, place: &Place, args: &Named) -> Result<u8> {
    use guest::shares_result::Which;
    let manager = Manager::running(handle, place)?;
    let guest = calls::lookup(&manager.client, &args.name).await?;
    let response = guest.shares_request().send().promise.await?;
    let list = match response.get()?.which()? {
        Which::Shares(shares) => shares?,
        Which::Error(error) => return Err(Error::read(error?)?.into()),
    };
    let shares = list.iter().map(facet::Share::read).collect::<Result<Vec<_>, _>>()?;
    if args.json {
        let shares: Vec<_> = shares.iter().map(Shared::from).collect();
        show::print_json(&shares)?;
        return Ok(status::SUCCESS);
    }
    let rows = shares.iter().map(|share| {
        [
            share.id.to_string(),
            kind_name(share.kind).to_owned(),
            spaced(share.rights),
            share.expires_in.map_or("-".into(), left),
            used(share),
            table::or_dash(&share.terms.label),
        ]
    });
    let headings = ["ID", "FACET", "PERMITS", "EXPIRES IN", "REDEEMED", "LABEL"];
    show::print(table::table(&headings, rows).as_bytes())?;
    Ok(status::SUCCESS)
}

impl<'a> From<&'a facet::Share> for Shared<'a> {
    fn from(share: &'a facet::Share) -> Self {
        Self {
            id: share.id,
            kind: kind_name(share.kind),
            label: &share.terms.label,
            rights: names(share.rights),
            expires_in_seconds: share.expires_in.map(|time| time.as_secs_f64()),
            once: share.terms.once,
            uid: share.terms.uid,
            redeemed: share.redeemed,
            shared_by_uid: share.shared_by_uid,
        }
    }
}

fn names(rights: Rights) -> Vec<&'static str> {
    rights.iter().map(right_name).collect()
}

/// Rights, so that a table can break the line between them.
pub(crate) fn spaced(rights: Rights) -> String {
    match rights == Rights::ALL {
        true => "all".to_owned(),
        false => rights.to_string().replace(',', ", "),
    }
}

/// A time to come.
pub(crate) fn left(time: std::time::Duration) -> String {
    table::duration(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}

/// How often a share was used, and by whom it can be.
fn used(share: &facet::Share) -> String {
    let of = if share.terms.once { " of 1" } else { "" };
    let whom = share.terms.uid.map(|uid| format!(", by {} alone", users::name(uid)));
    format!("{}{of}{}", share.redeemed, whom.unwrap_or_default())
}

/// Bounds as facts.
pub(crate) fn bound_facts(bounds: &Bounds) -> Vec<(&'static str, String)> {
    let bytes = |Range { min, max }: Range, unit: u64| {
        let most = match max.checked_mul(unit) {
            Some(bytes) if max != u64::MAX => table::size(bytes),
            _ => "any".to_owned(),
        };
        format!("{} to {most}", table::size(min.saturating_mul(unit)))
    };
    let mut facts = Vec::new();
    if let Some(CallRate { per_second, burst }) = bounds.rate {
        facts.push(("changes", format!("{per_second} a second, {burst} at once")));
    }
    if let Some(pages) = bounds.balloon_pages {
        facts.push(("balloon", bytes(pages, PAGE)));
    }
    if let Some(range) = bounds.memory_bytes {
        facts.push(("memory", bytes(range, 1)));
    }
    if !bounds.vsock_ports.is_empty() {
        let ports: Vec<_> = bounds.vsock_ports.iter().map(ToString::to_string).collect();
        facts.push(("vsock ports", ports.join(", ")));
    }
    facts
}

/// What a capability is, as JSON.
pub(crate) fn description(description: &facet::Description) -> serde_json::Value {
    let bounds = &description.bounds;
    let range = |range: Option<Range>| range.map(|range| json!({"min": range.min, "max": range.max}));
    json!({
        "kind": kind_name(description.kind),
        "guest": description.guest,
        "rights": names(description.rights),
        "expiresInSeconds": description.expires_in.map(|time| time.as_secs_f64()),
        "callsPerSecond": bounds.rate.map(|rate| rate.per_second),
        "burst": bounds.rate.map(|rate| rate.burst),
        "balloonPages": range(bounds.balloon_pages),
        "memoryBytes": range(bounds.memory_bytes),
        "vsockPorts": bounds.vsock_ports,
    })
}

/// `guest revoke`.
pub(crate) async fn revoke(handle: &Handle, place: &Place, args: &Revoke) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    let guest = calls::lookup(&manager.client, &args.name).await?;
    let mut request = guest.revoke_share_request();
    request.get().set_id(args.share);
    match read_completion(request.send().promise.await?.get()?) {
        Err(error) if error.kind == Kind::NotFound => {
            let hint = format!("`guest shares {}` shows what is shared", args.name);
            Err(error).context(hint)
        }
        outcome => Ok(outcome.map(|()| status::SUCCESS)?),
    }
}

/// `guest whoami`.
pub(crate) async fn whoami(handle: &Handle, place: &Place, args: &Json) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    let response = manager.client.who_am_i_request().send().promise.await?;
    let who = response.get()?;
    let (role, permits) = match who.get_role() {
        Ok(Role::None) => ("none", "to redeem tokens"),
        Ok(Role::Observe) => ("observe", "to look at all guests"),
        Ok(Role::Operate) => (
            "operate",
            "to launch guests, and everything to all guests but debugging",
        ),
        Ok(Role::Admin) => ("admin", "everything"),
        Err(_) => ("unknown", "what this version does not know"),
    };
    if args.json {
        let who = json!({"uid": who.get_uid(), "gid": who.get_gid(), "role": role, "readOnly": who.get_read_only()});
        show::print_json(&who)?;
        return Ok(status::SUCCESS);
    }
    let mut facts = vec![
        ("user", format!("{} ({})", users::name(who.get_uid()), who.get_uid())),
        ("group", who.get_gid().to_string()),
        ("role", role.to_owned()),
        ("permits", permits.to_owned()),
    ];
    if who.get_read_only() {
        facts.push(("socket", "read-only: nobody may change anything here".to_owned()));
    }
    show::print(table::facts(&facts).as_bytes())?;
    Ok(status::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits {
            only: Vec::new(),
            expires: None,
            rate: None,
            balloon: None,
            memory: None,
            ports: Vec::new(),
        }
    }

    #[test]
    fn nothing_said_is_nothing_narrowed() {
        assert_eq!(bounds(&limits()).unwrap(), Bounds::default());
    }

    #[test]
    fn balloons_are_counted_in_pages() {
        let with = |min, max| {
            let balloon = Some(Range { min, max });
            bounds(&Limits { balloon, ..limits() }).map(|bounds| bounds.balloon_pages)
        };
        let range = |min, max| Ok(Some(Range { min, max }));
        assert_eq!(with(4096, 1 << 20), range(1, 256));
        assert_eq!(with(0, u64::MAX), range(0, u64::MAX));
        assert_eq!(with(0, 4097).unwrap_err().about, "bounds.balloonPages");
    }

    #[test]
    fn bounds_are_told_in_sizes() {
        let bounds = Bounds {
            rate: Some(CallRate {
                per_second: 5,
                burst: 9,
            }),
            balloon_pages: Some(Range { min: 0, max: 256 }),
            memory_bytes: Some(Range {
                min: 1 << 20,
                max: u64::MAX,
            }),
            vsock_ports: vec![1, 7],
            ..Bounds::default()
        };
        let told: Vec<_> = bound_facts(&bounds).into_iter().map(|(_, text)| text).collect();
        assert_eq!(
            told,
            ["5 a second, 9 at once", "0 MiB to 1 MiB", "1 MiB to any", "1, 7"]
        );
    }
}

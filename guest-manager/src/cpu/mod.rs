//! What the host's scheduler is to give a guest: on which processors each vCPU may run, and what share of them the guest has.
//!
//! ```text
//!   configuration --------.
//!                         v
//!   pin, setScheduler --> wanted (kept with the guest) --at once--> the threads and the control group that are there
//!                            '-----------------------------------> those of each further run, before its vCPUs run
//! ```
//!
//! ```text
//!   known     which threads of a component run vCPUs, and when to look for them
//!   threads   what the host shows of them
//! ```

mod known;
pub(crate) mod threads;

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    rc::Rc,
    time::Instant,
};

use rustix::io::Errno;
use sepal_schema::{
    config::{GuestConfig, Limits, Pin},
    error::{Error, Kind},
    guest_capnp::VcpuState,
};

use self::{known::Known, threads::Seen};
use crate::{component::Component, guest::Guest};

/// The most processors that a vCPU is pinned to by name.
const MOST_CPUS: usize = 1024;
/// The largest weight of a control group.
const MOST_WEIGHT: u32 = 10_000;
/// The largest limit, in percent of one processor.
const MOST_PERCENT: u32 = 100_000;

/// What share of the host's processors a guest has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Share {
    /// 1 to 10000; 0 for the host's default.
    pub weight: u32,
    /// Percent of one processor; 0 for no limit.
    pub percent: u32,
}

impl Share {
    /// As a configuration says.
    pub(crate) fn of(config: &GuestConfig) -> Self {
        Self {
            weight: config.limits.cpu_weight,
            percent: config.limits.cpu_percent,
        }
    }

    fn check(self) -> Result<(), Error> {
        let check = |field: &str, value: u32, most: u32| match value <= most {
            true => Ok(()),
            false => Err(Error::bad_config(
                field,
                format!("{field} is {value}, and {most} at most"),
            )),
        };
        check("weight", self.weight, MOST_WEIGHT)?;
        check("percent", self.percent, MOST_PERCENT)
    }
}

/// What is wanted for a guest's vCPUs.
#[derive(Debug)]
pub struct Cpus {
    count: u8,
    pins: RefCell<BTreeMap<u8, Vec<u16>>>,
    share: Cell<Share>,
    /// The threads that run them.
    known: RefCell<Known>,
}

impl Cpus {
    /// As its configuration says.
    pub fn of(config: &GuestConfig) -> Self {
        let pins = config.pins.iter().map(|pin| (pin.vcpu, pin.cpus.clone()));
        Self {
            count: config.cpus(),
            pins: RefCell::new(pins.collect()),
            share: Cell::new(Share::of(config)),
            known: RefCell::default(),
        }
    }

    /// Whether any vCPU is to run on some processors only.
    pub(crate) fn has_pins(&self) -> bool {
        !self.pins.borrow().is_empty()
    }

    /// What is wanted now, in place of what the configuration said.
    pub fn pins(&self) -> Vec<Pin> {
        let pins = self.pins.borrow();
        pins.iter()
            .map(|(&vcpu, cpus)| Pin {
                vcpu,
                cpus: cpus.clone(),
            })
            .collect()
    }

    /// What share the guest is to have.
    pub fn share(&self) -> Share {
        self.share.get()
    }

    /// These limits, with the share that is wanted now.
    pub(crate) fn limits(&self, limits: Limits) -> Limits {
        let Share { weight, percent } = self.share.get();
        Limits {
            cpu_weight: weight,
            cpu_percent: percent,
            ..limits
        }
    }
}

/// Whether the processors that a configuration names are there, for vCPUs that it pins.
///
/// # Errors
/// `BAD_CONFIG` naming the pin of which none is.
pub(crate) fn check(pins: &[Pin]) -> Result<(), Error> {
    if pins.is_empty() {
        return Ok(());
    }
    // A host with more processors than can be named is none to judge.
    let Ok(own) = threads::own() else { return Ok(()) };
    match pins
        .iter()
        .position(|pin| !pin.cpus.iter().any(|cpu| own.contains(cpu)))
    {
        None => Ok(()),
        Some(i) => {
            let field = format!("pins[{i}].cpus");
            let message = format!("{field}: {}", none_there(&pins[i].cpus, &own));
            Err(Error::bad_config(field, message))
        }
    }
}

/// Pins the vCPUs of a run that is about to begin.
///
/// # Errors
/// As [`pin`]'s, about the vCPU.
pub(crate) async fn pin_all(guest: &Guest) -> Result<(), Error> {
    let pins = guest.cpus.pins();
    let Some(pid) = pid(guest).filter(|_| !pins.is_empty()) else {
        return Ok(());
    };
    let found = on_threads(guest, move || {
        let threads = threads::find(pid).unwrap_or_default();
        pins.iter().try_for_each(|pin| match threads.get(&pin.vcpu) {
            Some(&id) => set(pid, pin.vcpu, id, &pin.cpus),
            None => Ok(()),
        })?;
        Ok(threads)
    });
    found.await.map(|threads| found_threads(guest, pid, threads))
}

/// Lets a vCPU run on these processors only, or on all that the component may where there are none.
///
/// # Errors
/// `BAD_CONFIG`, `PERMISSION_DENIED` saying which privilege is lacking, `NOT_RUNNING`.
pub(crate) async fn pin(guest: &Guest, vcpu: u8, mut cpus: Vec<u16>) -> Result<(), Error> {
    guest.check_live()?;
    let count = guest.cpus.count;
    if vcpu >= count {
        let message = format!("there is no vCPU {vcpu}: the guest's are 0 to {}", count - 1);
        return Err(Error::bad_config("vcpu", message));
    }
    if cpus.len() > MOST_CPUS {
        let message = format!(
            "{} processors are too many to name, {MOST_CPUS} are the most",
            cpus.len()
        );
        return Err(Error::bad_config("cpus", message));
    }
    cpus.sort_unstable();
    cpus.dedup();
    let pid = pid(guest);
    let wanted = cpus.clone();
    on_threads(guest, move || {
        let own = threads::own().unwrap_or_default();
        if !wanted.is_empty() && !own.is_empty() && !wanted.iter().any(|cpu| own.contains(cpu)) {
            return Err(Error::bad_config("cpus", none_there(&wanted, &own)));
        }
        let thread = pid.and_then(|pid| Some((pid, *threads::find(pid).ok()?.get(&vcpu)?)));
        match thread {
            Some((pid, id)) => set(pid, vcpu, id, &wanted),
            // Between two runs; the next one begins with it.
            None => Ok(()),
        }
    })
    .await?;
    let mut pins = guest.cpus.pins.borrow_mut();
    match cpus.is_empty() {
        true => pins.remove(&vcpu),
        false => pins.insert(vcpu, cpus),
    };
    drop(pins);
    guest.save();
    Ok(())
}

/// Changes the guest's share of the host's processors.
///
/// # Errors
/// `BAD_CONFIG`; `NOT_SUPPORTED`, saying what the host's control groups lack; `NOT_RUNNING`.
pub(crate) async fn set_share(guest: &Guest, share: Share) -> Result<(), Error> {
    guest.check_live()?;
    share.check()?;
    let before = guest.cpus.share.replace(share);
    let Some(component) = component(guest) else {
        // Between two runs; the next one begins with it.
        guest.save();
        return Ok(());
    };
    let limits = guest.cpus.limits(component.limits());
    let outcome = guest.manager.starter.set_limits(component.pid, limits).await;
    match &outcome {
        Ok(()) => {
            component.has_limits(limits);
            guest.save();
        }
        // Unless somebody was faster.
        Err(_) if guest.cpus.share.get() == share => guest.cpus.share.set(before),
        Err(_) => {}
    }
    outcome
}

/// The process id of its component.
fn pid(guest: &Guest) -> Option<u32> {
    component(guest).map(|component| component.pid)
}

/// The component that the guest has at the moment; none between two runs.
fn component(guest: &Guest) -> Option<Rc<Component>> {
    let slot = guest.manager.slot(guest.id)?;
    slot.component_there().filter(|component| component.exit().is_none())
}

/// A vCPU, as far as the host and the manager know.
pub(crate) struct Vcpu {
    pub(crate) index: u8,
    pub(crate) state: VcpuState,
    /// None while it has no thread.
    pub(crate) seen: Option<Seen>,
}

/// The vCPUs in order.
///
/// # Errors
/// `NOT_RUNNING`.
pub(crate) async fn list(guest: &Rc<Guest>) -> Result<Vec<Vcpu>, Error> {
    guest.check_live()?;
    let pid = pid(guest);
    let look = move || Ok(pid.and_then(|pid| threads::look(pid).ok()).unwrap_or_default());
    let mut threads = on_threads(guest, look).await?;
    let (started, paused) = (guest.has_started() || guest.is_held(), guest.is_paused());
    let vcpus = (0..guest.cpus.count).map(|index| {
        let seen = threads.remove(&index);
        let state = match &seen {
            None => VcpuState::Stopped,
            Some(_) if !started => VcpuState::Stopped,
            Some(_) if paused => VcpuState::Paused,
            Some(seen) if seen.sleeps => VcpuState::Halted,
            Some(_) => VcpuState::Running,
        };
        Vcpu { index, state, seen }
    });
    Ok(vcpus.collect())
}

/// Which of these vCPUs have a thread that waits for something at this moment, as far as the threads are known: bit n for vCPU n. Asks the kernel once for
/// each of them.
pub(crate) fn asleep(guest: &Guest, pid: u32, vcpus: impl Iterator<Item = u8>) -> u64 {
    let mut known = guest.cpus.known.borrow_mut();
    let mut bits = 0;
    for vcpu in vcpus {
        let Some(&id) = known.threads(pid).get(&vcpu) else {
            continue;
        };
        match threads::sleeps(pid, id) {
            Some(sleeps) => bits |= u64::from(sleeps) << vcpu,
            None => known.gone(vcpu),
        }
    }
    bits
}

/// Has the threads that run vCPUs found in time for the next question, on another thread, unless they are known or were looked for not long ago.
pub(crate) fn look_for_threads(guest: &Rc<Guest>) {
    let Some(pid) = pid(guest) else { return };
    if !guest.cpus.known.borrow_mut().look(pid, Instant::now()) {
        return;
    }
    let (handle, asked) = (guest.manager.handle.clone(), Rc::downgrade(guest));
    guest.manager.handle.spawn(async move {
        let found = handle.spawn_blocking(move || threads::find(pid).unwrap_or_default());
        // Where no thread can be had for that, none are found.
        let threads = found.await.unwrap_or_default();
        if let Some(guest) = asked.upgrade() {
            found_threads(&guest, pid, threads);
        }
    });
}

fn found_threads(guest: &Guest, pid: u32, threads: BTreeMap<u8, u32>) {
    let cpus = &guest.cpus;
    cpus.known.borrow_mut().found(pid, threads, cpus.count, Instant::now());
}

/// Does on another thread what asks the kernel once for each thread of a component.
async fn on_threads<T: Send + 'static>(
    guest: &Guest,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let done = guest.manager.handle.spawn_blocking(work).await;
    done.map_err(|error| Error::new(Kind::NoResources, error.to_string()))?
}

/// Pins a thread; no processors are all that its process may run on.
fn set(pid: u32, vcpu: u8, id: u32, cpus: &[u16]) -> Result<(), Error> {
    let about = format!("vcpu{vcpu}");
    let allowed = || threads::allowed(pid).unwrap_or_default();
    let outcome = match cpus {
        [] => threads::pin(id, &allowed()),
        cpus => threads::pin(id, cpus),
    };
    outcome.or_else(|errno| match errno {
        // It has ended meanwhile.
        Errno::SRCH => Ok(()),
        Errno::INVAL => Err(Error::bad_config("cpus", none_there(cpus, &allowed()))),
        Errno::PERM => {
            let message = format!(
                "vCPU {vcpu} cannot be pinned: its component runs as another user, for which the guest manager needs the privilege CAP_SYS_NICE"
            );
            Err(Error::new(Kind::PermissionDenied, message).about(about))
        }
        errno => {
            let message = format!("vCPU {vcpu} cannot be pinned: {errno}");
            Err(Error::new(Kind::InternalError, message).about(about))
        }
    })
}

fn none_there(cpus: &[u16], there: &[u16]) -> String {
    let (cpus, there) = (ranges(cpus), ranges(there));
    format!("of the processors {cpus} none is there, or may be used; {there} may")
}

/// Ascending numbers as people write them: `0-3,8`.
pub(crate) fn ranges(cpus: &[u16]) -> String {
    let mut runs: Vec<(u16, u16)> = Vec::new();
    for &cpu in cpus {
        match runs.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(cpu) => *last = cpu,
            _ => runs.push((cpu, cpu)),
        }
    }
    let words = runs.iter().map(|&(first, last)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    });
    words.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_told_as_people_write_them() {
        assert_eq!(ranges(&[0, 1, 2, 3, 8]), "0-3,8");
        assert_eq!(ranges(&[5]), "5");
        assert_eq!(ranges(&[1, 3, 65534, 65535]), "1,3,65534-65535");
        assert_eq!(ranges(&[]), "");
    }

    #[test]
    fn pins_need_a_processor_that_is_there() {
        let there = *threads::own().unwrap().first().unwrap();
        let pin = |vcpu, cpus: &[u16]| Pin {
            vcpu,
            cpus: cpus.to_vec(),
        };
        check(&[]).unwrap();
        check(&[pin(0, &[there, 1023]), pin(1, &[there])]).unwrap();
        let error = check(&[pin(0, &[there]), pin(1, &[1022, 1023])]).unwrap_err();
        assert_eq!((error.kind, &error.about[..]), (Kind::BadConfig, "pins[1].cpus"));
        assert!(error.message.contains("1022-1023"), "{}", error.message);
    }

    #[test]
    fn shares_have_their_range() {
        let share = |weight, percent| Share { weight, percent };
        for good in [share(0, 0), share(1, 1), share(10_000, 100_000)] {
            good.check().unwrap();
        }
        assert_eq!(share(10_001, 0).check().unwrap_err().about, "weight");
        assert_eq!(share(0, 100_001).check().unwrap_err().about, "percent");
    }

    #[test]
    fn a_share_takes_the_place_of_the_configured_one() {
        let mut config = GuestConfig::default();
        config.limits.cpu_weight = 50;
        config.limits.memory_mib = 64;
        let cpus = Cpus::of(&config);
        assert_eq!(cpus.limits(config.limits), config.limits);
        cpus.share.set(Share {
            weight: 0,
            percent: 150,
        });
        let limits = cpus.limits(config.limits);
        assert_eq!((limits.cpu_weight, limits.cpu_percent, limits.memory_mib), (0, 150, 64));
    }
}

//! From counters at two moments to what happens a second. Pure.
//!
//! ```text
//!   figures told at a, then at b > a      (b - a) of each counter over the time between: when the component told them, not when they came
//!   nothing told since                    the rates of before, and the row is stale
//!   a counter or the uptime went back     the guest began again: no rates until the next time
//! ```

use std::{collections::BTreeMap, time::Duration};

use serde::Serialize;

use crate::figures::{Figures, Stats};

/// How exactly it is known when a component told its figures: by how old they were when they were sent, and when they came.
const JITTER: Duration = Duration::from_millis(50);

/// What happens a second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Rates {
    /// In hundredths of a host CPU's time.
    pub(super) cpu_percent: f64,
    pub(super) read_bytes: f64,
    pub(super) written_bytes: f64,
    pub(super) received_bytes: f64,
    pub(super) sent_bytes: f64,
    pub(super) exits: f64,
}

/// What is shown of a guest.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Row {
    pub(super) name: String,
    /// What its vCPUs do; none if there are no figures.
    pub(super) state: Option<&'static str>,
    pub(super) vcpus: usize,
    pub(super) uptime_seconds: f64,
    pub(super) guest_bytes: u64,
    pub(super) resident_bytes: u64,
    /// None as long as there is nothing to compare with.
    pub(super) per_second: Option<Rates>,
    /// Its component has told nothing since the last time.
    pub(super) stale: bool,
}

/// The counters of a guest at a moment.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Counters {
    cpu_seconds: f64,
    /// Read, written, received, sent; exits.
    counts: [u64; 5],
    uptime_seconds: f64,
}

impl Counters {
    fn of(stats: &Stats) -> Self {
        Self {
            cpu_seconds: stats.cpu_seconds(),
            counts: [
                stats.disk_bytes(|disk| disk.read_bytes),
                stats.disk_bytes(|disk| disk.written_bytes),
                stats.network_bytes(|network| network.received),
                stats.network_bytes(|network| network.sent),
                stats.exits(),
            ],
            uptime_seconds: stats.uptime_seconds,
        }
    }

    /// What happened a second in `time` since `before`; none if it began again meanwhile, or no time has passed.
    fn since(&self, before: &Self, time: Duration) -> Option<Rates> {
        let seconds = time.as_secs_f64();
        if seconds <= 0.0 || self.cpu_seconds < before.cpu_seconds || self.uptime_seconds < before.uptime_seconds {
            return None;
        }
        let mut rates = [0.0; 5];
        for ((rate, now), before) in rates.iter_mut().zip(self.counts).zip(before.counts) {
            *rate = now.checked_sub(before)? as f64 / seconds;
        }
        let [read_bytes, written_bytes, received_bytes, sent_bytes, exits] = rates;
        Some(Rates {
            cpu_percent: (self.cpu_seconds - before.cpu_seconds) / seconds * 100.0,
            read_bytes,
            written_bytes,
            received_bytes,
            sent_bytes,
            exits,
        })
    }
}

/// What was seen of a guest the last time.
#[derive(Debug, Clone, Copy)]
struct Seen {
    /// When the component told it.
    at: Duration,
    counters: Counters,
    rates: Option<Rates>,
}

/// Remembers what was seen the last time.
#[derive(Debug, Default)]
pub(super) struct Watch {
    seen: BTreeMap<String, Seen>,
}

impl Watch {
    /// The guests as they are `now`, on a clock that never goes back.
    pub(super) fn update(&mut self, now: Duration, guests: &[Figures]) -> Vec<Row> {
        let mut seen = BTreeMap::new();
        let rows = guests
            .iter()
            .map(|figures| {
                let Ok(stats) = &figures.stats else {
                    return unknown(&figures.name);
                };
                let (next, stale) = next(self.seen.get(&figures.name), now, stats);
                seen.insert(figures.name.clone(), next);
                Row {
                    name: figures.name.clone(),
                    state: Some(state(stats)),
                    vcpus: stats.vcpus.len(),
                    uptime_seconds: stats.uptime_seconds,
                    guest_bytes: stats.memory.guest_bytes,
                    resident_bytes: stats.memory.resident_bytes,
                    per_second: next.rates,
                    stale,
                }
            })
            .collect();
        self.seen = seen;
        rows
    }
}

/// What is now known of a guest that was seen before, and whether that is no more than was known then.
fn next(before: Option<&Seen>, now: Duration, stats: &Stats) -> (Seen, bool) {
    let age = Duration::try_from_secs_f64(stats.age_seconds).unwrap_or(Duration::MAX);
    let at = now.saturating_sub(age);
    let counters = Counters::of(stats);
    let told = |rates| Seen { at, counters, rates };
    let Some(before) = before else {
        return (told(None), false);
    };
    let time = at.saturating_sub(before.at);
    // The uptime is the manager's, and goes on while a component tells nothing.
    let same = (before.counters.cpu_seconds, before.counters.counts) == (counters.cpu_seconds, counters.counts);
    if same && time < JITTER {
        return (*before, true);
    }
    (told(counters.since(&before.counters, time)), false)
}

fn unknown(name: &str) -> Row {
    Row {
        name: name.to_owned(),
        state: None,
        vcpus: 0,
        uptime_seconds: 0.0,
        guest_bytes: 0,
        resident_bytes: 0,
        per_second: None,
        stale: true,
    }
}

/// What a guest does, from what its vCPUs do: as long as one runs, it runs.
fn state(stats: &Stats) -> &'static str {
    let any = |state: &str| stats.vcpus.iter().any(|vcpu| vcpu.state == state);
    match () {
        () if any("running") => "run",
        () if any("halted") => "idle",
        () if any("paused") => "paused",
        () if any("stopped") => "stop",
        () => "?",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sepal_schema::error::{Error, Kind};

    use super::*;
    use crate::figures::{Direction, Disk, Network, Vcpu};

    const S: Duration = Duration::from_secs(1);

    fn stats(cpu: f64, counts: [u64; 5], uptime: f64, age: f64) -> Stats {
        let [read_bytes, written_bytes, received, sent, exits] = counts;
        let direction = |bytes| Direction {
            bytes,
            ..Direction::default()
        };
        Stats {
            age_seconds: age,
            uptime_seconds: uptime,
            vcpus: vec![Vcpu {
                state: "running",
                exits,
                cpu_time_seconds: cpu,
                ..Vcpu::default()
            }],
            disks: vec![Disk {
                read_bytes,
                written_bytes,
                ..Disk::default()
            }],
            networks: vec![Network {
                received: direction(received),
                sent: direction(sent),
                ..Network::default()
            }],
            ..Stats::default()
        }
    }

    fn told(name: &str, stats: Stats) -> Figures {
        Figures {
            name: name.into(),
            uuid: String::new(),
            stats: Ok(stats),
        }
    }

    /// The rates of the guest "a" between two looks that are a second apart.
    fn between(first: Stats, second: Stats) -> Row {
        let mut watch = Watch::default();
        let row = watch.update(10 * S, &[told("a", first)]).remove(0);
        assert_eq!(row.per_second, None, "nothing to compare with");
        watch.update(11 * S, &[told("a", second)]).remove(0)
    }

    #[test]
    fn differences_over_the_time_between() {
        let row = between(
            stats(1.0, [0, 10, 0, 0, 100], 5.0, 0.0),
            stats(2.5, [4096, 10, 1, 2, 400], 6.0, 0.0),
        );
        let rates = row.per_second.unwrap();
        assert_eq!((rates.cpu_percent, rates.exits), (150.0, 300.0));
        assert_eq!((rates.read_bytes, rates.written_bytes), (4096.0, 0.0));
        assert_eq!((rates.received_bytes, rates.sent_bytes), (1.0, 2.0));
        assert!(!row.stale);
    }

    #[test]
    fn what_counts_is_when_the_component_told_them() {
        // Told half a second before they came.
        let row = between(stats(1.0, [0; 5], 5.0, 0.0), stats(1.25, [0, 0, 0, 0, 50], 6.0, 0.5));
        let rates = row.per_second.unwrap();
        assert_eq!((rates.cpu_percent, rates.exits), (50.0, 100.0));
        assert!(!row.stale, "it told something since");
    }

    #[test]
    fn a_component_that_tells_nothing_new_keeps_its_rates() {
        let mut watch = Watch::default();
        let mut look = |second: u32, stats| watch.update(second * S, &[told("a", stats)]).remove(0);
        look(1, stats(1.0, [0; 5], 1.0, 0.0));
        let before = look(2, stats(1.5, [0; 5], 2.0, 0.0));
        let silent = look(3, stats(1.5, [0; 5], 3.0, 1.0));
        assert_eq!(silent.per_second, before.per_second);
        assert!(silent.stale && !before.stale);
        // What it tells then is over the whole time.
        let again = look(6, stats(2.5, [0; 5], 6.0, 0.0));
        assert_eq!(again.per_second.unwrap().cpu_percent, 25.0);
    }

    #[test]
    fn a_guest_that_is_idle_is_not_stale() {
        let row = between(stats(1.0, [7; 5], 1.0, 0.0), stats(1.0, [7; 5], 2.0, 0.0));
        assert_eq!(row.per_second, Some(Rates::default()));
        assert!(!row.stale);
        // Its answer to the first question came after that was over, and was told when the second was put.
        let row = between(stats(1.0, [7; 5], 1.0, 1.0), stats(1.0, [7; 5], 2.0, 0.9));
        assert_eq!((row.per_second, row.stale), (Some(Rates::default()), false));
    }

    #[test]
    fn a_guest_that_began_again_has_no_rates_at_first() {
        let before = || stats(9.0, [9; 5], 9.0, 0.0);
        assert_eq!(between(before(), stats(0.5, [9; 5], 10.0, 0.0)).per_second, None);
        assert_eq!(
            between(before(), stats(9.5, [9, 9, 9, 9, 8], 10.0, 0.0)).per_second,
            None
        );
        assert_eq!(between(before(), stats(9.5, [10; 5], 0.5, 0.0)).per_second, None);
    }

    #[test]
    fn who_has_no_figures_is_shown_and_who_is_gone_is_forgotten() {
        let mut watch = Watch::default();
        watch.update(S, &[told("a", stats(1.0, [0; 5], 1.0, 0.0))]);
        let silent = Figures {
            name: "a".into(),
            uuid: String::new(),
            stats: Err(Error::new(Kind::TimedOut, "x")),
        };
        let rows = watch.update(2 * S, &[silent]);
        assert_eq!((rows[0].state, rows[0].per_second), (None, None));
        let rows = watch.update(3 * S, &[told("a", stats(2.0, [0; 5], 3.0, 0.0))]);
        assert_eq!(rows[0].per_second, None, "another one, for all that is known");
    }

    #[test]
    fn as_long_as_one_vcpu_runs_the_guest_does() {
        let mut two = stats(0.0, [0; 5], 0.0, 0.0);
        two.vcpus.push(Vcpu {
            state: "halted",
            ..Vcpu::default()
        });
        assert_eq!(state(&two), "run");
        two.vcpus[0].state = "halted";
        assert_eq!(state(&two), "idle");
        two.vcpus.clear();
        assert_eq!(state(&two), "?");
    }

    fn any_stats() -> impl Strategy<Value = Stats> {
        let float = prop_oneof![Just(0.0), 0.0..1e3, 0.0..1e19];
        (float.clone(), any::<[u64; 5]>(), float.clone(), float).prop_map(|(a, b, c, d)| stats(a, b, c, d))
    }

    proptest! {
        #[test]
        fn rates_are_numbers_whatever_is_told(
            looks in prop::collection::vec((0..u64::MAX / 64, any_stats()), 1..20)
        ) {
            let mut watch = Watch::default();
            let mut now = Duration::ZERO;
            for (wait, stats) in looks {
                now = now.saturating_add(Duration::from_nanos(wait));
                for row in watch.update(now, &[told("a", stats)]) {
                    let Some(rates) = row.per_second else { continue };
                    let all = [
                        rates.cpu_percent,
                        rates.read_bytes,
                        rates.written_bytes,
                        rates.received_bytes,
                        rates.sent_bytes,
                        rates.exits,
                    ];
                    prop_assert!(all.iter().all(|rate| rate.is_finite() && *rate >= 0.0), "{all:?}");
                }
            }
        }

        #[test]
        fn rates_times_time_is_what_was_counted(
            before in any::<u32>(), more in any::<u32>(), milliseconds in 1..100_000_u32
        ) {
            let mut watch = Watch::default();
            watch.update(S, &[told("a", stats(0.0, [before.into(); 5], 0.0, 0.0))]);
            let time = Duration::from_millis(milliseconds.into());
            let count = u64::from(before) + u64::from(more);
            let row = watch.update(S + time, &[told("a", stats(0.0, [count; 5], 1.0, 0.0))]).remove(0);
            let counted = row.per_second.unwrap().exits * time.as_secs_f64();
            prop_assert!((counted - f64::from(more)).abs() < 1e-3, "{counted} of {more}");
        }
    }
}

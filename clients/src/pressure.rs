//! `guest pressure`: what the guest manager does when the host runs short of memory.

use std::time::Duration;

use anyhow::Result;
use sepal_schema::{
    error::{Error, read_completion},
    node_capnp::{pressure_policy, pressure_state},
    transport::Handle,
};
use serde::Serialize;

use crate::{
    args::{Pressure, PressureCommand, PressureSet},
    devices::fit,
    manager::Manager,
    place::Place,
    show, status, table,
};

/// The state as JSON; the names are the protocol's.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct State {
    supported: bool,
    detail: String,
    policy: Policy,
    under_pressure: bool,
    taken_bytes: u64,
    inflations: u64,
    deflations: u64,
}

/// The policy as JSON.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "camelCase")]
struct Policy {
    enabled: bool,
    stall_percent: u8,
    window_ms: u32,
    step_percent: u8,
    reserve_percent: u8,
    calm_ms: u32,
}

impl State {
    fn read(from: pressure_state::Reader<'_>) -> Result<Self> {
        Ok(Self {
            supported: from.get_supported(),
            detail: fit(from.get_detail()?)?,
            policy: Policy::read(from.get_policy()?),
            under_pressure: from.get_under_pressure(),
            taken_bytes: from.get_taken_bytes(),
            inflations: from.get_inflations(),
            deflations: from.get_deflations(),
        })
    }

    fn in_words(&self) -> String {
        let Policy {
            enabled,
            stall_percent,
            window_ms,
            step_percent,
            reserve_percent,
            calm_ms,
        } = self.policy;
        let state = match (self.supported, enabled, self.under_pressure) {
            (false, ..) => format!(
                "nothing is done: nobody can tell when there is pressure ({})",
                self.detail
            ),
            (true, false, _) => "switched off".to_owned(),
            (true, true, true) => "the host runs short of memory".to_owned(),
            (true, true, false) => "the host has memory".to_owned(),
        };
        let time = |ms: u32| {
            table::duration(
                Duration::from_millis(ms.into())
                    .as_nanos()
                    .try_into()
                    .unwrap_or(u64::MAX),
            )
        };
        table::facts(&[
            ("state", state),
            ("policy", if enabled { "on" } else { "off" }.to_owned()),
            (
                "pressure",
                format!("when tasks stall for memory {stall_percent}% of {}", time(window_ms)),
            ),
            ("step", format!("{step_percent}% of a guest's memory at a time")),
            ("reserve", format!("each guest keeps {reserve_percent}% at least")),
            (
                "calm",
                format!("a step is given back after {} without pressure", time(calm_ms)),
            ),
            ("taken", table::size(self.taken_bytes)),
            (
                "changes",
                format!("{} times taken, {} times given back", self.inflations, self.deflations),
            ),
        ])
    }
}

impl Policy {
    fn read(from: pressure_policy::Reader<'_>) -> Self {
        Self {
            enabled: from.get_enabled(),
            stall_percent: from.get_stall_percent(),
            window_ms: from.get_window_ms(),
            step_percent: from.get_step_percent(),
            reserve_percent: from.get_reserve_percent(),
            calm_ms: from.get_calm_ms(),
        }
    }

    fn write(&self, mut to: pressure_policy::Builder<'_>) {
        to.set_enabled(self.enabled);
        to.set_stall_percent(self.stall_percent);
        to.set_window_ms(self.window_ms);
        to.set_step_percent(self.step_percent);
        to.set_reserve_percent(self.reserve_percent);
        to.set_calm_ms(self.calm_ms);
    }

    /// As the command line has it; what it leaves out stays.
    fn changed(self, by: &PressureSet) -> Result<Self, Error> {
        let time = |name: &'static str, given: Option<Duration>, before: u32| match given {
            None => Ok(before),
            // Zero would mean the manager's own choice.
            Some(time) => u32::try_from(time.as_millis())
                .ok()
                .filter(|&ms| ms > 0)
                .ok_or_else(|| Error::bad_config(name, format!("--{name} is more than 0, and 49 days at most"))),
        };
        Ok(Self {
            enabled: by.on || self.enabled && !by.off,
            stall_percent: by.stall.unwrap_or(self.stall_percent),
            window_ms: time("window", by.window, self.window_ms)?,
            step_percent: by.step.unwrap_or(self.step_percent),
            reserve_percent: by.reserve.unwrap_or(self.reserve_percent),
            calm_ms: time("calm", by.calm, self.calm_ms)?,
        })
    }
}

/// Shows what there is to know, or changes the policy.
pub(crate) async fn pressure(handle: &Handle, place: &Place, args: &Pressure) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    let answer = manager.client.pressure_request().send().promise.await?;
    let state = State::read(answer.get()?.get_state()?)?;
    match &args.command {
        Some(PressureCommand::Set(set)) => {
            let mut request = manager.client.set_pressure_policy_request();
            state.policy.changed(set)?.write(request.get().init_policy());
            read_completion(request.send().promise.await?.get()?)?;
        }
        None if args.json => show::print_json(&state)?,
        None => {
            show::print(state.in_words().as_bytes())?;
        }
    }
    Ok(status::SUCCESS)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn set(arguments: &[&str]) -> Option<PressureSet> {
        let all = ["guest", "pressure", "set"].iter().chain(arguments);
        match Cli::try_parse_from(all).ok()?.command {
            Command::Pressure(Pressure {
                command: Some(PressureCommand::Set(set)),
                ..
            }) => Some(set),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_left_out_stays() {
        let before = Policy {
            enabled: true,
            stall_percent: 10,
            window_ms: 1000,
            step_percent: 5,
            reserve_percent: 50,
            calm_ms: 10_000,
        };
        let changed = before.changed(&set(&["--calm", "1m", "--step", "7"]).unwrap()).unwrap();
        assert_eq!((changed.calm_ms, changed.step_percent), (60_000, 7));
        assert!(changed.enabled && changed.window_ms == 1000);
        assert!(!before.changed(&set(&["--off"]).unwrap()).unwrap().enabled);
        let off = Policy {
            enabled: false,
            ..before
        };
        assert!(!off.changed(&set(&["--stall", "20"]).unwrap()).unwrap().enabled);
        assert!(off.changed(&set(&["--on"]).unwrap()).unwrap().enabled);
        assert!(before.changed(&set(&["--calm", "0"]).unwrap()).is_err());
    }

    #[test]
    fn nothing_at_all_and_what_is_out_of_range_is_refused() {
        assert!(set(&[]).is_none());
        for wrong in [
            ["--stall", "0"],
            ["--stall", "101"],
            ["--step", "51"],
            ["--reserve", "9"],
            ["--calm", "x"],
        ] {
            assert!(set(&wrong).is_none(), "{wrong:?}");
        }
        assert!(set(&["--on", "--off"]).is_none());
    }

    #[test]
    fn states_are_told_in_words() {
        let mut state = State {
            supported: true,
            detail: String::new(),
            policy: Policy {
                enabled: true,
                stall_percent: 10,
                window_ms: 1500,
                step_percent: 5,
                reserve_percent: 50,
                calm_ms: 10_000,
            },
            under_pressure: false,
            taken_bytes: 64 << 20,
            inflations: 3,
            deflations: 2,
        };
        let words = state.in_words();
        for part in ["the host has memory", "10% of 1.5s", "64 MiB", "3 times taken"] {
            assert!(words.contains(part), "{part}: {words}");
        }
        state.policy.enabled = false;
        assert!(state.in_words().contains("switched off"));
        (state.supported, state.detail) = (false, "no file".into());
        assert!(state.in_words().contains("no file"));
    }
}

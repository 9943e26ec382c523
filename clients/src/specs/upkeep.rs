//! How a guest is kept, as the command line says it: what follows when it ends, where its vCPUs may run, its UUID.

use sepal_schema::config::{Pin, Restart, RestartPolicy, Uuid, upkeep::MAX_PIN_CPUS};

use super::{number, split, unknown};
use crate::args::units::parse_time;

/// Reads `never|on-failure|always[,attempts=N][,delay=TIME][,max-delay=TIME][,healthy=TIME]`.
pub(crate) fn parse_restart(text: &str) -> Result<Restart, String> {
    let (policy, options) = split(text);
    let mut restart = Restart {
        policy: parse_restart_policy(&policy)?,
        ..Restart::default()
    };
    for (key, value) in options {
        match (key.as_str(), value.as_deref()) {
            ("attempts", Some(value)) => restart.attempts = parse_attempts(number("attempts", value)?)?,
            ("delay", Some(value)) => restart.delay_ms = parse_milliseconds(value)?,
            ("max-delay", Some(value)) => restart.max_delay_ms = parse_milliseconds(value)?,
            ("healthy", Some(value)) => restart.healthy_ms = parse_milliseconds(value)?,
            (key, value) => return Err(unknown(key, value, "attempts=, delay=, max-delay= and healthy=")),
        }
    }
    Ok(restart)
}

/// Reads after what a guest is begun again.
pub(crate) fn parse_restart_policy(text: &str) -> Result<RestartPolicy, String> {
    match text {
        "never" => Ok(RestartPolicy::Never),
        "on-failure" => Ok(RestartPolicy::OnFailure),
        "always" => Ok(RestartPolicy::Always),
        _ => Err(format!(
            "'{text}' is no restart policy; never, on-failure and always are"
        )),
    }
}

/// A policy as it is read.
pub(crate) fn restart_policy_name(policy: RestartPolicy) -> &'static str {
    match policy {
        RestartPolicy::Never => "never",
        RestartPolicy::OnFailure => "on-failure",
        RestartPolicy::Always => "always",
    }
}

/// Takes a number of attempts; 0 would stand for the default.
pub(crate) fn parse_attempts(attempts: u32) -> Result<u32, String> {
    match attempts {
        0 => Err("at least 1 attempt; with the policy never there is none".to_owned()),
        attempts => Ok(attempts),
    }
}

/// Reads a time of whole milliseconds, at least one: 0 would stand for the default.
pub(crate) fn parse_milliseconds(text: &str) -> Result<u32, String> {
    let time = parse_time(text)?;
    match u32::try_from(time.as_millis()) {
        Ok(0) => Err(format!("'{text}' is too short; 1ms is the least")),
        Ok(milliseconds) => Ok(milliseconds),
        Err(_) => Err(format!("'{text}' is too long; 49d is possible")),
    }
}

/// Reads `VCPU=CPUS`: a vCPU, and the processors of the host that it may run on, as [`parse_cpus`] does.
pub(crate) fn parse_pin(text: &str) -> Result<Pin, String> {
    let pin = text
        .split_once('=')
        .and_then(|(vcpu, cpus)| Some((vcpu.parse().ok()?, cpus)));
    let Some((vcpu, cpus)) = pin else {
        return Err(format!("'{text}' is no pin; VCPU=CPUS is, as 0=2 or 1=0-3,8"));
    };
    let cpus = parse_cpus(cpus)?;
    Ok(Pin { vcpu, cpus })
}

/// Reads processors of the host: numbers and ranges of them, with commas between. Ascending, each once.
pub(crate) fn parse_cpus(text: &str) -> Result<Vec<u16>, String> {
    let wrong = || format!("'{text}' names no processors; numbers and ranges do, as 2 or 0-3,8");
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (Ok(first), Ok(last)) = (first.parse::<u16>(), last.parse::<u16>()) else {
            return Err(wrong());
        };
        if first > last {
            return Err(wrong());
        }
        cpus.extend(first..=last);
        if cpus.len() > MAX_PIN_CPUS as usize {
            return Err(format!("'{text}' names more than {MAX_PIN_CPUS} processors"));
        }
    }
    cpus.sort_unstable();
    cpus.dedup();
    Ok(cpus)
}

/// Ascending processors as they are read: "0-3,8".
pub(crate) fn show_cpus(cpus: &[u16]) -> String {
    let ranges = cpus.chunk_by(|a, b| a.checked_add(1) == Some(*b));
    let show = |range: &[u16]| match range {
        [first, .., last] => format!("{first}-{last}"),
        all => all.iter().map(u16::to_string).collect(),
    };
    ranges.map(show).collect::<Vec<_>>().join(",")
}

/// Reads a UUID, with or without hyphens; not the one that stands for none.
pub(crate) fn parse_uuid(text: &str) -> Result<Uuid, String> {
    match Uuid::try_parse(text) {
        Ok(uuid) if uuid.is_nil() => Err("the UUID is all zero, which stands for none".to_owned()),
        Ok(uuid) => Ok(uuid),
        Err(_) => Err(format!(
            "'{text}' is no UUID; one looks like 67e55044-10b1-426f-9247-bb680e5fe0c8"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restarts() {
        let all = parse_restart("on-failure,attempts=3,delay=100ms,max-delay=1m,healthy=2.5").unwrap();
        let expected = Restart {
            policy: RestartPolicy::OnFailure,
            attempts: 3,
            delay_ms: 100,
            max_delay_ms: 60_000,
            healthy_ms: 2500,
        };
        assert_eq!(all, expected);
        assert_eq!(parse_restart("never"), Ok(Restart::default()));
        for policy in ["never", "on-failure", "always"] {
            assert_eq!(restart_policy_name(parse_restart_policy(policy).unwrap()), policy);
        }
        for (text, word) in [
            ("", "no restart policy"),
            ("sometimes", "'sometimes'"),
            ("always,attempts=0", "at least 1"),
            ("always,attempts=many", "attempts=many"),
            ("always,delay=0", "1ms"),
            ("always,delay=60d", "49d"),
            ("always,delay", "'delay' is not known"),
            ("always,tries=3", "'tries=3' is not known"),
        ] {
            let error = parse_restart(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn pins() {
        assert_eq!(
            parse_pin("1=0-3,8,2"),
            Ok(Pin {
                vcpu: 1,
                cpus: vec![0, 1, 2, 3, 8]
            })
        );
        for (text, word) in [
            ("", "no pin"),
            ("1", "no pin"),
            ("x=1", "no pin"),
            ("256=1", "no pin"),
            ("0=", "names no processors"),
            ("0=3-1", "names no processors"),
            ("0=70000", "names no processors"),
            ("0=0-1024", "more than 1024"),
            ("0=0-65535,0-65535", "more than 1024"),
        ] {
            let error = parse_pin(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
        for text in ["0", "0-3", "0,2-3,65535", "0-1,3-4,6"] {
            assert_eq!(show_cpus(&parse_cpus(text).unwrap()), text);
        }
    }

    #[test]
    fn uuids() {
        let text = "67e55044-10b1-426f-9247-bb680e5fe0c8";
        assert_eq!(parse_uuid(text).unwrap().to_string(), text);
        assert_eq!(parse_uuid(&text.replace('-', "")), parse_uuid(text));
        for text in ["", "67e55044", "00000000-0000-0000-0000-000000000000"] {
            assert!(parse_uuid(text).is_err(), "{text}");
        }
    }
}

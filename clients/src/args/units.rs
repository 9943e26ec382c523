//! Sizes, times and ranges of the command line.

use std::time::Duration;

use sepal_schema::facet::{CallRate, Range};

use crate::specs::parse_bytes;

/// Reads a size as MiB: a number of MiB, or a number with one of the units M, MiB, G, GiB, T, TiB.
pub(crate) fn parse_mib(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number
        .parse()
        .map_err(|_| format!("'{text}' is no size of memory: one starts with a number, as 512M and 2G do"))?;
    let mib: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "m" | "mb" | "mib" => 1,
        "g" | "gb" | "gib" => 1 << 10,
        "t" | "tb" | "tib" => 1 << 20,
        _ => return Err(format!("'{unit}' is no unit of memory; M, G and T are (MiB, GiB, TiB)")),
    };
    let size = number.checked_mul(mib);
    size.ok_or_else(|| format!("{text} is more than can be said"))
}

/// Reads the size of a guest's memory as MiB, as [`parse_mib`] does.
pub(crate) fn parse_memory(text: &str) -> Result<i32, String> {
    match parse_mib(text).map(i32::try_from)? {
        Ok(0) => Err("a guest needs some memory".into()),
        Ok(size) => Ok(size),
        Err(_) => Err(format!(
            "{text} is more than the {} MiB that can be asked for",
            i32::MAX
        )),
    }
}

/// Reads a time: a number of seconds, or a number with one of the units ms, s, m, h, d; fractions allowed.
pub(crate) fn parse_time(text: &str) -> Result<Duration, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let seconds = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        _ => {
            return Err(format!(
                "'{text}' is no time; a number of seconds is, or one with ms, s, m, h or d"
            ));
        }
    };
    let number: f64 = number
        .parse()
        .map_err(|_| format!("'{text}' is no time: a time starts with a number, as 30s or 1.5h do"))?;
    Duration::try_from_secs_f64(number * seconds).map_err(|_| format!("{text} is longer than any time there is"))
}

/// Reads the time after which something ends: of a second or more, since one of nothing would be gone before anybody had it.
pub(crate) fn parse_lifetime(text: &str) -> Result<Duration, String> {
    match parse_time(text)? {
        time if time < Duration::from_secs(1) => Err("it must be at least 1 s; left out, there is no end".to_owned()),
        time => Ok(time),
    }
}

/// Reads sizes from one to another, both included: `MIN..MAX`; left out, the first is 0 and the second has no bound.
pub(crate) fn parse_range(text: &str) -> Result<Range, String> {
    let Some((min, max)) = text.split_once("..") else {
        return Err(format!("'{text}' is no range; MIN..MAX is, as 64M..1G"));
    };
    let size = |text: &str, default| match text {
        "" => Ok(default),
        text => parse_bytes(text),
    };
    let range = Range {
        min: size(min, 0)?,
        max: size(max, u64::MAX)?,
    };
    match range.min <= range.max {
        true => Ok(range),
        false => Err(format!("nothing is in '{text}': the first size is the larger one")),
    }
}

/// Reads how often something may be called: `N` times a second, or `N/BURST` with so many at once after a rest.
pub(crate) fn parse_rate(text: &str) -> Result<CallRate, String> {
    let (per_second, burst) = text.split_once('/').unwrap_or((text, text));
    let number = |text: &str| match text.parse() {
        Ok(number @ 1u32..) => Ok(number),
        _ => Err(format!("'{text}' is no number of calls; N and N/BURST are, from 1 on")),
    };
    Ok(CallRate {
        per_second: number(per_second)?,
        burst: number(burst)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_sizes() {
        for (text, mib) in [
            ("128", 128),
            ("512M", 512),
            ("2G", 2048),
            ("1GiB", 1024),
            ("1 T", 1 << 20),
            ("7mb", 7),
        ] {
            assert_eq!(parse_memory(text), Ok(mib), "{text}");
        }
        for text in [
            "",
            "M",
            "0",
            "-1",
            "1.5G",
            "12K",
            "4000000000",
            "99999999999999999999",
            "9999T",
        ] {
            assert!(parse_memory(text).is_err(), "{text}");
        }
    }

    #[test]
    fn lifetimes() {
        assert_eq!(parse_lifetime("1s"), Ok(Duration::from_secs(1)));
        for text in ["0", "0s", "1ms", "0.999"] {
            assert!(parse_lifetime(text).unwrap_err().contains("at least 1 s"), "{text}");
        }
    }

    #[test]
    fn times() {
        for (text, milliseconds) in [
            ("0.05", 50),
            ("30s", 30_000),
            ("250ms", 250),
            ("1.5m", 90_000),
            ("1h", 3_600_000),
            ("2d", 172_800_000),
        ] {
            assert_eq!(parse_time(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        for text in [
            "",
            "x",
            "-1",
            "NaN",
            "inf",
            "1e30",
            "s",
            "1w",
            "99999999999999999999d",
            "1.2.3",
        ] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ranges_and_rates() {
        let range = |min, max| Ok(Range { min, max });
        assert_eq!(parse_range("4K..1M"), range(4096, 1 << 20));
        assert_eq!(parse_range("..1M"), range(0, 1 << 20));
        assert_eq!(parse_range("1G.."), range(1 << 30, u64::MAX));
        for text in ["", "1M", "2M..1M", "a..b"] {
            assert!(parse_range(text).is_err(), "{text}");
        }
        let rate = |per_second, burst| Ok(CallRate { per_second, burst });
        assert_eq!((parse_rate("5"), parse_rate("5/20")), (rate(5, 5), rate(5, 20)));
        for text in ["", "0", "1/0", "x", "1/2/3"] {
            assert!(parse_rate(text).is_err(), "{text}");
        }
    }
}

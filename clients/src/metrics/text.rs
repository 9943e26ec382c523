//! The OpenMetrics text format, version 1.0.0: families of samples, one after the other. Pure.
//!
//! What the format asks for and is seen to here: a family's metadata precede its samples, which stay together; the unit is the end of the family's name;
//! the samples of counters end in `_total`, those of information in `_info`; a state set has a sample for each state, in a label of the family's own name;
//! the text ends in `# EOF`.

use std::{
    collections::HashSet,
    fmt::{self, Write},
};

/// The media type.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What the samples of a family are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// They only grow, and begin again at nothing.
    Counter,
    /// They are now so.
    Gauge,
    /// They do not change, and are told by labels.
    Info,
}

/// A family of metrics.
#[derive(Debug, Clone, Copy)]
pub(super) struct Family {
    /// Without what its kind adds.
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    /// The base unit, which its name ends in; empty if it has none.
    pub(super) unit: &'static str,
    /// A sentence for a person.
    pub(super) help: &'static str,
}

/// The value of a sample.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Value {
    Count(u64),
    Number(f64),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => write!(f, "{count}"),
            Self::Number(number) if number.is_nan() => f.write_str("NaN"),
            Self::Number(number) if number.is_infinite() => f.write_str(if *number > 0.0 { "+Inf" } else { "-Inf" }),
            Self::Number(number) => write!(f, "{number}"),
        }
    }
}

impl From<u64> for Value {
    fn from(count: u64) -> Self {
        Self::Count(count)
    }
}

impl From<f64> for Value {
    fn from(number: f64) -> Self {
        Self::Number(number)
    }
}

/// A label and its value.
pub(super) type Label<'a> = (&'a str, &'a str);

/// A text that is being written.
#[derive(Debug, Default)]
pub(super) struct Exposition(String);

impl Exposition {
    /// Writes a family: its metadata, and whatever samples `write` adds. Without samples nothing is written.
    pub(super) fn family(&mut self, family: Family, write: impl FnOnce(&mut Samples<'_>)) {
        let Family { name, kind, unit, help } = family;
        let (kind, suffix) = match kind {
            Kind::Counter => ("counter", "_total"),
            Kind::Gauge => ("gauge", ""),
            Kind::Info => ("info", "_info"),
        };
        self.write(name, kind, unit, help, |text| {
            write(&mut Samples {
                text,
                name,
                suffix,
                there: HashSet::new(),
            });
        });
    }

    /// Writes a family of state sets: for each of the labelled things, which of all states it is in.
    pub(super) fn states(&mut self, (name, help): (&str, &str), all: &[&str], write: impl FnOnce(&mut States<'_>)) {
        self.write(name, "stateset", "", help, |text| {
            write(&mut States { text, name, all })
        });
    }

    fn write(&mut self, name: &str, kind: &str, unit: &str, help: &str, write: impl FnOnce(&mut String)) {
        let before = self.0.len();
        line(&mut self.0, format_args!("# TYPE {name} {kind}"));
        if !unit.is_empty() {
            line(&mut self.0, format_args!("# UNIT {name} {unit}"));
        }
        line(&mut self.0, format_args!("# HELP {name} {}", Escaped(help)));
        let begin = self.0.len();
        write(&mut self.0);
        if self.0.len() == begin {
            self.0.truncate(before);
        }
    }

    /// The whole text.
    pub(super) fn finish(mut self) -> String {
        self.0.push_str("# EOF\n");
        self.0
    }
}

/// The samples of a family.
pub(super) struct Samples<'a> {
    text: &'a mut String,
    name: &'static str,
    suffix: &'static str,
    /// The labels of those that are there.
    there: HashSet<String>,
}

impl Samples<'_> {
    /// Adds a sample. A family may not have two with the same labels: of those that some component tells, the first counts.
    pub(super) fn add(&mut self, labels: &[Label<'_>], value: impl Into<Value>) {
        let labels = Labels(labels).to_string();
        let (name, suffix, value) = (self.name, self.suffix, value.into());
        if !self.there.contains(&labels) {
            line(self.text, format_args!("{name}{suffix}{labels} {value}"));
            self.there.insert(labels);
        }
    }
}

/// The state sets of a family.
pub(super) struct States<'a> {
    text: &'a mut String,
    name: &'a str,
    all: &'a [&'a str],
}

impl States<'_> {
    /// Adds a thing that is in this state.
    pub(super) fn add(&mut self, labels: &[Label<'_>], state: &str) {
        let mut labels = labels.to_vec();
        for of_all in self.all {
            labels.push((self.name, of_all));
            let value = u8::from(*of_all == state);
            line(self.text, format_args!("{}{} {value}", self.name, Labels(&labels)));
            labels.pop();
        }
    }
}

fn line(text: &mut String, words: fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = text.write_fmt(words);
    text.push('\n');
}

struct Labels<'a>(&'a [Label<'a>]);

impl fmt::Display for Labels<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (name, value)) in self.0.iter().enumerate() {
            let before = if i == 0 { "{" } else { "," };
            write!(f, "{before}{name}=\"{}\"", Escaped(value))?;
        }
        f.write_str(if self.0.is_empty() { "" } else { "}" })
    }
}

/// Backslashes, quotation marks and line feeds are written with a backslash.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '\\' => f.write_str("\\\\")?,
                '"' => f.write_str("\\\"")?,
                '\n' => f.write_str("\\n")?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: Family = Family {
        name: "sepal_x_seconds",
        kind: Kind::Counter,
        unit: "seconds",
        help: "A \"time\".",
    };

    #[test]
    fn a_text_as_the_specification_has_it() {
        let mut text = Exposition::default();
        text.family(TIME, |samples| {
            samples.add(&[("name", "a\\b\"c\nd"), ("vcpu", "0")], 1.5);
            samples.add(&[("name", "e"), ("vcpu", "1")], 3_u64);
            samples.add(&[("name", "e"), ("vcpu", "1")], 4_u64);
        });
        let info = Family {
            name: "sepal_y",
            kind: Kind::Info,
            unit: "",
            help: "What it is.",
        };
        text.family(info, |samples| samples.add(&[("version", "1")], 1_u64));
        text.states(("sepal_z", "What it does."), &["run", "stop"], |states| {
            states.add(&[("name", "a")], "stop");
        });
        let gauge = Family {
            name: "sepal_up",
            kind: Kind::Gauge,
            unit: "",
            help: "Whether.",
        };
        text.family(gauge, |samples| samples.add(&[], 1_u64));
        assert_eq!(
            text.finish(),
            "# TYPE sepal_x_seconds counter\n\
             # UNIT sepal_x_seconds seconds\n\
             # HELP sepal_x_seconds A \\\"time\\\".\n\
             sepal_x_seconds_total{name=\"a\\\\b\\\"c\\nd\",vcpu=\"0\"} 1.5\n\
             sepal_x_seconds_total{name=\"e\",vcpu=\"1\"} 3\n\
             # TYPE sepal_y info\n\
             # HELP sepal_y What it is.\n\
             sepal_y_info{version=\"1\"} 1\n\
             # TYPE sepal_z stateset\n\
             # HELP sepal_z What it does.\n\
             sepal_z{name=\"a\",sepal_z=\"run\"} 0\n\
             sepal_z{name=\"a\",sepal_z=\"stop\"} 1\n\
             # TYPE sepal_up gauge\n\
             # HELP sepal_up Whether.\n\
             sepal_up 1\n\
             # EOF\n"
        );
    }

    #[test]
    fn a_family_without_samples_is_not_there() {
        let mut text = Exposition::default();
        text.family(TIME, |_| {});
        assert_eq!(text.finish(), "# EOF\n");
    }

    #[test]
    fn numbers_that_are_none_have_names() {
        let text =
            [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e300, 0.1].map(|number| Value::from(number).to_string());
        assert_eq!(text[..3], ["NaN", "+Inf", "-Inf"]);
        assert!(text[3..].iter().all(|text| text.parse::<f64>().is_ok()));
    }
}

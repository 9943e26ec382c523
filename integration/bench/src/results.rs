//! What was measured: all values, and what they say. Written as JSON (`docs/performance.md` has its fields), read by the tables and plots;
//! nothing here measures.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::{
    figure::{self, Better, Figure, Of},
    host::Host,
};

/// How Sepal is called among the subjects.
pub(crate) const SEPAL: &str = "Sepal";

/// Everything that a run found out.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Results {
    /// Where.
    pub(crate) host: Host,
    /// Whether it was the short form, whose values say little.
    pub(crate) short: bool,
    /// Who was measured, Sepal first.
    pub(crate) subjects: Vec<Subject>,
    /// Peers that are not on this host.
    pub(crate) not_found: Vec<String>,
    /// In the order in which they were first measured.
    pub(crate) measured: Vec<Measured>,
    /// What a peer could not be measured for, and why.
    pub(crate) left_out: Vec<LeftOut>,
    /// What nobody could be measured for, since this host or this user lacks something.
    pub(crate) skipped: Vec<Skipped>,
    /// What failed for Sepal: a run with any fails.
    pub(crate) failed: Vec<String>,
    /// Whatever else the reader should know: sizes of binaries, for example.
    pub(crate) notes: Vec<String>,
}

/// Somebody who was measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Subject {
    pub(crate) name: String,
    pub(crate) version: String,
}

/// One figure of one subject, at one size if it grows.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Measured {
    #[serde(flatten, deserialize_with = "figure::read")]
    pub(crate) figure: &'static Figure,
    pub(crate) subject: String,
    /// The size, for a figure that grows with something.
    pub(crate) at: Option<f64>,
    /// One value a round, in the order of measuring.
    pub(crate) values: Vec<f64>,
    /// What the values say; made when the run ends.
    pub(crate) summary: Summary,
}

/// Median and spread.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    /// Tenth and ninetieth percentile.
    pub(crate) p10: f64,
    pub(crate) p90: f64,
}

/// A figure that a peer does not have here.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct LeftOut {
    /// Its id.
    pub(crate) figure: String,
    pub(crate) subject: String,
    pub(crate) reason: String,
}

/// A figure that nobody has here.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Skipped {
    /// Its id.
    pub(crate) figure: String,
    /// What the host or the user lacks.
    pub(crate) reason: String,
}

impl Summary {
    /// Of values in any order; `None` if there are none. A percentile is the nearest value.
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |percent: usize| sorted.get(((sorted.len() - 1) * percent + 50) / 100).copied();
        let last = sorted.last().copied()?;
        let middle = sorted.len() / 2;
        let median = if sorted.len().is_multiple_of(2) {
            f64::midpoint(sorted.get(middle - 1).copied()?, sorted.get(middle).copied()?)
        } else {
            sorted.get(middle).copied()?
        };
        Some(Self {
            median,
            min: at(0)?,
            max: last,
            p10: at(10)?,
            p90: at(90)?,
        })
    }
}

impl Results {
    /// What an earlier run wrote.
    ///
    /// # Errors
    /// It is not such a file.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        serde_json::from_str(text).context("this is not what --json writes")
    }

    /// As JSON.
    ///
    /// # Errors
    /// None that is known: every field has a form in JSON.
    pub(crate) fn to_json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)?)
    }

    /// The figures that have a value, in the order in which they were first measured.
    pub(crate) fn figures(&self) -> Vec<&'static Figure> {
        let mut figures: Vec<&'static Figure> = Vec::new();
        for measured in &self.measured {
            if !figures.contains(&measured.figure) {
                figures.push(measured.figure);
            }
        }
        figures
    }

    /// What was measured of a figure for a subject, at one size if it grows.
    pub(crate) fn find(&self, figure: &Figure, subject: &str, at: Option<f64>) -> Option<&Measured> {
        self.measured
            .iter()
            .find(|measured| measured.figure == figure && measured.subject == subject && measured.at == at)
    }

    /// Notes a value.
    pub(crate) fn record(&mut self, figure: &'static Figure, subject: &str, at: Option<f64>, value: f64) {
        let known = self
            .measured
            .iter_mut()
            .find(|known| known.figure == figure && known.subject == subject && known.at == at);
        let measured = match known {
            Some(measured) => measured,
            None => {
                self.measured.push(Measured {
                    figure,
                    subject: subject.to_owned(),
                    at,
                    values: Vec::new(),
                    summary: Summary::default(),
                });
                let last = self.measured.len() - 1;
                &mut self.measured[last]
            }
        };
        measured.values.push(value);
        measured.summary = Summary::of(&measured.values).unwrap_or_default();
    }

    /// Notes that a peer has no such figure, once.
    pub(crate) fn leave_out(&mut self, figure: &'static Figure, subject: &str, reason: &str) {
        let known = |left: &LeftOut| left.figure == figure.id && left.subject == subject;
        if !self.left_out.iter().any(known) {
            self.left_out.push(LeftOut {
                figure: figure.id.to_owned(),
                subject: subject.to_owned(),
                reason: reason.to_owned(),
            });
        }
    }

    /// Notes that nobody has such a figure here, once.
    pub(crate) fn skip(&mut self, figure: &'static Figure, reason: &str) {
        if !self.skipped.iter().any(|skipped| skipped.figure == figure.id) {
            self.skipped.push(Skipped {
                figure: figure.id.to_owned(),
                reason: reason.to_owned(),
            });
        }
    }

    /// The median of a figure for a subject; of one that grows, none.
    pub(crate) fn median(&self, figure: &Figure, subject: &str) -> Option<f64> {
        self.find(figure, subject, None).map(|measured| measured.summary.median)
    }

    /// The peer that does best, with its median.
    pub(crate) fn best_peer(&self, figure: &Figure) -> Option<(&str, f64)> {
        let peers = self
            .measured
            .iter()
            .filter(|measured| measured.figure == figure && measured.subject != SEPAL && measured.at.is_none());
        peers
            .map(|measured| (measured.subject.as_str(), measured.summary.median))
            .min_by(|left, right| match figure.better {
                Better::Lower => left.1.total_cmp(&right.1),
                Better::Higher => right.1.total_cmp(&left.1),
            })
    }

    /// What should be there and is not: of these figures, but for those that were skipped, those without a finite value of Sepal, and those of a
    /// peer that neither has a value nor is known to lack it.
    pub(crate) fn missing(&self, wanted: &[&'static Figure]) -> Vec<String> {
        let mut missing = Vec::new();
        let here = |figure: &&&'static Figure| !self.skipped.iter().any(|skipped| skipped.figure == figure.id);
        for figure in wanted.iter().filter(here) {
            for subject in &self.subjects {
                let measured = self.measured.iter().any(|measured| {
                    measured.figure == *figure
                        && measured.subject == subject.name
                        && measured.values.iter().all(|value| value.is_finite())
                });
                let excused = subject.name != SEPAL
                    && (figure.of == Of::Sepal
                        || self
                            .left_out
                            .iter()
                            .any(|left| left.figure == figure.id && left.subject == subject.name));
                if !measured && !excused {
                    missing.push(format!("{} of {}", figure.id, subject.name));
                }
            }
        }
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::{Results, SEPAL, Subject, Summary};
    use crate::{figure::Figure, host::Host};

    static START: Figure = Figure::cost("start.cold", "start", "ms");
    static CALLS: Figure = Figure::rate("rpc.calls", "calls", "/s").sepal_only();

    fn results() -> Results {
        let subject = |name: &str| Subject {
            name: name.to_owned(),
            version: String::new(),
        };
        Results {
            host: Host::default(),
            short: true,
            subjects: vec![subject(SEPAL), subject("QEMU"), subject("other")],
            not_found: Vec::new(),
            measured: Vec::new(),
            left_out: Vec::new(),
            skipped: Vec::new(),
            failed: Vec::new(),
            notes: Vec::new(),
        }
    }

    #[test]
    fn summaries_are_medians_with_their_spread() {
        let summary = Summary::of(&[5.0, 1.0, 3.0, 2.0, 4.0]).unwrap();
        assert!((summary.median - 3.0).abs() < 1e-9);
        assert!((summary.min - 1.0).abs() < 1e-9 && (summary.max - 5.0).abs() < 1e-9);
        let two = Summary::of(&[2.0, 1.0]).unwrap();
        assert!((two.median - 1.5).abs() < 1e-9);
        assert!((two.p10 - 1.0).abs() < 1e-9 && (two.p90 - 2.0).abs() < 1e-9);
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn the_best_peer_is_never_sepal() {
        let mut results = results();
        for (subject, value) in [(SEPAL, 1.0), ("QEMU", 9.0), ("other", 4.0)] {
            results.record(&START, subject, None, value);
        }
        assert_eq!(results.best_peer(&START), Some(("other", 4.0)));
    }

    #[test]
    fn what_is_written_can_be_read() {
        let mut results = results();
        results.record(&START, SEPAL, None, 1.5);
        results.record(&CALLS, SEPAL, Some(4.0), 2.0);
        results.leave_out(&START, "QEMU", "it has no serial port");
        let read = Results::parse(&results.to_json().unwrap()).unwrap();
        assert_eq!(read.figures(), [&START, &CALLS]);
        assert_eq!(read.median(&START, SEPAL), Some(1.5));
        assert_eq!(read.find(&CALLS, SEPAL, Some(4.0)).unwrap().values, [2.0]);
        assert_eq!(read.left_out, results.left_out);
        assert!(Results::parse("{}").is_err());
    }

    #[test]
    fn what_is_missing_is_named_unless_it_is_excused() {
        let mut results = results();
        assert_eq!(
            results.missing(&[&START, &CALLS]),
            [
                "start.cold of Sepal",
                "start.cold of QEMU",
                "start.cold of other",
                "rpc.calls of Sepal"
            ]
        );
        results.record(&START, SEPAL, None, 1.0);
        results.record(&START, "QEMU", None, f64::NAN);
        results.leave_out(&START, "other", "it has no serial port");
        results.record(&CALLS, SEPAL, None, 1.0);
        assert_eq!(results.missing(&[&START, &CALLS]), ["start.cold of QEMU"]);
        results.skip(&START, "this host has no KVM");
        assert!(results.missing(&[&START, &CALLS]).is_empty());
    }
}

//! What is measured: each figure's name, unit and goal. A part lists its figures as constants, so that a run knows which are missing.

use serde::{Deserialize, Deserializer, Serialize};

/// A figure.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Figure {
    /// Names it in files and on the command line: `PART.NAME`, in lower case with dashes.
    pub(crate) id: &'static str,
    /// What it is, for a table: a few words.
    pub(crate) title: &'static str,
    /// Unit of the values: `ms`, `us`, `KiB`, `MB/s`, `/s`, or empty for counts.
    pub(crate) unit: &'static str,
    /// Which values are good ones.
    pub(crate) better: Better,
    /// What Sepal's median should reach. None: there is only the comparison.
    pub(crate) goal: Option<f64>,
    /// For how a cost grows: what it grows with (`guests`, `vCPUs`), the x axis of its plot.
    pub(crate) grows_with: Option<&'static str>,
    /// Who can be measured.
    pub(crate) of: Of,
}

/// Which values are good ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Better {
    /// Costs.
    Lower,
    /// Rates.
    Higher,
}

/// Who can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Of {
    /// Sepal and every peer that has what is needed.
    All,
    /// Sepal: no peer has such a thing.
    Sepal,
}

/// A figure as a file of an earlier run has it.
#[derive(Deserialize)]
struct Earlier {
    id: String,
    title: String,
    unit: String,
    better: Better,
    goal: Option<f64>,
    grows_with: Option<String>,
    of: Of,
}

/// Reads a figure of an earlier run, which may be none of today's. It is kept until the program ends, as today's are.
///
/// # Errors
/// A field is missing or is not what it should be.
pub(crate) fn read<'de, D: Deserializer<'de>>(from: D) -> Result<&'static Figure, D::Error> {
    let earlier = Earlier::deserialize(from)?;
    Ok(Box::leak(Box::new(Figure {
        id: earlier.id.leak(),
        title: earlier.title.leak(),
        unit: earlier.unit.leak(),
        better: earlier.better,
        goal: earlier.goal,
        grows_with: earlier.grows_with.map(|with| &*with.leak()),
        of: earlier.of,
    })))
}

impl Figure {
    /// A cost that every VMM has.
    pub(crate) const fn cost(id: &'static str, title: &'static str, unit: &'static str) -> Self {
        Self {
            id,
            title,
            unit,
            better: Better::Lower,
            goal: None,
            grows_with: None,
            of: Of::All,
        }
    }

    /// A rate that every VMM has.
    pub(crate) const fn rate(id: &'static str, title: &'static str, unit: &'static str) -> Self {
        Self {
            better: Better::Higher,
            ..Self::cost(id, title, unit)
        }
    }

    /// With a goal (`design.md`'s "Figures to reach").
    pub(crate) const fn goal(self, goal: f64) -> Self {
        Self {
            goal: Some(goal),
            ..self
        }
    }

    /// That only Sepal has.
    pub(crate) const fn sepal_only(self) -> Self {
        Self { of: Of::Sepal, ..self }
    }

    /// Measured at several sizes of something.
    pub(crate) const fn growing(self, with: &'static str) -> Self {
        Self {
            grows_with: Some(with),
            ..self
        }
    }

    /// The part that it belongs to.
    pub(crate) fn part(&self) -> &'static str {
        self.id.split_once('.').map_or(self.id, |(part, _)| part)
    }

    /// How many times better `value` is than `other`: above 1 is better, below 1 worse; `None` if one of them is no positive number.
    pub(crate) fn times_better(&self, value: f64, other: f64) -> Option<f64> {
        let ratio = match self.better {
            Better::Lower => other / value,
            Better::Higher => value / other,
        };
        (value > 0.0 && other > 0.0 && ratio.is_finite()).then_some(ratio)
    }

    /// Whether a value reaches the goal; `None` without one.
    pub(crate) fn reached(&self, value: f64) -> Option<bool> {
        self.goal.map(|goal| match self.better {
            Better::Lower => value <= goal,
            Better::Higher => value >= goal,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Figure;

    #[test]
    fn goals_know_their_direction() {
        let cost = Figure::cost("a.b", "b", "ms").goal(2.0);
        assert_eq!(cost.reached(1.9), Some(true));
        assert_eq!(cost.reached(2.1), Some(false));
        let rate = Figure::rate("a.b", "b", "/s").goal(2.0);
        assert_eq!(rate.reached(1.9), Some(false));
        assert_eq!(Figure::rate("a.b", "b", "/s").reached(1.0), None);
    }

    #[test]
    fn better_is_above_one_for_costs_and_rates() {
        let near = |ratio: Option<f64>, wanted: f64| ratio.is_some_and(|ratio| (ratio - wanted).abs() < 1e-9);
        assert!(near(Figure::cost("a.b", "b", "ms").times_better(2.0, 6.0), 3.0));
        assert!(near(Figure::rate("a.b", "b", "/s").times_better(2.0, 6.0), 1.0 / 3.0));
        assert_eq!(Figure::cost("a.b", "b", "ms").times_better(0.0, 6.0), None);
    }
}

//! What is measured: each figure's name, unit and goal. A part lists its figures as constants, so that a run knows which are missing.

use serde::Serialize;

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Better {
    /// Costs.
    Lower,
    /// Rates.
    Higher,
}

/// Who can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Of {
    /// Sepal and every peer that has what is needed.
    All,
    /// Sepal: no peer has such a thing.
    Sepal,
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
}

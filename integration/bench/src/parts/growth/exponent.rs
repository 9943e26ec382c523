//! How a cost grows, as a power: 0 is not at all, 1 in proportion, 2 with the square. On a log-log plot it is the slope.

/// From one measured size to the next.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Step {
    /// The smaller size, and its cost.
    pub(super) from: (f64, f64),
    /// The larger size, and its cost.
    pub(super) to: (f64, f64),
    /// The power.
    pub(super) power: f64,
}

/// The steps between neighbours among (size, cost) in any order. What has no logarithm is left out.
pub(super) fn steps(points: &[(f64, f64)]) -> Vec<Step> {
    let positive = |value: f64| value.is_finite() && value > 0.0;
    let mut points: Vec<_> = points.to_vec();
    points.retain(|(size, cost)| positive(*size) && positive(*cost));
    points.sort_by(|left, right| left.0.total_cmp(&right.0));
    points.dedup_by(|left, right| left.0.total_cmp(&right.0).is_eq());
    let pairs = points.windows(2).filter_map(|pair| match pair {
        [from, to] => Some((*from, *to)),
        _ => None,
    });
    pairs
        .map(|(from, to)| Step {
            from,
            to,
            power: (to.1 / from.1).ln() / (to.0 / from.0).ln(),
        })
        .collect()
}

/// The costs without what only bad weather can explain: a size costs no more than any larger one did.
pub(super) fn calm(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut points = points.to_vec();
    points.sort_by(|left, right| right.0.total_cmp(&left.0));
    let mut least = f64::INFINITY;
    for (_, cost) in &mut points {
        least = least.min(*cost);
        *cost = least;
    }
    points.reverse();
    points
}

/// The steps that are steeper than `expected` by more than `tolerance`, in calm weather.
pub(super) fn steeper(points: &[(f64, f64)], expected: f64, tolerance: f64) -> Vec<Step> {
    let mut steps = steps(&calm(points));
    steps.retain(|step| step.power > expected + tolerance);
    steps
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{calm, steeper, steps};

    #[test]
    fn squares_are_steeper_than_lines() {
        let squares = [(4.0, 16.0), (1.0, 1.0), (2.0, 4.0)];
        let found = steps(&squares);
        assert_eq!(found.len(), 2);
        assert!(found.iter().all(|step| (step.power - 2.0).abs() < 1e-9));
        assert_eq!(steeper(&squares, 1.0, 0.5).len(), 2);
        assert!(steeper(&squares, 2.0, 0.1).is_empty());
    }

    #[test]
    fn what_does_not_grow_has_no_power() {
        assert!(steps(&[(1.0, 7.0), (100.0, 7.0)])[0].power.abs() < 1e-9);
        // A price paid once hides what comes with each.
        assert!(steps(&[(1.0, 101.0), (2.0, 102.0)])[0].power < 0.1);
    }

    #[test]
    fn one_bad_measurement_is_no_growth() {
        let spoiled = [(1.0, 5.0), (2.0, 50.0), (4.0, 5.5), (8.0, 6.0)];
        assert_eq!(calm(&spoiled), [(1.0, 5.0), (2.0, 5.5), (4.0, 5.5), (8.0, 6.0)]);
        assert!(steeper(&spoiled, 0.0, 0.3).is_empty());
    }

    #[test]
    fn what_has_no_logarithm_is_left_out() {
        assert!(steps(&[]).is_empty());
        assert!(steps(&[(1.0, 1.0)]).is_empty());
        assert!(steps(&[(0.0, 1.0), (1.0, 0.0), (2.0, f64::NAN), (3.0, 1.0), (3.0, 2.0)]).is_empty());
    }

    proptest! {
        #[test]
        fn a_power_law_has_its_power_everywhere(power in -3.0..3.0f64, factor in 0.01..100.0f64, sizes in prop::collection::btree_set(1..1000u32, 2..20)) {
            let points: Vec<_> = sizes.iter().map(|size| (f64::from(*size), factor * f64::from(*size).powf(power))).collect();
            let found = steps(&points);
            prop_assert_eq!(found.len(), sizes.len() - 1);
            for step in found {
                prop_assert!((step.power - power).abs() < 1e-6);
            }
        }

        #[test]
        fn nothing_panics(points in prop::collection::vec((any::<f64>(), any::<f64>()), 0..20)) {
            let _ = steeper(&points, 1.0, 0.2);
        }
    }
}

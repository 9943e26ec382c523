//! Bars: a panel for each figure, in the figure's own unit from 0; a bar for each subject's median, with its spread and the goal.

use anyhow::{Result, anyhow};
use plotters::{
    backend::SVGBackend,
    coord::Shift,
    drawing::{DrawingArea, IntoDrawingArea},
    element::{PathElement, Rectangle, Text},
    style::{Color, text_anchor::HPos},
};

use super::style::{BACKGROUND, FAINT, INK, Weight, of_subject, text};
use crate::{
    figure::{Better, Figure},
    report::number::{number, quantity},
    results::{Measured, Results},
};

const WIDTH: i32 = 940;
const MARGIN: i32 = 20;
/// Height of the heading.
const HEADING: i32 = 44;
/// Height of a panel's own heading.
const TITLE: i32 = 26;
/// Height of a bar with the space below it.
const STEP: i32 = 22;
const BAR: i32 = 15;
/// Space after a panel.
const GAP: i32 = 16;
/// Where bars begin: names are left of it.
const LEFT: i32 = 190;
/// The longest bar, which leaves room for its value.
const LONGEST: i32 = 520;

type Canvas<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws figures that do not grow.
pub(super) fn draw(results: &Results, title: &str, figures: &[&'static Figure]) -> Result<String> {
    let panels: Vec<_> = figures.iter().map(|figure| Panel::new(results, figure)).collect();
    let height = HEADING + panels.iter().map(Panel::height).sum::<i32>();
    let mut svg = String::new();
    {
        let size = (WIDTH.unsigned_abs(), height.unsigned_abs());
        let canvas = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let drawn = || -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
            canvas.fill(&BACKGROUND)?;
            let place = (MARGIN, HEADING / 2);
            canvas.draw(&Text::new(
                title.to_owned(),
                place,
                text(18.0, Weight::Bold, INK, HPos::Left),
            ))?;
            let mut top = HEADING;
            for panel in &panels {
                panel.draw(&canvas, top)?;
                top += panel.height();
            }
            canvas.present()?;
            Ok(())
        };
        drawn().map_err(|error| anyhow!("drawing {title}: {error}"))?;
    }
    Ok(svg)
}

/// One figure.
struct Panel<'a> {
    figure: &'static Figure,
    /// Who has it, with its number among the subjects.
    bars: Vec<(usize, &'a Measured)>,
    /// What the longest bar is worth.
    most: f64,
}

impl<'a> Panel<'a> {
    fn new(results: &'a Results, figure: &'static Figure) -> Self {
        let subjects = results.subjects.iter().enumerate();
        let bars: Vec<_> = subjects
            .filter_map(|(index, subject)| Some((index, results.find(figure, &subject.name, None)?)))
            .collect();
        let values = bars
            .iter()
            .map(|(_, measured)| measured.summary.p90.max(measured.summary.median));
        let most = values.chain(figure.goal).fold(0.0, f64::max);
        Self { figure, bars, most }
    }

    fn height(&self) -> i32 {
        TITLE + STEP * i32::try_from(self.bars.len()).unwrap_or(0) + GAP
    }

    /// Where a value ends.
    fn x(&self, value: f64) -> i32 {
        LEFT + along(value, self.most)
    }

    fn draw(&self, canvas: &Canvas<'_>, top: i32) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let middle = top + TITLE / 2;
        let direction = match self.figure.better {
            Better::Lower => "lower is better",
            Better::Higher => "higher is better",
        };
        canvas.draw(&Text::new(
            self.figure.title.to_owned(),
            (MARGIN, middle),
            text(13.0, Weight::Bold, INK, HPos::Left),
        ))?;
        canvas.draw(&Text::new(
            format!("{}, {direction}", self.figure.id),
            (WIDTH - MARGIN, middle),
            text(11.0, Weight::Normal, FAINT, HPos::Right),
        ))?;
        let first = top + TITLE;
        for (row, (index, measured)) in (0..).zip(&self.bars) {
            let top = first + STEP * row;
            let middle = top + BAR / 2;
            let summary = measured.summary;
            let color = of_subject(*index);
            canvas.draw(&Text::new(
                measured.subject.clone(),
                (LEFT - 10, middle),
                text(12.0, Weight::Normal, INK, HPos::Right),
            ))?;
            canvas.draw(&Rectangle::new(
                // A bar of nothing is a line.
                [(LEFT, top), (self.x(summary.median).max(LEFT + 1), top + BAR)],
                color.filled(),
            ))?;
            let mut end = self.x(summary.median);
            if measured.values.len() > 1 {
                let (from, to) = (self.x(summary.p10), self.x(summary.p90));
                canvas.draw(&PathElement::new(
                    vec![(from, middle), (to, middle)],
                    INK.stroke_width(1),
                ))?;
                for x in [from, to] {
                    canvas.draw(&PathElement::new(
                        vec![(x, middle - 3), (x, middle + 3)],
                        INK.stroke_width(1),
                    ))?;
                }
                end = end.max(to);
            }
            canvas.draw(&Text::new(
                quantity(summary.median, self.figure.unit),
                (end + 8, middle),
                text(12.0, Weight::Normal, INK, HPos::Left),
            ))?;
        }
        if let Some(goal) = self.figure.goal {
            let x = self.x(goal);
            let bottom = first + STEP * i32::try_from(self.bars.len()).unwrap_or(0);
            canvas.draw(&PathElement::new(
                vec![(x, first - 4), (x, bottom)],
                INK.stroke_width(2),
            ))?;
            canvas.draw(&Text::new(
                format!("goal {}", number(goal)),
                (x, bottom + 6),
                text(11.0, Weight::Normal, INK, HPos::Center),
            ))?;
        }
        Ok(())
    }
}

/// Pixels of a value on a scale from 0 to `most`.
fn along(value: f64, most: f64) -> i32 {
    let share = value / most;
    match share.is_finite() {
        // At most `LONGEST`.
        true => (share.clamp(0.0, 1.0) * f64::from(LONGEST)).round() as i32,
        false => 0,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{LONGEST, along};

    #[test]
    fn half_is_half() {
        assert_eq!(along(1.0, 2.0), LONGEST / 2);
        assert_eq!(along(0.0, 0.0), 0);
    }

    proptest! {
        #[test]
        fn no_bar_leaves_its_room(value in prop::num::f64::ANY, most in prop::num::f64::ANY) {
            prop_assert!((0..=LONGEST).contains(&along(value, most)));
        }
    }
}

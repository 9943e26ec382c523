//! Curves: how a figure grows, both axes logarithmic, so that a power law is a straight line and its exponent the slope.

use anyhow::{Result, anyhow};
use plotters::{
    backend::SVGBackend,
    chart::{ChartBuilder, SeriesLabelPosition},
    coord::combinators::{BindKeyPoints, IntoLogRange},
    drawing::IntoDrawingArea,
    element::{Circle, PathElement, Text},
    series::LineSeries,
    style::{
        Color,
        text_anchor::{HPos, Pos, VPos},
    },
};

use super::style::{BACKGROUND, FAINT, GRID, INK, Weight, of_subject, text};
use crate::{
    figure::Figure,
    report::{
        number::number,
        table::{curve, exponents, sizes_of},
    },
    results::Results,
};

const WIDTH: u32 = 760;
const HEIGHT: u32 = 460;
/// Where text at the right ends.
const RIGHT: i32 = 744;

/// A subject's curve.
struct Curve {
    index: usize,
    label: String,
    points: Vec<(f64, f64)>,
}

/// Draws a figure that grows with something; `None` without a positive value, which is all that a logarithm has a place for.
pub(super) fn draw(results: &Results, figure: &Figure, with: &str) -> Result<Option<String>> {
    let curves = curves(results, figure);
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let (Some(sizes), Some(values)) = (span(points().map(|point| point.0)), span(points().map(|point| point.1))) else {
        return Ok(None);
    };
    let unit = match figure.unit {
        "" => "count",
        unit => unit,
    };
    let mut svg = String::new();
    {
        let canvas = SVGBackend::with_string(&mut svg, (WIDTH, HEIGHT)).into_drawing_area();
        let drawn = || -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
            canvas.fill(&BACKGROUND)?;
            let heading = Text::new(
                format!("{}, by {with}", figure.title),
                (20, 22),
                text(15.0, Weight::Bold, INK, HPos::Left),
            );
            canvas.draw(&heading)?;
            let id = text(11.0, Weight::Normal, FAINT, HPos::Right);
            canvas.draw(&Text::new(figure.id.to_owned(), (RIGHT, 22), id))?;
            let x = (sizes.0 / 1.3..sizes.1 * 1.3).log_scale();
            let x = x.with_key_points(sizes_of(results, figure));
            let (bottom, top) = decades(values);
            let mut chart = ChartBuilder::on(&canvas)
                .margin(16)
                .margin_top(44)
                .x_label_area_size(48)
                .y_label_area_size(76)
                .build_cartesian_2d(x, (bottom..top).log_scale())?;
            let small = text(12.0, Weight::Normal, INK, HPos::Left);
            chart
                .configure_mesh()
                .x_desc(with)
                .y_desc(unit)
                .x_labels(20)
                .y_labels(10)
                .x_label_formatter(&|size| format!("{size}"))
                .y_label_formatter(&|value| decade(*value))
                .axis_style(FAINT)
                .bold_line_style(GRID)
                .light_line_style(BACKGROUND)
                .label_style(small.clone())
                .axis_desc_style(small.clone())
                .draw()?;
            for curve in &curves {
                let color = of_subject(curve.index);
                let line = LineSeries::new(curve.points.iter().copied(), color.stroke_width(2));
                chart
                    .draw_series(line)?
                    .label(curve.label.clone())
                    .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], color.stroke_width(3)));
                let dots = curve.points.iter();
                chart.draw_series(dots.map(|point| Circle::new(*point, 4, color.filled())))?;
            }
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperLeft)
                .background_style(BACKGROUND)
                .border_style(GRID)
                // The legend's lines are where they belong beside text that is placed by its top.
                .label_font(small.pos(Pos::new(HPos::Left, VPos::Top)))
                .draw()?;
            canvas.present()?;
            Ok(())
        };
        drawn().map_err(|error| anyhow!("drawing {}: {error}", figure.id))?;
    }
    Ok(Some(svg))
}

fn curves(results: &Results, figure: &Figure) -> Vec<Curve> {
    let subjects = results.subjects.iter().enumerate();
    let curves = subjects.map(|(index, subject)| {
        let mut points = curve(results, figure, &subject.name);
        points.retain(|(size, value)| *size > 0.0 && *value > 0.0 && value.is_finite());
        let slope = exponents(&points).map_or(String::new(), |(all, end)| {
            format!(", exponent {all:.2}, at the end {end:.2}")
        });
        Curve {
            index,
            label: format!("{}{slope}", subject.name),
            points,
        }
    });
    curves.filter(|curve| !curve.points.is_empty()).collect()
}

/// The least and the greatest; `None` of nothing.
fn span(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.fold(None, |span, value| {
        let (least, most) = span.unwrap_or((value, value));
        Some((value.min(least), value.max(most)))
    })
}

/// Whole decades around a span of positive numbers, and more than one, so that what does not grow looks as it should.
fn decades((least, most): (f64, f64)) -> (f64, f64) {
    let (bottom, top) = (least.log10().floor(), most.log10().ceil());
    let top = if top - bottom < 2.0 { bottom + 2.0 } else { top };
    (10f64.powf(bottom), 10f64.powf(top))
}

/// A power of ten in as few digits as it has.
fn decade(value: f64) -> String {
    match value < 1.0 {
        true => format!("{value}"),
        false => number(value.round())
            .trim_end_matches(".00")
            .trim_end_matches(".0")
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{decade, decades, span};

    #[test]
    fn a_span_is_the_least_and_the_greatest() {
        assert_eq!(span([3.0, 1.0, 2.0].into_iter()), Some((1.0, 3.0)));
        assert_eq!(span(std::iter::empty()), None);
    }

    #[test]
    fn decades_are_written_short() {
        let written: Vec<_> = [0.01, 0.1, 1.0, 10.0, 100.0, 1e4].into_iter().map(decade).collect();
        assert_eq!(written, ["0.01", "0.1", "1", "10", "100", "10,000"]);
    }

    proptest! {
        #[test]
        fn decades_are_around_what_they_are_of(least in 1e-6f64..1e9, times in 1.0f64..1e6) {
            let most = least * times;
            let (bottom, top) = decades((least, most));
            prop_assert!(bottom <= least * 1.000_001 && most <= top * 1.000_001 && top >= bottom * 99.0);
        }
    }
}

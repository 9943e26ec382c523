//! What all plots share. They bring their own background, so that they can be read in light and dark viewers, and their colours are those of
//! Okabe and Ito, which colour-blind people tell apart (<https://jfly.uni-koeln.de/color/>).

use plotters::style::{
    Color, FontDesc, FontFamily, FontStyle, RGBColor, TextStyle,
    text_anchor::{HPos, Pos, VPos},
};

/// Behind everything.
pub(super) const BACKGROUND: RGBColor = RGBColor(255, 255, 255);
/// Text.
pub(super) const INK: RGBColor = RGBColor(34, 34, 34);
/// What is said beside, and axes.
pub(super) const FAINT: RGBColor = RGBColor(102, 102, 102);
/// Lines of a grid.
pub(super) const GRID: RGBColor = RGBColor(221, 221, 221);

/// Sepal's is the first; yellow is left out, since it is not seen on white.
const SUBJECTS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(213, 94, 0),
    RGBColor(86, 180, 233),
    RGBColor(85, 85, 85),
];

/// The colour of the n-th subject.
pub(super) fn of_subject(index: usize) -> RGBColor {
    SUBJECTS[index % SUBJECTS.len()]
}

/// How bold text is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Weight {
    Normal,
    Bold,
}

/// Fonts that are on most hosts, the one that PNGs are drawn with first.
const FAMILY: &str = "DejaVu Sans, Verdana, sans-serif";
/// The back end divides sizes by this.
const BACKEND_SCALE: f64 = 1.24;

/// Text of `size` pixels, of which a point at its left, middle or right is where it is drawn; vertically that is its middle.
pub(super) fn text(size: f64, weight: Weight, color: RGBColor, anchor: HPos) -> TextStyle<'static> {
    let style = match weight {
        Weight::Normal => FontStyle::Normal,
        Weight::Bold => FontStyle::Bold,
    };
    TextStyle {
        font: FontDesc::new(FontFamily::Name(FAMILY), size * BACKEND_SCALE, style),
        color: color.to_backend_color(),
        pos: Pos::new(anchor, VPos::Center),
    }
}

//! An SVG as PNG, twice as large, with a font of the host.

use std::{fs, sync::Arc};

use anyhow::{Context, Result, ensure};
use resvg::{
    tiny_skia::{Pixmap, Transform},
    usvg::{Options, Tree, fontdb::Database},
};

/// Pixels of the PNG for one of the SVG.
const SCALE: f32 = 2.0;
/// Debian's package fonts-dejavu-core.
const FONTS: [&str; 2] = [
    "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf",
    "/usr/share/fonts/truetype/dejavu/DejaVuSans-Bold.ttf",
];

/// Draws, with its fonts.
pub(super) struct Renderer {
    options: Options<'static>,
}

impl Renderer {
    /// Reads the fonts.
    ///
    /// # Errors
    /// They are not there: text would be missing.
    pub(super) fn new() -> Result<Self> {
        let mut fonts = Database::new();
        for path in FONTS {
            let font = fs::read(path).with_context(|| format!("{path}, of Debian's package fonts-dejavu-core"))?;
            fonts.load_font_data(font);
        }
        ensure!(!fonts.is_empty(), "there is no font in {}", FONTS.join(", "));
        Ok(Self {
            options: Options {
                fontdb: Arc::new(fonts),
                ..Options::default()
            },
        })
    }

    /// The bytes of the PNG.
    ///
    /// # Errors
    /// It is no SVG.
    pub(super) fn render(&self, svg: &str) -> Result<Vec<u8>> {
        let tree = Tree::from_str(svg, &self.options).context("reading the plot")?;
        let size = tree.size().to_int_size();
        let scaled = size.scale_by(SCALE).context("the plot has no size")?;
        let mut pixels = Pixmap::new(scaled.width(), scaled.height()).context("the plot has no size")?;
        resvg::render(&tree, Transform::from_scale(SCALE, SCALE), &mut pixels.as_mut());
        pixels.encode_png().context("writing the PNG")
    }
}

//! The results as pictures: bars that compare, curves that show how costs grow.
//!
//! ```text
//!   bars     goals.svg, PART.svg       a panel for each figure, a bar for each subject
//!   growth   PART-FIGURE.svg           a log-log plot for each figure that grows with something
//!   png      the same as .png          where the feature of that name is built in
//! ```

mod bars;
mod growth;
#[cfg(feature = "png")]
mod png;
mod style;

use std::{fs, path::Path};

use anyhow::{Context, Result};

use crate::{figure::Figure, results::Results};

/// A picture.
struct Plot {
    /// Name of its file, without what it ends in.
    name: String,
    svg: String,
}

/// Writes all plots into a folder, which is made if it is not there.
///
/// # Errors
/// A file cannot be written; for PNG, the host has no font.
pub(crate) fn write(results: &Results, folder: &Path) -> Result<()> {
    let plots = plots(results)?;
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    #[cfg(feature = "png")]
    let renderer = png::Renderer::new()?;
    for plot in plots {
        let path = folder.join(&plot.name);
        let put = |end: &str, bytes: &[u8]| {
            let path = path.with_added_extension(end);
            fs::write(&path, bytes).with_context(|| format!("writing {}", path.display()))
        };
        put("svg", plot.svg.as_bytes())?;
        #[cfg(feature = "png")]
        put("png", &renderer.render(&plot.svg)?)?;
    }
    Ok(())
}

/// All that there is to show.
fn plots(results: &Results) -> Result<Vec<Plot>> {
    let figures = results.figures();
    let single = |wanted: &dyn Fn(&Figure) -> bool| -> Vec<&'static Figure> {
        let figures = figures.iter().copied();
        figures
            .filter(|figure| figure.grows_with.is_none() && wanted(figure))
            .collect()
    };
    let mut plots = Vec::new();
    let mut bars = |name: &str, title: &str, figures: &[&'static Figure]| -> Result<()> {
        if !figures.is_empty() {
            plots.push(Plot {
                name: name.to_owned(),
                svg: bars::draw(results, title, figures)?,
            });
        }
        Ok(())
    };
    // A goal of nothing has no bar; the tables say whether it is reached.
    bars(
        "goals",
        "Goals",
        &single(&|figure| figure.goal.is_some_and(|goal| goal > 0.0)),
    )?;
    let mut parts: Vec<&str> = figures.iter().map(|figure| figure.part()).collect();
    parts.dedup();
    for part in parts {
        bars(part, part, &single(&|figure| figure.part() == part))?;
    }
    for figure in &figures {
        if let Some(with) = figure.grows_with
            && let Some(svg) = growth::draw(results, figure, with)?
        {
            plots.push(Plot {
                name: figure.id.replace('.', "-"),
                svg,
            });
        }
    }
    Ok(plots)
}

#[cfg(test)]
mod tests {
    use super::plots;
    use crate::{
        figure::Figure,
        host::Host,
        results::{Results, SEPAL, Subject},
    };

    static COLD: Figure = Figure::cost("start.cold", "first <byte>", "ms").goal(2.8);
    static CALLS: Figure = Figure::rate("rpc.calls", "calls", "/s").sepal_only();
    static MEMORY: Figure = Figure::cost("scale.memory", "memory", "KiB").growing("guests");

    fn results() -> Results {
        let subject = |name: &str| Subject {
            name: name.to_owned(),
            version: String::new(),
        };
        let mut results = Results {
            host: Host::default(),
            short: false,
            subjects: vec![subject(SEPAL), subject("QEMU")],
            not_found: Vec::new(),
            measured: Vec::new(),
            left_out: Vec::new(),
            skipped: Vec::new(),
            failed: Vec::new(),
            notes: Vec::new(),
        };
        for (sepal, qemu) in [(2.0, 45.0), (3.0, 55.0)] {
            results.record(&COLD, SEPAL, None, sepal);
            results.record(&COLD, "QEMU", None, qemu);
        }
        results.record(&CALLS, SEPAL, None, 0.0);
        for (guests, value) in [(1.0, 10.0), (10.0, 100.0), (200.0, 0.0)] {
            results.record(&MEMORY, SEPAL, Some(guests), value);
        }
        results
    }

    #[test]
    fn each_part_and_each_growing_figure_has_a_plot() {
        let names: Vec<_> = plots(&results()).unwrap().into_iter().map(|plot| plot.name).collect();
        assert_eq!(names, ["goals", "start", "rpc", "scale-memory"]);
    }

    #[test]
    fn a_plot_says_what_and_who_and_how_much() {
        let plots = plots(&results()).unwrap();
        let svg = &plots[1].svg;
        for wanted in [
            "first &lt;byte&gt;",
            "Sepal",
            "QEMU",
            "2.50 ms",
            "goal 2.80",
            "lower is better",
        ] {
            assert!(svg.contains(wanted), "{wanted} is not in {svg}");
        }
        for plot in &plots {
            assert!(!plot.svg.contains("NaN") && !plot.svg.contains("inf"), "{}", plot.svg);
        }
    }

    #[test]
    fn nothing_is_drawn_of_nothing() {
        let mut results = results();
        results.measured.clear();
        assert!(plots(&results).unwrap().is_empty());
    }
}

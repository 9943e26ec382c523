//! Sizes of Sepal's programs: as they are built, and without what only debuggers and profilers read.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use sepal_integration::program;

use super::Part;
use crate::{bench::Bench, figure::Figure};

const COMPONENT: Figure = kib("size.component", "vmm-component, stripped");
const MANAGER: Figure = kib("size.manager", "guest-manager, stripped");
const KEEPER: Figure = kib("size.keeper", "sepal-keeper, stripped");
const GUEST: Figure = kib("size.guest", "guest, the command line, stripped");
const COMPONENT_BUILT: Figure = kib("size.component-built", "vmm-component as it is built");
const MANAGER_BUILT: Figure = kib("size.manager-built", "guest-manager as it is built");
const KEEPER_BUILT: Figure = kib("size.keeper-built", "sepal-keeper as it is built");
const GUEST_BUILT: Figure = kib("size.guest-built", "guest as it is built");

const fn kib(id: &'static str, title: &'static str) -> Figure {
    Figure::cost(id, title, "KiB").sepal_only()
}

/// The part.
pub(crate) const PART: Part = Part {
    name: "size",
    about: "sizes of the programs",
    figures: &[
        &COMPONENT,
        &MANAGER,
        &KEEPER,
        &GUEST,
        &COMPONENT_BUILT,
        &MANAGER_BUILT,
        &KEEPER_BUILT,
        &GUEST_BUILT,
    ],
    run,
};

fn run(bench: &mut Bench) -> Result<()> {
    let programs: [(&str, &'static Figure, &'static Figure); 4] = [
        ("vmm-component", &COMPONENT, &COMPONENT_BUILT),
        ("guest-manager", &MANAGER, &MANAGER_BUILT),
        ("sepal-keeper", &KEEPER, &KEEPER_BUILT),
        ("guest", &GUEST, &GUEST_BUILT),
    ];
    for (name, figure, built) in programs {
        let path = program(name)?;
        let copy = bench.scratch.join(name);
        // Of the package binutils, which a linker comes with.
        let stripped = Command::new("strip").arg("-o").arg(&copy).arg(&path).status();
        let stripped = stripped.context("running strip")?;
        ensure!(stripped.success(), "strip: {stripped} for {}", path.display());
        let kib = |path: &Path| fs::metadata(path).map(|file| file.len() as f64 / 1024.0);
        bench.record(figure, kib(&copy)?);
        bench.record(built, kib(&path)?);
        fs::remove_file(copy)?;
    }
    Ok(())
}

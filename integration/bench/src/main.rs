//! Measures Sepal beside other virtual machine monitors, in one run, in turn, with the same guests.
//!
//! ```text
//!   options -> who is here (vmm) -> each part (parts) -> results (results) -> table, JSON, plots (report)
//! ```
//!
//! `docs/performance.md` says how to run it, what the figures mean, and what they were.

mod bench;
mod crowd;
mod figure;
mod guests;
mod host;
mod launcher;
mod parts;
mod processes;
mod report;
mod results;
mod vmm;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, bail};
use clap::Parser;

use crate::{
    bench::Bench,
    host::Host,
    parts::{PARTS, Part},
    results::{Results, Subject},
    vmm::{PEERS, Sepal, Vmm},
};

/// Measures Sepal beside other virtual machine monitors.
#[derive(Debug, Parser)]
struct Arguments {
    /// Only these parts
    parts: Vec<String>,

    /// Everything once and small: to see that it works; the figures say little
    #[arg(long)]
    short: bool,

    /// Where a peer is that is not on PATH: qemu, firecracker, cloud-hypervisor, alioth, crosvm or lkvm. May be repeated
    #[arg(long, value_name = "NAME=PROGRAM", value_parser = peer)]
    peer: Vec<(String, PathBuf)>,

    /// Write all values to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Write the tables as Markdown to this file
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,

    /// Draw plots into this folder, as SVG, and as PNG where that is built in
    #[arg(long, value_name = "DIR")]
    plots: Option<PathBuf>,

    /// Measure nothing: show what an earlier run wrote with --json
    #[arg(long, value_name = "FILE", conflicts_with_all = ["parts", "short", "peer", "json"])]
    from: Option<PathBuf>,

    /// Serve calls on the socket that is standard input, for the part rpc
    #[arg(long, hide = true)]
    serve_calls: bool,

    /// List the parts and their figures, and measure nothing
    #[arg(long)]
    list: bool,
}

/// A peer's name and program.
fn peer(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, _)) if PEERS.iter().all(|peer| peer.key != name) => {
            let known = PEERS.map(|peer| peer.key).join(", ");
            Err(format!("there is no peer {name}; there are {known}"))
        }
        Some((name, path)) if Path::new(path).is_file() => Ok((name.to_owned(), path.into())),
        Some((_, path)) => Err(format!("there is no program {path}")),
        None => Err("it is NAME=PROGRAM".to_owned()),
    }
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    if arguments.serve_calls {
        return parts::rpc::serve_calls();
    }
    if arguments.list {
        print!("{}", listed());
        return Ok(());
    }
    if let Some(path) = &arguments.from {
        let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let results = Results::parse(&text).with_context(|| format!("{}", path.display()))?;
        return show(arguments, &results);
    }
    let parts = chosen(&arguments.parts)?;
    if !Path::new("/dev/kvm").exists() {
        if arguments.short {
            eprintln!("skipped: no /dev/kvm");
            return Ok(());
        }
        bail!("there is no /dev/kvm");
    }
    let results = measure(arguments, &parts)?;
    if let Some(path) = &arguments.json {
        write(path, &results.to_json()?)?;
    }
    show(arguments, &results)?;
    let figures: Vec<_> = parts.iter().flat_map(|part| part.figures).copied().collect();
    let missing = results.missing(&figures);
    if !missing.is_empty() || !results.failed.is_empty() {
        bail!("failed: {}; missing: {}", results.failed.join("; "), missing.join(", "));
    }
    Ok(())
}

/// Runs the parts, one after the other. One that fails does not keep the others from running.
fn measure(arguments: &Arguments, parts: &[&'static Part]) -> Result<Results> {
    let scratch = tempfile::tempdir().context("making a folder for images")?;
    let named = |name: &str| {
        let option = arguments.peer.iter().find(|(known, _)| known == name);
        option.map(|(_, path)| path.as_path())
    };
    let (mut peers, mut not_found) = (Vec::new(), Vec::new());
    for peer in PEERS {
        match peer.find(named(peer.key)) {
            Some(found) => peers.push(found),
            None => not_found.push(peer.key.to_owned()),
        }
    }
    if !not_found.is_empty() {
        eprintln!(
            "NOT COMPARED, since they are not on this host: {}",
            not_found.join(", ")
        );
    }
    let subject = |vmm: &dyn Vmm| Subject {
        name: vmm.name().to_owned(),
        version: vmm.version(),
    };
    let mut subjects = vec![subject(&Sepal)];
    subjects.extend(peers.iter().map(|peer| subject(peer)));
    let mut bench = Bench {
        results: Results {
            host: Host::look(),
            short: arguments.short,
            subjects,
            not_found,
            measured: Vec::new(),
            left_out: Vec::new(),
            skipped: Vec::new(),
            failed: Vec::new(),
            notes: Vec::new(),
        },
        peers,
        short: arguments.short,
        scratch: scratch.path().to_owned(),
    };
    for part in parts {
        eprintln!("{}: {}", part.name, part.about);
        if let Err(error) = (part.run)(&mut bench) {
            eprintln!("  failed: {error:#}");
            bench.results.failed.push(format!("{}: {error:#}", part.name));
        }
    }
    Ok(bench.results)
}

/// Prints the tables, and writes them and the plots where that is wanted.
fn show(arguments: &Arguments, results: &Results) -> Result<()> {
    print!("{}", report::terminal(results));
    if let Some(path) = &arguments.markdown {
        write(path, &report::markdown(results))?;
    }
    if let Some(folder) = &arguments.plots {
        report::plot::write(results, folder)?;
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

/// Parts and figures, for people.
fn listed() -> String {
    let mut text = String::new();
    for part in PARTS {
        text.push_str(&format!("{}: {}\n", part.name, part.about));
        for figure in part.figures {
            text.push_str(&format!("  {}: {}\n", figure.id, figure.title));
        }
    }
    text
}

/// The parts that were asked for, all if none was.
fn chosen(names: &[String]) -> Result<Vec<&'static Part>> {
    let known = || PARTS.iter().map(|part| part.name).collect::<Vec<_>>().join(", ");
    if let Some(unknown) = names.iter().find(|name| !PARTS.iter().any(|part| part.name == **name)) {
        bail!("there is no part {unknown}; there are {}", known());
    }
    let wanted = |part: &&Part| names.is_empty() || names.iter().any(|name| name == part.name);
    Ok(PARTS.iter().filter(wanted).collect())
}

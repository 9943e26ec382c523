//! Memory that a guest costs beyond its own, at rest.
//!
//! A guest in hlt at its first prompt has touched nearly nothing; what its VMM has in memory besides is read from the mappings of the VMM's processes
//! (`processes.rs` says how the guest's memory is told apart). PSS shares out what several processes have in memory, program text for the most
//! part; USS is what none shares; RSS counts everything in full, as if nobody shared. A guest alone pays for all of its program, the fiftieth for
//! hardly any: so both are measured.

use anyhow::Result;

use super::{
    Part, resting,
    units::{amount, number},
};
use crate::{
    bench::Bench,
    crowd::{Crowd, furnished, of_kernel},
    figure::Figure,
    guests::Image,
    processes::{Mapping, Memory, Process, largest, total},
    results::SEPAL,
};

static PSS: Figure = Figure::cost("memory.pss", "beyond the guest's memory, PSS, one guest", "KiB").goal(1024.0);
static USS: Figure = Figure::cost("memory.uss", "beyond the guest's memory, USS, one guest", "KiB");
static RSS: Figure = Figure::cost("memory.rss", "beyond the guest's memory, RSS, one guest", "KiB");
static PAGE_TABLES: Figure = Figure::cost("memory.page-tables", "page tables of the VMM, one guest", "KiB");
static THREADS: Figure = Figure::cost("memory.threads", "threads, one guest", "");
static CROWD_PSS: Figure = Figure::cost("memory.crowd-pss", "PSS, average over 50 guests", "KiB");
static CROWD_USS: Figure = Figure::cost("memory.crowd-uss", "USS, average over 50 guests", "KiB");
static CROWD_RSS: Figure = Figure::cost("memory.crowd-rss", "RSS, average over 50 guests", "KiB");
static DEVICES_PSS: Figure = Figure::cost("memory.devices-pss", "PSS, one guest with six devices", "KiB").sepal_only();
static DEVICES_USS: Figure = Figure::cost("memory.devices-uss", "USS, one guest with six devices", "KiB").sepal_only();
static DEVICES_RSS: Figure = Figure::cost("memory.devices-rss", "RSS, one guest with six devices", "KiB").sepal_only();
static DEVICES_THREADS: Figure =
    Figure::cost("memory.devices-threads", "threads, one guest with six devices", "").sepal_only();
static CROWD_DEVICES_PSS: Figure = Figure::cost(
    "memory.crowd-devices-pss",
    "PSS, average over 50 guests with six devices",
    "KiB",
)
.sepal_only();
static MANAGER: Figure = Figure::cost("memory.manager", "guest manager with one guest, PSS", "KiB").sepal_only();
static KEEPER: Figure = Figure::cost("memory.keeper", "keeper with one guest, PSS", "KiB").sepal_only();
static MANAGER_A_GUEST: Figure = Figure::cost(
    "memory.manager-a-guest",
    "guest manager, each further guest, PSS",
    "KiB",
)
.sepal_only();
static KEEPER_A_GUEST: Figure =
    Figure::cost("memory.keeper-a-guest", "keeper, each further guest, PSS", "KiB").sepal_only();

/// Memory.
pub(crate) const PART: Part = Part {
    name: "memory",
    about: "memory beyond the guest's own and threads, at rest",
    figures: &[
        &PSS,
        &USS,
        &RSS,
        &PAGE_TABLES,
        &THREADS,
        &CROWD_PSS,
        &CROWD_USS,
        &CROWD_RSS,
        &DEVICES_PSS,
        &DEVICES_USS,
        &DEVICES_RSS,
        &DEVICES_THREADS,
        &CROWD_DEVICES_PSS,
        &MANAGER,
        &KEEPER,
        &MANAGER_A_GUEST,
        &KEEPER_A_GUEST,
    ],
    run,
};

/// MiB of each guest.
const GUEST_MIB: u16 = 128;
/// Mappings that the notes name.
const NAMED: usize = 6;

fn run(bench: &mut Bench) -> Result<()> {
    alone(bench)?;
    devices(bench)?;
    crowd(bench)?;
    crowd_of_peers(bench)
}

/// The mappings of a guest's VMM without the guest's memory.
fn beyond(process: Process) -> std::io::Result<Vec<Mapping>> {
    process.beyond_guest(u64::from(GUEST_MIB) * 1024)
}

/// One guest, of everybody.
fn alone(bench: &mut Bench) -> Result<()> {
    let image = Image::idle(&bench.scratch)?;
    let mut notes = Vec::new();
    bench.alternate(&[&PSS, &USS, &RSS, &PAGE_TABLES, &THREADS], bench.scaled(5, 1), |vmm| {
        let (_guest, process) = resting::start(vmm, &resting::machine(&image, GUEST_MIB))?;
        let mappings = beyond(process)?;
        let memory = total(&mappings);
        notes.push((vmm.name().to_owned(), where_it_is(&mappings)));
        let kib = [memory.pss, memory.uss, memory.rss, process.page_tables()?];
        let mut values = kib.map(number).to_vec();
        values.push(amount(process.threads()?));
        Ok(values)
    })?;
    for subject in bench.results.subjects.clone() {
        if let Some((name, places)) = notes.iter().rfind(|(name, _)| *name == subject.name) {
            bench.results.notes.push(format!("memory of {name}, PSS: {places}"));
        }
    }
    Ok(())
}

/// One guest of ours that has devices.
fn devices(bench: &mut Bench) -> Result<()> {
    let (config, _network) = furnished(GUEST_MIB, &bench.scratch)?;
    let mut crowd = Crowd::start()?;
    crowd.add(config)?;
    let process = crowd.component(0)?;
    resting::settle(&[process])?;
    let mappings = beyond(process)?;
    let memory = total(&mappings);
    bench.record(&DEVICES_PSS, number(memory.pss));
    bench.record(&DEVICES_USS, number(memory.uss));
    bench.record(&DEVICES_RSS, number(memory.rss));
    bench.record(&DEVICES_THREADS, amount(process.threads()?));
    let (places, threads) = (where_it_is(&mappings), process.thread_names()?.join(", "));
    bench.results.notes.push(format!(
        "memory of {SEPAL} with six devices, PSS: {places}; threads: {threads}"
    ));
    Ok(())
}

/// Many guests of one manager of ours, first without devices, then with them.
fn crowd(bench: &mut Bench) -> Result<()> {
    let count = guests(bench);
    let image = Image::idle(&bench.scratch)?;
    let bare = || of_kernel(image.kernel(), GUEST_MIB);
    let mut crowd = Crowd::start()?;
    crowd.add(bare()?)?;
    let (manager, keeper) = (crowd.manager()?, crowd.keeper()?);
    resting::settle(&[manager, keeper])?;
    let first = [manager, keeper].map(|process| process.mappings().map(|mappings| total(&mappings).pss));
    while crowd.len() < count {
        crowd.add(bare()?)?;
    }
    let average = average(&mut crowd)?;
    for (figure, kib) in [
        (&CROWD_PSS, average[0]),
        (&CROWD_USS, average[1]),
        (&CROWD_RSS, average[2]),
    ] {
        bench.record(figure, kib);
    }
    for ((process, first), (one, more)) in [manager, keeper]
        .into_iter()
        .zip(first)
        .zip([(&MANAGER, &MANAGER_A_GUEST), (&KEEPER, &KEEPER_A_GUEST)])
    {
        let first = number(first?);
        let mappings = process.mappings()?;
        bench.record(one, first);
        bench.record(more, (number(total(&mappings).pss) - first) / amount(count - 1));
        let (name, places) = (process.name()?, where_it_is(&mappings));
        bench
            .results
            .notes
            .push(format!("memory of {name} with {count} guests, PSS: {places}"));
    }
    drop(crowd);

    // Ended after the guests.
    let mut networks = Vec::new();
    let mut crowd = Crowd::start()?;
    while crowd.len() < count {
        let (config, network) = furnished(GUEST_MIB, &bench.scratch)?;
        crowd.add(config)?;
        networks.push(network);
    }
    let [pss, ..] = self::average(&mut crowd)?;
    bench.record(&CROWD_DEVICES_PSS, pss);
    Ok(())
}

/// PSS, USS and RSS of a guest of ours on average.
fn average(crowd: &mut Crowd) -> Result<[f64; 3]> {
    let processes = (0..crowd.len())
        .map(|index| crowd.component(index))
        .collect::<Result<Vec<_>>>()?;
    resting::settle(&processes)?;
    Ok(average_of(&processes)?)
}

fn average_of(processes: &[Process]) -> std::io::Result<[f64; 3]> {
    let mut sum = Memory::default();
    for process in processes {
        sum += total(&beyond(*process)?);
    }
    let count = amount(processes.len().max(1));
    Ok([sum.pss, sum.uss, sum.rss].map(|kib| number(kib) / count))
}

/// As many guests of each of the others.
fn crowd_of_peers(bench: &mut Bench) -> Result<()> {
    let image = Image::idle(&bench.scratch)?;
    let count = guests(bench);
    let figures: [&'static Figure; 3] = [&CROWD_PSS, &CROWD_USS, &CROWD_RSS];
    let all = bench.each_peer(&figures, |vmm| {
        let machine = resting::machine(&image, GUEST_MIB);
        let mut guests = Vec::new();
        for _ in 0..count {
            let mut guest = vmm.start(&machine)?;
            guest.first_byte()?;
            guests.push(guest);
        }
        let processes = guests
            .iter_mut()
            .map(|guest| Ok(Process(guest.pid()?)))
            .collect::<Result<Vec<_>>>()?;
        resting::settle(&processes)?;
        Ok(average_of(&processes)?)
    });
    for (name, values) in all {
        for (figure, value) in figures.into_iter().zip(values) {
            bench.results.record(figure, name, None, value);
        }
    }
    Ok(())
}

/// How many guests are many.
fn guests(bench: &Bench) -> usize {
    bench.scaled(50, 10)
}

/// The largest mappings, in words.
fn where_it_is(mappings: &[Mapping]) -> String {
    let places = largest(mappings, NAMED)
        .into_iter()
        .map(|(name, kib)| format!("{kib} KiB {name}"));
    places.collect::<Vec<_>>().join(", ")
}

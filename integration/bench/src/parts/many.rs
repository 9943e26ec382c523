//! A guest manager that holds many guests at rest: what it still takes to ask, to start one more, to stop all of them; and what the manager
//! needs for them.

use std::time::Duration;

use anyhow::Result;

use super::{
    Part, resting,
    units::{amount, microseconds, milliseconds, number},
};
use crate::{
    bench::Bench,
    crowd::{Crowd, bare},
    figure::Figure,
    processes::{Process, total},
};

static FILL: Figure = Figure::cost("many.fill", "200 guests started one after the other, each", "ms").sepal_only();
static LIST: Figure = Figure::cost("many.list", "list of 200 guests", "ms").sepal_only();
static INFO: Figure = Figure::cost("many.info", "information about one of 200", "us").sepal_only();
static STATISTICS: Figure = Figure::cost("many.statistics", "statistics of one of 200", "us").sepal_only();
static ONE_MORE: Figure = Figure::cost("many.one-more", "one more started, to its first byte", "ms").sepal_only();
static STOP_ALL: Figure = Figure::cost("many.stop-all", "all 200 stopped", "ms").sepal_only();
static MANAGER_RSS: Figure = Figure::cost("many.manager-rss", "guest manager, RSS", "KiB").sepal_only();
static MANAGER_FDS: Figure = Figure::cost("many.manager-fds", "guest manager, descriptors", "").sepal_only();
static MANAGER_THREADS: Figure = Figure::cost("many.manager-threads", "guest manager, threads", "").sepal_only();
static RSS_A_GUEST: Figure = Figure::cost("many.rss-a-guest", "guest manager, RSS for each guest", "KiB").sepal_only();
static FDS_A_GUEST: Figure =
    Figure::cost("many.fds-a-guest", "guest manager, descriptors for each guest", "").sepal_only();
static KEEPER_RSS: Figure = Figure::cost("many.keeper-rss", "keeper, RSS", "KiB").sepal_only();
static KEEPER_FDS: Figure = Figure::cost("many.keeper-fds", "keeper, descriptors", "").sepal_only();
static WAKEUPS: Figure = Figure::cost(
    "many.wakeups",
    "wake-ups of manager and keeper, 200 guests at rest",
    "/s",
)
.goal(0.0)
.sepal_only();

/// Many guests.
pub(crate) const PART: Part = Part {
    name: "many",
    about: "a guest manager that holds 200 guests at rest",
    figures: &[
        &FILL,
        &LIST,
        &INFO,
        &STATISTICS,
        &ONE_MORE,
        &STOP_ALL,
        &MANAGER_RSS,
        &MANAGER_FDS,
        &MANAGER_THREADS,
        &RSS_A_GUEST,
        &FDS_A_GUEST,
        &KEEPER_RSS,
        &KEEPER_FDS,
        &WAKEUPS,
    ],
    run,
};

/// MiB of each guest.
const GUEST_MIB: u16 = 16;

/// What a process needs.
#[derive(Clone, Copy)]
struct Needs {
    rss: f64,
    descriptors: f64,
}

impl Needs {
    fn of(process: Process) -> Result<Self> {
        Ok(Self {
            rss: number(total(&process.mappings()?).rss),
            descriptors: amount(process.descriptors()?),
        })
    }
}

fn run(bench: &mut Bench) -> Result<()> {
    let count = bench.scaled(200, 20);
    let mut crowd = Crowd::start()?;
    // The first guest brings what all of them use.
    crowd.add(bare(GUEST_MIB))?;
    let manager = crowd.manager()?;
    let first = Needs::of(manager)?;
    for _ in 1..count {
        let took = crowd.add(bare(GUEST_MIB))?;
        bench.record(&FILL, milliseconds(took));
    }
    let keeper = crowd.keeper()?;
    resting::settle(&[manager, keeper])?;
    needs(bench, (manager, keeper), first, count)?;
    rest(bench, &[manager, keeper])?;
    answers(bench, &mut crowd)?;
    for _ in 0..bench.scaled(20, 2) {
        let took = crowd.add(bare(GUEST_MIB))?;
        bench.record(&ONE_MORE, milliseconds(took));
        crowd.stop_last()?;
    }
    let took = crowd.stop_all()?;
    bench.record(&STOP_ALL, milliseconds(took));
    Ok(())
}

/// What the manager needs for its guests, and the keeper.
fn needs(bench: &mut Bench, (manager, keeper): (Process, Process), first: Needs, count: usize) -> Result<()> {
    let now = Needs::of(manager)?;
    let further = amount(count - 1);
    bench.record(&MANAGER_RSS, now.rss);
    bench.record(&MANAGER_FDS, now.descriptors);
    bench.record(&RSS_A_GUEST, (now.rss - first.rss) / further);
    bench.record(&FDS_A_GUEST, (now.descriptors - first.descriptors) / further);
    bench.record(&MANAGER_THREADS, amount(manager.thread_names()?.len()));
    let keeper = Needs::of(keeper)?;
    bench.record(&KEEPER_RSS, keeper.rss);
    bench.record(&KEEPER_FDS, keeper.descriptors);
    Ok(())
}

/// What they do while nobody asks for anything.
fn rest(bench: &mut Bench, processes: &[Process]) -> Result<()> {
    let window = Duration::from_secs(bench.scaled(5, 1));
    let before = resting::activity(processes)?;
    std::thread::sleep(window);
    let done = resting::activity(processes)? - before;
    bench.record(&WAKEUPS, number(done.wakeups) / window.as_secs_f64());
    Ok(())
}

/// How soon the manager answers.
fn answers(bench: &mut Bench, crowd: &mut Crowd) -> Result<()> {
    for round in 0..bench.scaled(100_usize, 3) {
        // Not always the same guest.
        let which = round * 7 % crowd.len();
        let (_, info) = crowd.info(which)?;
        let statistics = crowd.statistics(which)?;
        let list = crowd.list()?;
        bench.record(&INFO, microseconds(info));
        bench.record(&STATISTICS, microseconds(statistics));
        bench.record(&LIST, milliseconds(list));
    }
    Ok(())
}

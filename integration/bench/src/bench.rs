//! A run: who is measured, how often, and what came of it. Parts measure through this, so that all of them alternate, warm up and record alike.

use std::{fmt::Display, path::PathBuf, thread, time::Duration};

use anyhow::{Context, Result};

use crate::{
    figure::Figure,
    results::{Results, SEPAL},
    vmm::{Found, Sepal, StartError, Vmm},
};

/// Between two VMMs: what the kernel and a guest manager do after a guest has ended is not for the next one to wait for.
const BETWEEN: Duration = Duration::from_millis(20);

/// A run.
pub(crate) struct Bench {
    /// Who is measured beside Sepal.
    pub(crate) peers: Vec<Found>,
    /// Whether it is the short form: everything once, to see that it works.
    pub(crate) short: bool,
    /// Folder for images and sockets; gone after the run.
    pub(crate) scratch: PathBuf,
    /// What came of it.
    pub(crate) results: Results,
}

impl Bench {
    /// `full`, or `short` if that is wanted: for numbers of rounds, guests, bytes.
    pub(crate) fn scaled<T>(&self, full: T, short: T) -> T {
        if self.short { short } else { full }
    }

    /// Measures every VMM in turn, `rounds` times and once before that to warm up (not in the short form): no VMM has better weather than another.
    /// `work` starts one and returns a value for each of `figures`, in their order.
    ///
    /// A peer that cannot do it is left out with its reason. A failure of Sepal ends the part.
    pub(crate) fn alternate(
        &mut self,
        figures: &[&'static Figure],
        rounds: usize,
        mut work: impl FnMut(&dyn Vmm) -> Result<Vec<f64>, StartError>,
    ) -> Result<()> {
        let warm_up = usize::from(!self.short);
        let mut out = Vec::new();
        for round in 0..rounds + warm_up {
            for index in 0..=self.peers.len() {
                let vmm: &dyn Vmm = match index.checked_sub(1) {
                    None => &Sepal,
                    Some(peer) => &self.peers[peer],
                };
                let name = vmm.name();
                if out.contains(&name) {
                    continue;
                }
                if !self.short {
                    thread::sleep(BETWEEN);
                }
                match work(vmm) {
                    Ok(values) if round >= warm_up => {
                        anyhow::ensure!(values.len() == figures.len(), "a value for each figure");
                        for (figure, value) in figures.iter().zip(values) {
                            self.results.record(figure, name, None, value);
                        }
                    }
                    Ok(_) => {}
                    Err(error) if name == SEPAL => {
                        let which = figures.first().map_or("", |figure| figure.id);
                        return Err(error.into_error()).context(which);
                    }
                    Err(error) => {
                        self.leave_out(figures, name, error);
                        out.push(name);
                    }
                }
            }
        }
        Ok(())
    }

    /// Does `work` with one peer after the other, and returns what came of it with their names. A peer that cannot do it is left out with its reason.
    pub(crate) fn each_peer<T>(
        &mut self,
        figures: &[&'static Figure],
        work: impl Fn(&dyn Vmm) -> Result<T, StartError>,
    ) -> Vec<(&'static str, T)> {
        let mut outcomes = Vec::new();
        for index in 0..self.peers.len() {
            let peer = &self.peers[index];
            let name = peer.name();
            match work(peer) {
                Ok(outcome) => outcomes.push((name, outcome)),
                Err(error) => self.leave_out(figures, name, error),
            }
        }
        outcomes
    }

    /// Notes that a peer has none of these figures.
    fn leave_out(&mut self, figures: &[&'static Figure], peer: &str, reason: impl Display) {
        let reason = reason.to_string();
        eprintln!("  {peer} is left out: {reason}");
        for figure in figures {
            self.results.leave_out(figure, peer, &reason);
        }
    }

    /// Notes, loudly, that nobody has these figures here.
    pub(crate) fn skip(&mut self, figures: &[&'static Figure], reason: impl Display) {
        let reason = reason.to_string();
        let names: Vec<_> = figures.iter().map(|figure| figure.id).collect();
        eprintln!("  SKIPPED, for everybody: {}: {reason}", names.join(", "));
        for figure in figures {
            self.results.skip(figure, &reason);
        }
    }

    /// Notes a value of Sepal's.
    pub(crate) fn record(&mut self, figure: &'static Figure, value: f64) {
        self.results.record(figure, SEPAL, None, value);
    }

    /// Notes a value of Sepal's at a size.
    pub(crate) fn record_at(&mut self, figure: &'static Figure, at: f64, value: f64) {
        self.results.record(figure, SEPAL, Some(at), value);
    }
}

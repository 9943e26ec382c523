//! A disk whose power can be cut off at any moment, for tests.
//!
//! A cut loses any part of what was not synced: each change of names is there afterwards, or not, whatever became of those before it; of a rename, also the
//! new name alone, with the old one beside it; a file that was being written is as it was before, or as it was to be, or cut off, or full of zeros. That is
//! more than file systems do that write a journal or a log: those keep changes of names in their order.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    io,
    rc::Rc,
};

use super::disk::Disk;

#[derive(Debug, Clone, Default)]
struct File {
    synced: Vec<u8>,
    seen: Vec<u8>,
}

type Names = BTreeMap<String, usize>;

#[derive(Debug, Clone)]
enum Change {
    Link(String, usize),
    Rename(String, String, usize),
    Unlink(String),
}

impl Change {
    /// What may be left of it: all or nothing, and so on.
    fn left(&self) -> Vec<Option<Self>> {
        let mut left = vec![None, Some(self.clone())];
        if let Self::Rename(_, to, file) = self {
            left.push(Some(Self::Link(to.clone(), *file)));
        }
        left
    }

    fn apply(&self, names: &mut Names) {
        match self {
            Self::Link(name, file) => {
                names.insert(name.clone(), *file);
            }
            Self::Rename(from, to, file) => {
                names.remove(from);
                names.insert(to.clone(), *file);
            }
            Self::Unlink(name) => {
                names.remove(name);
            }
        }
    }
}

#[derive(Debug, Clone, Default)]
struct State {
    files: Vec<File>,
    seen: Names,
    synced: Names,
    changes: Vec<Change>,
}

/// What happens when the steps are used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The power is gone: nothing works any more.
    Cut,
    /// One step fails, and what follows works.
    Once,
}

/// The disk. Clones are the same disk.
#[derive(Debug, Clone, Default)]
pub(crate) struct Simulated {
    state: Rc<RefCell<State>>,
    steps: Rc<Cell<usize>>,
    fails: Rc<Cell<Option<(usize, Failure)>>>,
}

impl Simulated {
    /// Fails at the step of this number, counted from 0 from now on.
    pub(crate) fn fail_at(&self, step: usize, failure: Failure) {
        self.fails.set(Some((self.steps.get() + step, failure)));
    }

    /// How many steps were taken.
    pub(crate) fn steps(&self) -> usize {
        self.steps.get()
    }

    /// What may be there after a cut, now.
    pub(crate) fn survivors(&self) -> Vec<Self> {
        let state = self.state.borrow();
        assert!(state.changes.len() < 12, "too many to try all");
        let mut disks = Vec::new();
        let left: Vec<_> = state.changes.iter().map(Change::left).collect();
        let ways = left.iter().map(Vec::len).product();
        for mut way in 0..ways {
            let mut names = state.synced.clone();
            for left in &left {
                if let Some(change) = &left[way % left.len()] {
                    change.apply(&mut names);
                }
                way /= left.len();
            }
            let mut choices = vec![Vec::new()];
            for file in &state.files {
                let all = variants(file);
                choices = choices
                    .into_iter()
                    .flat_map(|before: Vec<Vec<u8>>| {
                        all.iter().map(move |one| [before.clone(), vec![one.clone()]].concat())
                    })
                    .collect();
            }
            disks.extend(choices.into_iter().map(|contents| Self::of(&names, contents)));
        }
        disks
    }

    fn of(names: &Names, contents: Vec<Vec<u8>>) -> Self {
        let file = |content: Vec<u8>| File {
            synced: content.clone(),
            seen: content,
        };
        let state = State {
            files: contents.into_iter().map(file).collect(),
            seen: names.clone(),
            synced: names.clone(),
            changes: Vec::new(),
        };
        Self {
            state: Rc::new(RefCell::new(state)),
            ..Self::default()
        }
    }

    fn step(&self) -> io::Result<()> {
        let now = self.steps.get();
        self.steps.set(now + 1);
        match self.fails.get() {
            Some((at, Failure::Cut)) if now >= at => Err(io::Error::other("the power is gone")),
            Some((at, Failure::Once)) if now == at => Err(io::Error::other("there is no room")),
            _ => Ok(()),
        }
    }

    fn change(&self, change: Change) -> io::Result<()> {
        self.step()?;
        let state = &mut *self.state.borrow_mut();
        change.apply(&mut state.seen);
        state.changes.push(change);
        Ok(())
    }

    fn find(&self, name: &str) -> io::Result<usize> {
        let state = self.state.borrow();
        state.seen.get(name).copied().ok_or(io::ErrorKind::NotFound.into())
    }

    fn fill(&self, file: usize, content: &[u8]) -> io::Result<()> {
        self.step()?;
        self.state.borrow_mut().files[file].seen = content.to_vec();
        Ok(())
    }
}

/// What may be left of a file.
fn variants(file: &File) -> Vec<Vec<u8>> {
    let mut all = vec![
        file.synced.clone(),
        file.seen.clone(),
        file.seen[..file.seen.len() / 2].to_vec(),
        vec![0; file.seen.len()],
    ];
    if file.synced == file.seen {
        all.truncate(1);
    }
    all.dedup();
    all
}

impl Disk for Simulated {
    fn names(&self) -> io::Result<Vec<String>> {
        self.step()?;
        Ok(self.state.borrow().seen.keys().cloned().collect())
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        self.step()?;
        let file = self.find(name)?;
        Ok(self.state.borrow().files[file].seen.clone())
    }

    fn write(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let file = match self.find(name) {
            Ok(file) => {
                self.fill(file, &[])?;
                file
            }
            Err(_) => {
                let file = self.state.borrow().files.len();
                self.state.borrow_mut().files.push(File::default());
                self.change(Change::Link(name.to_owned(), file))?;
                file
            }
        };
        self.fill(file, &content[..content.len() / 3])?;
        self.fill(file, content)?;
        self.step()?;
        let file = &mut self.state.borrow_mut().files[file];
        file.synced.clone_from(&file.seen);
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let file = self.find(from)?;
        self.change(Change::Rename(from.to_owned(), to.to_owned(), file))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.find(name)?;
        self.change(Change::Unlink(name.to_owned()))
    }

    fn sync(&self) -> io::Result<()> {
        self.step()?;
        let state = &mut *self.state.borrow_mut();
        state.synced = state.seen.clone();
        state.changes.clear();
        Ok(())
    }
}

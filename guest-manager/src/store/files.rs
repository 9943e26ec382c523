//! Files that are the old ones or the new ones, whole, whenever the power goes.
//!
//! ```text
//!   put      write NAME.sepal.new, on the disk for good --> rename to NAME.sepal --> names on the disk for good
//!   delete   remove NAME.sepal --> names on the disk for good
//!   recover  NAME.sepal.new: what a put did not come to the end of: removed
//!            NAME.sepal:     its content; broken: kept aside as NAME.sepal.broken, and told
//!                            of a later version, or it cannot be read or moved: left where it is, and told; its name cannot be had
//! ```
//!
//! What cannot be put in order is told, and costs nobody but itself.
//!
//! That a rename is one step, and that what was synced before it is what is found under the new name, is what POSIX promises, and file systems keep.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use super::{
    disk::Disk,
    envelope::{Broken, Content, MAX_CONTENT, MAX_FILE, unwrap, wrap},
};

/// How the names of files end.
const ENDING: &str = ".sepal";
/// How the names of files end that are not finished.
const UNFINISHED: &str = ".sepal.new";
/// How the names of files end that are broken.
const BROKEN: &str = ".sepal.broken";
/// How many broken files of one name are kept aside.
const MAX_BROKEN: u32 = 100;

/// Files of one kind in a folder, each with a name.
#[derive(Debug)]
pub(crate) struct Files<D> {
    disk: D,
    kind: Content,
}

/// What is wrong with a file whose content is as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wrong {
    /// It is of no use to any version.
    Broken(String),
    /// Another version may know what it is for.
    Unknown(String),
}

/// What was found in a folder.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// The contents, by the files' names.
    pub(crate) contents: BTreeMap<String, Vec<u8>>,
    /// Names that cannot be had: there is a file that this version must leave alone.
    pub(crate) untouchable: BTreeSet<String>,
    /// A sentence for each file that is not as it should be.
    pub(crate) problems: Vec<String>,
}

impl<D: Disk> Files<D> {
    /// Files on `disk`.
    pub(crate) fn new(disk: D, kind: Content) -> Self {
        Self { disk, kind }
    }

    /// Puts a file there, in place of one that has its name. It is on the disk for good on return. After an error there is the old file or the new one.
    ///
    /// # Errors
    /// What the disk says; there is more of it than [`MAX_CONTENT`], which would not be read again.
    pub(crate) fn put(&self, name: &str, content: &[u8]) -> io::Result<()> {
        if content.len() > MAX_CONTENT {
            let message = format!("there are {} bytes to keep, and {MAX_CONTENT} at most", content.len());
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
        }
        let unfinished = format!("{name}{UNFINISHED}");
        let written = self.disk.write(&unfinished, &wrap(self.kind, content));
        let renamed = written.and_then(|()| self.disk.rename(&unfinished, &format!("{name}{ENDING}")));
        if let Err(error) = renamed {
            // Where not even that works, the next start does it.
            let _ = self.disk.remove(&unfinished);
            return Err(error);
        }
        self.disk.sync()
    }

    /// Takes a file away. It is gone for good on return. After an error it is there, or not.
    ///
    /// # Errors
    /// What the disk says.
    pub(crate) fn delete(&self, name: &str) -> io::Result<()> {
        match self.disk.remove(&format!("{name}{ENDING}")) {
            // Somebody has taken it away by hand.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            removed => removed?,
        }
        self.disk.sync()
    }

    /// Looks what is there, and puts it in order as far as that can be done. `check` says what is wrong with a content, if anything is.
    ///
    /// # Errors
    /// The folder cannot be read, or what was put in order does not stay so.
    pub(crate) fn recover(&self, mut check: impl FnMut(&str, &[u8]) -> Result<(), Wrong>) -> io::Result<Found> {
        let mut names = self.disk.names()?;
        names.sort();
        let (mut found, mut changed) = (Found::default(), false);
        for file in &names {
            if file.ends_with(UNFINISHED) {
                match self.disk.remove(file) {
                    Ok(()) => changed = true,
                    Err(error) => {
                        let file = file.escape_debug();
                        let problem = format!("{file} was not finished, and cannot be taken away: {error}");
                        found.problems.push(problem);
                    }
                }
                continue;
            }
            let Some(name) = file.strip_suffix(ENDING) else {
                continue;
            };
            let content = self.content(file);
            match content.and_then(|content| check(name, &content).map(|()| content)) {
                Ok(content) => {
                    found.contents.insert(name.to_owned(), content);
                }
                Err(Wrong::Unknown(why)) => found.leave(name, &why),
                Err(Wrong::Broken(why)) => match self.put_aside(file, name, &names) {
                    Ok(aside) => {
                        changed = true;
                        let (file, aside) = (file.escape_debug(), aside.escape_debug());
                        let problem = format!("{file} is broken, and is kept as {aside}: {why}");
                        found.problems.push(problem);
                    }
                    Err(error) => found.leave(name, &format!("{why}; and it cannot be kept aside: {error}")),
                },
            }
        }
        if changed {
            self.disk.sync()?;
        }
        Ok(found)
    }

    /// What is in a file.
    fn content(&self, file: &str) -> Result<Vec<u8>, Wrong> {
        let bytes = self.disk.read(file);
        let bytes = bytes.map_err(|error| Wrong::Unknown(format!("it cannot be read: {error}")))?;
        if bytes.len() > MAX_FILE {
            return Err(Wrong::Broken(format!("it has more than {MAX_FILE} bytes")));
        }
        match unwrap(self.kind, &bytes) {
            Ok(content) => Ok(content.to_vec()),
            Err(why @ (Broken::Newer(_) | Broken::OtherContent(_))) => Err(Wrong::Unknown(why.to_string())),
            Err(why @ (Broken::Foreign | Broken::Length { .. } | Broken::Damaged)) => {
                Err(Wrong::Broken(why.to_string()))
            }
        }
    }

    /// Gives a broken file another name, which is returned.
    fn put_aside(&self, file: &str, name: &str, names: &[String]) -> io::Result<String> {
        let aside = aside(name, names).ok_or_else(|| io::Error::other("there are too many such already"))?;
        self.disk.rename(file, &aside)?;
        Ok(aside)
    }
}

impl Found {
    fn leave(&mut self, name: &str, why: &str) {
        self.untouchable.insert(name.to_owned());
        let name = name.escape_debug();
        self.problems
            .push(format!("{name}{ENDING} is left alone, and not used: {why}"));
    }
}

/// What a broken file is called from now on; none if there are too many already.
fn aside(name: &str, names: &[String]) -> Option<String> {
    let free = |aside: &String| names.binary_search(aside).is_err();
    let numbered = (2..=MAX_BROKEN).map(|number| format!("{name}{BROKEN}-{number}"));
    std::iter::once(format!("{name}{BROKEN}")).chain(numbered).find(free)
}

#[cfg(test)]
mod tests;

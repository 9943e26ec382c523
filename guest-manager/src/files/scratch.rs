//! Where volatile disks keep what is written to them: files without a name in a folder of the manager's.
//!
//! Such a file is gone with its last descriptor, however the component ends. Where the folder cannot take one, the component keeps the writes
//! in memory; that is told, since they then count as the guest's memory.

use std::{io, os::fd::OwnedFd, path::PathBuf};

use rustix::fs::fstat;
use sepal_schema::{
    error::{Error, Kind},
    transport::file::Requirements,
};

use super::Way;

/// How a disk comes by its file.
pub(super) enum Scratch {
    /// It needs none.
    Unneeded,
    /// The client gives one.
    Given(Way),
    /// One is made in this folder.
    In(PathBuf),
}

/// The folder where nobody names one: `$TMPDIR`, or /var/tmp, which is on a disk where /tmp often is not.
pub(crate) fn default_folder() -> PathBuf {
    std::env::var_os("TMPDIR")
        .filter(|folder| !folder.is_empty())
        .map_or_else(|| "/var/tmp".into(), PathBuf::from)
}

impl Scratch {
    /// The file of disk number `index`. None: it needs none, or the folder takes none, which `notes` tells.
    pub(super) fn open(self, index: usize, notes: &mut Vec<String>) -> Result<Option<OwnedFd>, Error> {
        match self {
            Self::Unneeded => Ok(None),
            Self::Given(way) => given(&format!("disks[{index}].scratch"), way).map(Some),
            Self::In(folder) => match tempfile::tempfile_in(&folder) {
                Ok(file) => Ok(Some(file.into())),
                Err(error) => {
                    let folder = folder.display();
                    tracing::warn!("no file can be made in {folder} for a volatile disk: {error}");
                    notes.push(format!(
                        "What the guest writes to disks[{index}] is kept in memory: no file can be made in {folder} ({error})."
                    ));
                    Ok(None)
                }
            },
        }
    }
}

/// Checks that what a client gives is empty: what a volatile disk has not written reads as zeroes there.
fn given(field: &str, way: Way) -> Result<OwnedFd, Error> {
    let file = way.open(field, Requirements::READ_WRITE)?;
    let size = fstat(&file).map_err(|error| {
        let message = format!("{field}: the file cannot be asked about: {}", io::Error::from(error));
        Error::new(Kind::BadConfig, message).about(field)
    })?;
    match size.st_size {
        0 => Ok(file),
        bytes => {
            let message = format!("{field}: the file has {bytes} bytes; it has to be empty");
            Err(Error::bad_config(field, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write, os::unix::fs::MetadataExt};

    use super::*;

    #[test]
    fn a_file_of_ours_has_no_name() {
        let folder = tempfile::tempdir().unwrap();
        let mut notes = Vec::new();
        let opened = Scratch::In(folder.path().to_owned()).open(0, &mut notes).unwrap();
        let mut file = fs::File::from(opened.unwrap());
        file.write_all(b"kept").unwrap();
        let status = file.metadata().unwrap();
        assert_eq!(
            (status.nlink(), status.dev()),
            (0, folder.path().metadata().unwrap().dev())
        );
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        assert!(notes.is_empty());
    }

    #[test]
    fn a_folder_that_takes_none_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("missing");
        let mut notes = Vec::new();
        assert!(Scratch::In(missing.clone()).open(3, &mut notes).unwrap().is_none());
        assert_eq!(notes.len(), 1);
        for words in ["disks[3]", "in memory", missing.to_str().unwrap()] {
            assert!(notes[0].contains(words), "{notes:?}");
        }
    }

    #[test]
    fn a_clients_file_has_to_be_empty_and_writable() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("scratch");
        let open = || {
            let way = Way::Open(path.to_str().unwrap().to_owned());
            Scratch::Given(way).open(1, &mut Vec::new())
        };
        let missing = open().err().unwrap();
        assert_eq!((missing.kind, &missing.about[..]), (Kind::NotFound, "disks[1].scratch"));
        fs::write(&path, "").unwrap();
        assert!(open().unwrap().is_some());
        let read_only = Scratch::Given(Way::Check(fs::File::open(&path).unwrap().into()));
        let error = read_only.open(1, &mut Vec::new()).err().unwrap();
        assert!(error.message.contains("not open for writing"), "{error}");
        fs::write(&path, "x").unwrap();
        let error = open().err().unwrap();
        assert_eq!((error.kind, &error.about[..]), (Kind::BadConfig, "disks[1].scratch"));
        assert!(error.message.contains("1 bytes"), "{error}");
    }
}

//! What the peers have in common: each is a program that is looked for, asked for its version, and started once for each guest.

use std::{
    any::Any,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::{Extra, Machine, Process, StartError, Started, Vmm};

/// A VMM that Sepal is measured beside.
pub(crate) struct Peer {
    /// What it is called on the command line.
    pub(crate) key: &'static str,
    /// Its name, for tables.
    pub(super) name: &'static str,
    /// Its program, which PATH has.
    pub(super) program: &'static str,
    /// What makes that print its version.
    pub(super) version_argument: &'static str,
    /// What it has that not every VMM has.
    pub(super) has: &'static [Extra],
    /// Options that depend on how this program was built; found out once.
    pub(super) options: fn(&Path) -> Vec<&'static str>,
    /// Starts a guest, of whose machine it has everything.
    pub(super) start: fn(&Found, &Machine<'_>) -> Started,
}

/// A peer that is on this host.
pub(crate) struct Found {
    peer: &'static Peer,
    program: PathBuf,
    /// What [`Peer::options`] says of the program.
    pub(super) options: Vec<&'static str>,
}

impl Peer {
    /// Looks for it on PATH, unless it is known where it is.
    pub(crate) fn find(&'static self, named: Option<&Path>) -> Option<Found> {
        let program = named.map(Path::to_owned).or_else(|| on_path(self.program))?;
        Some(Found {
            peer: self,
            options: (self.options)(&program),
            program,
        })
    }
}

impl Found {
    /// Its program, still without arguments.
    pub(super) fn command(&self) -> Command {
        Command::new(&self.program)
    }

    /// Starts it with this standard input for a machine, and keeps `kept` for as long as it runs.
    pub(super) fn spawn(&self, command: Command, input: Stdio, machine: &Machine<'_>, kept: impl Any) -> Started {
        Process::start(self.peer.name, command, input, machine.trace, kept)
    }
}

impl Vmm for Found {
    fn name(&self) -> &'static str {
        self.peer.name
    }

    /// The first line that it prints for it.
    fn version(&self) -> String {
        let output = self.command().arg(self.peer.version_argument).output();
        let printed = output.map(|output| output.stdout).unwrap_or_default();
        let printed = String::from_utf8_lossy(&printed);
        printed.lines().next().unwrap_or_default().to_owned()
    }

    fn start(&self, machine: &Machine<'_>) -> Started {
        match machine.extras().find(|extra| !self.peer.has.contains(extra)) {
            Some(lacking) => Err(StartError::Unsupported(lacking.lack().into())),
            None => (self.peer.start)(self, machine),
        }
    }
}

/// A program on PATH.
pub(crate) fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::Vmm;
    use crate::vmm::{Disk, Kernel, Machine, PEERS};

    /// What the peer of that key says to a machine with such a disk.
    fn refusal(key: &str, direct: bool, qcow2: bool) -> String {
        let nowhere = Path::new("/nowhere");
        let mut machine = Machine::new(Kernel {
            elf: nowhere,
            bzimage: None,
            flat: None,
        });
        machine.disk = Some(Disk {
            path: nowhere,
            direct,
            qcow2,
        });
        let peer = PEERS.iter().find(|peer| peer.key == key).unwrap();
        let error = peer.find(Some(nowhere)).unwrap().start(&machine).err().unwrap();
        error.to_string()
    }

    #[test]
    fn who_lacks_something_is_not_asked_for_it() {
        assert_eq!(
            refusal("alioth", true, false),
            "unsupported: it has no disk past the page cache"
        );
        assert_eq!(refusal("lkvm", true, true), "unsupported: disks in qcow2");
    }

    #[test]
    fn who_has_everything_is_started() {
        let refused = refusal("qemu", true, true);
        assert!(!refused.starts_with("unsupported"), "{refused}");
    }
}

//! Running a program, alone or under valgrind, and looking at what it leaves.

use std::{ffi::OsString, fs, process::Command};

use sepal_tests::{Finished, World, kvm_missing};

use crate::built::{self, Compiler};

/// What a program runs under.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tool {
    None,
    Valgrind,
}

/// The exit status of a program in which valgrind found something.
const FOUND: &str = "--error-exitcode=99";

/// A program of `tests/c`, to be run.
pub(crate) struct Run {
    name: &'static str,
    kvm: bool,
    /// It leaves what it has, which is no leak then.
    untidy: bool,
    /// It changes limits of its process.
    limits: bool,
    /// How many rounds, alone and under valgrind; none: it has no rounds.
    rounds: Option<(u32, u32)>,
}

impl Run {
    pub(crate) fn of(name: &'static str) -> Self {
        Self {
            name,
            kvm: true,
            untidy: false,
            limits: false,
            rounds: None,
        }
    }

    /// It starts no guest.
    pub(crate) fn without_kvm(mut self) -> Self {
        self.kvm = false;
        self
    }

    /// It ends on purpose without giving everything back.
    pub(crate) fn untidy(mut self) -> Self {
        self.untidy = true;
        self
    }

    /// It has few descriptors at times, and does not run under valgrind: there, those beyond the limit can still be made but not used.
    pub(crate) fn limits(mut self) -> Self {
        self.limits = true;
        self
    }

    /// It takes a number of rounds: so many alone, and so many under valgrind.
    pub(crate) fn rounds(mut self, alone: u32, valgrind: u32) -> Self {
        self.rounds = Some((alone, valgrind));
        self
    }

    /// Builds it and runs it to its end, which has to be a good one.
    #[track_caller]
    pub(crate) fn by(self, compiler: Compiler, tool: Tool) {
        if self.kvm && kvm_missing() {
            return;
        }
        if self.limits && tool == Tool::Valgrind {
            println!("skipped: valgrind has no use for descriptors beyond the limit");
            return;
        }
        let folder = built::workplace();
        let source = ["c", "cpp"].map(|extension| built::sources().join(self.name).with_extension(extension));
        let source = source
            .iter()
            .find(|path| path.exists())
            .expect("a source file of that name");
        let program = compiler.program(source, folder.path());
        let mut words: Vec<OsString> = Vec::new();
        if tool == Tool::Valgrind {
            let options = [
                "valgrind",
                "--quiet",
                // Threads that look again and again leave the others their turn.
                "--fair-sched=try",
                "--num-callers=40",
                "--child-silent-after-fork=yes",
                FOUND,
            ];
            words.extend(options.map(OsString::from));
            if !self.untidy {
                let leaks = [
                    "--leak-check=full",
                    "--show-leak-kinds=all",
                    "--errors-for-leak-kinds=all",
                ];
                words.extend(leaks.map(OsString::from));
            }
        }
        words.push(program.into());
        words.extend(self.rounds.map(|(alone, valgrind)| {
            let rounds = if tool == Tool::Valgrind { valgrind } else { alone };
            rounds.to_string().into()
        }));
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        to_its_end(command);
    }
}

/// Runs a program to its end, in folders of its own; that has to be a good one, and nothing may be left.
#[track_caller]
pub(crate) fn to_its_end(mut command: Command) -> Finished {
    let world = World::new();
    let folders = [
        ("SEPAL_AVF_VSOCK_DIR", "ports"),
        ("SEPAL_AVF_EARLY_DIR", "early"),
        ("TMPDIR", "files"),
    ];
    for (variable, name) in folders {
        let folder = world.folder().join(name);
        fs::create_dir(&folder).unwrap();
        command.env(variable, folder);
    }
    command
        .env("AVF_TEST_KERNEL", built::guest())
        .env("XDG_RUNTIME_DIR", world.folder())
        .env("XDG_STATE_HOME", world.state_home())
        .env_remove("SEPAL_GUEST_MANAGER")
        .env_remove("RUST_LOG");
    let mut running = world.start_command(command, None);
    running.close_input();
    let finished = running.wait().expect_code(0);
    // The keeper of a manager that was killed cleans up after the program's end.
    world.assert_nothing_left();
    for (_, name) in folders {
        let left: Vec<_> = fs::read_dir(world.folder().join(name)).unwrap().collect();
        assert!(left.is_empty(), "left behind: {left:?}");
    }
    world.end();
    finished
}

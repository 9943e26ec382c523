//! What the tests build: the library, by its own script; the guest, as a file; and programs, by both compilers.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use sepal_tests::World;
use tempfile::TempDir;

/// A compiler of C and C++.
#[derive(Clone, Copy)]
pub(crate) enum Compiler {
    Gcc,
    Clang,
}

impl Compiler {
    pub(crate) const ALL: [Self; 2] = [Self::Gcc, Self::Clang];

    /// The command for C, or for C++.
    fn command(self, plus_plus: bool) -> &'static str {
        match (self, plus_plus) {
            (Self::Gcc, false) => "gcc",
            (Self::Gcc, true) => "g++",
            (Self::Clang, false) => "clang",
            (Self::Clang, true) => "clang++",
        }
    }

    /// Compiles with all warnings as errors, in the language of the file's name and the edition `standard`.
    pub(crate) fn compile(self, source: &Path, standard: &str, others: &[&OsStr]) {
        let plus_plus = source.extension().is_some_and(|extension| extension == "cpp");
        let mut command = Command::new(self.command(plus_plus));
        command
            .arg(format!("-std={standard}"))
            .args([
                "-Wall",
                "-Wextra",
                "-Wpedantic",
                "-Werror",
                // What valgrind 3.19 understands.
                "-gdwarf-4",
                "-O1",
                "-pthread",
                "-I",
            ])
            .arg(folder().join("include"))
            .arg(source)
            .args(others);
        must(command);
    }

    /// A program of `tests/c`, or one by its path, linked with the library.
    pub(crate) fn program(self, source: &Path, into: &Path) -> PathBuf {
        let program = into.join(source.file_stem().unwrap());
        let standard = match source.extension() {
            Some(extension) if extension == "cpp" => "c++17",
            _ => "c11",
        };
        let target = library().parent().unwrap();
        let (search, find) = (
            format!("-L{}", target.display()),
            format!("-Wl,-rpath,{}", target.display()),
        );
        let others = [
            "-o".as_ref(),
            program.as_os_str(),
            search.as_ref(),
            find.as_ref(),
            "-lavf".as_ref(),
        ];
        self.compile(source, standard, &others);
        program
    }
}

/// The folder of this crate.
pub(crate) fn folder() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The folder of the programs.
pub(crate) fn sources() -> PathBuf {
    folder().join("tests/c")
}

/// Runs a command that has to work; its output. It may take as long as it likes: builds wait for each other.
pub(crate) fn must(command: Command) -> String {
    // As everything that tests start, so that nobody takes it for an orphan.
    let world = World::new();
    let mut running = world.start_command(command, None);
    running.close_input();
    while !running.stdout.ended() {}
    running.wait().expect_code(0).out()
}

/// The library, built once, with the programs that it needs beside it: by the profile of this test.
pub(crate) fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let mut build = Command::new(folder().join("build"));
        if !cfg!(debug_assertions) {
            build.arg("--release");
        }
        must(build);
        // target/PROFILE/deps/TEST.
        let own = std::env::current_exe().unwrap();
        own.ancestors().nth(2).unwrap().join("libavf.so")
    })
}

/// The guest that the programs boot.
pub(crate) fn guest() -> &'static Path {
    // Never dropped, so in the folder that cargo gives tests for what they leave.
    static GUEST: OnceLock<PathBuf> = OnceLock::new();
    GUEST.get_or_init(|| {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("driver-guest.elf");
        // In place of the last one only when it is whole: another run of the tests may use it.
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        fs::write(file.path(), sepal_driver_guest::IMAGE).unwrap();
        file.persist(&path).unwrap();
        path
    })
}

/// A folder for programs.
pub(crate) fn workplace() -> TempDir {
    tempfile::Builder::new().prefix("libavf-test-").tempdir().unwrap()
}

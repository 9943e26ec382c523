//! Programs that use libavf as its users do: in C, each about one behaviour of the library (`tests/c`), in C++ and in Python; and what the library, its
//! header and its documentation promise besides.
//!
//! Each program runs twice: built by gcc, and built by clang under valgrind, which finds wrong accesses and every byte that was not given back. It ends with
//! status 0 if everything was as it should be. Afterwards nothing may be left of it: no process, control group, mount, socket or file.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests: a failure is a panic with a message"
)]

mod built;
mod documented;
mod installed;
mod interface;
mod run;

use std::{collections::BTreeSet, fs};

use built::Compiler;
use run::{Run, Tool};

/// A test module for each program: its name, and options.
macro_rules! programs {
    ($($name:ident $([$($option:tt)*])?;)*) => {
        $(mod $name {
            #[test]
            fn does_what_it_should() {
                super::Run::of(stringify!($name))$(.$($option)*)?.by(super::Compiler::Gcc, super::Tool::None);
            }

            #[test]
            fn is_clean_under_valgrind() {
                super::Run::of(stringify!($name))$(.$($option)*)?.by(super::Compiler::Clang, super::Tool::Valgrind);
            }
        })*

        /// The programs that are run.
        const PROGRAMS: &[&str] = &[$(stringify!($name)),*];
    };
}

programs! {
    android [rounds(50, 3)];
    config [without_kvm()];
    console;
    cplusplus;
    create;
    disks;
    early;
    exhausted [limits()];
    fork [untidy()];
    lifecycle;
    machine;
    memory;
    orphans [untidy()];
    races;
    reasons;
    service [without_kvm()];
    service_died;
    signals;
    threads;
    vsock;
}

#[test]
fn every_program_is_run() {
    let files = fs::read_dir(built::sources())
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let programs: BTreeSet<String> = files
        .filter(|path| path.extension().is_some_and(|extension| extension != "h"))
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    assert_eq!(programs, PROGRAMS.iter().map(|&name| name.to_owned()).collect());
}

#[test]
fn a_program_in_python() {
    if sepal_tests::kvm_missing() {
        return;
    }
    let mut command = std::process::Command::new("python3");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/ctypes_client.py");
    command.arg(script).arg(built::library()).arg(built::guest());
    run::to_its_end(command);
}

//! The examples of docs/libavf.md: what stands there is what is compiled and run here.

use std::{fs, path::PathBuf, process::Command};

use crate::{
    built::{self, Compiler},
    run,
};

/// The page's programs in C, in their order.
fn examples() -> Vec<String> {
    let page = built::folder().join("../../docs/libavf.md");
    let text = fs::read_to_string(page).unwrap();
    let parts = text.split("\n```c\n").skip(1);
    parts
        .map(|part| part.split_once("\n```").expect("an end of the example").0.to_owned() + "\n")
        .collect()
}

/// Runs example `number` with these arguments, built by both compilers; what it prints.
fn run_example(number: usize, arguments: &[PathBuf]) -> [String; 2] {
    let folder = built::workplace();
    let source = folder.path().join("example.c");
    fs::write(&source, &examples()[number]).unwrap();
    Compiler::ALL.map(|compiler| {
        let mut command = Command::new(compiler.program(&source, folder.path()));
        command.args(arguments);
        run::to_its_end(command).out()
    })
}

#[test]
fn every_example_is_run() {
    assert_eq!(examples().len(), 2);
}

#[test]
fn a_machine_whose_console_is_the_terminal() {
    if sepal_tests::kvm_missing() {
        return;
    }
    let folder = built::workplace();
    let script = folder.path().join("script");
    fs::write(&script, "say:hello").unwrap();
    for said in run_example(0, &[built::guest().to_owned(), script]) {
        assert!(said.contains("ok say hello"), "{said}");
        assert!(
            said.ends_with("The machine has stopped: it shut itself down.\n"),
            "{said}"
        );
    }
}

#[test]
fn a_machine_that_is_stopped_and_started_again() {
    if sepal_tests::kvm_missing() {
        return;
    }
    let folder = built::workplace();
    // It waits at its prompt.
    let kernel = folder.path().join("default-guest.elf");
    fs::write(&kernel, sepal_default_guest::IMAGE).unwrap();
    for said in run_example(1, std::slice::from_ref(&kernel)) {
        let once = "The guest printed something.\nIt is still running.\nIt has stopped: killed.\n";
        let end = "At 63 MiB there is now: the guest finds this at 63 MiB.\n";
        assert_eq!(said, [once, once, end].concat());
    }
}

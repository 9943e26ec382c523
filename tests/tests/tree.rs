//! What every file of the tree has to be like.

#![expect(
    clippy::expect_used,
    reason = "helpers of tests: a failure is a panic with a message"
)]

use std::{fs, path::Path, process::Command};

/// Most lines of a source file.
const MOST_LINES: usize = 650;

/// Source files of the tree; none where it is no git work tree (a tarball, for example).
fn sources() -> Option<Vec<(String, String)>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the workspace's folder");
    let output = Command::new("git")
        .args(["ls-files", "-z", "*.rs"])
        .current_dir(root)
        .output()
        .ok()?;
    if !output.status.success() {
        println!("skipped: {} is no git work tree", root.display());
        return None;
    }
    let names = String::from_utf8(output.stdout).expect("UTF-8");
    let names = names.split_terminator('\0').filter(|name| !is_generated(name));
    // A file that is deleted but not committed yet is none of the tree's.
    let read = |name: &str| Some((name.to_owned(), fs::read_to_string(root.join(name)).ok()?));
    Some(names.filter_map(read).collect())
}

/// capnpc's output.
fn is_generated(name: &str) -> bool {
    name.contains("/generated/") || name.ends_with("_capnp.rs")
}

#[test]
fn no_source_file_is_too_long() {
    let Some(sources) = sources() else { return };
    assert!(sources.len() > 100, "only {} files", sources.len());
    let long: Vec<String> = sources
        .iter()
        .map(|(name, text)| (name, text.lines().count()))
        .filter(|(_, lines)| *lines > MOST_LINES)
        .map(|(name, lines)| format!("{name}: {lines} lines"))
        .collect();
    assert!(
        long.is_empty(),
        "more than {MOST_LINES} lines; split them by what they are for: {long:#?}"
    );
}

#[test]
fn every_source_file_says_what_it_is_for() {
    let Some(sources) = sources() else { return };
    let silent: Vec<&String> = sources
        .iter()
        .filter(|(_, text)| {
            // Attributes of the crate may stand before.
            let mut lines = text
                .lines()
                .skip_while(|line| line.is_empty() || line.starts_with("#!["));
            !lines.next().is_some_and(|line| line.starts_with("//!"))
        })
        .map(|(name, _)| name)
        .collect();
    assert!(silent.is_empty(), "no //! comment at the head: {silent:#?}");
}

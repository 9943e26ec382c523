//! The checked-in code of the tests' own interface is what `support/transport.capnp` says.
//!
//! `SEPAL_REGENERATE=1 cargo test -p sepal-schema --test transport_generated` writes it anew.

use std::{fs, path::Path, process::Command};

#[test]
fn generated_code_matches_the_schema() {
    if Command::new("capnp").arg("--version").output().is_err() {
        println!("skipped: the capnp compiler is not installed (Debian package capnproto)");
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let support = root.join("tests/support");
    let fresh = tempfile::tempdir().unwrap();
    capnpc::CompilerCommand::new()
        .src_prefix(&support)
        .import_path(root)
        .no_standard_import()
        .default_parent_module(vec!["support".into()])
        .output_path(fresh.path())
        .file(support.join("transport.capnp"))
        .run()
        .unwrap();
    let generated = fs::read_to_string(fresh.path().join("transport_capnp.rs")).unwrap();
    let kept = support.join("transport_capnp.rs");
    if std::env::var_os("SEPAL_REGENERATE").is_some() {
        fs::write(&kept, generated).unwrap();
    } else {
        let current = fs::read_to_string(&kept).unwrap_or_default();
        assert!(
            generated == current,
            "{} is out of date; run: SEPAL_REGENERATE=1 cargo test -p sepal-schema --test transport_generated",
            kept.display()
        );
    }
}

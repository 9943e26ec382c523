//! The checked-in generated code is what the `.capnp` files say.
//!
//! Generates the code again and compares. With `SEPAL_REGENERATE=1` it writes the result into the source tree instead:
//! `SEPAL_REGENERATE=1 cargo test -p sepal-schema --test generated`.

use std::{fs, path::Path, process::Command};

const SCHEMAS: [&str; 16] = [
    "error.capnp",
    "file.capnp",
    "bytes.capnp",
    "facet.capnp",
    "debug.capnp",
    "vsock.capnp",
    "device.capnp",
    "agent.capnp",
    "config.capnp",
    "cpu.capnp",
    "node.capnp",
    "store.capnp",
    "guest.capnp",
    "lifecycle.capnp",
    "manager.capnp",
    "capnp/stream.capnp",
];

#[test]
fn generated_code_matches_the_schemas() {
    if Command::new("capnp").arg("--version").output().is_err() {
        println!("skipped: the capnp compiler is not installed (Debian package capnproto)");
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let fresh = tempfile::tempdir().unwrap();
    let mut compiler = capnpc::CompilerCommand::new();
    compiler
        .src_prefix(root)
        .import_path(root)
        .no_standard_import()
        .default_parent_module(vec!["generated".into()])
        .output_path(fresh.path());
    for schema in SCHEMAS {
        compiler.file(root.join(schema));
    }
    compiler.run().unwrap();

    let regenerate = std::env::var_os("SEPAL_REGENERATE").is_some();
    for schema in SCHEMAS {
        let name = schema.replace(".capnp", "_capnp.rs");
        let generated = fs::read_to_string(fresh.path().join(&name)).unwrap();
        let kept = root.join("src/generated").join(&name);
        if regenerate {
            fs::create_dir_all(kept.parent().unwrap()).unwrap();
            fs::write(&kept, generated).unwrap();
        } else {
            let current = fs::read_to_string(&kept).unwrap_or_default();
            assert!(
                generated == current,
                "{} is not what {schema} generates; run: SEPAL_REGENERATE=1 cargo test -p sepal-schema --test generated",
                kept.display()
            );
        }
    }
}

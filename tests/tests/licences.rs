//! What the dependencies are: every licence is one that `deny.toml` allows, and no crate is one that it bans.
//!
//! `cargo deny check` looks at more; this needs nothing but cargo.

#![expect(
    clippy::expect_used,
    reason = "helpers of tests: a failure is a panic with a message"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    process::Command,
};

use serde_json::Value;
use spdx::{Expression, LicenseReq, Licensee, ParseMode};

/// What `deny.toml` says.
struct Rules {
    allowed: Vec<Licensee>,
    banned: BTreeSet<String>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the workspace's folder")
}

fn rules() -> Rules {
    let text = std::fs::read_to_string(root().join("deny.toml")).expect("deny.toml");
    let rules: toml::Table = text.parse().expect("deny.toml is TOML");
    let allowed = rules["licenses"]["allow"].as_array().expect("a list").iter();
    let banned = rules["bans"]["deny"].as_array().expect("a list").iter();
    Rules {
        allowed: allowed
            .map(|name| Licensee::parse(name.as_str().expect("a string")).expect("an SPDX licence"))
            .collect(),
        banned: banned
            .map(|entry| entry["crate"].as_str().expect("a crate's name").to_owned())
            .collect(),
    }
}

/// The packages that the workspace's resolved graph has on the platform that we build for, tests included.
fn packages() -> Vec<Value> {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version",
            "1",
            "--locked",
            "--filter-platform",
            "x86_64-unknown-linux-gnu",
        ])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let by_id: BTreeMap<&str, &Value> = metadata["packages"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|package| (package["id"].as_str().expect("an id"), package))
        .collect();
    let nodes = metadata["resolve"]["nodes"].as_array().expect("a list").iter();
    nodes
        .map(|node| by_id[node["id"].as_str().expect("an id")].clone())
        .collect()
}

fn name(package: &Value) -> String {
    format!(
        "{} {}",
        package["name"].as_str().unwrap_or("?"),
        package["version"].as_str().unwrap_or("?")
    )
}

#[test]
fn every_licence_is_allowed() {
    let rules = rules();
    let allowed = |requirement: &LicenseReq| rules.allowed.iter().any(|licence| licence.satisfies(requirement));
    let packages = packages();
    assert!(
        packages.len() > 50,
        "only {} packages: is that the whole graph?",
        packages.len()
    );
    let offending: Vec<String> = packages
        .iter()
        .filter_map(|package| {
            let Some(licence) = package["license"].as_str() else {
                return Some(format!("{}: no licence in its manifest", name(package)));
            };
            // "MIT/Apache-2.0" is what old manifests write for "or".
            match Expression::parse_mode(licence, ParseMode::LAX) {
                Ok(expression) if expression.evaluate(allowed) => None,
                Ok(_) => Some(format!("{}: {licence}", name(package))),
                Err(error) => Some(format!("{}: {licence}: {error}", name(package))),
            }
        })
        .collect();
    assert!(offending.is_empty(), "not in deny.toml's list: {offending:#?}");
}

#[test]
fn no_banned_crate_is_in_the_graph() {
    let rules = rules();
    assert!(rules.banned.contains("tokio"));
    let packages = packages();
    let banned = |package: &&Value| package["name"].as_str().is_some_and(|name| rules.banned.contains(name));
    let found: Vec<String> = packages.iter().filter(banned).map(name).collect();
    assert!(found.is_empty(), "banned in deny.toml: {found:?}");
}

#[test]
fn the_rules_tell_licences_apart() {
    let rules = rules();
    let allows = |text: &str| {
        let expression = Expression::parse(text).expect("an SPDX expression");
        expression.evaluate(|requirement| rules.allowed.iter().any(|licence| licence.satisfies(requirement)))
    };
    assert!(allows("MIT OR Apache-2.0") && allows("GPL-3.0-only OR MIT") && allows("Apache-2.0 WITH LLVM-exception"));
    assert!(!allows("GPL-3.0-only") && !allows("MIT AND GPL-2.0-only"));
}

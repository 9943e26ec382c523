//! Programs in Python with a package of PyPI's, from a virtual environment in the user's cache, which is made once.

use std::{env, fs, path::PathBuf, process::Command};

use rustix::fs::FlockOperation;

/// The interpreter of an environment with this version of a package, which is made the first time.
///
/// # Panics
/// If it cannot be made: there is no Python, or no network.
pub fn with(package: &str, version: &str) -> PathBuf {
    let home = || PathBuf::from(env::var_os("HOME").expect("HOME")).join(".cache");
    let cache = env::var_os("XDG_CACHE_HOME")
        .map_or_else(home, PathBuf::from)
        .join("sepal");
    fs::create_dir_all(&cache).unwrap();
    let lock = fs::File::create(cache.join(format!("{package}.lock"))).unwrap();
    rustix::fs::flock(&lock, FlockOperation::LockExclusive).unwrap();
    let folder = cache.join(format!("{package}-{version}"));
    let complete = folder.join("complete");
    if !complete.exists() {
        let _ = fs::remove_dir_all(&folder);
        must(
            Command::new("python3").args(["-m", "venv"]).arg(&folder),
            "python3 with its module venv is needed: on Debian, apt-get install python3-venv",
        );
        must(
            Command::new(folder.join("bin/python"))
                .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
                .arg(format!("{package}=={version}")),
            &format!("{package} comes from PyPI, the first time: is there a network?"),
        );
        fs::write(complete, "").unwrap();
    }
    folder.join("bin/python")
}

/// Runs a command that has to work.
fn must(command: &mut Command, hint: &str) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}; {hint}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{said}\n{hint}",
        output.status
    );
}

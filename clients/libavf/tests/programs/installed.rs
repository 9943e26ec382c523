//! What `install` installs, used as README and docs/libavf.md say.

use std::{fs, path::Path, process::Command};

use crate::{
    built::{self, must},
    run,
};

/// All files below a folder, by their paths from there.
fn files(folder: &Path, below: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(folder.join(below)).unwrap() {
        let entry = entry.unwrap();
        let path = below.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            files(folder, &path, found);
        } else {
            found.push(path.to_str().unwrap().to_owned());
        }
    }
}

#[test]
fn what_is_installed_works_by_itself() {
    if sepal_tests::kvm_missing() {
        return;
    }
    let folder = built::workplace();
    // Built already, so that it is not built while others use it.
    built::library();
    let mut install = Command::new(built::folder().join("install"));
    install
        .arg("--prefix")
        .arg("/opt/avf")
        .arg("--destdir")
        .arg(folder.path());
    if cfg!(debug_assertions) {
        install.arg("--debug");
    }
    must(install);
    let prefix = folder.path().join("opt/avf");
    let mut installed = Vec::new();
    files(&prefix, Path::new(""), &mut installed);
    installed.sort();
    assert_eq!(
        installed,
        [
            "include/android/virtualization.h",
            "lib/libavf.so",
            "lib/pkgconfig/libavf.pc",
            "libexec/sepal/guest-manager",
            "libexec/sepal/sepal-keeper",
            "libexec/sepal/vmm-component",
            "share/man/man3/libavf.3",
        ]
    );
    // The file for pkg-config names where it will be.
    let description = fs::read_to_string(prefix.join("lib/pkgconfig/libavf.pc")).unwrap();
    let value = |key: &str| {
        let line = description.lines().find_map(|line| line.strip_prefix(key));
        line.unwrap_or_else(|| panic!("no {key} in {description}")).to_owned()
    };
    assert_eq!(value("prefix="), "/opt/avf");
    let expand = |text: &str| {
        let text = text
            .replace("${libdir}", &value("libdir="))
            .replace("${includedir}", &value("includedir="));
        text.replace("${prefix}", prefix.to_str().unwrap())
    };
    let flags = [value("Cflags: "), value("Libs: ")]
        .map(|flags| expand(&flags))
        .join(" ");
    let program = folder.path().join("program");
    let mut compile = Command::new("gcc");
    compile
        .args(["-std=gnu11", "-pthread", "-o"])
        .arg(&program)
        .arg(built::sources().join("disks.c"))
        .args(flags.split_whitespace())
        .arg(format!("-Wl,-rpath,{}", prefix.join("lib").display()));
    must(compile);
    run::to_its_end(Command::new(program));

    let mut groff = Command::new("groff");
    groff
        .args(["-man", "-Tutf8", "-ww", "-z"])
        .arg(prefix.join("share/man/man3/libavf.3"));
    if Path::new("/usr/bin/groff").exists() {
        // It says what is wrong on standard error, which is no failure to it.
        let finished = run::to_its_end(groff);
        assert_eq!(finished.stderr, "");
    } else {
        println!("the page was not formatted: there is no groff");
    }
}

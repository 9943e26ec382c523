//! What the library exports, and that its header is fit for every compiler.

use std::{collections::BTreeSet, fs, process::Command};

use crate::built::{self, Compiler, must};

/// The functions of Android's libavf, and the second spelling that its clients use.
const FUNCTIONS: [&str; 20] = [
    "AVirtualMachineRawConfig_addCustomMemoryBackingFile",
    "AVirtualMachineRawConfig_addDisk",
    "AVirtualMachineRawConfig_create",
    "AVirtualMachineRawConfig_destroy",
    "AVirtualMachineRawConfig_setBalloon",
    "AVirtualMachineRawConfig_setHypervisorSpecificAuthMethod",
    "AVirtualMachineRawConfig_setInitRd",
    "AVirtualMachineRawConfig_setInstanceId",
    "AVirtualMachineRawConfig_setKernel",
    "AVirtualMachineRawConfig_setMemoryMiB",
    "AVirtualMachineRawConfig_setMemoryMib",
    "AVirtualMachineRawConfig_setName",
    "AVirtualMachineRawConfig_setProtectedVm",
    "AVirtualMachine_createRaw",
    "AVirtualMachine_destroy",
    "AVirtualMachine_start",
    "AVirtualMachine_stop",
    "AVirtualMachine_waitForStop",
    "AVirtualizationService_create",
    "AVirtualizationService_destroy",
];

/// Libraries that every system has on which something else runs.
const SYSTEM: [&str; 5] = [
    "libc.so.6",
    "libm.so.6",
    "libgcc_s.so.1",
    "ld-linux-x86-64.so.2",
    "libdl.so.2",
];

#[test]
fn the_library_exports_the_functions_and_nothing_else() {
    let mut nm = Command::new("nm");
    nm.args(["-D", "--defined-only"]).arg(built::library());
    let listed = must(nm);
    let symbols: BTreeSet<String> = listed
        .lines()
        .map(|line| line.split_once(' ').unwrap().1.to_owned())
        .collect();
    let functions = FUNCTIONS.iter().map(|name| format!("T {name}@@LIBAVF"));
    // The version node itself is a symbol, too.
    assert_eq!(symbols, functions.chain(["A LIBAVF".to_owned()]).collect());
}

#[test]
fn the_library_needs_nothing_but_the_system() {
    let mut readelf = Command::new("readelf");
    readelf.args(["-d", "-W"]).arg(built::library());
    let dynamic = must(readelf);
    let named = |tag: &str| -> Vec<String> {
        let lines = dynamic.lines().filter(|line| line.contains(tag));
        let name = |line: &str| Some(line.split_once('[')?.1.split_once(']')?.0.to_owned());
        lines.filter_map(name).collect()
    };
    assert_eq!(named("(SONAME)"), ["libavf.so"]);
    let strange: Vec<String> = named("(NEEDED)")
        .into_iter()
        .filter(|name| !SYSTEM.contains(&name.as_str()))
        .collect();
    assert!(strange.is_empty(), "{strange:?}");
}

#[test]
fn the_header_is_fit_for_c_and_c_plus_plus() {
    let folder = built::workplace();
    // Twice, as an indirect inclusion does, before any other header; and every function is declared.
    let uses: String = FUNCTIONS
        .iter()
        .filter(|name| !name.ends_with("MiB"))
        .map(|name| format!("    (void)&{name};\n"))
        .collect();
    let text = format!(
        "#include <android/virtualization.h>\n#include <android/virtualization.h>\nint main(void) {{\n{uses}    \
         enum AVirtualMachineStopReason reason = AVIRTUAL_MACHINE_HANGUP;\n    return sizeof reason == 4 && reason == 11 ? 0 : 1;\n}}\n"
    );
    for (extension, standards) in [
        ("c", ["c11", "gnu11", "c17", "c2x"].as_slice()),
        ("cpp", ["c++17", "gnu++17", "c++20"].as_slice()),
    ] {
        let source = folder.path().join("includes").with_extension(extension);
        fs::write(&source, &text).unwrap();
        let object = folder.path().join("includes.o");
        for standard in standards {
            for compiler in Compiler::ALL {
                let strict = ["-Wconversion", "-Wundef", "-Wshadow", "-c", "-o"].map(AsRef::as_ref);
                compiler.compile(&source, standard, &[&strict[..], &[object.as_os_str()]].concat());
            }
        }
    }
}

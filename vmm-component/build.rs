//! Links the component statically where this machine can.
//!
//! A component that loads no libraries starts without a dynamic linker, and has none of their private pages; it stays position-independent. Cargo
//! cannot say this for one program of a workspace, and the others look users up through the C library's plug-ins, which needs a dynamic one. So
//! this script overrides, for this one program, what rustc says to the linker: `-static-pie`, and a folder in which the names of the shared
//! libraries lead to the static ones. Relocations are packed (RELR), which only newer C libraries unpack.
//!
//! Nothing more has to be installed: a program is linked that way and run first, and if that fails, the component is linked as any other.
//! `tests/linked.rs` fails if that happens although the C compiler can.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Linker scripts by the names that rustc asks for. The libraries named as empty are part of the C library, or not used.
const LIBRARIES: [(&str, &str); 7] = [
    ("libc.so", "GROUP(-l:libc.a -l:libgcc_eh.a -l:libgcc.a)\n"),
    ("libgcc_s.so", "INPUT(-l:libgcc_eh.a)\n"),
    ("libdl.so", "/* in libc.a */\n"),
    ("libm.so", "INPUT(-l:libm.a)\n"),
    ("libpthread.so", "/* in libc.a */\n"),
    ("librt.so", "/* in libc.a */\n"),
    ("libutil.so", "/* in libc.a */\n"),
];

/// The ELF type of position-independent programs, at offset 16.
const ET_DYN: u16 = 3;

/// Uses a thread, unwinding, a variable of each thread, and relocated data.
const PROBE: &str = r#"
use std::{cell::Cell, env, panic, process::ExitCode, thread};
thread_local! { static COUNT: Cell<usize> = const { Cell::new(1) }; }
static NAMES: [&str; 2] = ["one", "two"];
fn main() -> ExitCode {
    let index = env::args().count();
    let caught = thread::spawn(move || {
        COUNT.set(index);
        panic::catch_unwind(|| panic!("{}", NAMES[COUNT.get()])).is_err()
    });
    if caught.join().unwrap_or(false) { ExitCode::from(42) } else { ExitCode::FAILURE }
}
"#;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let Some(out) = env::var_os("OUT_DIR").map(PathBuf::from) else {
        return;
    };
    if !is_candidate() {
        println!("cargo::rustc-env=SEPAL_LINKED=as asked");
        return;
    }
    // For the test that looks at what came of it.
    println!("cargo::rustc-env=SEPAL_LINKED=static where it works");
    let arguments = [
        "-static-pie".to_owned(),
        format!("-L{}", out.display()),
        "-Wl,-z,pack-relative-relocs".to_owned(),
    ];
    match works(&out, &arguments) {
        Ok(true) => {
            for argument in arguments {
                println!("cargo::rustc-link-arg-bin=vmm-component={argument}");
            }
        }
        Ok(false) => {}
        Err(error) => println!("cargo::warning=the component is linked dynamically: {error}"),
    }
}

/// Whether it is worth a try: what is built runs here, with glibc, and nobody has asked for another kind of linking.
fn is_candidate() -> bool {
    let variable = |name| env::var(name).unwrap_or_default();
    variable("TARGET") == variable("HOST")
        && variable("CARGO_CFG_TARGET_OS") == "linux"
        && variable("CARGO_CFG_TARGET_ENV") == "gnu"
        && !variable("CARGO_CFG_TARGET_FEATURE").split(',').any(|feature| feature == "crt-static")
        // Sanitizers bring a run-time library that wants a dynamic C library.
        && env::var_os("CARGO_CFG_SANITIZE").is_none()
}

/// Links the probe in that way and runs it.
fn works(out: &Path, arguments: &[String]) -> io::Result<bool> {
    for (name, script) in LIBRARIES {
        fs::write(out.join(name), script)?;
    }
    let source = out.join("probe.rs");
    let program = out.join("probe");
    fs::write(&source, PROBE)?;
    let mut rustc = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc
        .args(["--edition", "2024", "-C", "opt-level=0", "-o"])
        .arg(&program)
        .arg(&source);
    if let Some(linker) = env::var_os("RUSTC_LINKER") {
        let mut option = std::ffi::OsString::from("linker=");
        option.push(linker);
        rustc.arg("-C").arg(option);
    }
    for argument in arguments {
        rustc.arg("-C").arg(format!("link-arg={argument}"));
    }
    if !rustc.stdout(Stdio::null()).stderr(Stdio::null()).status()?.success() {
        return Ok(false);
    }
    // A linker that knows no -static-pie is asked by rustc for -static, whose programs are always at the same addresses.
    let is_position_independent = fs::read(&program)?.get(16..18) == Some(&ET_DYN.to_le_bytes());
    let status = Command::new(&program)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    Ok(is_position_independent && status.code() == Some(42))
}

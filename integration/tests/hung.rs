//! A kernel that hangs, looked at from outside: what its memory says by virtual address, and which calls its vCPUs are in.
//!
//! It has panicked, and waits in that for ever. Its own System.map says what the addresses mean; the component boots it where it was linked, without
//! randomizing its base.

#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use sepal_integration::{Boot, Guest, artifacts};

/// Longer than any boot takes; it only ever makes a test fail.
const BOOT: Duration = Duration::from_secs(300);

/// Enough to meet the kernel in its timer's interrupt, too.
const LOOKS: usize = 200;

/// The kernel's symbols.
struct Symbols(BTreeMap<u64, String>);

impl Symbols {
    fn of(kernel: &artifacts::Kernel) -> Self {
        let map = fs::read_to_string(kernel.vmlinux.with_file_name("System.map")).unwrap();
        let symbol = |line: &str| {
            let mut words = line.split_whitespace();
            let address = u64::from_str_radix(words.next()?, 16).ok()?;
            Some((address, words.nth(1)?.to_owned()))
        };
        Self(map.lines().filter_map(symbol).collect())
    }

    fn address(&self, name: &str) -> u64 {
        *self.0.iter().find(|(_, symbol)| *symbol == name).unwrap().0
    }

    /// The function that an address is in, without what compilers add to its name.
    fn function(&self, address: u64) -> &str {
        let name = self.0.range(..=address).next_back().map_or("", |(_, name)| name);
        name.split('.').next().unwrap()
    }
}

/// The functions that a vCPU is in, innermost first.
fn functions(guest: &mut Guest, symbols: &Symbols, vcpu: u8) -> Vec<String> {
    let (frames, end) = guest.stack(vcpu, 64).unwrap();
    assert!(!end.is_empty());
    let mut found = Vec::new();
    for (i, frame) in (0..).zip(frames) {
        // A call may be the last instruction of its function.
        let address = frame.address - u64::from(i > 0);
        found.push(symbols.function(address).to_owned());
    }
    found
}

#[test]
fn a_kernel_that_hangs_is_looked_at() {
    if !Path::new("/dev/kvm").exists() {
        println!("skipped: no /dev/kvm");
        return;
    }
    let kernel = artifacts::kernel().unwrap();
    let symbols = Symbols::of(&kernel);
    let mut guest = Boot::new()
        .kernel(kernel.vmlinux)
        .initrd(artifacts::initramfs().unwrap())
        .cmdline("console=ttyS0 panic=0 sepal.run=script")
        .script("echo c >/proc/sysrq-trigger")
        .memory_mib(128)
        .start()
        .unwrap();
    guest.wait_for("end Kernel panic", BOOT).unwrap();

    // Where the vCPU is changes, and whether an interrupt came; how it came there does not.
    for _ in 0..LOOKS {
        let calls = functions(&mut guest, &symbols, 0);
        let mut rest = calls.iter();
        for name in [
            "panic",
            "sysrq_handle_crash",
            "__handle_sysrq",
            "write_sysrq_trigger",
            "vfs_write",
            "do_syscall_64",
        ] {
            assert!(rest.any(|call| call == name), "{name} in {calls:?}");
        }
    }
    let (_, end) = guest.stack(0, 64).unwrap();
    assert!(end.contains("a program"), "it was a script that asked for it: {end}");
    let (frames, end) = guest.stack(0, 2).unwrap();
    assert_eq!(frames.len(), 2);
    assert!(end.contains("no more than 2"), "{end}");

    let banner = symbols.address("linux_banner");
    let text = guest.read_virtual(0, banner, 65536).unwrap();
    assert!(
        text.starts_with(b"Linux version "),
        "{:?}",
        String::from_utf8_lossy(&text[..64])
    );
    assert_eq!(guest.read_virtual(0, banner, 0).unwrap(), b"");
    let found = guest.translate(0, banner).unwrap();
    assert_eq!(guest.read_physical(found.physical, 14).unwrap(), b"Linux version ");
    assert!(
        !found.writable && !found.user && !found.executable,
        "{found:?}: constants of the kernel"
    );
    let found = guest.translate(0, symbols.address("panic")).unwrap();
    assert!(
        !found.writable && !found.user && found.executable,
        "{found:?}: text of the kernel"
    );
    for (address, says) in [(0, "0x0 is not mapped"), (1 << 60, "0x1000000000000000 is no address")] {
        let error = guest.translate(0, address).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    let error = guest.stack(1, 64).unwrap_err();
    assert!(error.to_string().contains("vcpu"), "it has one vCPU: {error}");
    guest.finish().unwrap();
}

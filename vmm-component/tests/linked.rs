//! The component is linked statically where that works: a probe of `build.rs` that fails for another reason would otherwise go unnoticed, and only cost
//! every start.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::io::Errno;

/// Little-endian numbers of an ELF file of 64 bits (System V ABI, "Object Files").
struct Elf(Vec<u8>);

impl Elf {
    fn number<const N: usize>(&self, offset: usize) -> usize {
        let mut bytes = [0; 8];
        bytes[..N].copy_from_slice(&self.0[offset..offset + N]);
        u64::from_le_bytes(bytes).try_into().unwrap()
    }

    /// The types of its segments: `p_type` of each of `e_phnum` headers of `e_phentsize` bytes from `e_phoff`.
    fn segments(&self) -> Vec<usize> {
        assert_eq!(self.0[..6], *b"\x7fELF\x02\x01", "a little-endian ELF file of 64 bits");
        let (start, size, count) = (self.number::<8>(32), self.number::<2>(54), self.number::<2>(56));
        (0..count).map(|index| self.number::<4>(start + index * size)).collect()
    }
}

const PT_LOAD: usize = 1;
/// The path of a dynamic linker.
const PT_INTERP: usize = 3;

/// Whether the C compiler can make a static, position-independent program with packed relocations that runs here. Nothing of `build.rs` is used for that.
fn host_links_statically(folder: &Path) -> Result<bool, Errno> {
    let source = folder.join("probe.c");
    let program = folder.join("probe");
    fs::write(&source, "int main(void) { return 42; }\n").unwrap();
    let compiled = Command::new("cc")
        .args(["-static-pie", "-fPIE", "-Wl,-z,pack-relative-relocs", "-o"])
        .args([&program, &source])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    match compiled {
        Ok(status) if status.success() => Ok(Command::new(&program).status().unwrap().code() == Some(42)),
        Ok(_) => Ok(false),
        Err(error) => Err(Errno::from_io_error(&error).unwrap()),
    }
}

#[test]
fn the_component_needs_no_dynamic_linker_where_the_host_can_link_without() {
    if env!("SEPAL_LINKED") == "as asked" {
        println!("skipped: the build asks for another kind of linking");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    match host_links_statically(folder.path()) {
        Ok(true) => {}
        Ok(false) => return println!("skipped: the C compiler cannot link statically"),
        Err(errno) => return println!("skipped: no C compiler: {errno}"),
    }
    let segments = Elf(fs::read(env!("CARGO_BIN_EXE_vmm-component")).unwrap()).segments();
    assert!(segments.contains(&PT_LOAD), "{segments:?}");
    assert!(
        !segments.contains(&PT_INTERP),
        "the component is linked dynamically, though `cc -static-pie` works: see its build.rs"
    );
}

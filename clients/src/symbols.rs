//! Names for the addresses of a kernel, from its System.map or what its /proc/kallsyms says: a line a symbol, `ffffffff81000000 T _text`.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    path::Path,
};

use anyhow::{Context, Result, bail};

/// The largest file that is read.
const LARGEST: u64 = 256 << 20;
/// No function is longer: what is further behind one is something else.
const LONGEST: u64 = 1 << 20;

/// The functions of a kernel.
#[derive(Debug, Default)]
pub(crate) struct Symbols {
    /// By address, ascending, each once.
    functions: Vec<(u64, String)>,
}

impl Symbols {
    /// Reads them from a file.
    ///
    /// # Errors
    /// It cannot be read, or names no functions.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let name = path.display();
        let file = File::open(path).with_context(|| format!("reading the symbols in {name}"))?;
        let found = Self::parse(BufReader::new(file.take(LARGEST))).with_context(|| format!("{name}"))?;
        match found.functions.last() {
            None => bail!(
                "{name} names no functions; System.map of the guest's kernel does, with lines as \"ffffffff81000000 T _text\""
            ),
            Some((0, _)) => bail!("{name} has no addresses: /proc/kallsyms shows them to root only"),
            Some(_) => Ok(found),
        }
    }

    fn parse(mut from: impl BufRead) -> Result<Self> {
        let (mut functions, mut line) = (Vec::new(), Vec::new());
        while from.read_until(b'\n', &mut line)? > 0 {
            functions.extend(function(&String::from_utf8_lossy(&line)));
            line.clear();
        }
        // Of several names for one address the first in the file; what compilers put before functions is named last.
        functions.sort_by_key(|(address, name): &(u64, String)| (*address, name.starts_with("__pfx_")));
        functions.dedup_by_key(|(address, _)| *address);
        Ok(Self { functions })
    }

    /// The function that an address is in, and how far behind its beginning.
    pub(crate) fn of(&self, address: u64) -> Option<(&str, u64)> {
        let after = self.functions.partition_point(|(begin, _)| *begin <= address);
        let (begin, name) = self.functions.get(after.checked_sub(1)?)?;
        let offset = address - begin;
        (offset < LONGEST).then_some((name, offset))
    }

    /// The function that a call was made from which returns to this address: where it is the function's last instruction, the address is behind it.
    pub(crate) fn of_return(&self, address: u64) -> Option<(&str, u64)> {
        let (name, offset) = self.of(address.checked_sub(1)?)?;
        Some((name, offset + 1))
    }
}

/// A line's function, if it is about one.
fn function(line: &str) -> Option<(u64, String)> {
    let mut words = line.split_ascii_whitespace();
    let address = u64::from_str_radix(words.next()?, 16).ok()?;
    let is_text = matches!(words.next()?, "t" | "T" | "w" | "W");
    let shown: String = words.next()?.chars().filter(|c| !c.is_control()).collect();
    is_text.then_some((address, shown))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAP: &str = "\
0000000000000000 D __per_cpu_start
ffffffff81000000 T _text
ffffffff81000000 T startup_64
ffffffff81000100 t __pfx_do_idle
ffffffff81000110 t do_idle
ffffffff81000200 W arch_cpu_idle\t[module]
ffffffff81000300 D data
ffffffff81000400 T __pfx_last
ffffffff81000400 T last
";

    #[test]
    fn addresses_have_the_name_of_the_function_that_they_are_in() {
        let symbols = Symbols::parse(MAP.as_bytes()).unwrap();
        let at = |offset: u64| symbols.of(0xffff_ffff_8100_0000 + offset);
        assert_eq!(at(0), Some(("_text", 0)));
        assert_eq!(at(0x10f), Some(("__pfx_do_idle", 0xf)));
        assert_eq!(at(0x110), Some(("do_idle", 0)));
        assert_eq!(at(0x350), Some(("arch_cpu_idle", 0x150)), "data is no function");
        assert_eq!(at(0x401), Some(("last", 1)));
        assert_eq!(at(0x400 + LONGEST), None);
        assert_eq!(symbols.of(0xffff_ffff_80ff_ffff), None);
        let returns = |offset: u64| symbols.of_return(0xffff_ffff_8100_0000 + offset);
        assert_eq!(returns(0x200), Some(("do_idle", 0xf0)));
        assert_eq!(returns(0x201), Some(("arch_cpu_idle", 1)));
    }

    #[test]
    fn files_without_functions_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("map");
        let refused = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Symbols::read(&path).unwrap_err().to_string()
        };
        assert!(refused("").contains("names no functions"));
        assert!(refused("ffffffff81000000 D data\n\u{1}\n").contains("names no functions"));
        assert!(refused("0000000000000000 T _text\n").contains("to root only"));
        std::fs::remove_file(&path).unwrap();
        assert!(format!("{:#}", Symbols::read(&path).unwrap_err()).contains("No such file"));
    }

    proptest! {
        #[test]
        fn whatever_is_in_the_file_there_is_an_answer(bytes in proptest::collection::vec(any::<u8>(), 0..400), address in any::<u64>()) {
            let symbols = Symbols::parse(&bytes[..]).unwrap();
            prop_assert!(symbols.of(address).is_none_or(|(_, offset)| offset <= address));
            let _ = symbols.of_return(address);
        }
    }
}

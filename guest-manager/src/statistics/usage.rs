//! What the host says about the memory of a component's process. Nobody is asked or woken for it.

use std::{fs::File, io::Read};

/// Bytes of `/proc/PID/statm`: seven numbers of 64 bits, and blanks.
const MOST: usize = 7 * 21;

/// Memory of a process, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Usage {
    /// What it has of the host's memory.
    pub(super) resident: u64,
    /// How much of that is shared memory, or files.
    pub(super) shared: u64,
}

/// The memory of a process; none if it is no more, or 0.
pub(super) fn of(pid: u32) -> Option<Usage> {
    if pid == 0 {
        return None;
    }
    let mut file = File::open(format!("/proc/{pid}/statm")).ok()?;
    let mut text = [0; MOST];
    let length = file.read(&mut text).ok()?;
    parse(
        str::from_utf8(text.get(..length)?).ok()?,
        rustix::param::page_size() as u64,
    )
}

/// `/proc/PID/statm` (proc_pid_statm(5)): size, resident, shared, ..., in pages.
fn parse(text: &str, page: u64) -> Option<Usage> {
    let mut pages = text.split_ascii_whitespace().skip(1).map(str::parse::<u64>);
    let mut next = || pages.next()?.ok()?.checked_mul(page);
    Some(Usage {
        resident: next()?,
        shared: next()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_become_bytes() {
        let usage = Usage {
            resident: 300 * 4096,
            shared: 200 * 4096,
        };
        assert_eq!(parse("1000 300 200 10 0 50 0\n", 4096), Some(usage));
        for text in ["", "1000", "1000 300", "1000 x 200", "1 18446744073709551615 1"] {
            assert_eq!(parse(text, 4096), None, "{text}");
        }
    }

    #[test]
    fn this_process_has_memory_and_what_is_gone_has_none() {
        let usage = of(std::process::id()).unwrap();
        assert!(usage.resident > usage.shared && usage.shared > 0, "{usage:?}");
        assert_eq!(of(0), None);
        assert_eq!(of(u32::MAX), None);
    }
}

//! The host's processors, by the text of `/proc/cpuinfo`. Pure, but for [`usable`].

use std::collections::BTreeSet;

/// Most processors of a host that are counted: more than Linux can have (CONFIG_NR_CPUS of x86).
const MOST: usize = 16 * 1024;

/// The processors that are online.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cpus {
    /// The first one's name.
    pub model: String,
    /// How many there are.
    pub online: u32,
    /// In how many sockets; 1 at least.
    pub sockets: u32,
    /// Cores of a socket; 1 at least.
    pub cores_per_socket: u32,
    /// Processors of a core; 1 at least.
    pub threads_per_core: u32,
    /// The fastest one's present frequency, in MHz; 0 if the host does not tell.
    pub mhz: u32,
}

/// Reads the text of `/proc/cpuinfo` (proc_cpuinfo(5)): a block of `key : value` lines for each processor that is online, with an empty line after it.
pub(super) fn parse(cpuinfo: &str) -> Cpus {
    let mut found = Cpus::default();
    let (mut sockets, mut cores) = (BTreeSet::new(), BTreeSet::new());
    for block in cpuinfo.split("\n\n").take(MOST) {
        let field = |wanted: &str| {
            let mut fields = block.lines().filter_map(|line| line.split_once(':'));
            fields
                .find(|(key, _)| key.trim_end() == wanted)
                .map(|(_, value)| value.trim())
        };
        if field("processor").is_none() {
            continue;
        }
        // Where the host does not tell, each processor is a core of its own in the only socket.
        let socket = field("physical id").unwrap_or("0");
        let core = field("core id").map_or_else(|| format!("processor {}", found.online), str::to_owned);
        sockets.insert(socket);
        cores.insert((socket, core));
        found.online += 1;
        if found.model.is_empty() {
            found.model = field("model name").unwrap_or_default().to_owned();
        }
        let mhz = field("cpu MHz").and_then(|mhz| mhz.split('.').next()?.parse().ok());
        found.mhz = found.mhz.max(mhz.unwrap_or(0));
    }
    let count = |set: usize| u32::try_from(set).unwrap_or(u32::MAX).max(1);
    found.sockets = count(sockets.len());
    found.cores_per_socket = (count(cores.len()) / found.sockets).max(1);
    found.threads_per_core = (found.online / count(cores.len())).max(1);
    found
}

/// How many processors this process may run on; none if the kernel does not say, as on a host with more of them than it has room for in the answer.
pub(super) fn usable() -> Option<u32> {
    Some(rustix::thread::sched_getaffinity(None).ok()?.count())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn block(number: u32, socket: u32, core: u32) -> String {
        format!(
            "processor\t: {number}\nmodel name\t: A CPU: fast\ncpu MHz\t\t: {}.138\nphysical id\t: {socket}\ncore id\t\t: {core}\nflags\t\t: a b\n\n",
            2000 + number
        )
    }

    #[test]
    fn two_sockets_with_cores_of_two_threads() {
        let text: String = (0..16).map(|i| block(i, i / 8, i % 8 / 2)).collect();
        let found = parse(&text);
        assert_eq!((found.online, found.sockets), (16, 2));
        assert_eq!((found.cores_per_socket, found.threads_per_core), (4, 2));
        assert_eq!((&*found.model, found.mhz), ("A CPU: fast", 2015));
    }

    #[test]
    fn a_host_that_tells_little() {
        let found = parse("processor : 0\n\nprocessor : 1\n\nHardware : x\n");
        assert_eq!((found.online, found.sockets, found.cores_per_socket), (2, 1, 2));
        assert_eq!((found.threads_per_core, found.mhz), (1, 0));
        assert_eq!(parse("").sockets, 1);
    }

    #[test]
    fn this_host_has_processors() {
        let found = parse(&std::fs::read_to_string("/proc/cpuinfo").unwrap());
        assert!(found.online >= 1);
        assert!(usable().is_none_or(|usable| (1..=found.online).contains(&usable)));
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in "(processor|physical id|core id|cpu MHz|x|: |[0-9]{1,20}|\n|\n\n|\\PC){0,200}") {
            let found = parse(&text);
            prop_assert!(found.sockets >= 1 && found.cores_per_socket >= 1 && found.threads_per_core >= 1);
        }
    }
}

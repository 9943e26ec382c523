//! The host's NUMA cells: processors, memory and huge pages of each, from `/sys/devices/system/node` (linux/Documentation/ABI/stable/sysfs-devices-node).

use std::{fs, path::Path};

/// Where the kernel tells of them.
pub(super) const FOLDER: &str = "/sys/devices/system/node";
/// Most cells (CONFIG_NODES_SHIFT of x86 is 10 at most).
const MOST_CELLS: usize = 1024;
/// Most processors of a cell: what a number of 16 bits can tell apart.
const MOST_CPUS: usize = 1 << 16;
/// Most sizes of huge pages; x86 has two.
const MOST_SIZES: usize = 16;

/// A cell.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cell {
    /// Its number.
    pub id: u32,
    /// Its memory, in bytes.
    pub memory_bytes: u64,
    /// What nobody uses of it, in bytes.
    pub free_bytes: u64,
    /// Its processors.
    pub cpus: Vec<u16>,
    /// To each of the cells in order; 10 to itself.
    pub distances: Vec<u16>,
    /// The huge pages that are set aside, by size.
    pub huge_pages: Vec<HugePages>,
}

/// Huge pages of a size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HugePages {
    /// Bytes of each.
    pub size_bytes: u64,
    /// How many there are.
    pub total: u64,
    /// How many nobody uses.
    pub free: u64,
}

/// Reads what is below `folder`; empty where there is nothing to be read.
pub(super) fn read(folder: &Path) -> Vec<Cell> {
    let online = text(&folder.join("online"));
    let ids = parse_list(&online, MOST_CELLS);
    ids.into_iter()
        .map(|id| read_cell(u32::from(id), &folder.join(format!("node{id}"))))
        .collect()
}

fn read_cell(id: u32, folder: &Path) -> Cell {
    let meminfo = text(&folder.join("meminfo"));
    let distances = text(&folder.join("distance"));
    Cell {
        id,
        memory_bytes: parse_meminfo(&meminfo, "MemTotal").unwrap_or(0),
        free_bytes: parse_meminfo(&meminfo, "MemFree").unwrap_or(0),
        cpus: parse_list(&text(&folder.join("cpulist")), MOST_CPUS),
        distances: distances
            .split_ascii_whitespace()
            .filter_map(|distance| distance.parse().ok())
            .take(MOST_CELLS)
            .collect(),
        huge_pages: read_huge_pages(&folder.join("hugepages")),
    }
}

fn read_huge_pages(folder: &Path) -> Vec<HugePages> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries
        .filter_map(|entry| {
            let size_bytes = parse_size(entry.file_name().to_str()?)?;
            let count = |file: &str| text(&entry.path().join(file)).trim().parse().unwrap_or(0);
            Some(HugePages {
                size_bytes,
                total: count("nr_hugepages"),
                free: count("free_hugepages"),
            })
        })
        .take(MOST_SIZES)
        .collect();
    found.sort_by_key(|pages| pages.size_bytes);
    found
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Bytes of a page by the name of its folder: `hugepages-2048kB`.
fn parse_size(name: &str) -> Option<u64> {
    let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

/// A line of memory in `/proc/meminfo` (proc_meminfo(5)), or in a cell's, where `Node 0 ` is before it; in bytes.
pub(crate) fn parse_meminfo(meminfo: &str, wanted: &str) -> Option<u64> {
    let value = meminfo.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.rsplit(' ').next()? == wanted).then_some(value)
    })?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Numbers as the kernel lists them (`0-3,8`), at most `most` of them, in order and each once.
pub(super) fn parse_list(text: &str, most: usize) -> Vec<u16> {
    let mut found: Vec<u16> = text
        .trim()
        .split(',')
        .filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some(first.parse().ok()?..=last.parse().ok()?)
        })
        .flatten()
        .take(most)
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lists_of_numbers() {
        assert_eq!(parse_list("0-3,8\n", 99), [0, 1, 2, 3, 8]);
        assert_eq!(parse_list("5", 99), [5]);
        assert_eq!(parse_list("0-65535", 4), [0, 1, 2, 3]);
        for text in ["", "\n", "x", "3-", "-", "99999", "7-5"] {
            assert_eq!(parse_list(text, 99), Vec::<u16>::new(), "{text}");
        }
    }

    #[test]
    fn lines_of_memory() {
        let text =
            "MemTotal:       24684084 kB\nMemFree: 7 kB\nHugePages_Total:       0\nOdd: 18446744073709551615 kB\n";
        assert_eq!(parse_meminfo(text, "MemFree"), Some(7 << 10));
        assert_eq!(parse_meminfo("Node 1 MemFree: 2 kB\n", "MemFree"), Some(2048));
        for missing in ["Free", "HugePages_Total", "Odd", ""] {
            assert_eq!(parse_meminfo(text, missing), None, "{missing}");
        }
    }

    #[test]
    fn cells_of_a_host_with_two() {
        let folder = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("online", "0,2\n");
        for (id, cpus, distances) in [(0, "0-1", "10 21"), (2, "2-3", "21 10")] {
            write(
                &format!("node{id}/meminfo"),
                &format!("Node {id} MemTotal: 2048 kB\nNode {id} MemFree: 4 kB\n"),
            );
            write(&format!("node{id}/cpulist"), cpus);
            write(&format!("node{id}/distance"), distances);
        }
        write("node2/hugepages/hugepages-2048kB/nr_hugepages", "8\n");
        write("node2/hugepages/hugepages-2048kB/free_hugepages", "3\n");
        write("node2/hugepages/other/nr_hugepages", "8\n");
        let cells = read(folder.path());
        assert_eq!(cells.iter().map(|cell| cell.id).collect::<Vec<_>>(), [0, 2]);
        assert_eq!(
            (&cells[1].cpus[..], &cells[1].distances[..]),
            (&[2, 3][..], &[21, 10][..])
        );
        assert_eq!((cells[1].memory_bytes, cells[1].free_bytes), (2 << 20, 4 << 10));
        assert!(cells[0].huge_pages.is_empty());
        let pages = HugePages {
            size_bytes: 2 << 20,
            total: 8,
            free: 3,
        };
        assert_eq!(cells[1].huge_pages, [pages]);
        assert!(read(&folder.path().join("nowhere")).is_empty());
    }

    proptest! {
        #[test]
        fn any_list_is_read(text in "[0-9,\\-\n x]{0,60}", most in 0..100_usize) {
            let list = parse_list(&text, most);
            prop_assert!(list.len() <= most && list.is_sorted());
        }
    }
}

//! The parsers, on what kernels print, and processes of our own.

use std::process::Command;

use super::{
    Activity, Mapping, Memory, Process, beyond_guest, descendants, largest, parse_activity, parse_parent, parse_smaps,
    status_field, total,
};

const SMAPS: &str = "\
5587c0000000-5587c0100000 r-xp 00001000 08:01 1234                       /usr/lib/a program (deleted)
Size:               1024 kB
KernelPageSize:        4 kB
Rss:                 800 kB
Pss:                 400 kB
Pss_Dirty:             0 kB
Shared_Clean:        780 kB
Private_Clean:        12 kB
Private_Dirty:         8 kB
VmFlags: rd ex mr mw me
7f0000000000-7f0008000000 rw-s 00000000 00:01 77                         /memfd:guest (deleted)
Size:             131072 kB
Rss:                2048 kB
Pss:                2048 kB
Private_Clean:         0 kB
Private_Dirty:      2048 kB
7f0010000000-7f0010021000 rw-p 00000000 00:00 0
Size:                132 kB
Rss:                  16 kB
Pss:                  16 kB
Private_Clean:         0 kB
Private_Dirty:        16 kB
";

fn mapping(name: &str, inode: u64, access: &str, size: u64) -> Mapping {
    Mapping {
        name: name.to_owned(),
        inode,
        access: access.to_owned(),
        size,
        memory: Memory { rss: 4, pss: 4, uss: 4 },
    }
}

fn names(mappings: Option<Vec<Mapping>>) -> Option<Vec<String>> {
    mappings.map(|mappings| mappings.into_iter().map(|mapping| mapping.name).collect())
}

#[test]
fn mappings_are_read_with_their_names() {
    let mappings = parse_smaps(SMAPS);
    let names: Vec<_> = mappings.iter().map(|mapping| mapping.name.as_str()).collect();
    assert_eq!(names, ["/usr/lib/a program (deleted)", "/memfd:guest (deleted)", ""]);
    assert_eq!(mappings[0].inode, 1234);
    assert_eq!(mappings[0].access, "r-xp");
    assert_eq!(mappings[1].size, 131_072);
    let all = total(&mappings);
    assert_eq!((all.rss, all.pss, all.uss), (2864, 2464, 2084));
}

#[test]
fn nonsense_has_no_mappings() {
    for text in [
        "",
        "Rss: 4 kB",
        "x-y rw-p 0 0 0",
        "0-1 rw-p 0 0 many",
        "0-1 rw-p",
        "Rss: many kB\n\n:\n",
    ] {
        assert_eq!(parse_smaps(text), []);
    }
}

#[test]
fn the_memory_of_the_guest_is_left_out() {
    let rest = beyond_guest(parse_smaps(SMAPS), 131_072).unwrap();
    assert_eq!(total(&rest).pss, 416);
    assert_eq!(beyond_guest(parse_smaps(SMAPS), 131_073), None);
}

#[test]
fn a_file_in_pieces_is_one_memory() {
    let split = vec![
        mapping("/memfd:guest", 7, "rw-s", 3000),
        mapping("/memfd:guest", 7, "rw-s", 5000),
        mapping("/memfd:ring", 8, "rw-s", 100),
        mapping("", 0, "rw-p", 9000),
    ];
    assert_eq!(
        names(beyond_guest(split, 8000)),
        Some(vec!["/memfd:ring".to_owned(), String::new()])
    );
}

#[test]
fn without_a_file_it_is_what_is_large_and_writable() {
    let anonymous = vec![
        mapping("", 0, "rw-p", 8000),
        mapping("[anon:guest]", 0, "rw-p", 8000),
        mapping("", 0, "---p", 9000),
        mapping("[heap]", 0, "rw-p", 9000),
        mapping("", 0, "rw-p", 132),
    ];
    let rest = beyond_guest(anonymous, 8000).unwrap();
    assert_eq!(
        rest.iter().map(|mapping| mapping.size).collect::<Vec<_>>(),
        [9000, 9000, 132]
    );
}

#[test]
fn the_largest_are_named_by_file() {
    let mappings = [
        mapping("/usr/bin/one", 1, "r-xp", 8),
        mapping("/usr/bin/one", 1, "r-xp", 8),
        mapping("", 0, "rw-p", 8),
        mapping("[heap]", 0, "rw-p", 8),
    ];
    let expected = [("one r-xp".to_owned(), 8), ("[heap] rw-p".to_owned(), 4)];
    assert_eq!(largest(&mappings, 2), expected);
}

#[test]
fn activity_is_switches_and_time_run() {
    let status = "Name:\tvcpu\nVmPTE:\t     120 kB\nvoluntary_ctxt_switches:\t30\nnonvoluntary_ctxt_switches:\t4\n";
    let activity = parse_activity(status, "123456 789 10\n").unwrap();
    assert_eq!((activity.wakeups, activity.cpu_ns), (34, 123_456));
    assert_eq!(status_field(status, "VmPTE"), Some(120));
    assert_eq!(status_field(status, "Vm"), None);
    assert_eq!(parse_activity("", ""), None);
    let earlier = Activity {
        wakeups: 40,
        cpu_ns: 123_000,
    };
    assert_eq!(
        activity - earlier,
        Activity {
            wakeups: 0,
            cpu_ns: 456
        }
    );
}

#[test]
fn parents_are_found_after_any_name() {
    assert_eq!(parse_parent("17 (a) b) R 4 17 17 0 -1 4194560"), Some(4));
    assert_eq!(parse_parent("17 (a"), None);
}

#[test]
fn a_tree_has_everything_below_once() {
    let parents = [(2, 1), (3, 1), (4, 2), (5, 4), (9, 8), (8, 9)];
    assert_eq!(descendants(&parents, 2), [2, 4, 5]);
    assert_eq!(descendants(&parents, 8), [8, 9]);
    assert_eq!(descendants(&parents, 7), [7]);
}

#[test]
fn a_process_can_be_read() {
    // Of one's own, so that nothing of it comes and goes meanwhile as threads of this one do.
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    let process = Process(child.id());
    let tree = process.tree();
    let mappings = process.mappings();
    let threads = (process.threads(), process.thread_names());
    let descriptors = process.descriptors();
    let activity = process.activity();
    let tables = process.page_tables();
    let name = process.name();
    let beyond = process.beyond_guest(1 << 40);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(tree.unwrap(), [process]);
    assert!(total(&mappings.unwrap()).rss > 0);
    assert_eq!((threads.0.unwrap(), threads.1.unwrap().len()), (1, 1));
    assert!(descriptors.unwrap() > 0);
    assert!(activity.unwrap().cpu_ns > 0);
    assert!(tables.unwrap() > 0);
    assert!(!name.unwrap().is_empty());
    assert!(beyond.unwrap_err().to_string().contains("not recognized"));
}

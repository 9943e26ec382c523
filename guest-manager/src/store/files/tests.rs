//! The files against a disk that is cut off at every step, and against real folders.

use std::{collections::BTreeMap, fs, path::Path};

use proptest::prelude::*;

use super::*;
use crate::store::{
    disk::Folder,
    simulated::{Failure, Simulated},
};

type Model = BTreeMap<String, Vec<u8>>;

#[derive(Debug, Clone)]
enum Work {
    Put(String, Vec<u8>),
    Delete(String),
}

impl Work {
    fn on_disk(&self, files: &Files<Simulated>) -> io::Result<()> {
        match self {
            Self::Put(name, content) => files.put(name, content),
            Self::Delete(name) => files.delete(name),
        }
    }

    fn on_model(&self, model: &mut Model) {
        match self {
            Self::Put(name, content) => {
                model.insert(name.clone(), content.clone());
            }
            Self::Delete(name) => {
                model.remove(name);
            }
        }
    }
}

fn work() -> impl Strategy<Value = Work> {
    let name = || prop::sample::select(vec!["web", "db"]).prop_map(str::to_owned);
    let content = prop::collection::vec(any::<u8>(), 0..40);
    prop_oneof![
        3 => (name(), content).prop_map(|(name, content)| Work::Put(name, content)),
        1 => name().prop_map(Work::Delete),
    ]
}

fn files(disk: &Simulated) -> Files<Simulated> {
    Files::new(disk.clone(), Content::Definition)
}

fn recovered(disk: &Simulated) -> Found {
    files(disk).recover(|_, _| Ok(())).unwrap()
}

/// What is there is `before` or `after`, whole, and nothing else.
fn check(disk: &Simulated, before: &Model, after: &Model) {
    let either = |found: &Found| {
        let contents = &found.contents;
        assert!(
            contents == before || contents == after,
            "{found:?}\nis neither {before:?}\nnor {after:?}"
        );
    };
    let found = recovered(disk);
    either(&found);
    assert_eq!((&found.problems[..], found.untouchable.len()), (&[][..], 0));
    let names = disk.names().unwrap();
    assert_eq!(names.len(), found.contents.len(), "something is left: {names:?}");
    // Nor does the next cut change that.
    disk.survivors().iter().for_each(|disk| either(&recovered(disk)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_cut_at_any_step_leaves_the_old_or_the_new(works in prop::collection::vec(work(), 1..5)) {
        let whole = Simulated::default();
        for work in &works {
            work.on_disk(&files(&whole)).unwrap();
        }
        for cut in 0..=whole.steps() {
            let disk = Simulated::default();
            disk.fail_at(cut, Failure::Cut);
            let mut before = Model::new();
            let mut after = Model::new();
            for work in &works {
                work.on_model(&mut after);
                if work.on_disk(&files(&disk)).is_err() {
                    break;
                }
                work.on_model(&mut before);
            }
            for disk in disk.survivors() {
                // A start that is cut off, too, at each of its steps.
                let again = disk.survivors().remove(0);
                recovered(&again);
                for cut in 0..again.steps() {
                    let again = disk.survivors().remove(0);
                    again.fail_at(cut, Failure::Cut);
                    let _ = files(&again).recover(|_, _| Ok(()));
                    again.survivors().iter().for_each(|disk| check(disk, &before, &after));
                }
                check(&disk, &before, &after);
            }
        }
    }

    #[test]
    fn a_step_that_fails_is_told_and_leaves_the_old_or_the_new(works in prop::collection::vec(work(), 1..4), last in work()) {
        let whole = Simulated::default();
        let mut before = Model::new();
        for work in &works {
            work.on_disk(&files(&whole)).unwrap();
            work.on_model(&mut before);
        }
        let mut after = before.clone();
        last.on_model(&mut after);
        let steps = whole.steps();
        last.on_disk(&files(&whole)).unwrap();
        for step in 0..whole.steps() - steps {
            let disk = Simulated::default();
            works.iter().for_each(|work| work.on_disk(&files(&disk)).unwrap());
            disk.fail_at(step, Failure::Once);
            assert!(last.on_disk(&files(&disk)).is_err());
            check(&disk, &before, &after);
            last.on_disk(&files(&disk)).unwrap();
            check(&disk, &after, &after);
        }
    }
}

#[test]
fn what_would_not_be_read_again_is_not_kept() {
    let disk = Simulated::default();
    let files = files(&disk);
    files.put("web", b"one").unwrap();
    let error = files.put("web", &vec![0; MAX_CONTENT + 1]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
    files.put("large", &vec![0; MAX_CONTENT]).unwrap();
    let found = recovered(&disk);
    assert_eq!(
        (&found.contents["web"][..], found.contents["large"].len()),
        (&b"one"[..], MAX_CONTENT)
    );
    assert!(found.problems.is_empty(), "{:?}", found.problems);
}

fn folder(path: &Path) -> Files<Folder> {
    Files::new(Folder::open(path).unwrap(), Content::Definition)
}

#[test]
fn a_folder_keeps_what_was_put_into_it() {
    let above = tempfile::tempdir().unwrap();
    let path = above.path().join("definitions");
    let files = folder(&path);
    files.put("web", b"one").unwrap();
    files.put("web", b"two").unwrap();
    files.put("db", b"three").unwrap();
    files.put("gone", b"four").unwrap();
    files.delete("gone").unwrap();
    files.delete("never-there").unwrap();
    let found = folder(&path).recover(|_, _| Ok(())).unwrap();
    let contents: Vec<_> = found
        .contents
        .iter()
        .map(|(name, content)| (&name[..], &content[..]))
        .collect();
    assert_eq!(contents, [("db", &b"three"[..]), ("web", b"two")]);
    let mut names = files.disk.names().unwrap();
    names.retain(|name| !matches!(&name[..], "." | ".."));
    assert_eq!(names.len(), 2, "{names:?}");
}

#[test]
fn what_is_broken_is_kept_aside_and_told() {
    let above = tempfile::tempdir().unwrap();
    let path = above.path().join("definitions");
    let files = folder(&path);
    let there = |name: &str| path.join(name);
    for name in ["good", "torn", "twice", "newer", "refused"] {
        files.put(name, name.as_bytes()).unwrap();
    }
    let tear = |name: &str, keep: usize| {
        let bytes = fs::read(there(name)).unwrap();
        fs::write(there(name), &bytes[..keep]).unwrap();
    };
    tear("torn.sepal", 26);
    tear("twice.sepal", 0);
    fs::write(there("twice.sepal.broken"), "an earlier one").unwrap();
    let mut newer = fs::read(there("newer.sepal")).unwrap();
    newer[8] = 9;
    fs::write(there("newer.sepal"), &newer).unwrap();
    fs::write(there("half.sepal.new"), "half").unwrap();
    fs::write(there("README"), "somebody's").unwrap();
    fs::create_dir(there("folder.sepal")).unwrap();
    let check = |name: &str, _: &[u8]| {
        if name == "refused" {
            Err(Wrong::Broken("no".to_owned()))
        } else {
            Ok(())
        }
    };
    let found = folder(&path).recover(check).unwrap();
    assert_eq!(found.contents.keys().collect::<Vec<_>>(), ["good"]);
    assert_eq!(found.untouchable.iter().collect::<Vec<_>>(), ["folder", "newer"]);
    let told = found.problems.join("\n");
    for words in [
        "torn.sepal is broken, and is kept as torn.sepal.broken: it has 26 bytes",
        "twice.sepal is broken, and is kept as twice.sepal.broken-2: it does not begin",
        "refused.sepal is broken, and is kept as refused.sepal.broken: no",
        "newer.sepal is left alone, and not used: it was written in version 9",
        "folder.sepal is left alone, and not used: it cannot be read: it is not a regular file",
    ] {
        assert!(told.contains(words), "{words} is not in {told}");
    }
    assert_eq!(fs::read(there("twice.sepal.broken")).unwrap(), b"an earlier one");
    assert_eq!(fs::read(there("newer.sepal")).unwrap(), newer);
    assert_eq!(fs::read(there("README")).unwrap(), b"somebody's");
    assert!(!there("half.sepal.new").exists());
    // What is aside stays there, and is told once.
    let again = folder(&path).recover(check).unwrap();
    assert_eq!(again.problems.len(), 2, "{:?}", again.problems);
}

#[test]
fn what_cannot_be_put_in_order_costs_nobody_but_itself() {
    let above = tempfile::tempdir().unwrap();
    let path = above.path().join("definitions");
    let files = folder(&path);
    files.put("good", b"good").unwrap();
    // No name for it could be longer.
    let long = format!("{}.sepal", "x".repeat(249));
    fs::write(path.join(&long), "somebody's").unwrap();
    fs::create_dir_all(path.join("folder.sepal.new/in-it")).unwrap();
    let pipe = |name: &str| {
        let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU);
        rustix::fs::mknodat(rustix::fs::CWD, path.join(name), kind, mode, 0).unwrap();
    };
    pipe("pipe.sepal");
    std::os::unix::fs::symlink("good.sepal", path.join("link.sepal")).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(path.join("socket.sepal")).unwrap();
    // Of another kind, as a later version may have it here.
    fs::write(path.join("other.sepal"), wrap(Content::Settings, b"other")).unwrap();
    let found = folder(&path).recover(|_, _| Ok(())).unwrap();
    assert_eq!(found.contents.keys().collect::<Vec<_>>(), ["good"]);
    assert_eq!(
        found.untouchable.iter().map(|name| &name[..4]).collect::<Vec<_>>(),
        ["link", "othe", "pipe", "sock", "xxxx"]
    );
    let told = found.problems.join("\n");
    for words in [
        "folder.sepal.new was not finished, and cannot be taken away",
        "x.sepal is left alone, and not used: it does not begin as a file of the guest manager's does; and it cannot be kept aside",
        "other.sepal is left alone, and not used: there is something else in it (kind 2)",
        "link.sepal is left alone",
        "pipe.sepal is left alone",
        "socket.sepal is left alone",
    ] {
        assert!(told.contains(words), "{words} is not in {told}");
    }
    assert!(path.join(&long).exists() && path.join("other.sepal").exists());
    // Nor does a pipe hold up what is written.
    pipe("web.sepal.new");
    assert!(files.put("web", b"web").is_err());
    files.put("web", b"web").unwrap();
}

#[test]
fn what_another_version_has_another_use_for_is_left_alone() {
    let above = tempfile::tempdir().unwrap();
    let files = folder(above.path());
    files.put("later", b"later").unwrap();
    let unknown = |_: &str, _: &[u8]| Err(Wrong::Unknown("it is of a later version".to_owned()));
    let found = folder(above.path()).recover(unknown).unwrap();
    assert!(found.contents.is_empty() && found.untouchable.contains("later"));
    assert_eq!(folder(above.path()).recover(|_, _| Ok(())).unwrap().contents.len(), 1);
}

#[test]
fn a_folder_that_was_taken_away_is_told() {
    let above = tempfile::tempdir().unwrap();
    let path = above.path().join("definitions");
    let files = folder(&path);
    files.put("web", b"web").unwrap();
    fs::remove_dir_all(&path).unwrap();
    fs::create_dir(&path).unwrap();
    let error = files.put("web", b"again").unwrap_err();
    assert!(error.to_string().contains("was taken away"), "{error}");
    files.delete("web").unwrap();
}

//! Early virtual machines: those that a device's maker has defined, each for one program.
//!
//! ```xml
//! <early_vms>
//!     <early_vm>
//!         <name>name</name>
//!         <cid>100</cid>
//!         <path>/absolute/path/of/the/program</path>
//!     </early_vm>
//! </early_vms>
//! ```
//!
//! All files `early_vms*.xml` of the folder count together.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use roxmltree::{Document, Node};
use sepal_schema::config::device::MIN_CID;

use crate::environment;

/// Where the files are, unless [`FOLDER_VARIABLE`] names another folder.
const FOLDER: &str = "/etc/avf";
/// Names another folder.
const FOLDER_VARIABLE: &str = "SEPAL_AVF_EARLY_DIR";
/// Largest file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Why a machine is not an early one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EarlyError {
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error("{}: it is no regular file", path.display())]
    NoFile { path: PathBuf },
    #[error("{}: it has more than {MAX_FILE} bytes, which are the most that are read", path.display())]
    TooLarge { path: PathBuf },
    #[error("{}: {wrong}", path.display())]
    Wrong { path: PathBuf, wrong: Wrong },
    #[error("there is no early_vms*.xml in {}", .0.display())]
    None(PathBuf),
    #[error("no early virtual machine is named {name:?} in {}", folder.display())]
    Unknown { name: String, folder: PathBuf },
    #[error("the early virtual machine {name:?} is for the program {}, and this is {}", path.display(), own.display())]
    OtherProgram { name: String, path: PathBuf, own: PathBuf },
    #[error("two early virtual machines have the {what} {value}")]
    Twice { what: &'static str, value: String },
}

/// What is wrong in a file.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Wrong {
    #[error("line {line}: {0}", line = .0.pos().row)]
    Xml(#[from] roxmltree::Error),
    #[error("line {line}: <{found}> where <{wanted}> belongs")]
    Element {
        line: u32,
        found: String,
        wanted: &'static str,
    },
    #[error("line {line}: <early_vm> has no <{missing}>")]
    Missing { line: u32, missing: &'static str },
    #[error("line {line}: {found:?} is no context id: those are {MIN_CID} to 4294967294")]
    Cid { line: u32, found: String },
    #[error("line {line}: {found:?} is no absolute path")]
    Path { line: u32, found: String },
}

/// An early virtual machine.
#[derive(Debug, Clone, PartialEq, Eq)]
struct EarlyVm {
    name: String,
    cid: u32,
    path: PathBuf,
}

/// The context id of the early virtual machine of this name, which is for the running program.
pub(crate) fn cid(name: &str) -> Result<u32, EarlyError> {
    let folder = environment::variable(FOLDER_VARIABLE).map_or_else(|| PathBuf::from(FOLDER), PathBuf::from);
    let error = |path: &Path, error| EarlyError::Io {
        path: path.to_owned(),
        error,
    };
    let all = read(&folder)?;
    let own = Path::new("/proc/self/exe");
    let own = fs::read_link(own).map_err(|cause| error(own, cause))?;
    find(&all, name, &own, &folder)
}

fn find(all: &[EarlyVm], name: &str, own: &Path, folder: &Path) -> Result<u32, EarlyError> {
    let found = all.iter().find(|vm| vm.name == name);
    let vm = found.ok_or_else(|| EarlyError::Unknown {
        name: name.to_owned(),
        folder: folder.to_owned(),
    })?;
    // Where the path leads over symbolic links, the program's own is what they lead to.
    let path = fs::canonicalize(&vm.path).unwrap_or_else(|_| vm.path.clone());
    if path != own {
        return Err(EarlyError::OtherProgram {
            name: name.to_owned(),
            path: vm.path.clone(),
            own: own.to_owned(),
        });
    }
    Ok(vm.cid)
}

/// The machines of all files in a folder.
fn read(folder: &Path) -> Result<Vec<EarlyVm>, EarlyError> {
    let listed = fs::read_dir(folder).and_then(|entries| {
        let paths = entries.map(|entry| Ok(entry?.path()));
        paths.collect::<io::Result<Vec<_>>>()
    });
    let mut paths = match listed {
        Ok(paths) => paths,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            return Err(EarlyError::Io {
                path: folder.to_owned(),
                error,
            });
        }
    };
    paths.retain(|path| path.file_name().and_then(OsStr::to_str).is_some_and(counts));
    if paths.is_empty() {
        return Err(EarlyError::None(folder.to_owned()));
    }
    paths.sort();
    let mut all: Vec<EarlyVm> = Vec::new();
    for path in paths {
        for vm in parse(&text(&path)?).map_err(|wrong| EarlyError::Wrong { path, wrong })? {
            if all.iter().any(|other| other.name == vm.name) {
                return Err(EarlyError::Twice {
                    what: "name",
                    value: vm.name,
                });
            }
            if all.iter().any(|other| other.cid == vm.cid) {
                return Err(EarlyError::Twice {
                    what: "cid",
                    value: vm.cid.to_string(),
                });
            }
            all.push(vm);
        }
    }
    Ok(all)
}

fn counts(file: &str) -> bool {
    file.starts_with("early_vms") && file.ends_with(".xml")
}

fn text(path: &Path) -> Result<String, EarlyError> {
    let error = |error| EarlyError::Io {
        path: path.to_owned(),
        error,
    };
    // Asked first: opening a pipe would wait for its other end.
    if !fs::metadata(path).map_err(error)?.is_file() {
        return Err(EarlyError::NoFile { path: path.to_owned() });
    }
    let mut text = String::new();
    let file = File::open(path).map_err(error)?;
    file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(error)?;
    if text.len() as u64 > MAX_FILE {
        return Err(EarlyError::TooLarge { path: path.to_owned() });
    }
    Ok(text)
}

/// The machines of a file.
fn parse(text: &str) -> Result<Vec<EarlyVm>, Wrong> {
    let document = Document::parse(text)?;
    let root = document.root_element();
    let line = |node: Node<'_, '_>| document.text_pos_at(node.range().start).row;
    let expect = |node: Node<'_, '_>, wanted: &'static str| match node.tag_name().name() {
        found if found == wanted => Ok(()),
        found => Err(Wrong::Element {
            line: line(node),
            found: found.to_owned(),
            wanted,
        }),
    };
    expect(root, "early_vms")?;
    let mut all = Vec::new();
    for vm in root.children().filter(Node::is_element) {
        expect(vm, "early_vm")?;
        let field = |name: &'static str| {
            let missing = || Wrong::Missing {
                line: line(vm),
                missing: name,
            };
            let node = vm.children().find(|node| node.has_tag_name(name)).ok_or_else(missing)?;
            let text = node.text().unwrap_or_default().trim();
            if text.is_empty() {
                return Err(missing());
            }
            Ok((node, text.to_owned()))
        };
        let (_, name) = field("name")?;
        let (node, found) = field("cid")?;
        let cid = found.parse().ok().filter(|cid| (MIN_CID..u32::MAX).contains(cid));
        let cid = cid.ok_or_else(|| Wrong::Cid {
            line: line(node),
            found,
        })?;
        let (node, found) = field("path")?;
        if !found.starts_with('/') {
            return Err(Wrong::Path {
                line: line(node),
                found,
            });
        }
        all.push(EarlyVm {
            name,
            cid,
            path: found.into(),
        });
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = "<?xml version=\"1.0\"?>
<early_vms>
    <!-- one of the vendor's -->
    <early_vm><name>first</name><cid>100</cid><path>/bin/one</path></early_vm>
    <early_vm>
        <name> second </name>
        <cid>101</cid>
        <path>/bin/two</path>
    </early_vm>
</early_vms>";

    fn wrong(inner: &str) -> String {
        parse(&format!("<early_vms>\n{inner}</early_vms>"))
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn a_file_is_read() {
        let all = parse(TWO).unwrap();
        let names: Vec<_> = all.iter().map(|vm| (vm.name.as_str(), vm.cid)).collect();
        assert_eq!(names, [("first", 100), ("second", 101)]);
        assert_eq!(all[1].path, Path::new("/bin/two"));
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        let cut = parse("<early_vms>\n<early_vm></early_vms>").unwrap_err().to_string();
        assert!(cut.starts_with("line 2: "), "{cut}");
        assert_eq!(
            parse("<vms/>").unwrap_err().to_string(),
            "line 1: <vms> where <early_vms> belongs"
        );
        assert_eq!(wrong("<vm/>"), "line 2: <vm> where <early_vm> belongs");
        assert_eq!(
            wrong("<early_vm><cid>5</cid></early_vm>"),
            "line 2: <early_vm> has no <name>"
        );
        for cid in ["2", "4294967295", "x", "-5"] {
            let vm = format!("<early_vm><name>a</name>\n<cid>{cid}</cid><path>/a</path></early_vm>");
            assert!(wrong(&vm).starts_with(&format!("line 3: \"{cid}\"")), "{}", wrong(&vm));
        }
        let relative = "<early_vm><name>a</name><cid>5</cid><path>a</path></early_vm>";
        assert_eq!(wrong(relative), "line 2: \"a\" is no absolute path");
    }

    #[test]
    fn a_machine_is_for_one_program() {
        let all = parse(TWO).unwrap();
        let folder = Path::new("/etc/avf");
        let found = |name, own| find(&all, name, Path::new(own), folder);
        assert!(matches!(found("third", "/bin/one"), Err(EarlyError::Unknown { .. })));
        let other = found("first", "/bin/two").unwrap_err().to_string();
        assert!(other.contains("/bin/one") && other.contains("/bin/two"), "{other}");
        let own = fs::read_link("/proc/self/exe").unwrap();
        let ours = EarlyVm {
            name: "ours".into(),
            cid: 7,
            path: own.clone(),
        };
        assert_eq!(find(&[ours], "ours", &own, folder).unwrap(), 7);
    }

    #[test]
    fn all_files_of_the_folder_count() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(read(folder.path()), Err(EarlyError::None(_))));
        assert!(matches!(read(&folder.path().join("none")), Err(EarlyError::None(_))));
        fs::write(folder.path().join("other.xml"), "not one of them").unwrap();
        fs::write(folder.path().join("early_vms.xml"), TWO).unwrap();
        assert_eq!(read(folder.path()).unwrap().len(), 2);
        fs::write(
            folder.path().join("early_vms_2.xml"),
            "<early_vms><early_vm><name>x</name><cid>100</cid><path>/x</path></early_vm></early_vms>",
        )
        .unwrap();
        let twice = read(folder.path()).unwrap_err().to_string();
        assert_eq!(twice, "two early virtual machines have the cid 100");
        fs::write(folder.path().join("early_vms_2.xml"), "<early_vms>").unwrap();
        let broken = read(folder.path()).unwrap_err().to_string();
        assert!(broken.contains("early_vms_2.xml"), "{broken}");
    }

    #[test]
    fn only_files_of_a_bounded_size_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("early_vms.xml");
        fs::create_dir(&path).unwrap();
        assert!(matches!(read(folder.path()), Err(EarlyError::NoFile { .. })));
        fs::remove_dir(&path).unwrap();
        File::create(&path).unwrap().set_len(MAX_FILE + 1).unwrap();
        assert!(matches!(read(folder.path()), Err(EarlyError::TooLarge { .. })));
    }
}

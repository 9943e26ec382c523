//! virtiofsd, by the first words of its protocol (FUSE, `include/uapi/linux/fuse.h`).

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::*;
use crate::vhost_user::fs_config;

/// Where distributions put it; `VIRTIOFSD` names another place.
const PLACES: [&str; 3] = [
    "/usr/libexec/virtiofsd",
    "/usr/lib/qemu/virtiofsd",
    "/usr/lib/virtiofsd",
];

fn program() -> Option<PathBuf> {
    let named = std::env::var_os("VIRTIOFSD").map(PathBuf::from);
    named.or_else(|| PLACES.map(PathBuf::from).into_iter().find(|path| path.exists()))
}

struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts virtiofsd for `shared`. It is handed a socket that listens, so there is nothing to wait for.
fn start(program: &Path, shared: &Path, socket: &Path) -> (Daemon, UnixStream) {
    let listener = std::os::unix::net::UnixListener::bind(socket).unwrap();
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
    let fd = listener.as_raw_fd();
    let is_c = Command::new(program)
        .arg("--help")
        .output()
        .is_ok_and(|help| String::from_utf8_lossy(&help.stdout).contains("-o source=PATH"));
    let mut command = Command::new(program);
    command.arg(format!("--fd={fd}"));
    if is_c {
        command.arg("-o").arg(format!("source={}", shared.display()));
    } else {
        command.arg("--shared-dir").arg(shared).arg("--sandbox=none");
    }
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    (Daemon(child), UnixStream::connect(socket).unwrap())
}

fn words<const N: usize>(words: [u32; N]) -> Vec<u8> {
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// A FUSE request: length, operation, unique, node, uid, gid, pid, padding.
fn fuse(operation: u32, unique: u64, node: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = words([40 + body.len() as u32, operation]);
    bytes.extend(unique.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.extend(words([0; 4]));
    bytes.extend_from_slice(body);
    bytes
}

/// The payload of a FUSE answer without an error.
fn ok(answer: &[u8], unique: u64) -> &[u8] {
    let word = |at: usize| u32::from_le_bytes(answer[at..at + 4].try_into().unwrap());
    assert_eq!((word(4), word(8), word(0) as usize), (0, unique as u32, answer.len()));
    &answer[16..]
}

const INIT: u32 = 26;
const LOOKUP: u32 = 1;

fn greet(bench: &mut Bench, unique: u64) {
    // Version 7.31, and nothing optional.
    bench.request(1, &fuse(INIT, unique, 0, &words([7, 31, 0x2_0000, 0])), 4096);
    let answer = answer(bench, 1);
    assert_eq!(ok(&answer, unique)[..4], 7u32.to_le_bytes());
}

fn size_of(bench: &mut Bench, unique: u64, name: &str) -> u64 {
    let mut name = name.as_bytes().to_vec();
    name.push(0);
    bench.request(1, &fuse(LOOKUP, unique, 1, &name), 4096);
    let answer = answer(bench, 1);
    // fuse_entry_out: 40 bytes, then the attributes: inode, size.
    u64::from_le_bytes(ok(&answer, unique)[48..56].try_into().unwrap())
}

#[test]
fn virtiofsd_serves_files_and_its_successor_goes_on() {
    let Some(program) = program() else {
        println!("skipped: no virtiofsd");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let shared = folder.path().join("shared");
    std::fs::create_dir(&shared).unwrap();
    std::fs::write(shared.join("file"), "twelve bytes").unwrap();
    let settings = Settings {
        kind: DeviceKind::FileSystem,
        queue_sizes: vec![128, 128],
        config: ConfigSource::Given(fs_config("share", 1).unwrap()),
    };

    let (first, socket) = start(&program, &shared, &folder.path().join("first"));
    let (device, handle) = VhostUser::connect(socket.into(), settings).unwrap();
    let mut bench = Bench::new(device, true);
    bench.activate();
    greet(&mut bench, 1);
    assert_eq!(size_of(&mut bench, 2, "file"), 12);

    drop(first);
    assert_eq!(reports(&mut bench, 1), [lost("the back end closed the connection")]);
    let (_second, socket) = start(&program, &shared, &folder.path().join("second"));
    handle.reconnect(socket.into());
    assert_eq!(reports(&mut bench, 1), [restored()]);
    std::fs::write(shared.join("file"), "other").unwrap();
    greet(&mut bench, 3);
    assert_eq!(size_of(&mut bench, 4, "file"), 5);
}

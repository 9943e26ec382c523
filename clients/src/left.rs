//! Whether guests go on that no manager serves: their keepers' sockets are in the folder where the user's own manager keeps its state.

use std::{
    env, fs, io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

/// Where root's manager keeps its state, as any manager does without `--state` (docs/operation.md).
const OF_ROOT: &str = "/var/lib/sepal";

/// Whether a keeper of the user's own managers waits for the next one.
pub(crate) fn waits() -> bool {
    let variable = |name| env::var_os(name).map(PathBuf::from);
    let uid = rustix::process::geteuid().as_raw();
    folder(variable("XDG_STATE_HOME"), variable("HOME"), uid).is_some_and(|folder| waits_in(&folder.join("keepers")))
}

fn folder(state: Option<PathBuf>, home: Option<PathBuf>, uid: u32) -> Option<PathBuf> {
    match (state, home) {
        (Some(state), _) if state.is_absolute() => Some(state.join("sepal")),
        _ if uid == 0 => Some(OF_ROOT.into()),
        (_, Some(home)) if home.is_absolute() => Some(home.join(".local/state/sepal")),
        _ => None,
    }
}

fn waits_in(keepers: &Path) -> bool {
    let entries = fs::read_dir(keepers).into_iter().flatten().flatten();
    let mut paths = entries.map(|entry| entry.path());
    paths.any(|path| path.extension().is_some_and(|end| end == "sock") && listens(&path))
}

/// Whether somebody listens there, who notices nothing of this: a keeper takes packets, so that a stream cannot be connected (EPROTOTYPE, unix(7)).
fn listens(path: &Path) -> bool {
    match UnixStream::connect(path) {
        Ok(_) => true,
        Err(error) => !matches!(
            error.kind(),
            io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
        ),
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

    use super::*;

    #[test]
    fn the_folder_is_the_managers() {
        let path = |state: Option<&str>, home: Option<&str>, uid| {
            let found = folder(state.map(PathBuf::from), home.map(PathBuf::from), uid);
            found.map(|path| path.display().to_string())
        };
        assert_eq!(path(Some("/s"), Some("/h"), 7).as_deref(), Some("/s/sepal"));
        assert_eq!(path(None, Some("/root"), 0).as_deref(), Some(OF_ROOT));
        assert_eq!(path(Some("s"), Some("/h"), 7).as_deref(), Some("/h/.local/state/sepal"));
        assert_eq!(path(None, Some("h"), 7), None);
    }

    #[test]
    fn only_a_keeper_that_is_there_waits() {
        let above = tempfile::tempdir().unwrap();
        let keepers = above.path().join("keepers");
        assert!(!waits_in(&keepers));
        fs::create_dir(&keepers).unwrap();
        let path = keepers.join("1.sock");
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None);
        let socket = socket.unwrap();
        rustix::net::bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&socket, 1).unwrap();
        fs::write(keepers.join("1.key"), [7; 32]).unwrap();
        assert!(waits_in(&keepers));
        let came = rustix::net::accept(&socket);
        assert_eq!(came.unwrap_err(), rustix::io::Errno::AGAIN, "it notices nothing");
        drop(socket);
        assert!(!waits_in(&keepers), "it has ended, and left its socket");
    }
}

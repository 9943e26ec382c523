//! Whether guests go on that no manager serves: their keepers' sockets are in the folder where the user's own manager keeps its state.

use std::{fs, io, os::unix::net::UnixStream, path::Path};

use sepal_schema::state;

/// Whether a keeper of the user's own managers waits for the next one.
pub(crate) fn waits() -> bool {
    state::default_path().is_some_and(|folder| waits_in(&folder.join(state::KEEPERS)))
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

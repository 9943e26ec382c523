//! Where metrics are served: on a Unix socket, or on a TCP port of the loopback interface.

use std::{
    fmt, fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{FileTypeExt, MetadataExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

/// An address to listen on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Listen {
    Unix(PathBuf),
    /// Of the loopback interface.
    Tcp(SocketAddr),
}

impl Listen {
    /// Reads `unix:PATH`, `127.0.0.1:PORT`, `[::1]:PORT` or `localhost:PORT`.
    ///
    /// # Errors
    /// It is none, or one that others than this machine reach: there is no telling who asks.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                "" => Err("a path is missing after unix:".to_owned()),
                path => Ok(Self::Unix(path.into())),
            };
        }
        let address = match text.strip_prefix("localhost:") {
            Some(port) => port
                .parse()
                .ok()
                .map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port))),
            None => text.parse().ok(),
        };
        let address: SocketAddr =
            address.ok_or_else(|| format!("'{text}' is no address: unix:PATH, 127.0.0.1:PORT and [::1]:PORT are"))?;
        match is_loopback(address.ip()) {
            true => Ok(Self::Tcp(address)),
            false => Err(format!(
                "{} is reached from other machines, and whoever asks there is told everything: listen on 127.0.0.1, [::1] or a Unix socket",
                address.ip()
            )),
        }
    }
}

fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "http://{address}/metrics"),
        }
    }
}

/// A socket that listens. One with a path removes it in the end, unless it is another's by then.
#[derive(Debug)]
pub(super) struct Socket {
    pub(super) fd: OwnedFd,
    /// Where it is, with the port that was chosen.
    pub(super) at: Listen,
    /// Device and number of the socket's file.
    file: Option<(u64, u64)>,
}

impl Socket {
    /// Listens. What a process that is no more has left at a path is replaced.
    ///
    /// # Errors
    /// Those of the system; `EADDRINUSE` if somebody listens there.
    pub(super) fn bind(at: &Listen) -> io::Result<Self> {
        match at {
            Listen::Tcp(address) => {
                let listener = TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                let at = Listen::Tcp(listener.local_addr()?);
                let fd = listener.into();
                Ok(Self { fd, at, file: None })
            }
            Listen::Unix(path) => {
                let listener = match UnixListener::bind(path) {
                    Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_left_over(path) => {
                        fs::remove_file(path)?;
                        UnixListener::bind(path)?
                    }
                    bound => bound?,
                };
                listener.set_nonblocking(true)?;
                Ok(Self {
                    fd: listener.into(),
                    at: at.clone(),
                    file: file_id(path),
                })
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Listen::Unix(path) = &self.at
            && self.file.is_some()
            && file_id(path) == self.file
        {
            // Whoever comes next replaces it.
            let _ = fs::remove_file(path);
        }
    }
}

fn file_id(path: &Path) -> Option<(u64, u64)> {
    let file = fs::symlink_metadata(path).ok()?;
    Some((file.dev(), file.ino()))
}

/// Whether there is a socket on which nobody listens.
fn is_left_over(path: &Path) -> bool {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    is_socket && UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_this_machine_alone() {
        assert_eq!(Listen::parse("unix:/run/x"), Ok(Listen::Unix("/run/x".into())));
        for (text, shown) in [
            ("127.0.0.1:9100", "http://127.0.0.1:9100/metrics"),
            ("127.1.2.3:1", "http://127.1.2.3:1/metrics"),
            ("[::1]:9100", "http://[::1]:9100/metrics"),
            ("localhost:9100", "http://127.0.0.1:9100/metrics"),
        ] {
            assert_eq!(Listen::parse(text).unwrap().to_string(), shown);
        }
        for text in [
            "0.0.0.0:9100",
            "[::]:9100",
            "192.168.1.1:9100",
            "[fe80::1]:9",
            "[::ffff:10.0.0.1]:9",
        ] {
            assert!(Listen::parse(text).unwrap_err().contains("other machines"), "{text}");
        }
        for text in [
            "",
            "unix:",
            "9100",
            ":9100",
            "127.0.0.1",
            "example.com:80",
            "localhost:x",
            "/run/x",
        ] {
            assert!(Listen::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_socket_is_removed_in_the_end_and_what_is_left_over_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics");
        let at = Listen::Unix(path.clone());
        let socket = Socket::bind(&at).unwrap();
        assert_eq!(Socket::bind(&at).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        // Another has taken the place meanwhile.
        fs::remove_file(&path).unwrap();
        let other = Socket::bind(&at).unwrap();
        drop(socket);
        assert!(path.exists());
        drop(other);
        assert!(!path.exists());
        // Nobody listens any more on a listener of the standard library's, and its file stays.
        drop(UnixListener::bind(&path).unwrap());
        drop(Socket::bind(&at).unwrap());
        assert!(!path.exists());
        fs::write(&path, "not a socket").unwrap();
        assert_eq!(Socket::bind(&at).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }
}

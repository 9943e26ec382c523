//! What a service manager (systemd, or one that does as it does) gives this process, and wants to hear of it: listening sockets, and a socket for notices.
//!
//! ```text
//!   LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES --> passed: sockets that listen already, from descriptor 3 on (sd_listen_fds(3))
//!   NOTIFY_SOCKET <-- Notifier: READY=1, STATUS=..., RELOADING=1, STOPPING=1 (sd_notify(3))
//! ```

use std::{
    ffi::OsStr,
    io,
    os::{
        fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::{ffi::OsStrExt, net::UnixListener},
    },
    path::PathBuf,
};

use rustix::{
    net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt},
    time::ClockId,
};

/// The number of the first socket that is passed (SD_LISTEN_FDS_START).
const FIRST: RawFd = 3;
/// Most sockets that are passed; there are two uses for one.
const MOST: usize = 16;

/// Why what was passed cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// A variable of the environment is not what it should be.
    #[error("{variable} is \"{value}\", which {why}")]
    Variable {
        /// Its name.
        variable: &'static str,
        /// What it is.
        value: String,
        /// What is wrong with that.
        why: String,
    },
    /// A descriptor is no listening Unix socket.
    #[error("the descriptor {number} that the service manager passes ({name}) {why}")]
    Descriptor {
        /// Its number.
        number: RawFd,
        /// Its name.
        name: String,
        /// What is wrong with it.
        why: String,
    },
}

/// What a socket is for that was passed, by its name (FileDescriptorName= of its unit, or the unit's own name).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// `manager`, `sepal.socket`, or no name at all: the manager's socket.
    Main,
    /// `read-only`, `sepal-read-only.socket`: for whoever wants to look.
    ReadOnly,
}

/// A socket that listens already.
#[derive(Debug)]
pub struct Passed {
    /// The socket.
    pub socket: UnixListener,
    /// Where it listens.
    pub path: PathBuf,
    /// What for.
    pub purpose: Purpose,
}

/// Takes the sockets that were passed to this process; none if there are none. To be called once, before anything else opens descriptors under their numbers.
///
/// # Errors
/// [`ServiceError`].
pub fn passed() -> Result<Vec<Passed>, ServiceError> {
    let variable = |name| std::env::var(name).ok();
    let purposes = parse(std::process::id(), variable)?;
    (FIRST..)
        .zip(purposes)
        .map(|(number, (name, purpose))| {
            let taken = take(number).map_err(|why| ServiceError::Descriptor { number, name, why });
            taken.map(|(socket, path)| Passed { socket, path, purpose })
        })
        .collect()
}

/// The names and purposes of what is passed to the process `pid`, in the order of their numbers.
fn parse(pid: u32, variable: impl Fn(&'static str) -> Option<String>) -> Result<Vec<(String, Purpose)>, ServiceError> {
    // Meant for this process, not for one that it descends from.
    if variable("LISTEN_PID").and_then(|text| text.parse().ok()) != Some(pid) {
        return Ok(Vec::new());
    }
    let wrong = |variable, value: &str, why: &str| ServiceError::Variable {
        variable,
        value: value.to_owned(),
        why: why.to_owned(),
    };
    let fds = variable("LISTEN_FDS").unwrap_or_default();
    let count: usize = fds.parse().map_err(|_| wrong("LISTEN_FDS", &fds, "is no number"))?;
    if count > MOST {
        return Err(wrong(
            "LISTEN_FDS",
            &fds,
            "are more sockets than a guest manager has uses for",
        ));
    }
    let names = variable("LISTEN_FDNAMES");
    let mut names = names.as_deref().map(|names| names.split(':'));
    let name = || match &mut names {
        None => Some("unknown"),
        Some(names) => names.next(),
    };
    let names: Vec<_> = std::iter::repeat_with(name).take(count).collect();
    names
        .into_iter()
        .map(|name| match name {
            Some(name @ ("manager" | "sepal.socket" | "unknown" | "")) => Ok((name.to_owned(), Purpose::Main)),
            Some(name @ ("read-only" | "sepal-read-only.socket")) => Ok((name.to_owned(), Purpose::ReadOnly)),
            Some(name) => Err(wrong(
                "LISTEN_FDNAMES",
                name,
                "names no socket of a guest manager: \"manager\" and \"read-only\" do",
            )),
            None => Err(wrong(
                "LISTEN_FDNAMES",
                "",
                "names fewer sockets than LISTEN_FDS counts",
            )),
        })
        .collect()
}

/// Takes the descriptor `number` over, which is to be a Unix socket that listens.
fn take(number: RawFd) -> Result<(UnixListener, PathBuf), String> {
    // SAFETY: only asks about the number.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if flags < 0 {
        return Err("is not open".to_owned());
    }
    // SAFETY: it is open, and belongs to nobody in this process: who passed it says by LISTEN_FDS that it is for whoever takes it here, which is done once.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    let path = check(fd.as_fd()).map_err(|why| format!("cannot be used: {why}"))?;
    let prepare = rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC);
    prepare.map_err(|error| error.to_string())?;
    Ok((fd.into(), path))
}

/// Where a socket listens.
fn check(fd: BorrowedFd<'_>) -> Result<PathBuf, String> {
    let said = |errno: rustix::io::Errno| errno.to_string();
    if sockopt::socket_domain(fd).map_err(said)? != AddressFamily::UNIX
        || sockopt::socket_type(fd).map_err(said)? != SocketType::STREAM
    {
        return Err("it is no Unix stream socket".to_owned());
    }
    if !sockopt::socket_acceptconn(fd).map_err(said)? {
        return Err("it does not listen".to_owned());
    }
    let address = rustix::net::getsockname(fd).map_err(said)?;
    let address = SocketAddrUnix::try_from(address).map_err(said)?;
    match address.path_bytes() {
        Some(path) => Ok(PathBuf::from(OsStr::from_bytes(path))),
        None => Err("it has no path".to_owned()),
    }
}

/// Tells the service manager how this process fares; nobody, if there is none.
#[derive(Debug, Default)]
pub struct Notifier(Option<(OwnedFd, SocketAddrUnix)>);

impl Notifier {
    /// For the service manager that the environment names (NOTIFY_SOCKET).
    pub fn from_environment() -> Self {
        let Some(name) = std::env::var_os("NOTIFY_SOCKET") else {
            return Self::default();
        };
        Self::to(name.as_encoded_bytes()).unwrap_or_else(|error| {
            tracing::warn!("the service manager cannot be told anything: NOTIFY_SOCKET: {error}");
            Self::default()
        })
    }

    /// `name`: a path, or `@` and the name of an abstract socket.
    fn to(name: &[u8]) -> io::Result<Self> {
        let address = match name.split_first() {
            Some((b'@', name)) => SocketAddrUnix::new_abstract_name(name)?,
            Some((b'/', _)) => SocketAddrUnix::new(name)?,
            _ => {
                return Err(io::Error::other(
                    "it is neither a path from the root nor an abstract name",
                ));
            }
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
        Ok(Self(Some((socket, address))))
    }

    /// Whether somebody is told.
    pub fn is_heard(&self) -> bool {
        self.0.is_some()
    }

    /// The manager serves, as `status` says.
    pub fn ready(&self, status: &str) {
        self.tell(&format!("READY=1\nMAINPID={}\nSTATUS={status}", std::process::id()));
    }

    /// It reads again what it reads at its start; [`Notifier::ready`] follows.
    pub fn reloading(&self) {
        let now = rustix::time::clock_gettime(ClockId::Monotonic);
        let microseconds = now.tv_sec.saturating_mul(1_000_000).saturating_add(now.tv_nsec / 1000);
        self.tell(&format!("RELOADING=1\nMONOTONIC_USEC={microseconds}"));
    }

    /// It ends, for this reason.
    pub fn stopping(&self, why: &str) {
        self.tell(&format!("STOPPING=1\nSTATUS=ending: {why}"));
    }

    fn tell(&self, words: &str) {
        let Some((socket, address)) = &self.0 else { return };
        // As sd_notify(3) has it, who cannot be told is no reason to fail.
        if let Err(error) = rustix::net::sendto(socket, words.as_bytes(), SendFlags::NOSIGNAL, address) {
            tracing::debug!("the service manager is not told: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use super::*;

    fn purposes(variables: &[(&str, &str)]) -> Result<Vec<Purpose>, String> {
        let of = |name| {
            variables
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        };
        let parsed = parse(7, of).map_err(|error| error.to_string())?;
        Ok(parsed.into_iter().map(|(_, purpose)| purpose).collect())
    }

    #[test]
    fn sockets_are_for_the_process_that_is_named() {
        assert_eq!(purposes(&[]), Ok(vec![]));
        assert_eq!(purposes(&[("LISTEN_PID", "8"), ("LISTEN_FDS", "1")]), Ok(vec![]));
        assert_eq!(
            purposes(&[("LISTEN_PID", "7"), ("LISTEN_FDS", "1")]),
            Ok(vec![Purpose::Main])
        );
        let named = [
            ("LISTEN_PID", "7"),
            ("LISTEN_FDS", "2"),
            ("LISTEN_FDNAMES", "read-only:sepal.socket"),
        ];
        assert_eq!(purposes(&named), Ok(vec![Purpose::ReadOnly, Purpose::Main]));
        for (fds, names, word) in [
            ("", "", "no number"),
            ("99", "", "more sockets"),
            ("1", "ssh", "\"ssh\""),
            ("2", "manager", "fewer"),
        ] {
            let error = purposes(&[("LISTEN_PID", "7"), ("LISTEN_FDS", fds), ("LISTEN_FDNAMES", names)]).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn only_what_listens_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!(check(listener.as_fd()), Ok(path));
        let (stream, _other) = UnixStream::pair().unwrap();
        assert!(check(stream.as_fd()).unwrap_err().contains("does not listen"));
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(check(file.as_fd()).is_err());
        let datagrams = UnixDatagram::unbound().unwrap();
        assert!(check(datagrams.as_fd()).unwrap_err().contains("no Unix stream"));
    }

    #[test]
    fn notices_are_heard() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let notifier = Notifier::to(path.as_os_str().as_encoded_bytes()).unwrap();
        let heard = || {
            let mut buffer = [0; 256];
            let length = socket.recv(&mut buffer).unwrap();
            String::from_utf8_lossy(&buffer[..length]).into_owned()
        };
        notifier.ready("all is well");
        let ready = heard();
        assert!(
            ready.starts_with("READY=1\n") && ready.ends_with("STATUS=all is well"),
            "{ready}"
        );
        notifier.reloading();
        assert!(heard().starts_with("RELOADING=1\nMONOTONIC_USEC="));
        notifier.stopping("of a signal");
        assert_eq!(heard(), "STOPPING=1\nSTATUS=ending: of a signal");
        // Nobody listens any more, and nothing comes of that.
        drop(socket);
        notifier.ready("x");
        assert!(!Notifier::default().is_heard() && Notifier::to(b"relative").is_err());
    }
}

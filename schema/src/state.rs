//! Where a guest manager keeps its state unless told otherwise, and what tells others of it.

use std::path::{Path, PathBuf};

/// Where root's manager keeps it.
const OF_ROOT: &str = "/var/lib/sepal";

/// The folder of a user's manager: `sepal` in the folder for state (`$XDG_STATE_HOME`) where there is one; else `/var/lib/sepal` for root, and
/// `~/.local/state/sepal` for anybody else with a home.
pub fn default_folder(state: Option<&Path>, home: Option<&Path>, uid: u32) -> Option<PathBuf> {
    match (state, home) {
        (Some(state), _) if state.is_absolute() => Some(state.join("sepal")),
        _ if uid == 0 => Some(PathBuf::from(OF_ROOT)),
        (_, Some(home)) if home.is_absolute() => Some(home.join(".local/state/sepal")),
        _ => None,
    }
}

/// The folder of the calling user's manager; none for somebody without a home.
pub fn default_path() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    let (state, home) = (variable("XDG_STATE_HOME"), variable("HOME"));
    default_folder(state.as_deref(), home.as_deref(), rustix::process::geteuid().as_raw())
}

/// In that folder: how the next manager finds the keepers of guests that go on without one.
pub const KEEPERS: &str = "keepers";

/// The file beside a manager's socket that is locked by whoever listens there, and has its process id.
pub fn lock_of(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    path.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_is_the_users() {
        let path = |state: Option<&str>, home: Option<&str>, uid| {
            let path = default_folder(state.map(Path::new), home.map(Path::new), uid);
            path.map(|path| path.display().to_string())
        };
        assert_eq!(path(Some("/s"), Some("/h"), 7).as_deref(), Some("/s/sepal"));
        assert_eq!(path(Some("/s"), None, 0).as_deref(), Some("/s/sepal"));
        assert_eq!(path(None, Some("/root"), 0).as_deref(), Some("/var/lib/sepal"));
        assert_eq!(path(Some("s"), Some("/h"), 7).as_deref(), Some("/h/.local/state/sepal"));
        assert_eq!(path(None, Some("h"), 7), None);
    }
}

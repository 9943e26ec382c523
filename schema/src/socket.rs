//! Where a guest manager listens unless told otherwise.

use std::path::{Path, PathBuf};

/// Name of the manager's socket in its folder.
pub const SOCKET: &str = "manager.sock";

/// The folder of a user's manager: `sepal` in the runtime folder (`$XDG_RUNTIME_DIR`) where there is one; else `/run/sepal` for root, and
/// `/tmp/sepal-UID` for anybody else, where the manager makes sure that nobody else owns it.
pub fn default_folder(runtime_dir: Option<&Path>, uid: u32) -> PathBuf {
    match runtime_dir {
        Some(runtime) if runtime.is_absolute() => runtime.join("sepal"),
        _ if uid == 0 => PathBuf::from("/run/sepal"),
        _ => PathBuf::from(format!("/tmp/sepal-{uid}")),
    }
}

/// The socket of the calling user's manager.
pub fn default_path() -> PathBuf {
    let runtime_dir = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    default_folder(runtime_dir.as_deref(), rustix::process::getuid().as_raw()).join(SOCKET)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_is_the_users() {
        let folder = |runtime: Option<&str>, uid| default_folder(runtime.map(Path::new), uid).display().to_string();
        assert_eq!(folder(Some("/run/user/7"), 7), "/run/user/7/sepal");
        assert_eq!(folder(None, 0), "/run/sepal");
        assert_eq!(folder(None, 7), "/tmp/sepal-7");
        assert_eq!(folder(Some("relative"), 7), "/tmp/sepal-7");
    }
}

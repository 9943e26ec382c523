//! What of a definition is not so good now: told to whoever defines it. What can be put right later must not keep it from being defined.

use std::{collections::BTreeSet, io};

use sepal_schema::{
    config::{File, GuestConfig},
    error::{Error, Kind},
};

use crate::{client::Client, manager::Manager, resources};

/// Most warnings that are told at a time.
const MAX_WARNINGS: usize = 16;

/// What would keep a guest with this configuration from starting now. `client` sent it.
///
/// # Errors
/// What would always keep it from starting here.
pub(crate) async fn warnings(manager: &Manager, config: &GuestConfig, client: &Client) -> Result<Vec<String>, Error> {
    let no_resources = |error: io::Error| Error::new(Kind::NoResources, error.to_string());
    let named = files(config);
    let look = move || named.into_iter().filter(|(_, path)| is_missing(path)).collect();
    let missing: Vec<(String, String)> = manager.handle.spawn_foreign(look).await.map_err(no_resources)?;
    let fields: BTreeSet<&str> = missing.iter().map(|(field, _)| &field[..]).collect();
    let (rest, disks) = without(config.try_clone().map_err(no_resources)?, &fields);
    let sentence = |(field, path): &(String, String)| format!("{field}: {path} is not there");
    let mut warnings: Vec<String> = missing.iter().map(sentence).collect();
    match resources::check(manager, rest, client)
        .await
        .map_err(|error| renumbered(error, &disks))
    {
        Ok(()) => {}
        Err(error) if passes(error.kind) => warnings.push(error.message),
        Err(error) => return Err(error),
    }
    warnings.truncate(MAX_WARNINGS);
    Ok(warnings)
}

/// Whether what is wrong may be gone by the time of the start: others have it, or there is not enough of it, or it is not there yet.
fn passes(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::NotFound
            | Kind::AlreadyRunning
            | Kind::AlreadyBound
            | Kind::NoResources
            | Kind::NoStorage
            | Kind::GuestInitializationFailure
            | Kind::FailedServiceConnect
    )
}

fn is_missing(path: &str) -> bool {
    std::fs::metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// The files that a configuration names by their paths, each with its field.
fn files(config: &GuestConfig) -> Vec<(String, String)> {
    let mut files = Vec::new();
    let mut add = |field: String, file: &File| {
        if let File::Path(path) = file {
            files.push((field, path.clone()));
        }
    };
    add("kernel".into(), &config.kernel);
    add("initrd".into(), &config.initrd);
    for (i, disk) in config.disks.iter().enumerate() {
        add(format!("disks[{i}].image"), &disk.image);
        add(format!("disks[{i}].scratch"), &disk.scratch);
        for (j, below) in disk.backing.iter().enumerate() {
            add(format!("disks[{i}].backing[{j}]"), &below.file);
        }
    }
    files
}

/// A configuration without what names these fields' files, so that the rest can be looked at; and which of its disks those are that are left.
fn without(mut config: GuestConfig, missing: &BTreeSet<&str>) -> (GuestConfig, Vec<usize>) {
    if missing.contains("kernel") {
        // An initrd is for that kernel.
        (config.kernel, config.initrd) = (File::None, File::None);
    }
    if missing.contains("initrd") {
        config.initrd = File::None;
    }
    let whole = |i: &usize| {
        let prefix = format!("disks[{i}].");
        !missing.iter().any(|field| field.starts_with(&prefix))
    };
    let left: Vec<usize> = (0..config.disks.len()).filter(whole).collect();
    let mut index = 0..;
    config.disks.retain(|_| index.next().is_some_and(|i| left.contains(&i)));
    (config, left)
}

/// An error about a configuration without some of the disks, as one about the whole.
fn renumbered(error: Error, left: &[usize]) -> Error {
    let seen = error.about.strip_prefix("disks[").and_then(|rest| rest.split_once(']'));
    let Some((number, rest)) = seen else { return error };
    let Some(disk) = number.parse().ok().and_then(|i: usize| left.get(i)) else {
        return error;
    };
    let (was, is) = (format!("disks[{number}]"), format!("disks[{disk}]"));
    Error {
        about: format!("{is}{rest}"),
        message: error.message.replace(&was, &is),
        ..error
    }
}

#[cfg(test)]
mod tests {
    use sepal_schema::{config::device::Disk, config_capnp::guest_config::disk::Mode};

    use super::*;

    fn config() -> GuestConfig {
        let disk = |name: &str| Disk::new(File::Path(format!("/{name}")), Mode::ReadWrite);
        GuestConfig {
            kernel: File::Path("/kernel".into()),
            initrd: File::Path("/initrd".into()),
            disks: vec![disk("a"), disk("b"), disk("c")],
            ..GuestConfig::default()
        }
    }

    #[test]
    fn what_is_missing_is_left_out_and_the_rest_is_told_by_its_own_number() {
        let fields: Vec<_> = files(&config()).into_iter().map(|(field, _)| field).collect();
        assert_eq!(
            fields,
            ["kernel", "initrd", "disks[0].image", "disks[1].image", "disks[2].image"]
        );
        let (rest, left) = without(config(), &["kernel", "disks[1].image"].into());
        assert!(rest.kernel.is_none() && rest.initrd.is_none());
        assert_eq!((rest.disks.len(), &left[..]), (2, &[0, 2][..]));
        let error = Error::bad_config("disks[1].image", "disks[1].image: it is a folder");
        let error = renumbered(error, &left);
        assert_eq!(
            (&error.about[..], &error.message[..]),
            ("disks[2].image", "disks[2].image: it is a folder")
        );
        for about in ["networks[0].tapNamed", "disks[7].image", "disks[", ""] {
            let error = Error::bad_config(about, "bad");
            assert_eq!(renumbered(error.clone(), &left), error);
        }
    }
}

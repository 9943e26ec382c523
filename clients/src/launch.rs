//! `guest launch`.

use std::path::Path;

use anyhow::Result;
use sepal_schema::{
    config::GuestConfig,
    error::{Outcome, read_completion},
    guest_capnp::guest,
    manager_capnp::guest_manager,
    transport::Handle,
};

use crate::{
    args::Launch,
    assemble,
    manager::Manager,
    place::{Otherwise, Place},
    session, show, status, uploads,
};

/// A guest that was launched; it is stopped when the lease is dropped.
struct Launched {
    guest: guest::Client,
    lease: guest_manager::lease::Client,
    name: String,
}

/// Boots a guest; stays connected to its serial port until it ends, unless it is to be left running. Or only tells whether it could be booted.
pub(crate) async fn launch(handle: &Handle, place: &Place, args: &Launch) -> Result<u8> {
    let otherwise = match args.detach {
        true => Otherwise::Daemon,
        false => Otherwise::Private,
    };
    // What is wrong with the files here needs no manager to be told.
    let mut config = assemble::config(args.name.as_deref(), &args.options, place.is_here())?;
    let mut manager = Manager::connect(handle, place, otherwise)?;
    let disks: Vec<&Path> = args
        .options
        .devices
        .disks
        .iter()
        .map(|disk| disk.file.as_path())
        .collect();
    let ready = match manager.carries_fds() {
        true => Ok(()),
        false => uploads::replace(&manager, &mut config, &disks).await,
    };
    let launched = match ready {
        Ok(()) if args.check => check(&manager, config).await.map(|()| None),
        Ok(()) => send(&manager, config, args.detach).await.map(Some),
        Err(error) => Err(error),
    };
    let outcome = match launched {
        // Nothing to be told: what is wrong would have been.
        Ok(None) => Ok(status::SUCCESS),
        Ok(Some(launched)) if args.detach => {
            show::print(format!("{}\n", launched.name).as_bytes())?;
            Ok(status::SUCCESS)
        }
        Ok(Some(Launched { guest, lease, name })) => {
            let ended = session::launched(handle, &manager, &guest, &name).await;
            drop(lease);
            ended
        }
        Err(error) => Err(manager.explain(handle, error).await),
    };
    manager.close(handle).await;
    outcome
}

async fn check(manager: &Manager, config: GuestConfig) -> Result<()> {
    let mut request = manager.client.check_request();
    config.encode(request.get().init_config(), &manager.fds())?;
    Ok(read_completion(request.send().promise.await?.get()?)?)
}

async fn send(manager: &Manager, config: GuestConfig, detach: bool) -> Result<Launched> {
    let mut request = manager.client.launch_request();
    config.encode(request.get().init_config(), &manager.fds())?;
    request.get().set_detach(detach);
    let response = request.send().promise.await?;
    let launched = response.get()?.outcome()?;
    Ok(Launched {
        guest: launched.get_guest()?,
        lease: launched.get_lease()?,
        name: launched.get_name()?.to_string()?,
    })
}

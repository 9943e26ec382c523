//! `guest launch`.

use std::path::PathBuf;

use anyhow::Result;
use sepal_schema::{
    config::GuestConfig,
    error::{Outcome, read_completion},
    guest_capnp::guest,
    manager_capnp::guest_manager,
    transport::Handle,
};

use crate::{
    again::Back,
    args::Launch,
    assemble,
    manager::Manager,
    place::{Otherwise, Place},
    session, show, status, uploads,
};

/// A guest that was launched; it is stopped when the lease is dropped.
pub(crate) struct Launched {
    pub(crate) guest: guest::Client,
    pub(crate) lease: guest_manager::lease::Client,
    pub(crate) name: String,
}

/// Boots a guest; stays connected to its serial port until it ends, unless it is to be left running. Or only tells whether it could be booted.
pub(crate) async fn launch(handle: &Handle, place: &Place, args: &Launch) -> Result<u8> {
    // What is wrong with the files here needs no manager to be told.
    let (name, file, here) = (args.name.as_deref(), args.file.as_deref(), place.is_here());
    let mut assembled = assemble::assemble(name, file, &args.options, here, false)?;
    let durable = assembled.is_durable();
    let otherwise = match args.detach || durable {
        true => Otherwise::Daemon,
        false => Otherwise::Private,
    };
    let disks = assembled.disks();
    let config = assembled.open()?;
    let mut manager = Manager::connect(handle, place, otherwise)?;
    let launched = try_launch(&manager, config, &disks, args).await;
    let outcome = match launched {
        // Nothing to be told: what is wrong would have been.
        Ok(None) => Ok(status::SUCCESS),
        Ok(Some(launched)) if args.detach => {
            show::print(format!("{}\n", launched.name).as_bytes())?;
            Ok(status::SUCCESS)
        }
        Ok(Some(launched)) => {
            let back = match durable {
                true => Back::of_lease(place, &launched).await,
                false => None,
            };
            session::launched(handle, &manager, &launched, back).await
        }
        Err(error) => Err(manager.explain(handle, assembled.explain(error)).await),
    };
    manager.close(handle).await;
    outcome
}

/// Launches the guest, or only tells whether that could be done; none then.
async fn try_launch(
    manager: &Manager,
    mut config: GuestConfig,
    disks: &[PathBuf],
    args: &Launch,
) -> Result<Option<Launched>> {
    if !manager.carries_fds() {
        uploads::replace(manager, &mut config, disks).await?;
    }
    match args.check {
        true => check(manager, config).await.map(|()| None),
        false => send(manager, config, args.detach).await.map(Some),
    }
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
    Launched::read(request.send().promise.await?.get()?)
}

impl Launched {
    /// Reads what the guest manager answered.
    pub(crate) fn read(answer: guest_manager::launch_result::Reader<'_>) -> Result<Self> {
        let launched = answer.outcome()?;
        Ok(Self {
            guest: launched.get_guest()?,
            lease: launched.get_lease()?,
            name: launched.get_name()?.to_string()?,
        })
    }
}

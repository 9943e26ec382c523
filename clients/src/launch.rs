//! `guest launch`.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use sepal_schema::{
    config::{self, GuestConfig, Limits},
    error::Error,
    guest_capnp::guest,
    manager_capnp::guest_manager,
    transport::Handle,
};

use crate::{args::Launch, manager::Manager, session, show, status};

/// What a Linux kernel needs to be told to print on the serial port.
const LINUX_CONSOLE: &str = "console=ttyS0";

/// A guest that was launched; it is stopped when the lease is dropped.
struct Launched {
    guest: guest::Client,
    lease: guest_manager::lease::Client,
    name: String,
}

/// Boots a guest; stays connected to its serial port until it ends, unless it is to be left running.
pub(crate) async fn launch(handle: &Handle, socket: Option<&Path>, args: &Launch) -> Result<u8> {
    let config = config(args)?;
    let mut manager = match args.detach {
        true => Manager::running_or_daemon(handle, socket)?,
        false => Manager::running_or_private(handle, socket)?,
    };
    let outcome = match send(&manager, config, args.detach).await {
        Ok(launched) if args.detach => {
            show::print(format!("{}\n", launched.name).as_bytes())?;
            Ok(status::SUCCESS)
        }
        Ok(Launched { guest, lease, name }) => {
            let ended = session::run(&manager, &guest, &name, session::Mode::Launched).await;
            drop(lease);
            ended
        }
        Err(error) => Err(manager.explain(handle, error).await),
    };
    manager.close(handle).await;
    outcome
}

fn config(args: &Launch) -> Result<GuestConfig> {
    let cmdline = match (&args.cmdline, &args.kernel) {
        (Some(cmdline), _) => cmdline.clone(),
        (None, Some(_)) => LINUX_CONSOLE.to_owned(),
        (None, None) => String::new(),
    };
    let megabytes = |size: Option<i32>| size.and_then(|mib| u64::try_from(mib).ok()).unwrap_or(0);
    Ok(GuestConfig {
        name: args.name.clone().unwrap_or_default(),
        kernel: open("kernel", args.kernel.as_ref())?,
        initrd: open("initrd", args.initrd.as_ref())?,
        cmdline,
        cmdline_add: args.cmdline_add.clone(),
        cpus: args.cpus,
        memory_mib: args.memory.unwrap_or(0),
        huge_pages: args.huge_pages,
        limits: Limits {
            memory_mib: megabytes(args.limit_memory),
            cpu_percent: args.limit_cpu.unwrap_or(0),
            cpu_weight: 0,
            tasks: args.limit_tasks.unwrap_or(0),
        },
        waived_layers: args.waive_layer.clone(),
        ..GuestConfig::default()
    })
}

fn open(what: &str, path: Option<&PathBuf>) -> Result<config::File> {
    let Some(path) = path else {
        return Ok(config::File::None);
    };
    let file = File::open(path).with_context(|| format!("opening the {what} {}", path.display()))?;
    Ok(config::File::Fd(file.into()))
}

async fn send(manager: &Manager, config: GuestConfig, detach: bool) -> Result<Launched> {
    use guest_manager::launch_result::Which;
    let mut request = manager.client.launch_request();
    config.encode(request.get().init_config(), &manager.fds())?;
    request.get().set_detach(detach);
    let response = request.send().promise.await?;
    match response.get()?.which()? {
        Which::Launched(launched) => Ok(Launched {
            guest: launched.get_guest()?,
            lease: launched.get_lease()?,
            name: launched.get_name()?.to_string()?,
        }),
        Which::Error(error) => Err(Error::read(error?)?.into()),
    }
}

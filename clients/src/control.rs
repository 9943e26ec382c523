//! `guest stop`, `wait`, `remove` and `end-manager`.

use std::time::Duration;

use anyhow::Result;
use futures::{FutureExt, pin_mut, select};
use sepal_schema::{
    error::{Error, Kind, read_completion},
    report::StopReport,
    transport::Handle,
};

use crate::{
    args::{Stop, Wait},
    calls,
    manager::Manager,
    place::Place,
    show, status,
};

/// How long a guest gets to shut down unless the command line says otherwise.
const PATIENCE: Duration = Duration::from_secs(30);
/// When the user is told that there is a way which always works.
const HINT_AFTER: Duration = Duration::from_secs(10);

/// Stops a guest; the exit status is 0 if it is gone as asked.
pub(crate) async fn stop(handle: &Handle, place: &Place, args: &Stop) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    let guest = calls::lookup(&manager.client, &args.name).await?;
    let power = calls::power(&guest);
    let report = match (args.force, args.timeout) {
        (true, None) => calls::kill(&power).await?,
        (force, timeout) => {
            let stopping = calls::stop(&power, timeout.unwrap_or(PATIENCE), force).fuse();
            let hint = handle.sleep(HINT_AFTER).fuse();
            pin_mut!(stopping, hint);
            loop {
                select! {
                    report = stopping => break report?,
                    () = hint => eprintln!("still waiting for {0}; `guest stop --force {0}` stops it in any case", args.name),
                }
            }
        }
    };
    tell(&args.name, &report, args.json)?;
    Ok(status::SUCCESS)
}

/// Waits for a guest's end.
pub(crate) async fn wait(handle: &Handle, place: &Place, args: &Wait) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    let guest = calls::lookup(&manager.client, &args.name).await?;
    let observer = calls::observer(&guest);
    let report = match args.timeout {
        None => calls::wait(&observer).await?,
        Some(timeout) => match handle.timeout(timeout, calls::wait(&observer)).await {
            Ok(report) => report?,
            Err(_) => {
                let message = format!("{} has not ended within {} s", args.name, timeout.as_secs_f64());
                return Err(Error::new(Kind::TimedOut, message).into());
            }
        },
    };
    tell(&args.name, &report, args.json)?;
    Ok(status::of(&report))
}

/// Forgets a guest that has ended.
pub(crate) async fn remove(handle: &Handle, place: &Place, name: &str) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    let mut request = manager.client.remove_request();
    request.get().set_name(name);
    read_completion(request.send().promise.await?.get()?)?;
    Ok(status::SUCCESS)
}

/// Stops all guests by force and ends the manager; returns when it has.
pub(crate) async fn end_manager(handle: &Handle, place: &Place) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    let response = manager.client.shutdown_request().send().promise.await?;
    read_completion(response.get()?)?;
    manager.connection.ended().await;
    Ok(status::SUCCESS)
}

fn tell(name: &str, report: &StopReport, json: bool) -> Result<()> {
    if json {
        return show::print_json(&show::Ending::from(report));
    }
    eprintln!("{name}: {}", report.detail);
    Ok(())
}

//! `guest stop`, `wait`, `pause`, `resume`, `reset`, `nmi`, `remove` and `end-manager`.

use std::time::Duration;

use anyhow::Result;
use futures::{FutureExt, pin_mut, select};
use sepal_schema::{
    error::{Error, Kind, read_completion},
    guest_capnp::{observer, power},
    report::{Rung, StopReport, rung_name},
    transport::Handle,
};

use crate::{
    args::{Stop, StopOptions, Wait, WaitOptions},
    calls,
    ending::Process,
    manager::Manager,
    place::{Otherwise, Place},
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
    stop_by(handle, &calls::power(&guest), &args.name, &args.options).await
}

/// Goes down the ladder as far as it may, and tells which rung it took.
pub(crate) async fn stop_by(handle: &Handle, power: &power::Client, name: &str, options: &StopOptions) -> Result<u8> {
    let at_once = options.kill || options.force && options.timeout.is_none();
    let report = if at_once {
        calls::kill(power).await?
    } else {
        let timeout = options.timeout.unwrap_or(PATIENCE);
        let stopping = calls::stop(power, timeout, options.force).fuse();
        let hint = handle.sleep(HINT_AFTER).fuse();
        pin_mut!(stopping, hint);
        loop {
            select! {
                report = stopping => break report.map_err(|error| insist(error, name))?,
                () = hint => say!("still waiting for {name}; `guest stop --force {name}` stops it in any case"),
            }
        }
    };
    tell(name, &report, options.json)?;
    Ok(status::SUCCESS)
}

/// Says what to do about a guest that did not react in time.
fn insist(error: anyhow::Error, name: &str) -> anyhow::Error {
    match error.downcast::<Error>() {
        Ok(error) if error.kind == Kind::TimedOut => {
            let message = format!("{} `guest stop --force {name}` stops it in any case", error.message);
            Error { message, ..error }.into()
        }
        Ok(error) => error.into(),
        Err(error) => error,
    }
}

/// Stops by force at once, and tells which rung it took.
pub(crate) async fn kill(power: &power::Client, name: &str) -> Result<u8> {
    tell(name, &calls::kill(power).await?, false)?;
    Ok(status::SUCCESS)
}

/// What the power facet does without waiting for the guest's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Press {
    Shutdown,
    Pause,
    Resume,
    Reset,
    Nmi,
}

/// `guest pause`, `resume`, `reset` and `nmi`.
pub(crate) async fn press(handle: &Handle, place: &Place, name: &str, what: Press) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    let guest = calls::lookup(&manager.client, name).await?;
    press_on(&calls::power(&guest), what).await
}

/// Does it.
pub(crate) async fn press_on(power: &power::Client, what: Press) -> Result<u8> {
    macro_rules! call {
        ($request:ident) => {
            read_completion(power.$request().send().promise.await?.get()?)
        };
    }
    match what {
        Press::Shutdown => call!(shutdown_request),
        Press::Pause => call!(pause_request),
        Press::Resume => call!(resume_request),
        Press::Reset => call!(reset_request),
        Press::Nmi => call!(nmi_request),
    }?;
    Ok(status::SUCCESS)
}

/// Waits for a guest's end.
pub(crate) async fn wait(handle: &Handle, place: &Place, args: &Wait) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    let guest = calls::lookup(&manager.client, &args.name).await?;
    wait_by(handle, &calls::observer(&guest), &args.name, &args.options).await
}

/// Waits for the end of the guest that an observer sees; the exit status tells it.
pub(crate) async fn wait_by(
    handle: &Handle,
    observer: &observer::Client,
    name: &str,
    options: &WaitOptions,
) -> Result<u8> {
    let report = match options.timeout {
        None => calls::wait(observer).await?,
        Some(timeout) => match handle.timeout(timeout, calls::wait(observer)).await {
            Ok(report) => report?,
            Err(_) => {
                let message = format!("{name} has not ended within {} s", timeout.as_secs_f64());
                return Err(Error::new(Kind::TimedOut, message).into());
            }
        },
    };
    tell(name, &report, options.json)?;
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

/// Ends the manager, and all guests by force; to `keep` those that are durable leaves them to the next one. Returns when it has ended.
pub(crate) async fn end_manager(handle: &Handle, place: &Place, keep: bool) -> Result<u8> {
    // Without one, nothing is to be done for those that are kept.
    let manager = match keep {
        true => Manager::connect(handle, place, Otherwise::Fail)?,
        false => Manager::running(handle, place)?,
    };
    let process = Process::of(place, &manager).await?;
    match keep {
        true => read_completion(manager.client.retire_request().send().promise.await?.get()?)?,
        false => read_completion(manager.client.shutdown_request().send().promise.await?.get()?)?,
    }
    manager.connection.ended().await;
    if let Some(process) = process {
        process.ended(handle).await?;
    }
    Ok(status::SUCCESS)
}

fn tell(name: &str, report: &StopReport, json: bool) -> Result<()> {
    if json {
        return show::print_json(&show::Ending::from(report));
    }
    match report.rung {
        Rung::None => say!("{name}: {}", report.detail),
        rung => say!("{name}: {}: {}", rung_name(rung), report.detail),
    }
    Ok(())
}

//! The protocol's calls as Rust functions: typed errors become `sepal_schema::error::Error`, broken connections exceptions.

use std::time::Duration;

use anyhow::Result;
use sepal_schema::{
    error::{Error, Outcome, read_completion},
    facet::Description,
    facet_capnp::facet,
    guest_capnp::{console, guest, observer, output, power, serial},
    info::GuestInfo,
    manager_capnp::guest_manager,
    report::StopReport,
};

/// A guest by its name.
pub(crate) async fn lookup(manager: &guest_manager::Client, name: &str) -> Result<guest::Client> {
    let mut request = manager.lookup_request();
    request.get().set_name(name);
    let response = request.send().promise.await?;
    Ok(response.get()?.outcome()?.get_guest()?)
}

/// All guests, sorted by name, as of one moment.
pub(crate) async fn browse(manager: &guest_manager::Client) -> Result<Vec<GuestInfo>> {
    let response = match manager.browse_request().send().promise.await {
        // A manager of an older version tells all at once.
        Err(error) if error.kind == capnp::ErrorKind::Unimplemented => {
            let response = manager.list_request().send().promise.await?;
            let all = response.get()?.get_guests()?.iter().map(GuestInfo::read);
            return Ok(all.collect::<Result<_, _>>()?);
        }
        response => response?,
    };
    let listing = response.get()?.get_listing()?;
    let mut guests = Vec::new();
    loop {
        let response = listing.next_request().send().promise.await?;
        let page = response.get()?;
        let infos = page.get_guests()?;
        guests.extend(infos.iter().map(GuestInfo::read).collect::<Result<Vec<_>, _>>()?);
        // A page without guests would never come to an end.
        if page.get_ended() || infos.is_empty() {
            return Ok(guests);
        }
    }
}

/// The read-only facet.
pub(crate) fn observer(guest: &guest::Client) -> observer::Client {
    guest.observer_request().send().pipeline.get_observer()
}

/// The facet that stops.
pub(crate) fn power(guest: &guest::Client) -> power::Client {
    guest.power_request().send().pipeline.get_power()
}

/// The serial port.
pub(crate) fn serial(guest: &guest::Client) -> serial::Client {
    guest.serial_request().send().pipeline.get_serial()
}

/// A port of the virtio console.
pub(crate) async fn console(guest: &guest::Client, port: u32) -> Result<console::Client> {
    let mut request = guest.console_request();
    request.get().set_port(port);
    let response = request.send().promise.await?;
    Ok(response.get()?.outcome()?.get_console()?)
}

/// Tells a console the size of the terminal.
pub(crate) async fn resize(console: &console::Client, columns: u16, rows: u16) -> Result<()> {
    let mut request = console.resize_request();
    request.get().set_columns(columns);
    request.get().set_rows(rows);
    Ok(read_completion(request.send().promise.await?.get()?)?)
}

/// What a capability is, and what it permits.
pub(crate) async fn describe(facet: &facet::Client) -> Result<Description> {
    let response = facet.describe_request().send().promise.await?;
    description(response.get()?)
}

/// What a token stands for, and what it permits; it is not redeemed by that.
pub(crate) async fn describe_token(manager: &guest_manager::Client, token: &str) -> Result<Description> {
    let mut request = manager.describe_request();
    request.get().set_token(token);
    let response = request.send().promise.await?;
    description(response.get()?)
}

fn description(result: facet::describe_result::Reader<'_>) -> Result<Description> {
    use facet::describe_result::Which;
    match result.which()? {
        Which::Description(description) => Ok(Description::read(description?)?),
        Which::Error(error) => Err(Error::read(error?)?.into()),
    }
}

/// What the serial port printed.
pub(crate) fn output(observer: &observer::Client) -> output::Client {
    observer.output_request().send().pipeline.get_output()
}

/// What there is to know about a guest.
pub(crate) async fn info(observer: &observer::Client) -> Result<GuestInfo> {
    let response = observer.info_request().send().promise.await?;
    Ok(GuestInfo::read_result(response.get()?)?)
}

/// Waits for the guest's end.
pub(crate) async fn wait(observer: &observer::Client) -> Result<StopReport> {
    let response = observer.wait_request().send().promise.await?;
    Ok(StopReport::read_result(response.get()?)?)
}

/// Stops by force at once.
pub(crate) async fn kill(power: &power::Client) -> Result<StopReport> {
    let response = power.kill_request().send().promise.await?;
    stop_result(response.get()?)
}

/// Asks to shut down, waits, and then stops by force if that is allowed.
pub(crate) async fn stop(power: &power::Client, timeout: Duration, force: bool) -> Result<StopReport> {
    let mut request = power.stop_request();
    // Zero would mean the protocol's own default.
    request
        .get()
        .set_timeout_ms(u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX).max(1));
    request.get().set_force(force);
    let response = request.send().promise.await?;
    stop_result(response.get()?)
}

fn stop_result(result: power::stop_result::Reader<'_>) -> Result<StopReport> {
    use power::stop_result::Which;
    match result.which()? {
        Which::Report(report) => Ok(StopReport::read(report?)?),
        Which::Error(error) => Err(Error::read(error?)?.into()),
    }
}

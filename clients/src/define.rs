//! `guest define`, `undefine`, `start`, `autostart` and `definition`: guests that the guest manager keeps.

use anyhow::Result;
use sepal_schema::{
    config::Uuid,
    error::{Outcome, read_completion},
    transport::Handle,
};
use serde::Serialize;

use crate::{
    args::{Autostart, Define, Start, Switch},
    assemble, configuration,
    launch::Launched,
    manager::Manager,
    place::{Otherwise, Place},
    recreate, session, show, status,
};

/// A definition that was made, as JSON.
#[derive(Serialize)]
struct Defined<'a> {
    name: &'a str,
    uuid: String,
    warnings: &'a [String],
}

/// Has the guest manager keep a definition.
pub(crate) async fn define(handle: &Handle, place: &Place, args: &Define) -> Result<u8> {
    let (name, file, here) = (args.name.as_deref(), args.file.as_deref(), place.is_here());
    let mut assembled = assemble::assemble(name, file, &args.options, here, true)?;
    let config = assembled.name(here)?;
    let name = config.name.clone();
    let manager = Manager::connect(handle, place, Otherwise::Daemon)?;
    let mut request = manager.client.define_request();
    let mut definition = request.get().init_definition();
    definition.set_autostart(args.autostart || assembled.autostart);
    config.encode(definition.init_config(), &manager.fds())?;
    request.get().set_replace(args.replace);
    let response = request.send().promise.await?;
    let answer = response
        .get()?
        .outcome()
        .map_err(|error| assembled.explain(error.into()))?;
    let warnings = answer.get_warnings()?.iter().map(|warning| Ok(warning?.to_string()?));
    let warnings: Vec<String> = warnings.collect::<Result<_>>()?;
    let uuid = Uuid::from_slice(answer.get_uuid()?)?;
    if args.json {
        show::print_json(&Defined {
            name: &name,
            uuid: uuid.to_string(),
            warnings: &warnings,
        })?;
        return Ok(status::SUCCESS);
    }
    for warning in &warnings {
        say!("warning: {warning}");
    }
    Ok(status::SUCCESS)
}

/// Forgets a definition.
pub(crate) async fn undefine(handle: &Handle, place: &Place, name: &str) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    let mut request = manager.client.undefine_request();
    request.get().set_name(name);
    read_completion(request.send().promise.await?.get()?)?;
    Ok(status::SUCCESS)
}

/// Starts a guest from its definition; it is nobody's, and goes on without this program.
pub(crate) async fn start(handle: &Handle, place: &Place, args: &Start) -> Result<u8> {
    let manager = Manager::connect(handle, place, Otherwise::Daemon)?;
    let mut request = manager.client.start_request();
    request.get().set_name(&args.name);
    request.get().set_detach(true);
    let started = Launched::read(request.send().promise.await?.get()?)?;
    match args.attach {
        true => session::started(handle, place, &manager, started).await,
        false => Ok(status::SUCCESS),
    }
}

/// Says whether a guest is started when the guest manager starts.
pub(crate) async fn autostart(handle: &Handle, place: &Place, args: &Autostart) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    let mut request = manager.client.set_autostart_request();
    request.get().set_name(&args.name);
    request.get().set_autostart(args.state == Switch::On);
    read_completion(request.send().promise.await?.get()?)?;
    Ok(status::SUCCESS)
}

/// Prints a definition as a configuration file.
pub(crate) async fn definition(handle: &Handle, place: &Place, name: &str) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    let mut request = manager.client.definition_request();
    request.get().set_name(name);
    let response = request.send().promise.await?;
    let definition = response.get()?.outcome()?.get_definition()?;
    let config = recreate::read(definition.get_config()?, &[])?;
    let nameless = configuration::nameless(&config, &[]);
    let text = configuration::write(&config, definition.get_autostart(), &nameless, !place.is_here())?;
    show::print(text.as_bytes())?;
    recreate::tell(&nameless);
    Ok(status::SUCCESS)
}

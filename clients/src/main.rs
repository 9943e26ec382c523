//! `guest`: the command line of Sepal, a client of the guest manager like any other.
//!
//! ```text
//!   args      what can be said
//!   manager   finds the guest manager, or starts one
//!   calls     the protocol's calls, as Rust functions
//!   launch, session, show, control, devices, vsock, agent   the commands
//!   specs     what the options for devices mean
//!   terminal, status, table          what the user sees
//! ```

mod agent;
mod args;
mod calls;
mod control;
mod devices;
mod launch;
mod manager;
mod session;
mod show;
mod specs;
mod status;
mod table;
mod terminal;
mod vsock;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{CommandFactory, Parser};
use sepal_schema::transport::Reactor;

use crate::args::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = run(&cli);
    terminal::restore();
    outcome.map_or_else(|error| status::fail(&error), ExitCode::from)
}

fn run(cli: &Cli) -> Result<u8> {
    let mut reactor = Reactor::new().context("making the event loop")?;
    let handle = reactor.handle();
    let socket = cli.manager.as_deref();
    let outcome = match &cli.command {
        Command::Launch(args) => reactor.run_until(launch::launch(&handle, socket, args)),
        Command::Attach(args) => reactor.run_until(session::attach(&handle, socket, args)),
        Command::Console(args) => reactor.run_until(session::console(&handle, socket, args)),
        Command::Balloon(args) => reactor.run_until(devices::balloon(&handle, socket, args)),
        Command::Mem(args) => reactor.run_until(devices::mem(&handle, socket, args)),
        Command::Disk(args) => reactor.run_until(devices::disk(&handle, socket, args)),
        Command::Net(args) => reactor.run_until(devices::net(&handle, socket, args)),
        Command::Vsock(args) => reactor.run_until(vsock::vsock(&handle, socket, args)),
        Command::Exec(args) => reactor.run_until(agent::exec(&handle, socket, args)),
        Command::Cp { from, to } => reactor.run_until(agent::cp(&handle, socket, from, to)),
        Command::List(args) => reactor.run_until(show::list(&handle, socket, args)),
        Command::Info(args) => reactor.run_until(show::info(&handle, socket, args)),
        Command::Logs(args) => reactor.run_until(show::logs(&handle, socket, args)),
        Command::Version(args) => reactor.run_until(show::version(&handle, socket, args)),
        Command::Stop(args) => reactor.run_until(control::stop(&handle, socket, args)),
        Command::Wait(args) => reactor.run_until(control::wait(&handle, socket, args)),
        Command::Remove { name } => reactor.run_until(control::remove(&handle, socket, name)),
        Command::EndManager => reactor.run_until(control::end_manager(&handle, socket)),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "guest", &mut script);
            show::print(&script)?;
            return Ok(status::SUCCESS);
        }
    };
    outcome.context("running the event loop")?
}

//! `guest`: the command line of Sepal, a client of the guest manager like any other.
//!
//! ```text
//!   args                      what can be said
//!   place, local, left, manager     finds the guest manager here or on another machine, or starts one; relay is the other machine's side
//!   ending                    the end of a guest manager
//!   calls                     the protocol's calls, as Rust functions
//!   launch, define, session, show, events, stats, top, metrics, registers, inspect, cpu, control, devices, vsock, agent, sharing, redeem      the commands
//!   copying, again            between standard streams and a guest's port, and back to a guest that outlives its manager
//!   streams, uploads          what stands in for descriptors on connections that carry none
//!   specs, configuration      what the options for devices mean, and configuration files
//!   assemble, recreate        the configuration that all of that makes, and the file that would make a guest again
//!   say, terminal, status, table, users   what the user sees
//! ```

#[macro_use]
mod say;

mod again;
mod agent;
mod args;
mod assemble;
mod calls;
mod configuration;
mod control;
mod copying;
mod cpu;
mod crashes;
mod define;
mod devices;
mod doctor;
mod ending;
mod events;
mod figures;
mod inspect;
mod launch;
mod left;
mod local;
mod manager;
mod metrics;
mod place;
mod pressure;
mod readers;
mod recreate;
mod redeem;
mod registers;
mod relay;
mod session;
mod sharing;
mod show;
mod specs;
mod stats;
mod status;
mod streams;
mod symbols;
mod table;
mod terminal;
mod top;
mod uploads;
mod users;
mod vsock;

use std::process::ExitCode;

use anyhow::{Context, Result, anyhow};
use sepal_schema::transport::Reactor;

use crate::{
    args::{Cli, Command},
    control::Press,
    place::Place,
    readers::while_read,
};

fn main() -> ExitCode {
    let cli = Cli::read();
    let place = Place::new(cli.manager.clone(), cli.ssh.clone());
    let outcome = run(&cli, &place);
    terminal::restore();
    // The event loop is gone, and with it whatever kept the way to another machine open.
    let broken = place.close();
    let outcome = match (outcome, broken) {
        (Err(error), Some(broken)) if !status::is_answer(&error) => Err(anyhow!("{broken}")),
        (outcome, _) => outcome,
    };
    outcome.map_or_else(|error| status::fail(&error), ExitCode::from)
}

fn run(cli: &Cli, place: &Place) -> Result<u8> {
    let mut reactor = Reactor::new().context("making the event loop")?;
    let handle = reactor.handle();
    let outcome = match &cli.command {
        Command::Launch(args) => reactor.run_until(launch::launch(&handle, place, args)),
        Command::Attach(args) => reactor.run_until(session::attach(&handle, place, args)),
        Command::Console(args) => reactor.run_until(session::console(&handle, place, args)),
        Command::Balloon(args) => reactor.run_until(devices::balloon(&handle, place, args)),
        Command::Mem(args) => reactor.run_until(devices::mem(&handle, place, args)),
        Command::Disk(args) => reactor.run_until(devices::disk(&handle, place, args)),
        Command::Net(args) => reactor.run_until(devices::net(&handle, place, args)),
        Command::Vsock(args) => reactor.run_until(vsock::vsock(&handle, place, args)),
        Command::Exec(args) => reactor.run_until(agent::exec(&handle, place, args)),
        Command::Cp { from, to } => reactor.run_until(agent::cp(&handle, place, from, to)),
        Command::Define(args) => reactor.run_until(define::define(&handle, place, args)),
        Command::Undefine(args) => reactor.run_until(define::undefine(&handle, place, &args.name)),
        Command::Start(args) => reactor.run_until(define::start(&handle, place, args)),
        Command::Autostart(args) => reactor.run_until(define::autostart(&handle, place, args)),
        Command::Definition(args) => reactor.run_until(define::definition(&handle, place, &args.name)),
        Command::List(args) => reactor.run_until(show::list(&handle, place, args)),
        Command::Info(args) => reactor.run_until(show::info(&handle, place, args)),
        Command::Logs(args) if args.follow => reactor.run_until(while_read(&handle, show::logs(&handle, place, args))),
        Command::Logs(args) => reactor.run_until(show::logs(&handle, place, args)),
        Command::Version(args) => reactor.run_until(show::version(&handle, place, args)),
        Command::Events(args) if args.options.no_follow => reactor.run_until(events::events(&handle, place, args)),
        Command::Events(args) => reactor.run_until(while_read(&handle, events::events(&handle, place, args))),
        Command::Stats(args) => reactor.run_until(stats::stats(&handle, place, args)),
        Command::Top(args) => reactor.run_until(top::top(&handle, place, args)),
        Command::Metrics(args) => reactor.run_until(metrics::metrics(&handle, place, args)),
        Command::Registers(args) => reactor.run_until(registers::registers(&handle, place, args)),
        Command::Peek(args) => reactor.run_until(inspect::peek(&handle, place, args)),
        Command::Stack(args) => reactor.run_until(inspect::stack(&handle, place, args)),
        Command::Cpu(args) => reactor.run_until(cpu::cpu(&handle, place, args)),
        Command::Pin(args) => reactor.run_until(cpu::pin(&handle, place, args)),
        Command::Pause(args) => reactor.run_until(control::press(&handle, place, &args.name, Press::Pause)),
        Command::Resume(args) => reactor.run_until(control::press(&handle, place, &args.name, Press::Resume)),
        Command::Reset(args) => reactor.run_until(control::press(&handle, place, &args.name, Press::Reset)),
        Command::Nmi(args) => reactor.run_until(control::press(&handle, place, &args.name, Press::Nmi)),
        Command::Share(args) => reactor.run_until(sharing::share(&handle, place, args)),
        Command::Shares(args) => reactor.run_until(sharing::shares(&handle, place, args)),
        Command::Revoke(args) => reactor.run_until(sharing::revoke(&handle, place, args)),
        Command::Redeem(args) => reactor.run_until(redeem::redeem(&handle, place, args)),
        Command::Whoami(args) => reactor.run_until(sharing::whoami(&handle, place, args)),
        Command::Stop(args) => reactor.run_until(control::stop(&handle, place, args)),
        Command::Wait(args) => reactor.run_until(control::wait(&handle, place, args)),
        Command::Remove(args) => reactor.run_until(control::remove(&handle, place, &args.name)),
        Command::EndManager(args) => reactor.run_until(control::end_manager(&handle, place, args.keep)),
        Command::Doctor(args) => reactor.run_until(doctor::doctor(&handle, place, args)),
        Command::Pressure(args) => reactor.run_until(pressure::pressure(&handle, place, args)),
        Command::Relay(args) => return relay::relay(args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::documented(), "guest", &mut script);
            show::print(&script)?;
            return Ok(status::SUCCESS);
        }
    };
    outcome.context("running the event loop")?
}

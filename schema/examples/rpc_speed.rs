//! Measures remote calls between two processes: `cargo run --release -p sepal-schema --example rpc_speed`.
//!
//! Prints the time of a single call, of calls that are pipelined 64 deep, of streamed bytes, and of a descriptor that
//! travels with a call. Medians over rounds, since the machine has other things to do. With one of `single`, `pipelined`,
//! `streamed` and `fd` as argument, and perhaps a number of calls, it does only that: for a profiler.

#[path = "../tests/support/mod.rs"]
mod support;

use std::{
    io::{self, Write as _},
    os::{fd::AsFd, fd::OwnedFd, unix::net::UnixStream},
    process::{Command, Stdio},
    time::Instant,
};

use futures::{StreamExt, TryStreamExt, stream};
use sepal_schema::transport::{FdTable, Limits, Reactor, connect};

use support::{Counts, memfd, ping, probe, serve_probe};

const SINGLE_CALLS: u64 = 20_000;
const PIPELINED_CALLS: u64 = 100_000;
const DEPTH: usize = 64;
const STREAMED_CHUNKS: u64 = 8_000;
const CHUNK: usize = 64 * 1024;
const FD_CALLS: u64 = 10_000;
const ROUNDS: usize = 5;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let only = arguments.next();
    if only.as_deref() == Some("serve") {
        return serve();
    }
    let calls = arguments.next().map(|calls| calls.parse()).transpose()?;
    let wanted = Wanted { only, calls };
    let (ours, theirs) = UnixStream::pair()?;
    let mut server = Command::new(std::env::current_exe()?)
        .arg("serve")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()?;
    let mut reactor = Reactor::single_threaded()?;
    let handle = reactor.handle();
    let (client, connection) = connect::<probe::Client>(&handle, ours, Limits::default())?;
    reactor.run_until(measure(&client, &connection.fds(), &wanted))??;
    drop((client, connection, reactor));
    server.wait()?;
    Ok(())
}

fn serve() -> Result<(), Box<dyn std::error::Error>> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut reactor = Reactor::single_threaded()?;
    let connection = serve_probe(&reactor.handle(), socket, Limits::default(), &Counts::default());
    reactor.run_until(connection)?;
    Ok(())
}

/// CPU time of this process, which other processes on the machine do not change much.
fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// What the arguments ask for.
struct Wanted {
    only: Option<String>,
    calls: Option<u64>,
}

impl Wanted {
    /// How many calls to make in this part, if it is wanted.
    fn calls(&self, part: &str, usual: u64) -> Option<u64> {
        let wanted = self.only.as_deref().is_none_or(|only| only == part);
        wanted.then(|| self.calls.unwrap_or(usual))
    }
}

async fn measure(client: &probe::Client, table: &FdTable, wanted: &Wanted) -> capnp::Result<()> {
    if let Some(calls) = wanted.calls("single", SINGLE_CALLS) {
        single(client, calls).await?;
    }
    if let Some(calls) = wanted.calls("pipelined", PIPELINED_CALLS) {
        pipelined(client, calls).await?;
    }
    if let Some(chunks) = wanted.calls("streamed", STREAMED_CHUNKS) {
        streamed(client, chunks).await?;
    }
    if let Some(calls) = wanted.calls("fd", FD_CALLS) {
        with_descriptor(client, table, calls).await?;
    }
    Ok(())
}

async fn single(client: &probe::Client, calls: u64) -> capnp::Result<()> {
    let mut times = Vec::new();
    for n in 0..calls {
        let start = Instant::now();
        ping(client, n).await?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    let middle = median(&mut times);
    writeln!(
        io::stdout(),
        "single call: median {middle:.1} us, fastest {:.1} us, 99 % within {:.1} us",
        times[0],
        times[times.len() * 99 / 100]
    )?;
    Ok(())
}

async fn pipelined(client: &probe::Client, calls: u64) -> capnp::Result<()> {
    let mut rates = Vec::new();
    let cpu_start = cpu_seconds();
    for _ in 0..ROUNDS {
        let start = Instant::now();
        stream::iter(0..calls)
            .map(|n| ping(client, n))
            .buffer_unordered(DEPTH)
            .try_for_each(|_| async { Ok(()) })
            .await?;
        rates.push(calls as f64 / start.elapsed().as_secs_f64());
    }
    let cpu_each = (cpu_seconds() - cpu_start) / (calls as f64 * ROUNDS as f64);
    let middle = median(&mut rates);
    writeln!(
        io::stdout(),
        "{DEPTH} calls in flight: median {middle:.0} calls/s, fastest {:.0} calls/s, {:.2} us of the caller's CPU each",
        rates[ROUNDS - 1],
        cpu_each * 1e6
    )?;
    Ok(())
}

async fn streamed(client: &probe::Client, chunks: u64) -> capnp::Result<()> {
    let chunk = vec![7; CHUNK];
    let mut rates = Vec::new();
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for _ in 0..chunks {
            let mut request = client.write_request();
            request.get().set_data(&chunk);
            request.send().await?;
        }
        client.total_request().send().promise.await?;
        rates.push((chunks * CHUNK as u64) as f64 / start.elapsed().as_secs_f64() / f64::from(1 << 30));
    }
    let middle = median(&mut rates);
    writeln!(
        io::stdout(),
        "streamed in chunks of 64 KiB: median {middle:.2} GiB/s, fastest {:.2} GiB/s",
        rates[ROUNDS - 1]
    )?;
    Ok(())
}

async fn with_descriptor(client: &probe::Client, table: &FdTable, calls: u64) -> capnp::Result<()> {
    let file = memfd();
    let mut times = Vec::new();
    for _ in 0..calls {
        let start = Instant::now();
        let number = table
            .send(file.try_clone()?)
            .map_err(|error| capnp::Error::failed(error.to_string()))?;
        let mut request = client.take_fds_request();
        request.get().init_numbers(1).set(0, number);
        request.send().promise.await?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    writeln!(
        io::stdout(),
        "call with a descriptor: median {:.1} us",
        median(&mut times)
    )?;
    Ok(())
}

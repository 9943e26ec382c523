//! Measures remote calls between two processes: `cargo run --release -p sepal-schema --example rpc_speed`.
//!
//! Prints the time of a single call, of calls that are pipelined 64 deep, of streamed bytes, and of a descriptor that
//! travels with a call. Medians over rounds, since the machine has other things to do.

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

const SINGLE_CALLS: usize = 20_000;
const PIPELINED_CALLS: u64 = 100_000;
const DEPTH: usize = 64;
const STREAMED_CHUNKS: u32 = 8_000;
const CHUNK: usize = 64 * 1024;
const FD_CALLS: u32 = 10_000;
const ROUNDS: usize = 5;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if std::env::args().nth(1).as_deref() == Some("serve") {
        return serve();
    }
    let (ours, theirs) = UnixStream::pair()?;
    let mut server = Command::new(std::env::current_exe()?)
        .arg("serve")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()?;
    let mut reactor = Reactor::single_threaded()?;
    let handle = reactor.handle();
    let (client, connection) = connect::<probe::Client>(&handle, ours, Limits::default())?;
    reactor.run_until(measure(&client, &connection.fds()))??;
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

async fn measure(client: &probe::Client, table: &FdTable) -> capnp::Result<()> {
    let mut out = io::stdout();
    let mut times = Vec::with_capacity(SINGLE_CALLS);
    for n in 0..SINGLE_CALLS {
        let start = Instant::now();
        ping(client, n as u64).await?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    let middle = median(&mut times);
    writeln!(
        out,
        "single call: median {middle:.1} us, fastest {:.1} us, 99 % within {:.1} us",
        times[0],
        times[SINGLE_CALLS * 99 / 100]
    )?;

    let mut rates = Vec::new();
    let cpu_start = cpu_seconds();
    for _ in 0..ROUNDS {
        let start = Instant::now();
        stream::iter(0..PIPELINED_CALLS)
            .map(|n| ping(client, n))
            .buffer_unordered(DEPTH)
            .try_for_each(|_| async { Ok(()) })
            .await?;
        rates.push(PIPELINED_CALLS as f64 / start.elapsed().as_secs_f64());
    }
    let cpu_each = (cpu_seconds() - cpu_start) / (PIPELINED_CALLS as f64 * ROUNDS as f64);
    writeln!(
        out,
        "{DEPTH} calls in flight: {:.0} calls/s, {:.2} us of the caller's CPU each",
        median(&mut rates),
        cpu_each * 1e6
    )?;

    let chunk = vec![7; CHUNK];
    let mut rates = Vec::new();
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for _ in 0..STREAMED_CHUNKS {
            let mut request = client.write_request();
            request.get().set_data(&chunk);
            request.send().await?;
        }
        client.total_request().send().promise.await?;
        rates.push(f64::from(STREAMED_CHUNKS) * CHUNK as f64 / start.elapsed().as_secs_f64());
    }
    writeln!(
        out,
        "streamed in chunks of 64 KiB: {:.2} GiB/s",
        median(&mut rates) / f64::from(1 << 30)
    )?;

    let file = memfd();
    let mut times = Vec::new();
    for _ in 0..FD_CALLS {
        let start = Instant::now();
        let number = table
            .send(file.try_clone()?)
            .map_err(|error| capnp::Error::failed(error.to_string()))?;
        let mut request = client.take_fds_request();
        request.get().init_numbers(1).set(0, number);
        request.send().promise.await?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    writeln!(out, "call with a descriptor: median {:.1} us", median(&mut times))?;
    Ok(())
}

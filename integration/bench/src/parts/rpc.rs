//! Calls between two processes: to the guest manager, and to a server that does nothing, which shows what of it the transport costs.
//!
//! The call is `version`; the stream is an upload. Nobody else has such a protocol to compare with.

mod served;

use std::{
    fs::File,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use rustix::{
    io::{FdFlags, fcntl_setfd},
    time::{ClockId, clock_gettime},
};
use sepal_integration::program;
use sepal_schema::{
    config::{self, GuestConfig},
    error::Outcome,
    file_capnp::upload,
    manager_capnp::guest_manager,
    transport::{Connection, Limits, Reactor, connect, reactor::LINGER},
};

use super::{Part, units::median_microseconds};
use crate::{bench::Bench, figure::Figure};

pub(crate) use served::serve_calls;

const SINGLE: Figure = Figure::cost("rpc.single", "a call to the manager and its answer", "us")
    .goal(25.0)
    .sepal_only();
const PIPELINED: Figure = Figure::rate("rpc.pipelined", "calls to the manager, 64 in flight", "/s")
    .goal(200_000.0)
    .sepal_only();
const STREAMING: Figure = Figure::rate(
    "rpc.streaming",
    "bytes streamed to the manager, which keeps them",
    "MB/s",
)
.sepal_only();
const BARE_SINGLE: Figure = Figure::cost("rpc.bare-single", "a call to a server that does nothing", "us").sepal_only();
const BARE_PIPELINED: Figure = Figure::rate(
    "rpc.bare-pipelined",
    "calls to a server that does nothing, 64 in flight",
    "/s",
)
.sepal_only();
const BARE_STREAMING: Figure = Figure::rate(
    "rpc.bare-streaming",
    "bytes streamed to a server that drops them",
    "MB/s",
)
.sepal_only();
const CALLER_CPU: Figure = Figure::cost(
    "rpc.caller-cpu",
    "the caller's CPU time for each of 64 calls in flight",
    "us",
)
.sepal_only();
const DESCRIPTOR: Figure = Figure::cost(
    "rpc.descriptor",
    "a call with a descriptor to a server that closes it",
    "us",
)
.sepal_only();

/// The part.
pub(crate) const PART: Part = Part {
    name: "rpc",
    about: "calls to the guest manager and to a server that does nothing: one, many at once, streams",
    figures: &[
        &SINGLE,
        &PIPELINED,
        &STREAMING,
        &BARE_SINGLE,
        &BARE_PIPELINED,
        &BARE_STREAMING,
        &CALLER_CPU,
        &DESCRIPTOR,
    ],
    run,
};

/// Calls in flight at a time.
const DEPTH: usize = 64;
/// Bytes of one streamed call: the most that one may have.
const CHUNK: usize = 64 * 1024;
/// Nothing here takes as long.
const PATIENCE: Duration = Duration::from_secs(120);

/// How much of each a round does.
struct Amount {
    single: usize,
    pipelined: usize,
    chunks: usize,
    descriptors: usize,
}

fn run(bench: &mut Bench) -> Result<()> {
    let (rounds, amount) = bench.scaled(
        (
            15,
            Amount {
                single: 4_000,
                pipelined: 50_000,
                chunks: 2_000,
                descriptors: 2_000,
            },
        ),
        (
            1,
            Amount {
                single: 100,
                pipelined: 1_000,
                chunks: 50,
                descriptors: 50,
            },
        ),
    );
    let mut manager = Peer::manager()?;
    let mut bare = Peer::bare()?;
    let warm_up = usize::from(!bench.short);
    for round in 0..rounds + warm_up {
        let to_manager = manager.measure(&amount)?;
        let to_bare = bare.measure(&amount)?;
        let descriptor = bare.descriptors(amount.descriptors)?;
        if round < warm_up {
            continue;
        }
        bench.record(&SINGLE, to_manager.single_us);
        bench.record(&PIPELINED, to_manager.pipelined);
        bench.record(&STREAMING, to_manager.streaming);
        bench.record(&BARE_SINGLE, to_bare.single_us);
        bench.record(&BARE_PIPELINED, to_bare.pipelined);
        bench.record(&BARE_STREAMING, to_bare.streaming);
        bench.record(&CALLER_CPU, to_bare.caller_us);
        bench.record(&DESCRIPTOR, descriptor);
    }
    Ok(())
}

/// What a round tells.
struct Round {
    /// Median of single calls, in us.
    single_us: f64,
    /// Calls a second.
    pipelined: f64,
    /// CPU time of this process for each of them, in us: what other processes do changes it little.
    caller_us: f64,
    /// MB/s.
    streaming: f64,
}

/// A process that serves the manager's protocol on one connection, and ends with it.
struct Peer {
    reactor: Reactor,
    client: guest_manager::Client,
    connection: Connection,
    child: Child,
}

impl Peer {
    /// A guest manager.
    fn manager() -> Result<Self> {
        let mut command = Command::new(program("guest-manager")?);
        Self::start(|theirs| {
            // For the program that is started; the descriptor is closed here right after that.
            fcntl_setfd(&theirs, FdFlags::empty())?;
            let number = theirs.as_raw_fd().to_string();
            let child = command.args(["--fd", &number]).stdin(Stdio::null()).spawn();
            child.context("starting the guest manager")
        })
    }

    /// This program as a server that does nothing.
    fn bare() -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        Self::start(|theirs| {
            let child = command.arg("--serve-calls").stdin(Stdio::from(theirs)).spawn();
            child.context("starting a server")
        })
    }

    fn start(spawn: impl FnOnce(OwnedFd) -> Result<Child>) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let reactor = Reactor::single_threaded()?.lingering(LINGER);
        let child = spawn(theirs.into())?;
        let (client, connection) = connect(&reactor.handle(), ours, Limits::default())?;
        Ok(Self {
            reactor,
            client,
            connection,
            child,
        })
    }

    fn measure(&mut self, amount: &Amount) -> Result<Round> {
        let client = self.client.clone();
        let Amount {
            single,
            pipelined,
            chunks,
            ..
        } = *amount;
        within(&mut self.reactor, async move {
            let single_us = single_calls(&client, single).await?;
            let (pipelined, caller_us) = pipelined_calls(&client, pipelined).await?;
            let streaming = streamed(&client, chunks).await?;
            Ok(Round {
                single_us,
                pipelined,
                caller_us,
                streaming,
            })
        })
    }

    /// Median of calls with a descriptor each, in us.
    fn descriptors(&mut self, count: usize) -> Result<f64> {
        let (client, fds) = (self.client.clone(), self.connection.fds());
        within(&mut self.reactor, async move {
            let file = File::open("/dev/null")?;
            let mut times = Vec::with_capacity(count);
            for _ in 0..count {
                let config = GuestConfig {
                    kernel: config::File::Fd(file.try_clone()?.into()),
                    ..GuestConfig::default()
                };
                let start = Instant::now();
                let mut request = client.launch_request();
                config.encode(request.get().init_config(), &fds)?;
                request.send().promise.await?;
                times.push(start.elapsed());
            }
            median_microseconds(times)
        })
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.connection.disconnect();
        // The loop is what closes the connection, and that is what ends the process.
        let ended = self.connection.ended();
        let _ = self.reactor.run_until(ended);
        let _ = self.child.wait();
    }
}

/// Runs work on a loop, but not for ever.
pub(super) fn within<T>(reactor: &mut Reactor, work: impl Future<Output = Result<T>>) -> Result<T> {
    let handle = reactor.handle();
    let outcome = reactor.run_until(async move { handle.timeout(PATIENCE, work).await })?;
    outcome.map_err(|_| anyhow::anyhow!("no answer within {PATIENCE:?}"))?
}

/// The median of calls one after the other, in us.
async fn single_calls(client: &guest_manager::Client, count: usize) -> Result<f64> {
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let start = Instant::now();
        call(client).await?;
        times.push(start.elapsed());
    }
    median_microseconds(times)
}

/// Calls a second with [`DEPTH`] in flight, and the caller's CPU time for each, in us.
async fn pipelined_calls(client: &guest_manager::Client, count: usize) -> Result<(f64, f64)> {
    let (start, cpu_start) = (Instant::now(), cpu_seconds());
    stream::iter(0..count)
        .map(|_| call(client))
        .buffer_unordered(DEPTH)
        .try_for_each(|()| async { Ok(()) })
        .await?;
    let cpu = (cpu_seconds() - cpu_start) / count as f64;
    Ok((count as f64 / start.elapsed().as_secs_f64(), cpu * 1e6))
}

/// MB/s of an upload.
async fn streamed(client: &guest_manager::Client, chunks: usize) -> Result<f64> {
    let size = (chunks * CHUNK) as u64;
    let mut request = client.upload_request();
    request.get().set_size(size);
    let response = request.send().promise.await?;
    let upload: upload::Client = response.get()?.outcome()?.get_upload()?;
    let chunk = vec![7; CHUNK];
    let start = Instant::now();
    for _ in 0..chunks {
        let mut request = upload.write_request();
        request.get().set_bytes(&chunk);
        request.send().await?;
    }
    let received = upload.finish_request().send().promise.await?.get()?.get_size();
    let took = start.elapsed();
    ensure!(received == size, "{received} of {size} bytes have come");
    Ok(size as f64 / took.as_secs_f64() / 1e6)
}

async fn call(client: &guest_manager::Client) -> Result<()> {
    let response = client.version_request().send().promise.await?;
    ensure!(response.get()?.get_pid() != 0, "the answer says who answered");
    Ok(())
}

/// CPU time of this process.
fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

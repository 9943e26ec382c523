//! Streams of bytes between the guest and a client: sockets, the console, the serial port.
//!
//! Sockets and the console are measured for Sepal alone. QEMU's sockets need `/dev/vhost-vsock`, whose bytes pass through the host's kernel to its own
//! AF_VSOCK sockets, and the others' consoles go to whatever their standard output is: no two of them have another end that could be compared.
//! Every VMM has the serial port, whose output is read here as it comes.
//!
//! The guest's drivers put one packet or one buffer in the queue and wait until it is taken before the next, so what is sent is measured with a doorbell
//! for each 16 KiB of a socket and each 4 KiB of the console; what is received comes as fast as there are buffers.

use std::{
    io::{self, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use sepal_integration::{Boot, Report};
use sepal_schema::config::device::{Console, Vsock};

use super::{Part, drivers::Drivers};
use crate::{bench::Bench, figure::Figure, vmm::Vmm};

static VSOCK_OUT: Figure = Figure::rate("streams.vsock-out", "socket, from the guest", "MB/s").sepal_only();
static VSOCK_IN: Figure = Figure::rate("streams.vsock-in", "socket, to the guest", "MB/s").sepal_only();
static VSOCK_PING: Figure = Figure::cost("streams.vsock-ping", "socket, 64 bytes there and back", "us").sepal_only();
static CONSOLE_OUT: Figure = Figure::rate("streams.console-out", "console, from the guest", "MB/s").sepal_only();
static CONSOLE_IN: Figure = Figure::rate("streams.console-in", "console, to the guest", "MB/s").sepal_only();
static CONSOLE_PING: Figure = Figure::cost("streams.console-ping", "console, a byte there and back", "us").sepal_only();
static SERIAL: Figure = Figure::rate("streams.serial", "serial port, from the guest", "bytes/s");

/// Streams.
pub(crate) const PART: Part = Part {
    name: "streams",
    about: "sockets, the console and the serial port, to a client that reads and answers",
    figures: &[
        &VSOCK_OUT,
        &VSOCK_IN,
        &VSOCK_PING,
        &CONSOLE_OUT,
        &CONSOLE_IN,
        &CONSOLE_PING,
        &SERIAL,
    ],
    run,
};

const PATIENCE: Duration = Duration::from_secs(120);
/// Ports that the guest connects to.
const SINK: u32 = 1024;
const SOURCE: u32 = 1025;
const ECHO: u32 = 1026;
/// Bytes that the host writes at once.
const PIECE: usize = 256 << 10;
/// What the guest counts to in what it writes and reads on a console.
const MODULUS: usize = 251;

fn run(bench: &mut Bench) -> Result<()> {
    // One more, to warm up.
    for round in 0..bench.scaled(6, 1) {
        let values = [sockets(bench)?, console(bench)?].concat();
        if bench.short || round > 0 {
            for (figure, value) in PART.figures.iter().zip(values) {
                bench.record(figure, value);
            }
        }
    }
    let drivers = Drivers::new(bench)?;
    let cmdline = format!("run=serial-bulk:{}", bench.scaled(8 << 10, 2 << 10));
    bench.alternate(&[&SERIAL], bench.scaled(5, 1), |vmm: &dyn Vmm| {
        let mut guest = vmm.start(&drivers.machine(&cmdline))?;
        Ok(vec![guest.report("serial-bulk")?.number("bytes_s")?])
    })
}

/// Bytes a microsecond, which are megabytes a second.
fn rate(report: &Report) -> Result<f64> {
    Ok(report.number("bytes")? / report.number("us")?)
}

fn joined<T>(thread: JoinHandle<io::Result<T>>) -> Result<T> {
    let result = thread.join().map_err(|_| anyhow!("a thread panicked"))?;
    result.context("the other end of a stream")
}

/// Listens where the guest's connections to a port arrive, and does `work` with the first one.
fn listen<T: Send + 'static>(
    path: &Path,
    port: u32,
    work: impl FnOnce(UnixStream) -> io::Result<T> + Send + 'static,
) -> Result<JoinHandle<io::Result<T>>> {
    let listener = UnixListener::bind(format!("{}_{port}", path.display()))?;
    Ok(thread::spawn(move || work(listener.accept()?.0)))
}

/// Sends back what comes.
fn echo(mut stream: &UnixStream) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            count => stream.write_all(&buffer[..count])?,
        }
    }
}

/// Through the Unix sockets that stand for the host's ports: out, in, there and back.
fn sockets(bench: &Bench) -> Result<Vec<f64>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("vsock");
    let bytes = bench.scaled(128 << 20, 8 << 20);
    let sink = listen(&path, SINK, |mut stream| io::copy(&mut stream, &mut io::sink()))?;
    let source = listen(&path, SOURCE, |mut stream| {
        let piece = vec![0x5a; PIECE];
        // The guest closes when it has enough.
        while stream.write_all(&piece).is_ok() {}
        Ok(())
    })?;
    let echo = listen(&path, ECHO, |stream| echo(&stream))?;
    let trips = bench.scaled(2000, 100);
    let commands = format!("vsock-bulk:{SINK}:{bytes}:out,vsock-bulk:{SOURCE}:{bytes}:in,vsock-ping:{ECHO}:{trips}:64");
    let socket_path = path.display().to_string();
    let mut guest = Boot::drivers(&commands)
        .configure(|config| {
            config.vsock = Some(Vsock {
                socket_path,
                ..Vsock::default()
            });
        })
        .start()?;
    let out = rate(&guest.wait_for_report("vsock-bulk", PATIENCE)?)?;
    let arrived = joined(sink)?;
    ensure!(arrived == bytes, "{arrived} of {bytes} bytes arrived");
    let into = rate(&guest.wait_for_report("vsock-bulk", PATIENCE)?)?;
    joined(source)?;
    let ping = guest.wait_for_report("vsock-ping", PATIENCE)?.number("median_us")?;
    joined(echo)?;
    Ok(vec![out, into, ping])
}

/// Through the stream that a client opens of a console: out, of which what arrives counts; in; there and back.
fn console(bench: &Bench) -> Result<Vec<f64>> {
    let bytes = bench.scaled(16 << 20, 1 << 20);
    let trips = bench.scaled(2000, 100);
    // The round trips come first: the guest makes none before the stream is open.
    let commands = format!("console-ping:{trips}:1,console-bulk:{bytes}:4096,console-take:{bytes}");
    let mut guest = Boot::drivers(&commands)
        .configure(|config| config.console = Some(Console::default()))
        .start()?;
    guest.wait_for("waiting console-ping", PATIENCE)?;
    let stream = guest.open_console(0)?;
    let answering = {
        let mut stream = stream.try_clone()?;
        thread::spawn(move || {
            for _ in 0..trips {
                let mut byte = [0];
                stream.read_exact(&mut byte)?;
                stream.write_all(&byte)?;
            }
            // From here on it is the bulk.
            let mut arrived = 0;
            let mut buffer = vec![0; PIECE];
            loop {
                match stream.read(&mut buffer)? {
                    0 => return Ok(arrived),
                    count => arrived += count,
                }
            }
        })
    };
    let ping = guest.wait_for_report("console-ping", PATIENCE)?.number("median_us")?;
    let report = guest.wait_for_report("console-bulk", PATIENCE)?;
    guest.wait_for("waiting console-take", PATIENCE)?;
    let piece: Vec<u8> = (0..MODULUS * 1024).map(|index| (index % MODULUS) as u8).collect();
    let mut writer = &stream;
    let mut left = bytes;
    while left > 0 {
        let count = piece.len().min(left);
        writer.write_all(&piece[..count])?;
        left -= count;
    }
    let into = rate(&guest.wait_for_report("console-take", PATIENCE)?)?;
    // The guest ends, and the stream with it.
    drop(guest);
    let arrived = joined(answering)?;
    ensure!(arrived > 0, "nothing of the console's output arrived");
    let out = arrived as f64 / report.number("us")?;
    Ok(vec![out, into, ping])
}

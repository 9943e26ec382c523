//! Our side: a guest through a private manager, in the jail.

use std::{io::Write as _, os::unix::net::UnixListener, thread, time::Duration};

use sepal_integration::{Boot, Guest, HarnessError, Report, disk};
use sepal_schema::config::device::{Console, DiskFormat, DiskMode, Link, Network, Vsock};

use crate::{Device, Failure, GUEST_MAC, Run};

const PATIENCE: Duration = Duration::from_secs(300);
/// Bytes of a stream.
const STREAM: usize = 256 << 20;
const CONSOLE: usize = 32 << 20;

/// Starts the driver guest.
pub(crate) fn start(commands: &str, device: Device<'_>) -> Result<Box<dyn Run>, Failure> {
    let boot = Boot::drivers(commands);
    let boot = match device {
        Device::Disk(path) => boot.disk(disk(path, DiskMode::ReadWrite, DiskFormat::Raw)?),
        Device::Tap(fd) => {
            let mut network = Network::new(Link::Tap(vec![fd]));
            network.mac = Some(GUEST_MAC);
            boot.network(network)
        }
    };
    Ok(Box::new(boot.start()?))
}

impl Run for Guest {
    fn wait_for(&mut self, text: &str) -> Result<(), HarnessError> {
        Guest::wait_for(self, text, PATIENCE).map(drop)
    }

    fn report(&mut self, command: &str) -> Result<Report, HarnessError> {
        self.wait_for_report(command, PATIENCE)
    }
}

/// Throughput of streams, in MB/s: through the Unix sockets beside the manager, and of a console that nobody reads live.
pub(crate) fn streams() -> Result<Vec<(&'static str, f64)>, Failure> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("vsock");
    let beside = |port: u32| UnixListener::bind(format!("{}_{port}", path.display()));
    let (sink, source) = (beside(1024)?, beside(1025)?);
    let commands = format!("vsock-bulk:1024:{STREAM}:out,vsock-bulk:1025:{STREAM}:in,console-bulk:{CONSOLE}:4096");
    let mut guest = Boot::drivers(&commands)
        .configure(|config| {
            config.console = Some(Console::default());
            config.vsock = Some(Vsock {
                socket_path: path.display().to_string(),
                ..Vsock::default()
            });
        })
        .start()?;
    let sinking = thread::spawn(move || std::io::copy(&mut sink.accept()?.0, &mut std::io::sink()));
    let out = rate(&guest.wait_for_report("vsock-bulk", PATIENCE)?)?;
    sinking.join().map_err(|_| "the sink panicked")??;
    let feeding = thread::spawn(move || {
        let (mut stream, _) = source.accept()?;
        let piece = vec![0x5a; 1 << 20];
        // The guest closes when it has enough.
        while stream.write_all(&piece).is_ok() {}
        Ok::<(), std::io::Error>(())
    });
    let into = rate(&guest.wait_for_report("vsock-bulk", PATIENCE)?)?;
    feeding.join().map_err(|_| "the source panicked")??;
    let console = rate(&guest.wait_for_report("console-bulk", PATIENCE)?)?;
    Ok(vec![
        ("vsock from the guest", out),
        ("vsock to the guest", into),
        ("console from the guest", console),
    ])
}

fn rate(report: &Report) -> Result<f64, HarnessError> {
    Ok(report.number("bytes")? / report.number("us")?)
}

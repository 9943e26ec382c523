//! The component alone: started in its jail by this program, which is its only client.

use std::{
    io::Read,
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags};
use sepal_integration::program;
use sepal_runner::{
    host,
    outer::{ComponentSpec, Program, Runner},
    startup::{CONTROL, HandleKind, KVM},
};
use sepal_schema::{
    config::{File, GuestConfig},
    lifecycle_capnp::guest_lifecycle,
    transport::{Limits, Reactor, connect, reactor::Direction},
};

use crate::{parts::units::milliseconds, vmm::Machine};

/// Nothing here takes as long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Milliseconds from starting the process until the guest's first byte, for each round after one that warms up.
pub(super) fn measure(machine: &Machine<'_>, rounds: usize) -> Result<Vec<f64>> {
    let mut runner = Runner::new()?;
    let mut reactor = Reactor::new()?;
    let mut values = Vec::with_capacity(rounds);
    for round in 0..=rounds {
        let took = once(&mut runner, &mut reactor, machine).context("a component without a manager")?;
        if round > 0 {
            values.push(milliseconds(took));
        }
    }
    Ok(values)
}

fn once(runner: &mut Runner, reactor: &mut Reactor, machine: &Machine<'_>) -> Result<Duration> {
    let open = |path: &Path, flags| rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty());
    let config = GuestConfig {
        kernel: File::Fd(open(machine.kernel.elf, OFlags::RDONLY)?),
        memory_mib: i32::try_from(machine.memory_mib)?,
        ..GuestConfig::default()
    };
    let (control, theirs) = UnixStream::pair()?;
    let (serial, guests_end) = UnixStream::pair()?;
    let program = Program::open(program("vmm-component")?)?;

    let begun = Instant::now();
    let mut spec = ComponentSpec::new(program, c"vmm-component".to_owned());
    spec.handles.add(CONTROL, HandleKind::Socket, theirs.into())?;
    spec.handles
        .add(KVM, HandleKind::Kvm, open(Path::new("/dev/kvm"), OFlags::RDWR)?)?;
    let mut process = runner.spawn(spec)?;
    let handle = reactor.handle();
    let (client, connection) = connect::<guest_lifecycle::Client>(&handle, control, Limits::default())?;
    let mut create = client.create_request();
    config.encode(create.get().init_config(), &connection.fds())?;
    let mut setup = create.get().init_host();
    setup.set_unassisted(host::is_unassisted());
    let number = connection.fds().send(guests_end.into())?;
    setup.init_serial().init_stream().set_number(number);
    let created = create.send().promise;
    let run = client.run_request().send().promise;
    let serial = handle.register(serial)?;
    let byte = serial.io(Direction::Read, |mut serial: &UnixStream| serial.read(&mut [0]));
    let read = reactor.run_until(handle.timeout(PATIENCE, byte))?;
    let read = read.map_err(|_| anyhow::anyhow!("no first byte in time"))??;
    let took = begun.elapsed();
    anyhow::ensure!(read == 1, "the guest ended without a byte");
    drop((created, run));
    connection.disconnect();
    reactor.run_until(connection)?;
    process.wait()?;
    Ok(took)
}

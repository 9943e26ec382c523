//! One guest manager of one's own, and guests of one kind that come and go on it, also several at once: what a client waits for.

use std::{
    future::{Future, ready},
    iter,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use sepal_integration::{Boot, LaunchRequest, Manager};
use sepal_schema::{
    error::{Error, Outcome},
    guest_capnp::{guest, observer, output, power},
    info::GuestInfo,
    manager_capnp::guest_manager::{self, lease},
    report::StopReport,
    transport::Handle,
};

use crate::processes::Process;

/// Nothing here takes as long.
const PATIENCE: Duration = Duration::from_secs(60);

/// A guest manager of one's own.
pub(crate) struct Launcher {
    manager: Manager,
}

/// A guest that runs; it is stopped when this is dropped, which nobody waits for.
pub(crate) struct Launched {
    /// What the manager calls it.
    pub(crate) name: String,
    guest: guest::Client,
    /// Held: the guest ends when it is dropped.
    _lease: lease::Client,
}

impl Launched {
    /// What tells about it.
    pub(crate) fn observer(&self) -> observer::Client {
        observer(&self.guest)
    }
}

impl Launcher {
    /// Starts the manager with these options.
    pub(crate) fn start(options: &[&str]) -> Result<Self> {
        let manager = Manager::start_with(options).context("starting a guest manager")?;
        let mut launcher = Self { manager };
        // It has started when it answers.
        let asked = launcher.manager.client().version_request().send().promise;
        launcher.run(async move {
            let answer = asked.await?;
            answer.get()?;
            Ok(())
        })?;
        Ok(launcher)
    }

    /// The manager's process.
    pub(crate) fn process(&self) -> Result<Process> {
        let pid = self.manager.pid().context("the manager is somebody else's")?;
        Ok(Process(pid))
    }

    /// What makes calls to the manager.
    pub(crate) fn client(&self) -> &guest_manager::Client {
        self.manager.client()
    }

    /// Launches a guest; how long it took from sending that until its first byte had come back. What reads the byte is sent along with the launch.
    pub(crate) fn launch(&mut self, boot: Boot) -> Result<(Duration, Launched)> {
        let request = self.manager.launch_request(boot)?;
        self.run(launch(request))
    }

    /// Asks for what there is to know about a guest.
    pub(crate) fn info(&mut self, launched: &Launched) -> Result<(GuestInfo, Duration)> {
        let observer = launched.observer();
        self.run(async move {
            let asked = Instant::now();
            let response = observer.info_request().send().promise.await?;
            let info = GuestInfo::read_result(response.get()?)?;
            Ok((info, asked.elapsed()))
        })
    }

    /// Waits until all that a guest has printed ends with this.
    pub(crate) fn wait_for(&mut self, launched: &Launched, end: &[u8]) -> Result<()> {
        let output: output::Client = launched.observer().output_request().send().pipeline.get_output();
        self.run(async move {
            let mut printed = Vec::new();
            while !printed.ends_with(end) {
                let mut request = output.read_request();
                request.get().set_position(printed.len() as u64);
                let response = request.send().promise.await?;
                let piece = response.get()?.outcome()?;
                ensure!(!piece.get_ended(), "the guest has ended");
                printed.extend(piece.get_bytes()?);
            }
            Ok(())
        })
    }

    /// Stops a guest by force: how long it takes until the manager says that it has ended and its process is gone, whatever comes last.
    pub(crate) fn stop(&mut self, launched: &Launched) -> Result<Duration> {
        let (info, _) = self.info(launched)?;
        let process = process(info.component_pid)?;
        let power = launched.guest.power_request().send().pipeline.get_power();
        let gone = gone(self.manager.handle(), process)?;
        self.run(async move {
            let sent = Instant::now();
            let answer = power.kill_request().send().promise.await?;
            if let power::stop_result::Which::Error(error) = answer.get()?.which()? {
                return Err(Error::read(error?)?.into());
            }
            gone.await;
            Ok(sent.elapsed())
        })
    }

    /// Waits for a guest to end by itself, and let go of what it had.
    pub(crate) fn end(&mut self, launched: &Launched) -> Result<()> {
        let asked = launched.observer().wait_request().send().promise;
        self.run(async move {
            StopReport::read_result(asked.await?.get()?)?;
            Ok(())
        })
    }

    /// Starts guests that end by themselves for so long, at most `at_once` at a time, and waits for the end of each: how many there were a second.
    pub(crate) fn turn_over(
        &mut self,
        boot: impl Fn() -> Result<Boot>,
        at_once: usize,
        during: Duration,
    ) -> Result<f64> {
        let request = self.manager.launches();
        let (request, boot) = (&request, &boot);
        let begun = Instant::now();
        let due = iter::from_fn(|| (begun.elapsed() < during).then_some(()));
        let guests = stream::iter(due).map(|()| async move {
            let (_, launched) = launch(request(boot()?)?).await?;
            let answer = launched.observer().wait_request().send().promise.await?;
            StopReport::read_result(answer.get()?)?;
            Ok(())
        });
        let all = guests
            .buffer_unordered(at_once)
            .try_fold(0.0, |count, ()| ready(Ok(count + 1.0)));
        let count: f64 = self.run(all)?;
        Ok(count / begun.elapsed().as_secs_f64())
    }

    /// Does work that makes calls, but not for ever.
    pub(crate) fn run<T>(&mut self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let outcome = self.manager.within(PATIENCE, work)?;
        outcome.with_context(|| format!("no answer within {PATIENCE:?}"))?
    }
}

async fn launch(request: LaunchRequest) -> Result<(Duration, Launched)> {
    let sent = Instant::now();
    let launching = request.send();
    let guest = launching.pipeline.get_guest();
    let output: output::Client = observer(&guest).output_request().send().pipeline.get_output();
    let read = output.read_request().send().promise;
    let response = launching.promise.await?;
    let launched = response.get()?.outcome()?;
    let launched = Launched {
        name: launched.get_name()?.to_string()?,
        guest: launched.get_guest()?,
        _lease: launched.get_lease()?,
    };
    let answer = read.await?;
    let printed = answer.get()?.outcome()?.get_bytes()?;
    ensure!(!printed.is_empty(), "the guest ended without a byte");
    Ok((sent.elapsed(), launched))
}

fn observer(guest: &guest::Client) -> observer::Client {
    guest.observer_request().send().pipeline.get_observer()
}

/// A handle on a process.
pub(crate) fn process(pid: u32) -> Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.context("this is no process id")?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Waits until a process has ended.
fn gone(handle: Handle, process: OwnedFd) -> Result<impl Future<Output = ()>> {
    let process = handle.register(process)?;
    Ok(async move { process.readable().await })
}

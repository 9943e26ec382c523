//! A virtual machine as the program's threads use it: its life behind a lock, and the way to the task that carries it out (`machine`).

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures::channel::mpsc::{UnboundedReceiver, UnboundedSender, unbounded};

use crate::{
    answer::{Answer, Awaited, answer},
    life::{Life, NoStart, Stop},
    log,
    reason::StopReason,
    streams::Ends,
};

/// What the program asks of the task.
pub(crate) enum Command {
    Start,
    Stop,
}

/// What a machine's handle and task share.
pub(crate) struct Shared {
    life: Mutex<Life>,
    changed: Condvar,
    name: String,
    pub(crate) ends: Arc<Ends>,
}

impl Shared {
    fn look(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes its life, and wakes whoever waits for that.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut Life) -> T) -> T {
        let result = change(&mut self.look());
        self.changed.notify_all();
        result
    }

    /// Waits until `what` is there.
    fn until<T>(&self, what: impl Fn(&Life) -> Option<T>) -> T {
        let mut life = self.look();
        loop {
            if let Some(result) = what(&life) {
                return result;
            }
            life = self.changed.wait(life).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Tells the user about this machine.
    pub(crate) fn say(&self, what: &str) {
        log::say_to(self.ends.log.as_ref(), &format!("{}: {what}", self.name));
    }
}

/// The task's side. When it is dropped, the machine is stopped for good.
pub(crate) struct Driven {
    pub(crate) shared: Arc<Shared>,
    pub(crate) commands: UnboundedReceiver<Command>,
    /// Dropped last: who destroys the machine waits for it.
    _gone: Answer<()>,
}

impl Drop for Driven {
    fn drop(&mut self) {
        self.shared.change(Life::lost);
    }
}

/// What is behind a handle `AVirtualMachine`.
pub struct Vm {
    shared: Arc<Shared>,
    commands: UnboundedSender<Command>,
    gone: Awaited<()>,
}

impl Vm {
    /// A machine that does not run, and its task's side. `name` is what the program calls it.
    pub(crate) fn new(name: String, ends: Ends) -> (Self, Driven) {
        let shared = Arc::new(Shared {
            life: Mutex::new(Life::new()),
            changed: Condvar::new(),
            name,
            ends: Arc::new(ends),
        });
        let (sender, commands) = unbounded();
        let (keeps, gone) = answer();
        let vm = Self {
            shared: shared.clone(),
            commands: sender,
            gone,
        };
        let driven = Driven {
            shared,
            commands,
            _gone: keeps,
        };
        (vm, driven)
    }

    /// Tells the user about this machine.
    pub(crate) fn say(&self, what: &str) {
        self.shared.say(what);
    }

    fn command(&self, command: Command) {
        // Without a task the machine is lost, which its life says.
        let _ = self.commands.unbounded_send(command);
    }

    /// Starts it; returns when its processors run, or whether they do not.
    pub(crate) fn start(&self) -> bool {
        // Commands are given while the life is locked: a stop in another thread comes after the start that it is for.
        let started = self.shared.change(|life| {
            let run = life.start()?;
            self.command(Command::Start);
            Ok(run)
        });
        match started {
            Ok(run) => self.shared.until(|life| life.has_started(run)),
            Err(why @ (NoStart::Running | NoStart::Lost)) => {
                self.say(&format!("not started: {why}"));
                false
            }
        }
    }

    /// Stops it; returns when it has stopped, or false if it was not running or its service ended.
    pub(crate) fn stop(&self) -> bool {
        let stop = self.shared.change(|life| {
            let stop = life.stop();
            if matches!(stop, Stop::Ask(_)) {
                self.command(Command::Stop);
            }
            stop
        });
        let (Stop::Ask(run) | Stop::Wait(run)) = stop else {
            return false;
        };
        self.shared.until(|life| life.was_stopped(run))
    }

    /// Waits for its end, for at most `timeout`; for ever without one.
    pub(crate) fn wait(&self, timeout: Option<Duration>) -> Option<StopReason> {
        // Later than the clock can tell is never.
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut life = self.shared.look();
        let since = life.ended_runs();
        loop {
            if let Some(reason) = life.stopped(since) {
                return Some(reason);
            }
            let Some(deadline) = deadline else {
                life = self.shared.changed.wait(life).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let waited = self.shared.changed.wait_timeout(life, left);
            life = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Stops it, and waits until nothing of it is left.
    pub(crate) fn destroy(self) {
        self.stop();
        let Self { shared, commands, gone } = self;
        drop((shared, commands));
        // The answer is that there is none.
        gone.take();
    }
}

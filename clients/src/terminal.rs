//! The user's terminal: raw while a guest has it, and as it was afterwards, whatever happens.

use std::{
    io::{self, IsTerminal},
    os::fd::AsFd,
    sync::Mutex,
    thread,
};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// The byte that detaches: Ctrl-], as telnet and virsh have it.
pub(crate) const ESCAPE: u8 = 0x1d;

/// What the terminal was like before it became raw.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// While it lives, standard input gives every key as it is typed, if it is a terminal.
pub(crate) struct Raw(());

impl Raw {
    /// Makes the terminal raw. `None` if standard input is none.
    pub(crate) fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        raw.make_raw();
        restore_on_signals()?;
        if let Ok(mut slot) = BEFORE.lock() {
            *slot = Some(before);
        }
        tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw)?;
        Ok(Some(Self(())))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// Makes the terminal what it was before [`Raw::enter`].
pub(crate) fn restore() {
    if let Some(before) = BEFORE.lock().ok().and_then(|mut slot| slot.take()) {
        // There is nobody left to tell if the terminal is gone.
        let _ = tcsetattr(io::stdin().as_fd(), OptionalActions::Now, &before);
    }
}

/// Signals that would end the program end it after the terminal is restored.
fn restore_on_signals() -> io::Result<()> {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initializes the set that the other calls then use; pthread_sigmask changes only this thread's mask, which threads
    // started later inherit, so that only the thread below takes the signals.
    let set = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        let mut set = set.assume_init();
        for signal in [libc::SIGTERM, libc::SIGHUP, libc::SIGINT, libc::SIGQUIT] {
            libc::sigaddset(&mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        set
    };
    thread::Builder::new().name("signals".into()).spawn(move || {
        let mut signal = 0;
        // SAFETY: the set is initialized, and `signal` is ours to write.
        let waited = unsafe { libc::sigwait(&set, &mut signal) };
        if waited == 0 {
            restore();
            std::process::exit(128 + signal);
        }
    })?;
    Ok(())
}

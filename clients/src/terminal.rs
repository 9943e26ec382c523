//! The user's terminal: raw while a guest has it, and as it was afterwards, whatever happens.

use std::{
    io::{self, BufRead, IsTerminal, Write},
    os::fd::{AsFd, FromRawFd, OwnedFd},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use sepal_schema::transport::{AsyncFd, Handle, reactor::Direction};

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

/// While it lives, standard output is the terminal's alternate screen, without a cursor.
pub(crate) struct Screen(());

/// Whether there is a [`Screen`].
static SCREEN: AtomicBool = AtomicBool::new(false);

impl Screen {
    /// Switches to the alternate screen.
    pub(crate) fn enter() -> io::Result<Self> {
        let screen = Self(());
        SCREEN.store(true, Ordering::SeqCst);
        let mut out = io::stdout().lock();
        out.write_all(b"\x1b[?1049h\x1b[?25l")?;
        out.flush()?;
        Ok(screen)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        leave_screen();
    }
}

/// Switches back from the alternate screen. Written past what this program buffers: whoever holds that may have been stopped in the middle.
fn leave_screen() {
    if SCREEN.swap(false, Ordering::SeqCst) {
        // There is nobody left to tell if the terminal is gone.
        let _ = rustix::io::write(io::stdout().as_fd(), b"\x1b[?25h\x1b[?1049l");
    }
}

/// Makes the terminal what it was before [`Raw::enter`] and [`Screen::enter`].
pub(crate) fn restore() {
    leave_screen();
    if let Some(before) = BEFORE.lock().ok().and_then(|mut slot| slot.take()) {
        // There is nobody left to tell if the terminal is gone.
        let _ = tcsetattr(io::stdin().as_fd(), OptionalActions::Now, &before);
    }
}

/// Copies lines to standard error until there are no more, and returns the last one that says something. On a raw terminal a line feed alone would
/// not bring the next line to its beginning.
pub(crate) fn relay(mut from: impl BufRead) -> String {
    let (mut line, mut last) = (Vec::new(), String::new());
    while let Ok(1..) = from.read_until(b'\n', &mut line) {
        let raw = BEFORE.lock().is_ok_and(|before| before.is_some());
        // Whoever does not want to see it is no reason to keep the other side waiting.
        let _ = io::stderr().write_all(&fit(&line, raw));
        if !line.trim_ascii().is_empty() {
            last = String::from_utf8_lossy(line.trim_ascii()).into_owned();
        }
        line.clear();
    }
    last
}

/// A line as standard error is to get it while the terminal is `raw`, or not.
fn fit(line: &[u8], raw: bool) -> Vec<u8> {
    match line.strip_suffix(b"\n") {
        Some(text) if raw => [text, b"\r\n"].concat(),
        _ => line.to_vec(),
    }
}

/// Starts a thread that leaves the signals which end the program to the one that restores the terminal.
pub(crate) fn spawn<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let set = ending_signals();
    let mut before = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: both sets are valid, and the call fills the second; it changes only this thread's mask, which the new thread inherits.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, before.as_mut_ptr()) };
    let spawned = thread::Builder::new().name(name.into()).spawn(work);
    // SAFETY: pthread_sigmask has filled the set: it only fails for an unknown operation.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut()) };
    spawned
}

/// Columns and rows of the terminal, if standard input is one.
pub(crate) fn size() -> Option<(u16, u16)> {
    let size = rustix::termios::tcgetwinsize(io::stdin().as_fd()).ok()?;
    Some((size.ws_col, size.ws_row))
}

/// Signals that arrive, one at a time.
pub(crate) struct Signals(AsyncFd<OwnedFd>);

impl Signals {
    /// Waits for the next one.
    ///
    /// # Errors
    /// They cannot be read any more.
    pub(crate) async fn next(&self) -> io::Result<()> {
        let take = |fd: &OwnedFd| Ok(rustix::io::read(fd, &mut [0; size_of::<libc::signalfd_siginfo>()])?);
        self.0.io(Direction::Read, take).await.map(drop)
    }

    /// Takes these from now on. Threads that are started later leave them alone.
    fn of(handle: &Handle, set: &libc::sigset_t) -> io::Result<Self> {
        // SAFETY: the set is valid; the mask concerns this thread and those that it will make.
        let fd = unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, set, std::ptr::null_mut());
            libc::signalfd(-1, set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: fresh, and owned by nothing else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self(handle.register(fd)?))
    }
}

/// Watches for changes of the terminal's size from now on.
///
/// # Errors
/// The system gives no descriptor.
pub(crate) fn size_changes(handle: &Handle) -> io::Result<Signals> {
    Signals::of(handle, &set_of(&[libc::SIGWINCH]))
}

/// Takes the signals that would end the program from now on.
///
/// # Errors
/// The system gives no descriptor.
pub(crate) fn endings(handle: &Handle) -> io::Result<Signals> {
    Signals::of(handle, &ending_signals())
}

/// The signals that would end the program.
fn ending_signals() -> libc::sigset_t {
    set_of(&[libc::SIGTERM, libc::SIGHUP, libc::SIGINT, libc::SIGQUIT])
}

fn set_of(signals: &[libc::c_int]) -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initializes the set that the other calls then use.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        let mut set = set.assume_init();
        for &signal in signals {
            libc::sigaddset(&mut set, signal);
        }
        set
    }
}

/// Signals that would end the program end it after the terminal is restored.
fn restore_on_signals() -> io::Result<()> {
    let set = ending_signals();
    // SAFETY: the set is valid; the call changes only this thread's mask, which threads started later inherit, so that only the thread below
    // takes the signals.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_begin_at_the_margin() {
        assert_eq!(fit(b"rip=0\n", false), b"rip=0\n");
        assert_eq!(fit(b"rip=0\n", true), b"rip=0\r\n");
        assert_eq!(fit(b"cut off", true), b"cut off");
    }
}

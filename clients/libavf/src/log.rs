//! What a program's user is told in words: lines on standard error, and on the log descriptor of the machine that they are about.
//!
//! The program may have closed the other end, may not want to be stopped by a pipe that is full, and may have a handler for SIGPIPE that is none of our
//! business: so a line that cannot be written at once is lost, one that is long is cut, and the signal is taken back where it arises.

use std::{
    mem,
    os::fd::{AsFd, BorrowedFd},
    ptr,
    sync::OnceLock,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use sepal_schema::error::Error;

use crate::streams::{CHUNK, Kind};

/// Whether the program had a standard error before the library opened anything: what has the number later may be the library's own.
static HAS_STANDARD_ERROR: OnceLock<bool> = OnceLock::new();

/// To be called before anything is opened.
pub(crate) fn look_for_standard_error() -> bool {
    // SAFETY: only asks about the number.
    *HAS_STANDARD_ERROR.get_or_init(|| unsafe { libc::fcntl(libc::STDERR_FILENO, libc::F_GETFD) } >= 0)
}

/// What the manager answered, with what it is about.
pub(crate) fn words(error: &Error) -> String {
    match error.about.as_str() {
        "" => error.message.clone(),
        about if error.message.contains(about) => error.message.clone(),
        about => format!("{about}: {}", error.message),
    }
}

/// Tells `what` on standard error.
pub(crate) fn say(what: &str) {
    if look_for_standard_error() {
        // SAFETY: whether or not it is still open, to the program the number means nothing but standard error; it is only written to.
        write_line(unsafe { BorrowedFd::borrow_raw(libc::STDERR_FILENO) }, what);
    }
}

/// Tells `what` on standard error, and on the log, if there is one.
pub(crate) fn say_to(log: Option<impl AsFd>, what: &str) {
    say(what);
    if let Some(log) = log {
        write_line(log.as_fd(), what);
    }
}

fn write_line(to: BorrowedFd<'_>, what: &str) {
    let mut line = format!("libavf: {}", what.replace(['\n', '\r'], " "));
    line.truncate(line.floor_char_boundary(CHUNK - 1));
    line.push('\n');
    let mut ready = [PollFd::from_borrowed_fd(to, PollFlags::OUT)];
    let now = Timespec::default();
    if matches!(poll(&mut ready, Some(&now)), Ok(1)) {
        without_sigpipe(|| {
            // There is nobody to tell that it could not be told. A machine's output may have taken the room meanwhile.
            let _ = Kind::of(to).write(to, line.as_bytes());
        });
    }
}

/// Does something by which SIGPIPE may come to this thread, and takes the signal back.
fn without_sigpipe(what: impl FnOnce()) {
    // SAFETY: signal sets are plain C structs that the calls fill; the mask is this thread's, and restored. The signal is taken only if it was neither
    // blocked nor pending before, so it can only have come from `what`.
    unsafe {
        let mut pipe: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&raw mut pipe);
        libc::sigaddset(&raw mut pipe, libc::SIGPIPE);
        let (mut pending, mut before): (libc::sigset_t, libc::sigset_t) = (mem::zeroed(), mem::zeroed());
        libc::sigpending(&raw mut pending);
        if libc::sigismember(&raw const pending, libc::SIGPIPE) == 1
            || libc::pthread_sigmask(libc::SIG_BLOCK, &raw const pipe, &raw mut before) != 0
        {
            return what();
        }
        what();
        let now: libc::timespec = mem::zeroed();
        if libc::sigismember(&raw const before, libc::SIGPIPE) == 0 {
            libc::sigtimedwait(&raw const pipe, ptr::null_mut(), &raw const now);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn what_an_error_is_about_is_told_once() {
        let error = Error::bad_config("protectedVm", "this host can have none");
        assert_eq!(words(&error), "protectedVm: this host can have none");
        let error = Error::bad_config("kernel", "the kernel is a pipe");
        assert_eq!(words(&error), "the kernel is a pipe");
        let error = Error::new(sepal_schema::error::Kind::NoResources, "no room");
        assert_eq!(words(&error), "no room");
    }

    #[test]
    fn a_line_comes_with_the_librarys_name_and_nothing_breaks_it() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        write_line(writer.as_fd(), "one\ntwo");
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "libavf: one two\n");
    }

    #[test]
    fn a_line_is_never_longer_than_what_fits_for_certain() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        write_line(writer.as_fd(), &"é".repeat(100_000));
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert!(text.len() <= CHUNK && text.len() > CHUNK - 3, "{}", text.len());
        assert!(text.ends_with("é\n"), "{text}");
    }

    #[test]
    fn a_reader_that_is_gone_or_stands_still_stops_nobody() {
        let (reader, writer) = std::io::pipe().unwrap();
        let room = rustix::pipe::fcntl_getpipe_size(&writer).unwrap();
        rustix::io::write(&writer, &vec![0; room]).unwrap();
        write_line(writer.as_fd(), "nobody reads this");
        drop(reader);
        // SAFETY: what SIGPIPE does is set for the process, as in a C program: it would end it.
        let before = unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
        write_line(writer.as_fd(), "nobody can");
        // SAFETY: as it was.
        unsafe { libc::signal(libc::SIGPIPE, before) };
    }
}

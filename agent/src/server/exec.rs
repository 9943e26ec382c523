//! Runs a program for the host: one thread that waits for the host, the program's pipes or terminal, and its end, all at once.
//!
//! ```text
//!   host --Data--> input (at most WINDOW bytes) --> stdin or terminal      host --Resize, Signal--> terminal, process group
//!   host <-------- outgoing (some 64 KiB) <-------- stdout, stderr or terminal
//!   program ended: what is in its pipes is still sent, then Exited or Killed
//!   host went away: the process group is killed
//! ```
//!
//! A program that leaves others behind with its output does not hold its host up: its own end is what counts.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ExitStatus, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::SendFlags;
use rustix::process::{Pid, PidfdFlags, Signal};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use super::{Connection, Trouble};
use crate::client::Operation;
use crate::protocol::{Command, DATA_MAX, Message, Terminal, ToAgent, ToHost, WINDOW};

/// Bytes of unsent output above which no more is read from the program.
const UNSENT_MAX: usize = 64 << 10;
/// How long a terminal may stay silent after the program's end before no more is expected of it: the last bytes of a terminal arrive a moment after
/// they were written, unlike those of a pipe.
const LAST_WORDS: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// Bytes that a pipe holds at most, unless a privileged program makes it larger.
const PIPES: usize = 1 << 20;

/// The host's end of the program's input and outputs.
struct Ends {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    /// Where `stdin` and `stdout` lead, if that is a terminal.
    terminal: Option<OwnedFd>,
}

/// A program that runs. Dropped, it and all of its process group are killed.
struct Running {
    child: Child,
    pidfd: OwnedFd,
}

impl Running {
    fn signal_group(&self, signal: Signal) {
        // It was not waited for, so its number is still its own; a group that is gone needs no signal.
        if let Some(pid) = Pid::from_raw(self.child.id().cast_signed()) {
            let _ = rustix::process::kill_process_group(pid, signal);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            self.signal_group(Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

/// Runs `command`, and says how it ended.
pub(super) fn run(connection: &mut Connection, command: &Command) -> Result<(), Trouble> {
    let operation = Operation::Exec(command.clone());
    operation.check().map_err(|error| Trouble::bad(&error.to_string()))?;
    let (running, ends) = start(command)?;
    connection.send(&ToHost::Go)?;
    let mut session = Session {
        connection,
        running,
        ends,
        input: VecDeque::new(),
        input_ended: false,
        outgoing: Vec::new(),
        ended: None,
        last_words: PIPES,
    };
    session.run()
}

fn start(command: &Command) -> Result<(Running, Ends), Trouble> {
    let text = |bytes: &[u8]| OsString::from(OsStr::from_bytes(bytes));
    let Some((program, arguments)) = command.arguments.split_first() else {
        return Err(Trouble::bad("no program"));
    };
    let program = text(program);
    let failed = |error: &io::Error| Trouble::io(&program.display().to_string(), error);
    let mut process = std::process::Command::new(&program);
    process.args(arguments.iter().map(|argument| text(argument)));
    for variable in &command.environment {
        // Checked before: each has a name and a `=`.
        if let Some(at) = variable.iter().position(|&byte| byte == b'=') {
            process.env(text(&variable[..at]), text(&variable[at + 1..]));
        }
    }
    if !command.directory.is_empty() {
        process.current_dir(text(&command.directory));
    }
    let terminal = match command.terminal {
        None => {
            process
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            None
        }
        Some(size) => {
            let (ours, theirs) = open_terminal(size).map_err(|e| Trouble::io("a terminal", &e))?;
            let other = || theirs.try_clone().map_err(|e| failed(&e));
            process.stdin(other()?).stdout(other()?).stderr(theirs);
            Some(ours)
        }
    };
    let on_terminal = terminal.is_some();
    // A session of its own: a terminal's foreground, and a group that ends together.
    let own_session = move || {
        rustix::process::setsid()?;
        if on_terminal {
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        Ok(())
    };
    // SAFETY: what runs between fork and exec are two system calls and the conversion of an error number, which neither allocate nor lock.
    unsafe { process.pre_exec(own_session) };
    let mut child = process.spawn().map_err(|e| failed(&e))?;
    // Closes the agent's copies of the terminal's other end.
    drop(process);
    let pid = Pid::from_raw(child.id().cast_signed());
    let pidfd = pid
        .ok_or(Errno::SRCH)
        .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()));
    let pidfd = match pidfd {
        Ok(pidfd) => pidfd,
        Err(errno) => {
            let _ = child.kill();
            let _ = child.wait();
            return Err(failed(&errno.into()));
        }
    };
    let ends = match &terminal {
        Some(ours) => {
            let ours = || ours.try_clone().map_err(|e| failed(&e));
            Ends {
                stdin: Some(ours()?),
                stdout: Some(ours()?),
                stderr: None,
                terminal: Some(ours()?),
            }
        }
        None => Ends {
            stdin: child.stdin.take().map(OwnedFd::from),
            stdout: child.stdout.take().map(OwnedFd::from),
            stderr: child.stderr.take().map(OwnedFd::from),
            terminal: None,
        },
    };
    let running = Running { child, pidfd };
    for end in [&ends.stdin, &ends.stdout, &ends.stderr].into_iter().flatten() {
        rustix::io::ioctl_fionbio(end, true).map_err(|e| failed(&e.into()))?;
    }
    Ok((running, ends))
}

/// A terminal of this size: our end, and the program's.
fn open_terminal(size: Terminal) -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&ours)?;
    let theirs = rustix::pty::ioctl_tiocgptpeer(&ours, flags)?;
    set_size(&ours, size)?;
    Ok((ours, theirs))
}

fn set_size(terminal: &OwnedFd, size: Terminal) -> io::Result<()> {
    let size = Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(rustix::termios::tcsetwinsize(terminal, size)?)
}

/// What was ready.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Host,
    Stdin,
    Stdout,
    Stderr,
    Program,
}

struct Session<'a> {
    connection: &'a mut Connection,
    running: Running,
    ends: Ends,
    /// For the program.
    input: VecDeque<u8>,
    input_ended: bool,
    /// Frames for the host.
    outgoing: Vec<u8>,
    ended: Option<ExitStatus>,
    /// Bytes that are still read after the program's end: what its pipes can hold, whoever else may be writing.
    last_words: usize,
}

impl Session<'_> {
    fn run(&mut self) -> Result<(), Trouble> {
        // Messages that came with the request.
        self.take_messages()?;
        loop {
            let ready = self.wait()?;
            for source in &ready {
                match source {
                    Source::Host => self.move_host()?,
                    Source::Stdin => self.feed(),
                    Source::Stdout => self.read_output(true),
                    Source::Stderr => self.read_output(false),
                    Source::Program => self.look_at_program()?,
                }
            }
            if let Some(status) = self.ended
                && self.outgoing.is_empty()
                && (ready.is_empty() || (self.ends.stdout.is_none() && self.ends.stderr.is_none()))
            {
                let end = match (status.code(), status.signal()) {
                    // A status is one byte, and a signal's number far below.
                    (Some(code), _) => ToHost::Exited(code as u8),
                    (None, signal) => ToHost::Killed(signal.unwrap_or(0) as u8),
                };
                // Everything else is gone, so this may block as long as the host likes.
                rustix::io::ioctl_fionbio(&self.connection.socket, false).map_err(host)?;
                return self.connection.send(&end);
            }
        }
    }

    /// Waits for something to do. Nothing after the program's end means that its pipes are empty.
    fn wait(&self) -> Result<Vec<Source>, Trouble> {
        let room = self.outgoing.len() < UNSENT_MAX;
        let runs = self.ended.is_none();
        let Ends {
            stdin, stdout, stderr, ..
        } = &self.ends;
        let mut host_flags = PollFlags::IN;
        host_flags.set(PollFlags::OUT, !self.outgoing.is_empty());
        let (sources, mut fds): (Vec<Source>, Vec<PollFd<'_>>) = [
            (Source::Host, Some(&self.connection.socket), host_flags),
            (
                Source::Stdin,
                stdin.as_ref().filter(|_| !self.input.is_empty()),
                PollFlags::OUT,
            ),
            (Source::Stdout, stdout.as_ref().filter(|_| room), PollFlags::IN),
            (Source::Stderr, stderr.as_ref().filter(|_| room), PollFlags::IN),
            (Source::Program, runs.then_some(&self.running.pidfd), PollFlags::IN),
        ]
        .into_iter()
        .filter_map(|(source, fd, flags)| Some((source, PollFd::new(fd?, flags))))
        .unzip();
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let timeout = if runs || !self.outgoing.is_empty() {
            None
        } else if self.ends.terminal.is_some() {
            Some(&LAST_WORDS)
        } else {
            Some(&at_once)
        };
        loop {
            match poll(&mut fds, timeout) {
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(host(errno)),
            }
        }
        let ready = sources.into_iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty());
        Ok(ready.map(|(source, _)| source).collect())
    }

    /// Sends to the host, and receives from it.
    fn move_host(&mut self) -> Result<(), Trouble> {
        while !self.outgoing.is_empty() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::send(&self.connection.socket, &self.outgoing, flags) {
                Ok(count) => drop(self.outgoing.drain(..count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(host(errno)),
            }
        }
        let mut buffer = [0; 16 << 10];
        let flags = rustix::net::RecvFlags::DONTWAIT;
        match rustix::net::recv(&self.connection.socket, &mut buffer, flags) {
            Ok((0, _)) => Err(Trouble::Host("while its program ran".into())),
            Ok((count, _)) => {
                self.connection.decoder.push(&buffer[..count]);
                self.take_messages()
            }
            Err(Errno::INTR | Errno::AGAIN) => Ok(()),
            Err(errno) => Err(host(errno)),
        }
    }

    fn take_messages(&mut self) -> Result<(), Trouble> {
        while let Some(message) = self.connection.decoder.take()? {
            match message {
                ToAgent::Data(data) => {
                    if self.input.len() + data.len() > WINDOW {
                        return Err(Trouble::bad("more input than there is room for"));
                    }
                    // What nobody reads any more is dropped, and counts as read.
                    if self.ends.stdin.is_some() && !self.input_ended {
                        self.input.extend(data);
                    } else {
                        self.taken(data.len());
                    }
                }
                ToAgent::End => self.input_ended = true,
                ToAgent::Resize(size) => {
                    if let Some(terminal) = &self.ends.terminal {
                        // Fails only for a terminal that is gone.
                        let _ = set_size(terminal, size);
                    }
                }
                ToAgent::Signal(number) => {
                    // A number that is no signal is none.
                    if self.ended.is_none()
                        && let Some(signal) = Signal::from_named_raw(number.into())
                    {
                        self.running.signal_group(signal);
                    }
                }
                _ => return Err(Trouble::bad("another request while a program runs")),
            }
        }
        self.feed();
        Ok(())
    }

    /// Gives the program input, as much as it takes.
    fn feed(&mut self) {
        while let (Some(stdin), (bytes, _)) = (&self.ends.stdin, self.input.as_slices())
            && !bytes.is_empty()
        {
            match rustix::io::write(stdin, bytes) {
                Ok(count) => {
                    self.input.drain(..count);
                    self.taken(count);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                // It reads no more.
                Err(_) => {
                    self.taken(self.input.len());
                    self.input.clear();
                    self.ends.stdin = None;
                }
            }
        }
        if self.input_ended
            && self.input.is_empty()
            && let Some(stdin) = self.ends.stdin.take()
        {
            if self.ends.terminal.is_some() {
                // A terminal has no end that could be closed: its driver takes this for one. At most a byte, which there is room for.
                let _ = rustix::io::write(&stdin, &[END_OF_FILE]);
            }
            drop(stdin);
        }
    }

    fn taken(&mut self, count: usize) {
        if count > 0 {
            // At most a window.
            self.outgoing.extend(ToHost::Taken(count as u32).encode());
        }
    }

    /// Reads what the program says.
    fn read_output(&mut self, standard: bool) {
        let end = if standard {
            &mut self.ends.stdout
        } else {
            &mut self.ends.stderr
        };
        let Some(fd) = end else { return };
        let mut buffer = vec![0; DATA_MAX / 4];
        match rustix::io::read(fd, &mut buffer) {
            Err(Errno::INTR | Errno::AGAIN) => {}
            // A terminal that nobody has open any more answers with an error.
            Ok(0) | Err(_) => *end = None,
            Ok(count) => {
                buffer.truncate(count);
                let message = if standard {
                    ToHost::Output(buffer)
                } else {
                    ToHost::Errors(buffer)
                };
                self.outgoing.extend(message.encode());
                if self.ended.is_some() {
                    self.last_words = self.last_words.saturating_sub(count);
                    if self.last_words == 0 {
                        (self.ends.stdout, self.ends.stderr) = (None, None);
                    }
                }
            }
        }
    }

    fn look_at_program(&mut self) -> Result<(), Trouble> {
        self.ended = self
            .running
            .child
            .try_wait()
            .map_err(|e| Trouble::io("the program", &e))?;
        if self.ended.is_some() {
            self.taken(self.input.len());
            self.input.clear();
            self.ends.stdin = None;
        }
        Ok(())
    }
}

/// Control-D.
const END_OF_FILE: u8 = 4;

fn host(errno: Errno) -> Trouble {
    Trouble::Host(errno.to_string())
}

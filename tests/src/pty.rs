//! A program on a terminal of its own.

use std::{
    fs::File,
    io::Write,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command, ExitStatus},
};

use rustix::{
    pty::{self, OpenptFlags},
    termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize},
};

use crate::{
    capture::Capture,
    spawn::{describe, end, spawn, wait},
};

/// A program whose standard streams are one terminal. Dropping it kills the program.
pub struct Pty {
    command: String,
    child: Child,
    keyboard: File,
    /// Held, so that the terminal's modes can be looked at.
    terminal: OwnedFd,
    /// What the terminal shows.
    pub screen: Capture,
}

impl Pty {
    /// Starts a program as the leader of a session whose terminal this is.
    ///
    /// # Panics
    /// If there is no terminal to be had, or the program cannot be started.
    pub(crate) fn start(mut command: Command, owner: u64) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let ours = pty::openpt(flags).expect("a terminal");
        pty::unlockpt(&ours).unwrap();
        let terminal = pty::ioctl_tiocgptpeer(&ours, flags).unwrap();
        let size = Winsize {
            ws_row: 24,
            ws_col: 80,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&terminal, size).unwrap();
        let stream = || terminal.try_clone().unwrap();
        command.stdin(stream()).stdout(stream()).stderr(stream());
        // SAFETY: both calls are async-signal-safe, descriptor 0 is the terminal by then, and nothing else happens between fork and exec.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                rustix::process::ioctl_tiocsctty(BorrowedFd::borrow_raw(0))?;
                Ok(())
            });
        }
        let child = spawn(&mut command, owner);
        let keyboard = File::from(ours);
        Self {
            command: describe(&command),
            child,
            screen: Capture::of(keyboard.try_clone().unwrap()),
            keyboard,
            terminal,
        }
    }

    /// The program's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Types.
    ///
    /// # Panics
    /// If the terminal is gone.
    pub fn type_in(&mut self, text: &str) {
        self.keyboard.write_all(text.as_bytes()).unwrap();
    }

    /// Gives the terminal another size, which the program is told by a signal.
    ///
    /// # Panics
    /// If the terminal is gone.
    pub fn resize(&self, columns: u16, rows: u16) {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&self.keyboard, size).unwrap();
    }

    /// Waits until the terminal shows `text`, after what earlier waits have found; returns everything from there to its end.
    ///
    /// # Panics
    /// After [`crate::PATIENCE`].
    #[track_caller]
    pub fn expect(&self, text: &str) -> String {
        self.screen.expect(text)
    }

    /// The terminal's modes.
    ///
    /// # Panics
    /// If the terminal is gone.
    pub fn modes(&self) -> Termios {
        tcgetattr(&self.terminal).unwrap()
    }

    /// True if the terminal waits for whole lines and echoes them, as a shell expects it.
    pub fn is_cooked(&self) -> bool {
        self.modes()
            .local_modes
            .contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    /// Waits for the program's end.
    ///
    /// # Panics
    /// After [`crate::PATIENCE`], with what the terminal shows.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        wait(&mut self.child).unwrap_or_else(|| panic!("{} does not end:\n{}", self.command, self.screen.text()))
    }
}

impl Drop for Pty {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

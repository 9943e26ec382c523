//! User-mode networking by passt (docs/decisions/0007-user-mode-network.md): one process a network, which speaks frames on one end of a socket
//! pair and opens ordinary sockets of the host for the guest's connections.
//!
//! ```text
//!   start: socket pair, passt on its standard input --> ARP request for the gateway --> answer: it works
//!                                                            '--> end of file: it ended; its last words say why
//! ```
//!
//! passt ends when the other end of the pair closes, so it cannot outlive guest and manager. It takes an unprivileged user, an empty root and a
//! system-call filter for itself. Its standard error is a pipe that never blocks it: what nobody reads is lost.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{NetworkError, failed};

/// The program.
pub const PROGRAM: &str = "passt";
/// How long passt may take to come up.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// The network that the guest sees; the addresses that QEMU's users know.
const GUEST: [u8; 4] = [10, 0, 2, 15];
const NETMASK: &str = "255.255.255.0";
const GATEWAY: [u8; 4] = [10, 0, 2, 2];

/// Longest of last words that is kept, in bytes.
const MAX_WORDS: usize = 512;
/// The longest frame that is taken while passt comes up.
const MAX_FRAME: usize = 70_000;
/// Who asks for the gateway if the guest's address is not known: unicast and local. passt follows the guest's frames later.
const ASKING: [u8; 6] = [0x02, 0, 0, 0, 0, 0x0f];

/// A running passt. Dropping it ends the process.
#[derive(Debug)]
pub struct Passt {
    pub(super) child: Child,
    stderr: OwnedFd,
}

/// Starts `program` for a network with `mtu` and a guest with the address `mac`; returns the guest's end once it works.
pub(super) fn start(program: &str, mtu: u16, mac: Option<[u8; 6]>) -> Result<(OwnedFd, Passt), NetworkError> {
    let (ours, theirs) = UnixStream::pair().map_err(failed("make a socket pair"))?;
    let (stderr, their_stderr) = pipe().map_err(failed("make a pipe"))?;
    let [guest, gateway] = [GUEST, GATEWAY].map(|ip| ip.map(|byte| byte.to_string()).join("."));
    let mut command = Command::new(program);
    command
        .args(["--foreground", "--quiet", "--stderr", "--fd", "0"])
        .args(["--address", &guest, "--netmask", NETMASK, "--gateway", &gateway])
        .args(["--mtu", &mtu.to_string()])
        // The guest reaches out, but not to what listens on the host's loopback interface; nobody reaches in.
        .args(["--no-map-gw", "--tcp-ports", "none", "--udp-ports", "none"])
        .current_dir("/")
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(their_stderr);
    let spawned = command.spawn();
    // It holds the other process's ends of both pairs.
    drop(command);
    let child = spawned.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => NetworkError::NoPasst(program.to_owned()),
        _ => failed(format!("start {program}"))(error),
    })?;
    let mut passt = Passt { child, stderr };
    match wait_for_gateway(&ours, mac.unwrap_or(ASKING)) {
        Ok(()) => Ok((ours.into(), passt)),
        Err(error) => Err(NetworkError::PasstFailed(passt.explain(&error))),
    }
}

/// Whether there is a program of that name.
pub(super) fn check(program: &str) -> Result<(), NetworkError> {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let runs =
        |folder: std::path::PathBuf| rustix::fs::access(folder.join(program), rustix::fs::Access::EXEC_OK).is_ok();
    match std::env::split_paths(&folders).any(runs) {
        true => Ok(()),
        false => Err(NetworkError::NoPasst(program.to_owned())),
    }
}

/// A pipe whose writer loses what does not fit.
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::pipe::pipe_with(
        rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK,
    )?)
}

impl Passt {
    /// Why it did not come up.
    fn explain(&mut self, error: &io::Error) -> String {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let words = self.last_words();
        if words.is_empty() { error.to_string() } else { words }
    }

    /// The end of what it wrote to its standard error.
    fn last_words(&self) -> String {
        let mut all = Vec::new();
        let mut part = [0; 4096];
        // The pipe does not block, and nobody writes to it any more.
        while let Ok(len @ 1..) = rustix::io::read(&self.stderr, &mut part) {
            all.extend_from_slice(&part[..len]);
        }
        tidy(&String::from_utf8_lossy(&all))
    }
}

/// What passt said, in one line, without what it always says.
fn tidy(words: &str) -> String {
    let told =
        |line: &&str| !line.is_empty() && !line.starts_with("Failed to send") && !line.starts_with("Don't run as root");
    let words = words.lines().map(str::trim).filter(told).collect::<Vec<_>>().join("; ");
    let start = words.ceil_char_boundary(words.len().saturating_sub(MAX_WORDS));
    words[start..].chars().filter(|c| !c.is_control()).collect()
}

impl Drop for Passt {
    fn drop(&mut self) {
        // Fails only if it has ended and was reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks who has the gateway's address, until passt answers.
fn wait_for_gateway(socket: &UnixStream, mac: [u8; 6]) -> io::Result<()> {
    let mut socket = socket;
    let deadline = Instant::now() + PATIENCE;
    let question = arp_request(mac);
    // Small enough for an empty socket.
    socket.write_all(&(question.len() as u32).to_be_bytes())?;
    socket.write_all(&question)?;
    loop {
        let mut length = [0; 4];
        read_until(socket, &mut length, deadline)?;
        let len = u32::from_be_bytes(length) as usize;
        if len > MAX_FRAME {
            return Err(io::Error::other(format!("it announced a frame of {len} bytes")));
        }
        let mut frame = vec![0; len];
        read_until(socket, &mut frame, deadline)?;
        if is_answer(&frame) {
            socket.set_read_timeout(None)?;
            return Ok(());
        }
    }
}

fn read_until(mut socket: &UnixStream, mut bytes: &mut [u8], deadline: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        let late = || io::Error::from(io::ErrorKind::TimedOut);
        let left = deadline
            .checked_duration_since(Instant::now())
            .filter(|left| !left.is_zero());
        socket.set_read_timeout(Some(left.ok_or_else(late)?))?;
        match socket.read(bytes) {
            Ok(0) => return Err(io::Error::other("it closed its socket")),
            Ok(len) => bytes = &mut bytes[len..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(late()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// "Who has the gateway's address?" (RFC 826), from the guest.
fn arp_request(mac: [u8; 6]) -> Vec<u8> {
    [
        &[0xff; 6][..],
        &mac,
        // ARP; Ethernet and IPv4 addresses of 6 and 4 bytes; a request.
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
        &mac,
        &GUEST,
        &[0; 6],
        &GATEWAY,
    ]
    .concat()
}

fn is_answer(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[8, 6]) && frame.get(20..22) == Some(&[0, 2]) && frame.get(28..32) == Some(&GATEWAY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_words_are_tidied() {
        let said = "Failed to send 47 bytes to syslog\nDon't run as root. Changing to nobody...\n\nNo interface\r\nNot usable\n";
        assert_eq!(tidy(said), "No interface; Not usable");
        assert!(tidy(&"é".repeat(1000)).len() <= MAX_WORDS);
    }

    #[test]
    fn the_gateways_answer_is_known() {
        let question = arp_request(ASKING);
        assert_eq!(question.len(), 42);
        assert!(!is_answer(&question) && !is_answer(&[]));
        let mut answer = question;
        answer[21] = 2;
        answer[28..32].copy_from_slice(&GATEWAY);
        assert!(is_answer(&answer));
    }
}

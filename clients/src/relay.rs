//! `guest relay`: the far end of a connection from another machine. Bytes between its standard streams and the guest manager's socket, nothing else.
//!
//! ```text
//!   standard input  --(thread)--> socket       its end is passed on, and the manager ends the connection
//!   standard output <------------ socket       its end is the end
//! ```

use std::{
    fs::File,
    io,
    net::Shutdown,
    os::fd::{AsFd, BorrowedFd},
    thread,
};

use anyhow::{Context, Result};

use crate::{args::Relay, local, place::Otherwise, status, streams};

/// Copies until one of the two sides has ended.
pub(crate) fn relay(args: &Relay) -> Result<u8> {
    let otherwise = match (args.private, args.start) {
        (true, _) => Otherwise::Private,
        (_, true) => Otherwise::Daemon,
        _ => Otherwise::Resume,
    };
    let found = local::connect(args.socket.as_deref(), otherwise)?;
    // Not the standard library's own streams, which keep back what has no line's end.
    let mut from = unbuffered(io::stdin().as_fd())?;
    let mut to = unbuffered(io::stdout().as_fd())?;
    let mut socket = found.socket;
    let mut away = socket.try_clone().context("copying to the guest manager")?;
    let input = move || {
        // However the input ended, nothing follows; if the socket has, its other direction tells.
        let _ = streams::copy(&mut from, &mut away);
        let _ = away.shutdown(Shutdown::Write);
    };
    thread::Builder::new()
        .name("input".into())
        .spawn(input)
        .context("starting a thread for the input")?;
    let copied = streams::copy(&mut socket, &mut to);
    // The manager ends a connection whose other end is gone; that of this connection alone ends with it.
    let _ = socket.shutdown(Shutdown::Both);
    if let Some(child) = found.child {
        child.wait().context("waiting for the guest manager")?;
    }
    match copied {
        // Nobody is there any more to be told.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(status::SUCCESS),
        copied => copied
            .context("copying what the guest manager sends")
            .map(|()| status::SUCCESS),
    }
}

fn unbuffered(stream: BorrowedFd<'_>) -> Result<File> {
    Ok(File::from(
        stream.try_clone_to_owned().context("copying a standard stream")?,
    ))
}

//! Commands that print what happens as it happens end when nobody reads that any more, also while nothing does: `guest events | head -3`.

use std::{future::Future, io, os::fd::OwnedFd, pin::pin};

use anyhow::Result;
use futures::future::{Either, select};
use rustix::event::{
    Timespec,
    epoll::{self, CreateFlags, EventData, EventFlags},
};
use sepal_schema::transport::{Handle, reactor::Direction};

use crate::status;

/// Carries out a command for as long as somebody may read what it prints.
pub(crate) async fn while_read(handle: &Handle, command: impl Future<Output = Result<u8>>) -> Result<u8> {
    match select(pin!(command), pin!(gone(handle))).await {
        Either::Left((outcome, _)) => outcome,
        Either::Right(((), _)) => Ok(status::SUCCESS),
    }
}

/// Waits until the other end of standard output is closed; for ever where it has none, or that cannot be told.
async fn gone(handle: &Handle) {
    let watched = watch().and_then(|watch| handle.register(watch));
    if let Ok(watched) = watched
        && watched.io(Direction::Read, is_gone).await.is_ok()
    {
        return;
    }
    futures::future::pending().await
}

/// What becomes readable when standard output has an error. Not that itself: the loop would have it not block, and it is shared with others.
fn watch() -> io::Result<OwnedFd> {
    let watch = epoll::create(CreateFlags::CLOEXEC)?;
    // Errors and hang-ups are always told (epoll_ctl(2)).
    epoll::add(&watch, io::stdout(), EventData::new_u64(0), EventFlags::empty())?;
    Ok(watch)
}

fn is_gone(watch: &OwnedFd) -> io::Result<()> {
    let mut events = [epoll::Event {
        flags: EventFlags::empty(),
        data: EventData::new_u64(0),
    }];
    match epoll::wait(watch, &mut events[..], Some(&Timespec::default()))? {
        0 => Err(io::ErrorKind::WouldBlock.into()),
        _ => Ok(()),
    }
}

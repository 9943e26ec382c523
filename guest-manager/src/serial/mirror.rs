//! Output of a port in memory that outlives this process: every byte is there before it is taken out of the component's socket.
//!
//! The socket itself counts what was peeked at (SO_PEEK_OFF, socket(7)), and counts back when that is taken. So whoever has the socket next can tell, if this
//! process is killed between the two, what has been kept already (`durable::ring`).

use std::{
    cell::{Cell, RefCell},
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use rustix::net::RecvFlags;

use crate::{
    durable::{memory::Shared, ring::Ring},
    history::History,
};

/// The ring of a port, if there is one.
#[derive(Debug, Default)]
pub(super) struct Mirror {
    ring: RefCell<Option<Ring<Shared>>>,
    /// That something is not kept has been told.
    told: Cell<bool>,
}

impl Mirror {
    /// A descriptor of the ring, which is made, to keep the last `capacity` bytes, where there is none yet: before anything was printed.
    pub(super) fn descriptor(&self, capacity: usize) -> io::Result<OwnedFd> {
        let mut slot = self.ring.borrow_mut();
        let ring = match slot.take() {
            Some(ring) => ring,
            None => Ring::create(Shared::new()?, capacity)?,
        };
        let descriptor = ring.memory().descriptor();
        *slot = Some(ring);
        descriptor
    }

    /// Goes on with the ring of an earlier manager; returns what is in it, which keeps the last `capacity` bytes or more.
    pub(super) fn restore(&self, ring: OwnedFd, capacity: usize) -> io::Result<History> {
        let ring = Ring::open(Shared::from(ring))?;
        let (_, bytes) = ring.kept()?;
        let history = History::restored(capacity.max(bytes.len()), ring.end(), &bytes);
        *self.ring.borrow_mut() = Some(ring);
        Ok(history)
    }

    /// Output comes from this socket now: one that nobody has read from yet, or that of which an earlier manager has kept what is in the ring. What has been
    /// kept already is taken out of it.
    pub(super) fn attach(&self, socket: &UnixStream) -> io::Result<()> {
        let Some(ring) = &mut *self.ring.borrow_mut() else {
            return Ok(());
        };
        let twice = ring.published(peek_offset(socket)?.unwrap_or(0));
        set_peek_offset(socket)?;
        let mut rest = usize::try_from(twice).unwrap_or(usize::MAX);
        let mut room = [0; 4096];
        while rest > 0 {
            let most = rest.min(room.len());
            match rustix::net::recv(socket, &mut room[..most], RecvFlags::DONTWAIT)?.1 {
                0 => break,
                count => rest -= count,
            }
        }
        ring.all_consumed()
    }

    /// Takes what there is out of the socket, keeps it, and tells it; returns how much it was.
    pub(super) fn take(
        &self,
        socket: &UnixStream,
        room: &mut [MaybeUninit<u8>],
        tell: impl FnOnce(&[u8]),
    ) -> io::Result<usize> {
        let mut slot = self.ring.borrow_mut();
        let Some(ring) = &mut *slot else {
            drop(slot);
            let ((bytes, _), _) = rustix::net::recv(socket, room, RecvFlags::DONTWAIT)?;
            tell(bytes);
            return Ok(bytes.len());
        };
        ring.all_consumed()?;
        let ((bytes, _), _) = rustix::net::recv(socket, &mut *room, RecvFlags::DONTWAIT | RecvFlags::PEEK)?;
        if let Err(error) = ring.publish(bytes) {
            // The guest goes on, and who reads it now loses nothing. There may be memory for what it prints next.
            if !self.told.replace(true) {
                let position = ring.end();
                tracing::error!(
                    "what a guest printed is not kept for the next manager, from byte {position} on: {error}"
                );
            }
            ring.skip(bytes.len())?;
        }
        tell(bytes);
        let count = bytes.len();
        let mut taken = 0;
        while taken < count {
            match rustix::net::recv(socket, &mut room[..count - taken], RecvFlags::DONTWAIT)?.1 {
                0 => break,
                more => taken += more,
            }
        }
        Ok(count)
    }
}

/// How much of what is in a socket was peeked at; none if that is not counted.
fn peek_offset(socket: &UnixStream) -> io::Result<Option<u64>> {
    let mut value: libc::c_int = -1;
    let mut length = socklen();
    // SAFETY: both pointers are to locals, of which the second says how large the first is.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    match result {
        0 => Ok(u64::try_from(value).ok()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// From now on what is peeked at is counted, from the first byte that is in the socket.
fn set_peek_offset(socket: &UnixStream) -> io::Result<()> {
    let value: libc::c_int = 0;
    // SAFETY: the pointer is to a local of the size that is given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const value).cast(),
            socklen(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

const fn socklen() -> libc::socklen_t {
    size_of::<libc::c_int>() as libc::socklen_t
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn take(mirror: &Mirror, socket: &UnixStream) -> (usize, Vec<u8>) {
        let (mut room, mut told) = ([MaybeUninit::uninit(); 8], Vec::new());
        let count = mirror.take(socket, &mut room, |bytes| told.extend(bytes)).unwrap();
        (count, told)
    }

    #[test]
    fn whoever_comes_next_loses_nothing_and_has_nothing_twice() {
        let (mut component, ours) = UnixStream::pair().unwrap();
        let mirror = Mirror::default();
        let kept = mirror.descriptor(64).unwrap();
        mirror.attach(&ours).unwrap();
        component.write_all(b"one two three four").unwrap();
        assert_eq!(take(&mirror, &ours), (8, b"one two ".into()));
        assert_eq!(take(&mirror, &ours), (8, b"three fo".into()));

        // Killed after it has kept the rest, and before it has taken it.
        {
            let mut slot = mirror.ring.borrow_mut();
            let ring = slot.as_mut().unwrap();
            ring.all_consumed().unwrap();
            let mut room = [0; 8];
            let (_, count) = rustix::net::recv(&ours, &mut room, RecvFlags::DONTWAIT | RecvFlags::PEEK).unwrap();
            ring.publish(&room[..count]).unwrap();
        }
        component.write_all(b" five").unwrap();
        let next = Mirror::default();
        let history = next.restore(kept.try_clone().unwrap(), 64).unwrap();
        assert_eq!(
            (history.end(), history.read(0, 0).bytes),
            (18, b"one two three four".into())
        );
        next.attach(&ours).unwrap();
        assert_eq!(take(&next, &ours), (5, b" five".into()));

        // Killed after it has looked, and before it has kept anything.
        component.write_all(b" six").unwrap();
        next.ring.borrow_mut().as_mut().unwrap().all_consumed().unwrap();
        let _ = rustix::net::recv(&ours, &mut [0; 8], RecvFlags::DONTWAIT | RecvFlags::PEEK).unwrap();
        let last = Mirror::default();
        let history = last.restore(kept, 64).unwrap();
        assert_eq!(history.end(), 23);
        last.attach(&ours).unwrap();
        assert_eq!(take(&last, &ours), (4, b" six".into()));
    }

    #[test]
    fn a_port_whose_output_cannot_be_kept_is_read_all_the_same() {
        let (mut component, ours) = UnixStream::pair().unwrap();
        let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
        let kept = rustix::fs::memfd_create("full", flags).unwrap();
        let mirror = Mirror::default();
        let memory = Shared::from(kept.try_clone().unwrap());
        mirror.ring.replace(Some(Ring::create(memory, 64).unwrap()));
        mirror.attach(&ours).unwrap();
        component.write_all(b"one two ").unwrap();
        assert_eq!(take(&mirror, &ours), (8, b"one two ".into()));
        // Memory that cannot grow: what was written is all that there is room for.
        rustix::fs::ftruncate(&kept, 4096 + 8).unwrap();
        rustix::fs::fcntl_add_seals(&kept, rustix::fs::SealFlags::GROW).unwrap();
        component.write_all(b"three four").unwrap();
        assert_eq!(take(&mirror, &ours), (8, b"three fo".into()));
        assert_eq!(take(&mirror, &ours), (2, b"ur".into()));
        let next = Mirror::default();
        let history = next.restore(kept, 64).unwrap();
        assert_eq!(
            (history.start(), history.end()),
            (18, 18),
            "it goes on where the reader was"
        );
        next.attach(&ours).unwrap();
        component.write_all(b"!").unwrap();
        assert_eq!(take(&next, &ours), (1, b"!".into()));
    }
}

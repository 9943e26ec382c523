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
    rc::Rc,
};

use rustix::net::RecvFlags;

use crate::{
    durable::{memory::Shared, ring::Ring},
    history::{History, Tail},
};

/// The ring of a port, if there is one.
#[derive(Debug, Default)]
pub(super) struct Mirror {
    ring: RefCell<Option<Rc<RefCell<Ring<Shared>>>>>,
    /// That something is not kept has been told.
    told: Cell<bool>,
}

impl Mirror {
    /// A descriptor of the ring, and what is in it. It is made, to keep the last `capacity` bytes, where there is none yet: before anything was printed.
    pub(super) fn descriptor(&self, capacity: usize) -> io::Result<(OwnedFd, Rc<dyn Tail>)> {
        let mut slot = self.ring.borrow_mut();
        let ring = match slot.take() {
            Some(ring) => ring,
            None => Rc::new(RefCell::new(Ring::create(Shared::new()?, capacity)?)),
        };
        let descriptor = ring.borrow().memory().descriptor();
        *slot = Some(ring.clone());
        Ok((descriptor?, ring))
    }

    /// Goes on with the ring of an earlier manager; returns what is in it.
    pub(super) fn restore(&self, ring: OwnedFd, capacity: usize) -> io::Result<History> {
        let ring = Rc::new(RefCell::new(Ring::open(Shared::from(ring))?));
        *self.ring.borrow_mut() = Some(ring.clone());
        Ok(History::restored(capacity, ring))
    }

    /// Output comes from this socket now: one that nobody has read from yet, or that of which an earlier manager has kept what is in the ring. What has been
    /// kept already is taken out of it.
    pub(super) fn attach(&self, socket: &UnixStream) -> io::Result<()> {
        let Some(ring) = self.ring.borrow().clone() else {
            return Ok(());
        };
        let mut ring = ring.borrow_mut();
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

    /// Takes what there is out of the socket, keeps it, and tells it, and whether it is kept; returns how much it was.
    pub(super) fn take(
        &self,
        socket: &UnixStream,
        room: &mut [MaybeUninit<u8>],
        tell: impl FnOnce(&[u8], bool),
    ) -> io::Result<usize> {
        let Some(ring) = self.ring.borrow().clone() else {
            let ((bytes, _), _) = rustix::net::recv(socket, room, RecvFlags::DONTWAIT)?;
            tell(bytes, false);
            return Ok(bytes.len());
        };
        ring.borrow_mut().all_consumed()?;
        let ((bytes, _), _) = rustix::net::recv(socket, &mut *room, RecvFlags::DONTWAIT | RecvFlags::PEEK)?;
        let published = ring.borrow_mut().publish(bytes);
        // The ring is to be read from by those who are told.
        tell(bytes, published.is_ok());
        if let Err(error) = published {
            // The guest goes on, and who reads it now loses nothing. There may be memory for what it prints next.
            if !self.told.replace(true) {
                let position = ring.borrow().end();
                tracing::error!(
                    "what a guest printed is not kept for the next manager, from byte {position} on: {error}"
                );
            }
            ring.borrow_mut().skip(bytes.len())?;
        }
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

impl Tail for RefCell<Ring<Shared>> {
    fn start(&self) -> u64 {
        self.borrow().start()
    }

    fn end(&self) -> u64 {
        self.borrow().end()
    }

    fn read(&self, position: u64, most: usize) -> Vec<u8> {
        let read = self.borrow().read(position, most);
        let read = read.inspect_err(|error| tracing::error!("what a guest printed cannot be read: {error}"));
        read.map(|(_, bytes)| bytes).unwrap_or_default()
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
        let count = mirror.take(socket, &mut room, |bytes, _| told.extend(bytes)).unwrap();
        (count, told)
    }

    #[test]
    fn whoever_comes_next_loses_nothing_and_has_nothing_twice() {
        let (mut component, ours) = UnixStream::pair().unwrap();
        let mirror = Mirror::default();
        let (kept, _) = mirror.descriptor(64).unwrap();
        mirror.attach(&ours).unwrap();
        component.write_all(b"one two three four").unwrap();
        assert_eq!(take(&mirror, &ours), (8, b"one two ".into()));
        assert_eq!(take(&mirror, &ours), (8, b"three fo".into()));

        // Killed after it has kept the rest, and before it has taken it.
        {
            let ring = mirror.ring.borrow().clone().unwrap();
            let mut ring = ring.borrow_mut();
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
        let ring = next.ring.borrow().clone().unwrap();
        ring.borrow_mut().all_consumed().unwrap();
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
        mirror
            .ring
            .replace(Some(Rc::new(RefCell::new(Ring::create(memory, 64).unwrap()))));
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

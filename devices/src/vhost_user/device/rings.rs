//! Memory and rings, as the back end is told of them and as they are taken from it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use event_manager::EventSet;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{FIRST_CALL, Phase, QUIESCE, VhostUser};
use crate::vhost_user::connection::Lost;
use crate::vhost_user::message::{FEATURE_PROTOCOL, REGIONS_MAX, Region, Request, protocol};
use crate::virtio::device::Context;

/// Where guest memory begins among the addresses that name places in rings to the back end. They only have to be the same in all messages, and
/// are none of this process's.
const USER_BASE: u64 = 1 << 44;

/// A ring, as far as it is the back end's.
#[derive(Default)]
pub(super) struct Ring {
    /// The back end has been told of it.
    pub(super) started: bool,
    /// A back end has had it since the driver set it up: what is used says where to go on.
    pub(super) served: bool,
    /// Rung here, where the transport lends no doorbell.
    pub(super) kick: Option<EventFd>,
    /// Interrupts are relayed, where the transport lends no eventfd for them.
    pub(super) call: Option<EventFd>,
}

impl VhostUser {
    /// Tells the back end of memory and of all rings that the driver has enabled.
    pub(super) fn start(&mut self, context: &mut Context<'_>) -> Result<(), Lost> {
        self.phase = Phase::Starting;
        let protocol = if self.settled.has_protocol { FEATURE_PROTOCOL } else { 0 };
        let features = context.features & self.settled.features | protocol;
        self.send(&Request::SetFeatures(features), Vec::new());
        let (regions, files) = memory_table(context.memory)?;
        self.send(&Request::SetMemTable(regions), files);
        if !self.settled.uses(protocol::INFLIGHT) {
            return self.start_rings(context);
        }
        if let Some((inflight, place)) = &self.inflight {
            let (request, place) = (Request::SetInflightFd(*inflight), place.try_clone()?);
            self.send(&request, vec![place]);
            return self.start_rings(context);
        }
        self.phase = Phase::Placing;
        let request = Request::GetInflightFd {
            // At most `QUEUES_MAX`.
            queues: self.rings.len() as u16,
            queue_size: self.settings.queue_sizes.iter().copied().max().unwrap_or(0),
        };
        self.send(&request, Vec::new());
        Ok(())
    }

    /// The back end has memory, and a place for what is under way: the rings follow.
    pub(super) fn start_rings(&mut self, context: &mut Context<'_>) -> Result<(), Lost> {
        if matches!(self.phase, Phase::Placing)
            && let Some((inflight, place)) = &self.inflight
        {
            let (request, place) = (Request::SetInflightFd(*inflight), place.try_clone()?);
            self.send(&request, vec![place]);
        }
        self.phase = Phase::Starting;
        (0..)
            .take(self.rings.len())
            .try_for_each(|queue| self.start_ring(queue, context))
    }

    /// Tells the back end of one ring, if the driver has enabled it.
    pub(super) fn start_ring(&mut self, queue: u16, context: &mut Context<'_>) -> Result<(), Lost> {
        let n = usize::from(queue);
        let Some(ring) = context.queue(queue) else {
            return Ok(());
        };
        if self.rings[n].started {
            return Ok(());
        }
        let (setup, (next, _)) = (ring.setup(), ring.positions());
        let base = if self.rings[n].served {
            // What was taken and not used is done again by the next one, or known to it from the place that it shares.
            let index = context.memory.read_obj::<u16>(GuestAddress(setup.used + 2));
            index.map_or(next, u16::from_le)
        } else {
            next
        };
        self.rings[n].served = true;
        self.rings[n].started = true;
        for request in [
            Request::SetVringNum {
                queue,
                entries: setup.size,
            },
            Request::SetVringBase { queue, base },
            Request::SetVringAddr {
                queue,
                descriptors: setup.descriptors.wrapping_add(USER_BASE),
                used: setup.used.wrapping_add(USER_BASE),
                available: setup.available.wrapping_add(USER_BASE),
            },
        ] {
            self.send(&request, Vec::new());
        }
        let (bell, interrupt) = context.transport.queue_fds(queue);
        let call = match interrupt {
            Some(fd) => duplicate(fd)?,
            None => self.relay(queue, context)?,
        };
        self.send(&Request::SetVringCall { queue }, vec![call]);
        let kick = match bell {
            Some(fd) => duplicate(fd)?,
            None => duplicate(own(&mut self.rings[n].kick)?.as_raw_fd())?,
        };
        self.send(&Request::SetVringKick { queue }, vec![kick]);
        if self.settled.has_protocol {
            self.send(&Request::SetVringEnable { queue, enable: true }, Vec::new());
        }
        // There may be chains already, for which nobody rings any more.
        context.ring(queue);
        self.ring(queue);
        Ok(())
    }

    /// The eventfd by which the back end interrupts the driver through this loop.
    fn relay(&mut self, queue: u16, context: &mut Context<'_>) -> Result<OwnedFd, Lost> {
        let place = &mut self.rings[usize::from(queue)].call;
        let is_new = place.is_none();
        let call = own(place)?;
        if is_new {
            context
                .watch(call, FIRST_CALL + u32::from(queue), EventSet::IN)
                .map_err(io::Error::other)?;
        }
        Ok(duplicate(call.as_raw_fd())?)
    }

    /// Rings for the back end, if it listens to a bell of ours.
    pub(super) fn ring(&self, queue: u16) {
        if let Some(kick) = &self.rings[usize::from(queue)].kick {
            // Fails only with a full counter, and then it has rung.
            let _ = kick.write(1);
        }
    }

    /// Has the back end let go of these rings, and waits for that. What else was under way with them is given up.
    pub(super) fn quiesce(&mut self, queues: &[u16], within: Duration) -> Result<(), Lost> {
        let deadline = Instant::now() + within;
        let Some(connection) = &mut self.connection else {
            return Ok(());
        };
        for &queue in queues {
            if std::mem::take(&mut self.rings[usize::from(queue)].started) {
                if self.settled.has_protocol {
                    connection.send(&Request::SetVringEnable { queue, enable: false }, Vec::new());
                }
                connection.send(&Request::GetVringBase { queue }, Vec::new());
            }
        }
        while !connection.is_idle() {
            // Where a ring stopped is of no interest: its chains are given up.
            if connection.progress()?.is_empty() && !connection.is_idle() {
                connection.wait(deadline, within)?;
            }
        }
        Ok(())
    }

    /// The rings that the back end has.
    pub(super) fn started(&self) -> Vec<u16> {
        let started = |queue: &u16| self.rings[usize::from(*queue)].started;
        (0..).take(self.rings.len()).filter(started).collect()
    }

    /// Has the back end let go of all rings, and forget what the driver had set up.
    pub(super) fn let_go(&mut self) -> Result<(), Lost> {
        let began = Instant::now();
        let started = self.started();
        let was_started = !started.is_empty();
        self.quiesce(&started, QUIESCE)?;
        if was_started && self.settled.uses(protocol::RESET_DEVICE) {
            self.send(&Request::ResetDevice, Vec::new());
            self.quiesce(&[], QUIESCE.saturating_sub(began.elapsed()))?;
        }
        Ok(())
    }
}

/// Guest memory as a back end maps it: what is adjacent in its file and in the guest is one region.
pub(super) fn memory_table(memory: &GuestMemoryMmap) -> io::Result<(Vec<Region>, Vec<OwnedFd>)> {
    let mut regions: Vec<(Region, RawFd)> = Vec::new();
    for region in memory.iter() {
        let Some(file) = region.file_offset() else {
            return Err(io::Error::other("guest memory is in no file that a back end could map"));
        };
        let (guest, size, fd) = (region.start_addr().0, region.len(), file.file().as_raw_fd());
        match regions.last_mut() {
            Some((last, last_fd))
                if *last_fd == fd && last.guest + last.size == guest && last.offset + last.size == file.start() =>
            {
                last.size += size;
            }
            _ => regions.push((
                Region {
                    guest,
                    size,
                    user: guest.wrapping_add(USER_BASE),
                    offset: file.start(),
                },
                fd,
            )),
        }
    }
    if regions.len() > REGIONS_MAX {
        return Err(io::Error::other(format!(
            "guest memory is in {} pieces, and a back end takes {REGIONS_MAX}",
            regions.len()
        )));
    }
    let (regions, fds): (Vec<Region>, Vec<RawFd>) = regions.into_iter().unzip();
    let files = fds.into_iter().map(duplicate).collect::<io::Result<_>>()?;
    Ok((regions, files))
}

/// Makes an eventfd where there is none.
fn own(place: &mut Option<EventFd>) -> io::Result<&mut EventFd> {
    match place {
        Some(fd) => Ok(fd),
        None => Ok(place.insert(new_eventfd()?)),
    }
}

pub(super) fn new_eventfd() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

/// A descriptor of our own for what `fd` is.
fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: whoever gave the number (the transport, guest memory, a ring) keeps it open at least until this call returns.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    fd.as_fd().try_clone_to_owned()
}

//! Context ids of guests' socket devices: each unique on the host, whichever manager's guest has it.
//!
//! A context id in use is a Unix socket bound to an abstract name (unix(7)). All managers of a host share that name space, whoever runs them;
//! the kernel gives the name free when the manager ends, however that comes about; and nothing is left behind anywhere. Guests of other monitors
//! are seen where the kernel knows them.
//!
//! ```text
//!   take --> Cid --fds-----> kept beside the component of a guest that goes on without its manager
//!              '- dropped: free, in a moment                    '--hold--> (the next manager) take --> Cid
//! ```

use std::{
    cell::RefCell,
    collections::{HashMap, VecDeque},
    io,
    os::{
        fd::OwnedFd,
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram},
    },
    rc::Rc,
    time::{Duration, Instant},
};

use sepal_schema::{
    config::device::MIN_CID,
    error::{Error, Kind},
    transport::Handle,
};

use crate::vsock::reservation::reserve;

/// How many context ids are tried before there is said to be none.
const MAX_TRIES: u32 = 4096;

/// How long a context id that was let go of may be held by whoever kept a copy.
const LET_GO: Duration = Duration::from_secs(1);
/// Pause before another try to take such a one.
const BETWEEN_TRIES: Duration = Duration::from_millis(2);
/// Most context ids that are remembered as let go of.
const MOST_LET_GO: usize = 256;

/// Who has a context id.
#[derive(Debug)]
struct Holder {
    guest: String,
    /// What an earlier manager held it by, until it is taken.
    kept: Vec<OwnedFd>,
}

#[derive(Debug, Default)]
struct Table {
    holders: HashMap<u32, Holder>,
    let_go: VecDeque<(Instant, u32)>,
}

/// The context ids that guests of this manager have, and who has them.
#[derive(Debug, Clone, Default)]
pub struct Cids(Rc<RefCell<Table>>);

/// A context id, held until this is dropped.
#[derive(Debug)]
pub struct Cid {
    number: u32,
    cids: Cids,
    /// Its name, and what the host's kernel gives it by, if it does.
    fds: Vec<OwnedFd>,
}

impl Cid {
    /// The number.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// What keeps it for as long as a copy of it is open, whoever has that.
    pub(crate) fn fds(&self) -> &[OwnedFd] {
        &self.fds
    }
}

impl Drop for Cid {
    fn drop(&mut self) {
        let table = &mut *self.cids.0.borrow_mut();
        table.holders.remove(&self.number);
        table.let_go.truncate(MOST_LET_GO - 1);
        table.let_go.push_front((Instant::now(), self.number));
    }
}

impl Cids {
    /// Takes the context id `wanted` for a guest; 0: the lowest that is free.
    ///
    /// # Errors
    /// `ALREADY_BOUND` about `vsock.cid`, saying who has it; `NO_RESOURCES`.
    pub fn take(&self, wanted: u32, guest: &str) -> Result<Cid, Error> {
        if wanted != 0 {
            let kept = self
                .claim(wanted, guest)
                .map_or_else(|| self.bind(wanted, guest), |cid| Ok(Some(cid)));
            return kept?.ok_or_else(|| self.taken(wanted));
        }
        for number in MIN_CID..MIN_CID + MAX_TRIES {
            if let Some(cid) = self.bind(number, guest)? {
                return Ok(cid);
            }
        }
        let message = format!("the first {MAX_TRIES} context ids are all taken; choose one");
        Err(Error::new(Kind::NoResources, message).about("vsock.cid"))
    }

    /// As [`Cids::take`]; waits for one that a guest of this manager has let go of a moment ago.
    ///
    /// # Errors
    /// As for [`Cids::take`].
    pub(crate) async fn take_in_time(&self, handle: &Handle, wanted: u32, guest: &str) -> Result<Cid, Error> {
        loop {
            match self.take(wanted, guest) {
                Err(_) if self.was_let_go(wanted) => handle.sleep(BETWEEN_TRIES).await,
                outcome => return outcome,
            }
        }
    }

    /// Whether nobody here has it, and somebody had a moment ago.
    fn was_let_go(&self, number: u32) -> bool {
        let table = self.0.borrow();
        let recent = |(at, known): &(Instant, u32)| *known == number && at.elapsed() < LET_GO;
        !table.holders.contains_key(&number) && table.let_go.iter().any(recent)
    }

    /// A guest has a context id by these [copies](Cid::fds), and takes it later.
    pub(crate) fn hold(&self, number: u32, guest: &str, kept: Vec<OwnedFd>) {
        if number != 0 && !kept.is_empty() {
            let guest = guest.to_owned();
            self.0.borrow_mut().holders.insert(number, Holder { guest, kept });
        }
    }

    /// Takes what is held for the guest.
    fn claim(&self, number: u32, guest: &str) -> Option<Cid> {
        let table = &mut *self.0.borrow_mut();
        let holder = table.holders.get_mut(&number).filter(|holder| holder.guest == guest)?;
        let fds = std::mem::take(&mut holder.kept);
        (!fds.is_empty()).then(|| Cid {
            number,
            cids: self.clone(),
            fds,
        })
    }

    /// Whether the context id `wanted` could be taken, without taking it. Guests of other monitors, which only who takes one meets, are not looked at.
    ///
    /// # Errors
    /// `ALREADY_BOUND` about `vsock.cid`, saying who has it.
    pub(crate) fn look(&self, wanted: u32) -> Result<(), Error> {
        if wanted == 0 {
            return Ok(());
        }
        // Whoever has the name can be connected to.
        let has_holder = || -> io::Result<()> { UnixDatagram::unbound()?.connect_addr(&name(wanted)?) };
        match self.0.borrow().holders.contains_key(&wanted) || (has_holder().is_ok() && !self.was_let_go(wanted)) {
            true => Err(self.taken(wanted)),
            false => Ok(()),
        }
    }

    fn taken(&self, number: u32) -> Error {
        let holder = self.0.borrow().holders.get(&number).map(|holder| holder.guest.clone());
        let who = holder.map_or("a guest of another manager or monitor".to_owned(), |name| {
            format!("guest \"{name}\"")
        });
        let message = format!("vsock.cid: {who} has the context id {number}; 0 chooses one that is free");
        Error::new(Kind::AlreadyBound, message).about("vsock.cid")
    }

    /// Takes one; none if somebody has it.
    fn bind(&self, number: u32, guest: &str) -> Result<Option<Cid>, Error> {
        if self.0.borrow().holders.contains_key(&number) {
            return Ok(None);
        }
        let bound = name(number).and_then(|name| UnixDatagram::bind_addr(&name));
        match bound {
            Ok(socket) => {
                let Ok(reserved) = reserve(number) else {
                    return Ok(None);
                };
                let holder = Holder {
                    guest: guest.to_owned(),
                    kept: Vec::new(),
                };
                self.0.borrow_mut().holders.insert(number, holder);
                Ok(Some(Cid {
                    number,
                    cids: self.clone(),
                    fds: [socket.into()].into_iter().chain(reserved.into_fd()).collect(),
                }))
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(None),
            Err(error) => {
                let message = format!("no context id can be taken: {error}");
                Err(Error::new(Kind::NoResources, message).about("vsock.cid"))
            }
        }
    }
}

/// The name that stands for a context id.
fn name(number: u32) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("sepal/cid/{number}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Far from those that are chosen, so that tests which run at the same time do not meet.
    fn somewhere() -> u32 {
        0x4000_0000 + std::process::id()
    }

    #[test]
    fn a_context_id_has_one_holder_on_the_host() {
        let (ours, theirs) = (Cids::default(), Cids::default());
        let cid = ours.take(somewhere(), "web").unwrap();
        assert_eq!(cid.number(), somewhere());
        for (cids, who) in [(&ours, "guest \"web\""), (&theirs, "another manager or monitor")] {
            let error = cids.take(somewhere(), "db").unwrap_err();
            assert_eq!((error.kind, &error.about[..]), (Kind::AlreadyBound, "vsock.cid"));
            assert!(error.message.contains(who), "{error}");
            assert_eq!(cids.look(somewhere()), Err(error));
        }
        drop(cid);
        ours.look(somewhere()).unwrap();
        ours.look(0).unwrap();
        theirs.take(somewhere(), "db").unwrap();
    }

    #[test]
    fn a_context_id_outlives_its_manager_by_what_holds_it() {
        let (before, others, after) = (Cids::default(), Cids::default(), Cids::default());
        let number = somewhere() + 1;
        let cid = before.take(number, "web").unwrap();
        let kept: Vec<OwnedFd> = cid.fds().iter().map(|fd| fd.try_clone().unwrap()).collect();
        drop(cid);
        assert!(before.was_let_go(number) && !others.was_let_go(number));
        assert_eq!(others.take(number, "db").unwrap_err().kind, Kind::AlreadyBound);
        after.hold(number, "web", kept);
        let error = after.take(number, "db").unwrap_err();
        assert!(error.message.contains("guest \"web\""), "{error}");
        let cid = after.take(number, "web").unwrap();
        assert_eq!(after.take(number, "web").unwrap_err().kind, Kind::AlreadyBound);
        assert_eq!(others.take(number, "db").unwrap_err().kind, Kind::AlreadyBound);
        drop(cid);
        others.take(number, "db").unwrap();
    }

    #[test]
    fn who_does_not_care_gets_one_that_is_free() {
        let (ours, theirs) = (Cids::default(), Cids::default());
        let cids: Vec<_> = [&ours, &theirs, &ours]
            .map(|cids| cids.take(0, "web").unwrap().number())
            .into();
        assert!(cids.iter().all(|cid| *cid >= MIN_CID));
        let held = [
            ours.take(0, "a").unwrap(),
            theirs.take(0, "b").unwrap(),
            ours.take(0, "c").unwrap(),
        ];
        assert!(held[0].number() != held[1].number() && held[1].number() != held[2].number());
    }
}

//! Context ids of guests' socket devices: each unique on the host, whichever manager's guest has it.
//!
//! A context id in use is a Unix socket bound to an abstract name (unix(7)). All managers of a host share that name space, whoever runs them;
//! the kernel gives the name free when the manager ends, however that comes about; and nothing is left behind anywhere. Guests of other monitors
//! are seen where the kernel knows them.

use std::{
    cell::RefCell,
    collections::HashMap,
    io,
    os::{
        fd::OwnedFd,
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram},
    },
    rc::Rc,
};

use sepal_schema::{
    config::device::MIN_CID,
    error::{Error, Kind},
};

use crate::vsock::reservation::{Reservation, reserve};

/// How many context ids are tried before there is said to be none.
const MAX_TRIES: u32 = 4096;

/// The context ids that guests of this manager have, and who has them.
#[derive(Debug, Clone, Default)]
pub struct Cids(Rc<RefCell<HashMap<u32, String>>>);

/// A context id, held until this is dropped.
#[derive(Debug)]
pub struct Cid {
    number: u32,
    cids: Cids,
    _name: OwnedFd,
    _reserved: Reservation,
}

impl Cid {
    /// The number.
    pub fn number(&self) -> u32 {
        self.number
    }
}

impl Drop for Cid {
    fn drop(&mut self) {
        self.cids.0.borrow_mut().remove(&self.number);
    }
}

impl Cids {
    /// Takes the context id `wanted` for a guest; 0: the lowest that is free.
    ///
    /// # Errors
    /// `ALREADY_BOUND` about `vsock.cid`, saying who has it; `NO_RESOURCES`.
    pub fn take(&self, wanted: u32, guest: &str) -> Result<Cid, Error> {
        if wanted != 0 {
            return self.bind(wanted, guest)?.ok_or_else(|| self.taken(wanted));
        }
        for number in MIN_CID..MIN_CID + MAX_TRIES {
            if let Some(cid) = self.bind(number, guest)? {
                return Ok(cid);
            }
        }
        let message = format!("the first {MAX_TRIES} context ids are all taken; choose one");
        Err(Error::new(Kind::NoResources, message).about("vsock.cid"))
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
        match self.0.borrow().contains_key(&wanted) || has_holder().is_ok() {
            true => Err(self.taken(wanted)),
            false => Ok(()),
        }
    }

    fn taken(&self, number: u32) -> Error {
        let holder = self.0.borrow().get(&number).cloned();
        let who = holder.map_or("a guest of another manager or monitor".to_owned(), |name| {
            format!("guest \"{name}\"")
        });
        let message = format!("vsock.cid: {who} has the context id {number}; 0 chooses one that is free");
        Error::new(Kind::AlreadyBound, message).about("vsock.cid")
    }

    /// Takes one; none if somebody has it.
    fn bind(&self, number: u32, guest: &str) -> Result<Option<Cid>, Error> {
        if self.0.borrow().contains_key(&number) {
            return Ok(None);
        }
        let bound = name(number).and_then(|name| UnixDatagram::bind_addr(&name));
        match bound {
            Ok(socket) => {
                let Ok(reserved) = reserve(number) else {
                    return Ok(None);
                };
                self.0.borrow_mut().insert(number, guest.to_owned());
                Ok(Some(Cid {
                    number,
                    cids: self.clone(),
                    _name: socket.into(),
                    _reserved: reserved,
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

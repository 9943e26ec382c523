//! A keeper that holds what managers leave, in this process: managers one after the other, each with an event loop of its own.
//!
//! ```text
//!   with manager: keep, set durable, release -----> story
//!   manager gone: what is kept stays as it is at that moment, whatever the manager's end would still have written
//!   next manager: inherits it, and components get their connections to it
//! ```

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    fs::File,
    io::{IoSliceMut, Read, Seek, Write},
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::net::UnixStream},
    rc::{Rc, Weak},
    time::Duration,
};

use futures::{channel::oneshot, future::LocalBoxFuture};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use sepal_guest_manager::{
    component::{Custody, Exit},
    durable,
    manager::{Manager, Settings},
    starter::{Asking, Fate, Inheritance, Orphan},
};
use sepal_schema::{
    error::{Error, Kind},
    transport::{Handle, Reactor},
};

use super::{Fake, Process, Starter};
use crate::world::{HUNG, World};

type Kept = BTreeMap<String, Vec<OwnedFd>>;

/// What is kept beside a component.
struct Beside {
    process: Rc<Process>,
    kept: Kept,
    durable: bool,
}

/// The keeper.
#[derive(Default)]
pub(crate) struct Keeper {
    own: RefCell<Kept>,
    beside: RefCell<BTreeMap<u32, Beside>>,
    /// There is no manager at the moment: nobody is heard.
    alone: Cell<bool>,
    /// What it answers to whoever wants something kept.
    pub(crate) fails: Cell<Option<Kind>>,
    /// What it was told, in order.
    pub(crate) story: RefCell<Vec<String>>,
}

impl Keeper {
    pub(crate) fn new() -> Rc<Self> {
        Rc::default()
    }

    /// A test on a manager that finds what the one before has left, and is killed in the end.
    pub(crate) fn manager(self: &Rc<Self>, settings: Settings, test: impl AsyncFnOnce(World)) {
        self.alone.set(false);
        let mut reactor = Reactor::new().unwrap();
        let handle = reactor.handle();
        let fake = Fake::kept(&handle, self);
        let manager = Manager::new(handle.clone(), settings, Box::new(Starter(fake.clone()))).unwrap();
        durable::take_over(&manager, (self.inherit(), Asking::default()));
        self.connect(&handle);
        let world = World {
            handle: handle.clone(),
            manager,
            fake,
        };
        let done = reactor.run_until(handle.timeout(HUNG, test(world))).unwrap();
        done.expect("the test hangs");
        self.freeze();
        drop(reactor);
        // What is not to go on ends with its manager.
        let gone: Vec<_> = {
            let mut beside = self.beside.borrow_mut();
            let gone = beside.extract_if(.., |_, beside| !beside.durable);
            gone.map(|(_, beside)| beside.process).collect()
        };
        gone.iter().for_each(|process| process.die(Exit::Signal(9)));
    }

    pub(crate) fn processes(&self) -> Vec<Rc<Process>> {
        let beside = self.beside.borrow();
        beside.values().map(|beside| beside.process.clone()).collect()
    }

    pub(super) fn custody(self: &Rc<Self>, process: &Rc<Process>) -> Rc<dyn Custody> {
        let beside = Beside {
            process: process.clone(),
            kept: Kept::new(),
            durable: false,
        };
        self.beside.borrow_mut().insert(process.pid, beside);
        self.custody_of(process.pid)
    }

    fn custody_of(self: &Rc<Self>, pid: u32) -> Rc<dyn Custody> {
        let keeper = self.clone();
        Rc::new(Held { keeper, pid })
    }

    pub(super) fn keep_own(&self, kept: BTreeMap<String, OwnedFd>) -> Result<(), Error> {
        let kept = kept.into_iter().map(|(label, fd)| (label, vec![fd]));
        self.tell("own", |keeper| keeper.own.borrow_mut().extend(kept))
    }

    fn tell(&self, words: &str, act: impl FnOnce(&Self)) -> Result<(), Error> {
        if self.alone.get() {
            return Ok(());
        }
        if let Some(kind) = self.fails.get() {
            return Err(Error::new(kind, "the keeper keeps nothing"));
        }
        self.story.borrow_mut().push(words.to_owned());
        act(self);
        Ok(())
    }

    /// The manager is gone: nothing of what its end does is heard, nor what it writes into memory that was kept.
    fn freeze(&self) {
        self.alone.set(true);
        let mut own = self.own.borrow_mut();
        let mut beside = self.beside.borrow_mut();
        let memory = beside.values_mut().flat_map(|beside| beside.kept.iter_mut());
        let memory = memory.filter(|(label, _)| ["record", "rings"].contains(&&***label));
        for fd in own.iter_mut().chain(memory).flat_map(|(_, fds)| fds) {
            *fd = copy(fd);
        }
    }

    fn inherit(self: &Rc<Self>) -> Vec<Inheritance> {
        let clones = |kept: &Kept| -> Kept {
            let fds = |fds: &Vec<OwnedFd>| fds.iter().map(|fd| fd.try_clone().unwrap()).collect();
            kept.iter().map(|(label, kept)| (label.clone(), fds(kept))).collect()
        };
        let beside = self.beside.borrow();
        let orphans = beside.iter().map(|(pid, beside)| Orphan {
            kept: clones(&beside.kept),
            custody: self.custody_of(*pid),
            fate: fate(&beside.process),
        });
        vec![Inheritance {
            own: clones(&self.own.borrow()),
            orphans: orphans.collect(),
        }]
    }

    /// Components take the connections that the manager has sent them.
    fn connect(&self, handle: &Handle) {
        for process in self.processes() {
            let successors = process.successors.borrow();
            if let Some(socket) = successors.as_ref().filter(|_| process.alive()).and_then(receive) {
                process.serve(handle, socket);
            }
        }
    }

    /// The components that it has something of, by their process ids.
    pub(crate) fn holds(&self) -> Vec<u32> {
        self.beside.borrow().keys().copied().collect()
    }
}

struct Held {
    keeper: Rc<Keeper>,
    pid: u32,
}

impl Held {
    fn tell(&self, words: String, act: impl FnOnce(&mut Beside)) -> Result<(), Error> {
        self.keeper.tell(&words, |keeper| {
            if let Some(beside) = keeper.beside.borrow_mut().get_mut(&self.pid) {
                act(beside);
            }
        })
    }
}

impl Custody for Held {
    fn keep(&self, label: &str, fds: Vec<OwnedFd>) -> Result<(), Error> {
        self.tell(format!("{}: {label}", self.pid), |beside| {
            beside.kept.insert(label.to_owned(), fds);
        })
    }

    fn set_durable(&self) -> Result<(), Error> {
        self.tell(format!("{}: durable", self.pid), |beside| beside.durable = true)
    }

    fn release(&self) {
        // Whoever lets go of something does not ask whether that works.
        let _ = self.keeper.tell(&format!("{}: release", self.pid), |keeper| {
            keeper.beside.borrow_mut().remove(&self.pid);
        });
    }

    fn sent(&self) -> LocalBoxFuture<'static, ()> {
        Box::pin(futures::future::ready(()))
    }
}

fn fate(process: &Rc<Process>) -> Fate {
    if let Some(exit) = process.ended.borrow().clone() {
        return Fate::Ended(exit);
    }
    let (tell, exited) = oneshot::channel();
    process.exit.replace(Some(tell));
    let killed: Weak<Process> = Rc::downgrade(process);
    Fate::Lives {
        pid: process.pid,
        kill: Box::new(move || {
            if let Some(process) = killed.upgrade() {
                process.is_killed();
            }
        }),
        exit: Box::pin(async move { exited.await.unwrap_or(Exit::Unknown("the test is over".into())) }),
    }
}

/// The last connection that has come; those before are of managers that are gone.
fn receive(successors: &OwnedFd) -> Option<UnixStream> {
    let mut last = None;
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let (mut byte, flags) = ([0], RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC);
        match rustix::net::recvmsg(successors, &mut [IoSliceMut::new(&mut byte)], &mut control, flags) {
            Ok(received) if received.bytes > 0 => {}
            _ => return last,
        }
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                last = fds.map(UnixStream::from).last();
            }
        }
    }
}

/// Memory of its own with the same content.
fn copy(memory: &OwnedFd) -> OwnedFd {
    let mut from = File::from(memory.try_clone().unwrap());
    let fd = rustix::fs::memfd_create("copy", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut to = File::from(fd);
    let mut content = Vec::new();
    from.rewind().unwrap();
    from.read_to_end(&mut content).unwrap();
    to.write_all(&content).unwrap();
    to.into()
}

/// Settings with which nothing is waited for long.
pub(crate) fn brisk() -> Settings {
    Settings {
        force_after: Duration::from_millis(50),
        ..Settings::default()
    }
}

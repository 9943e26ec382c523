//! A durable guest, its manager's end, and the manager after it.

use std::{
    cell::RefCell,
    io::IoSlice,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    rc::Rc,
    sync::{Arc, atomic::Ordering},
};

use capnp::capability::FromClientHook;
use futures::{FutureExt, channel::oneshot};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, sendmsg, socketpair,
};
use sepal_schema::{
    error::{Error, Kind, read_completion},
    guest_capnp::{GuestStatus, event, event_sink, guest},
    info::GuestInfo,
    lifecycle_capnp::{component, guest_lifecycle, host_setup},
    report::{Reason, StopReport},
    transport::{Connection, EndReason, Handle, Limits, connect, guard},
};

use super::world::{Bench, World, bench, kind};
use crate::machine::Happening;

/// A component whose manager may go.
struct Durable {
    handle: Handle,
    world: Arc<World>,
    exited: oneshot::Receiver<()>,
    /// By which managers come.
    door: OwnedFd,
}

/// A manager that has come.
struct Heir {
    component: component::Client,
    connection: Connection,
}

/// What an heir finds.
struct Found {
    guest: guest::Client,
    status: GuestStatus,
    paused: bool,
    uptime: u64,
    missed: u64,
}

fn doors() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
}

fn send(door: &OwnedFd, fd: OwnedFd) {
    let rights = [fd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&rights));
    sendmsg(door, &[IoSlice::new(b"m")], &mut control, SendFlags::empty()).unwrap();
}

/// Creates a durable guest; with a sink, its events go there.
async fn create(bench: &Bench, sink: Option<event_sink::Client>) -> OwnedFd {
    let (door, theirs) = doors();
    let number = bench.fds.send(theirs).unwrap();
    let created = bench.create_with(|params| {
        let mut host = params.get_host().unwrap();
        host.set_durable(true);
        host.reborrow().init_successors().set_number(number);
        if let Some(sink) = sink {
            host.set_events(sink);
        }
    });
    created.await.unwrap();
    door
}

/// The manager is no more.
fn orphan(bench: Bench, door: OwnedFd) -> Durable {
    let Bench {
        handle, world, exited, ..
    } = bench;
    Durable {
        handle,
        world,
        exited,
        door,
    }
}

fn come(handle: &Handle, door: &OwnedFd) -> Heir {
    let (ours, theirs) = UnixStream::pair().unwrap();
    send(door, theirs.into());
    let (component, connection) = connect(handle, ours, Limits::default()).unwrap();
    Heir { component, connection }
}

impl Durable {
    fn come(&self) -> Heir {
        come(&self.handle, &self.door)
    }
}

impl Heir {
    async fn attach_with(&self, fill: impl FnOnce(host_setup::Builder<'_>)) -> Result<Found, Error> {
        let mut request = self.component.attach_request();
        fill(request.get().init_host());
        let answer = request.send().promise.await.unwrap();
        let answer = answer.get().unwrap();
        if answer.has_error() {
            return Err(Error::read(answer.get_error().unwrap()).unwrap());
        }
        Ok(Found {
            guest: answer.get_guest().unwrap(),
            status: answer.get_status().unwrap(),
            paused: answer.get_paused(),
            uptime: answer.get_uptime_ns(),
            missed: answer.get_missed_events(),
        })
    }

    async fn attach(&self) -> Found {
        self.attach_with(|_| {}).await.unwrap()
    }

    async fn ended(&self) -> Result<StopReport, Error> {
        use guest_lifecycle::run_result::Which;
        let answer = self.component.ended_request().send().promise.await.unwrap();
        match answer.get().unwrap().which().unwrap() {
            Which::Ended(report) => Ok(StopReport::read(report.unwrap()).unwrap()),
            Which::Error(error) => Err(Error::read(error.unwrap()).unwrap()),
        }
    }

    /// A round trip: what came before has been done.
    async fn settle(&self) {
        self.component.layers_request().send().promise.await.unwrap();
    }
}

async fn info(guest: &guest::Client) -> GuestInfo {
    let observer = guest.observer_request().send().pipeline.get_observer();
    let answer = observer.info_request().send().promise.await.unwrap();
    GuestInfo::read_result(answer.get().unwrap()).unwrap()
}

#[test]
fn a_durable_guest_goes_on_and_is_taken_over_again_and_again() {
    bench(|bench| async move {
        let door = create(&bench, None).await;
        drop(bench.lifecycle.run_request().send());
        bench.until_running().await;
        let guest = orphan(bench, door);
        let mut last = 0;
        for _ in 0..3 {
            let heir = guest.come();
            let found = heir.attach().await;
            assert_eq!(
                (found.status, found.paused, found.missed),
                (GuestStatus::Running, false, 0)
            );
            assert!(found.uptime > last);
            last = found.uptime;
            assert_eq!(guest.world.alive.load(Ordering::SeqCst), 1);
            // The facets are those of the guest, and its end can be waited for.
            assert_eq!(info(&found.guest).await.status, GuestStatus::Running);
            let mut ended = Box::pin(heir.ended());
            heir.settle().await;
            assert!((&mut ended).now_or_never().is_none());
        }
        let heir = guest.come();
        heir.attach().await;
        let ended = heir.ended();
        guest.world.report(1, Happening::Shutdown);
        assert_eq!(ended.await.unwrap().reason, Reason::Shutdown);
        // Nobody holds the way in any more, and the last manager goes.
        drop((guest.door, heir));
        guest.exited.await.unwrap();
    });
}

#[test]
fn how_it_ended_without_a_manager_can_be_asked() {
    bench(|bench| async move {
        let door = create(&bench, None).await;
        drop(bench.lifecycle.run_request().send());
        bench.until_running().await;
        let guest = orphan(bench, door);
        guest.world.report(1, Happening::Shutdown);
        let heir = guest.come();
        // Whether the end overtakes the heir or not.
        let report = heir.ended().await.unwrap();
        assert_eq!(report.reason, Reason::Shutdown);
        drop(heir);
        let heir = guest.come();
        let found = heir.attach().await;
        assert_eq!((found.status, found.uptime), (GuestStatus::Stopped, report.uptime_ns));
        assert_eq!(info(&found.guest).await.stop, Some(report.clone()));
        assert_eq!(heir.ended().await.unwrap(), report);
        drop((guest.door, heir));
        guest.exited.await.unwrap();
    });
}

#[test]
fn one_that_was_not_started_is_started_by_the_next_manager() {
    bench(|bench| async move {
        let door = create(&bench, None).await;
        let guest = orphan(bench, door);
        let heir = guest.come();
        assert_eq!(heir.attach().await.status, GuestStatus::NotStarted);
        assert_eq!(kind(heir.ended().await), Kind::NotCreated);
        let lifecycle = heir.component.clone().cast_to::<guest_lifecycle::Client>();
        let run = lifecycle.run_request().send().promise;
        while guest.world.started.load(Ordering::SeqCst) == 0 {
            heir.settle().await;
        }
        let stopped = lifecycle.stop_request().send().promise.await.unwrap();
        read_completion(stopped.get().unwrap()).unwrap();
        run.await.unwrap();
        assert_eq!(kind(heir.ended().await), Kind::ControllerForcedHalt);
    });
}

/// Remembers the devices that failed.
struct Sink {
    heard: Rc<RefCell<Vec<String>>>,
    /// Of the second it does not say that it has heard, and so is not told of those after it.
    deaf: bool,
}

impl event_sink::Server for Sink {
    async fn event(self: capnp::capability::Rc<Self>, params: event_sink::EventParams) -> Result<(), capnp::Error> {
        if let event::Which::DeviceFailed(failed) = params.get()?.get_event()?.which()? {
            self.heard.borrow_mut().push(failed.get_device()?.to_string()?);
        }
        if self.deaf && self.heard.borrow().len() == 2 {
            std::future::pending::<()>().await;
        }
        Ok(())
    }
}

#[test]
fn what_the_manager_before_did_not_hear_is_told_to_the_next() {
    for deaf in [false, true] {
        bench(|bench| async move {
            let heard = Rc::<RefCell<Vec<String>>>::default();
            let fail = |world: &World, n: usize| {
                let (device, reason) = (format!("disk{n}"), "a panic".into());
                world.report(1, Happening::DeviceFailed { device, reason });
            };
            let first = Sink {
                heard: heard.clone(),
                deaf,
            };
            let door = create(&bench, Some(guard::new_client(first))).await;
            drop(bench.lifecycle.run_request().send());
            bench.until_running().await;
            (0..3).for_each(|n| fail(&bench.world, n));
            while heard.borrow().len() < if deaf { 2 } else { 3 } {
                bench.component.layers_request().send().promise.await.unwrap();
            }
            // So that the answers have come, if there are any.
            bench.component.layers_request().send().promise.await.unwrap();
            let guest = orphan(bench, door);
            heard.borrow_mut().clear();
            (3..6).for_each(|n| fail(&guest.world, n));
            let heir = guest.come();
            heir.settle().await;
            let next = Sink {
                heard: heard.clone(),
                deaf: false,
            };
            let sink: event_sink::Client = guard::new_client(next);
            let found = heir.attach_with(|mut host| host.set_events(sink)).await.unwrap();
            fail(&guest.world, 6);
            let expected: Vec<_> = (if deaf { 1 } else { 3 }..7).map(|n| format!("disk{n}")).collect();
            while heard.borrow().len() < expected.len() {
                heir.settle().await;
            }
            assert_eq!((heard.take(), found.missed), (expected, 0));
        });
    }
}

#[test]
fn of_very_many_events_the_latest_are_kept_and_the_others_counted() {
    const MANY: usize = 300;
    bench(|bench| async move {
        let door = create(&bench, None).await;
        drop(bench.lifecycle.run_request().send());
        bench.until_running().await;
        let guest = orphan(bench, door);
        for n in 0..MANY {
            let (device, reason) = (format!("disk{n}"), "a panic".into());
            guest.world.report(1, Happening::DeviceFailed { device, reason });
        }
        // A manager that only looks does not take them away.
        let heir = guest.come();
        heir.settle().await;
        drop(heir);
        let heir = guest.come();
        let heard = Rc::<RefCell<Vec<String>>>::default();
        let sink: event_sink::Client = guard::new_client(Sink {
            heard: heard.clone(),
            deaf: false,
        });
        let found = heir.attach_with(|mut host| host.set_events(sink)).await.unwrap();
        while heard.borrow().len() < 256 {
            heir.settle().await;
        }
        // The guest's start was an event, too.
        assert_eq!(found.missed, (MANY + 1 - 256) as u64);
        let latest: Vec<_> = (MANY - 256..MANY).map(|n| format!("disk{n}")).collect();
        assert_eq!(heard.take(), latest);
    });
}

#[test]
fn a_manager_that_is_there_is_not_displaced() {
    bench(|bench| async move {
        let door = create(&bench, None).await;
        let intruder = come(&bench.handle, &door);
        assert!(matches!(intruder.connection.await, EndReason::ClosedByPeer));
        // Neither by what is no connection.
        send(&door, std::fs::File::open("/dev/null").unwrap().into());
        bench.component.layers_request().send().promise.await.unwrap();
        let guest = orphan(bench, door);
        // This one overtakes the news that there is no manager.
        let heir = guest.come();
        heir.attach().await;
        let intruder = guest.come();
        assert!(matches!(intruder.connection.await, EndReason::ClosedByPeer));
        assert_eq!(heir.attach().await.status, GuestStatus::NotStarted);
    });
}

#[test]
fn it_ends_when_nobody_can_come_any_more() {
    for before in [false, true] {
        bench(|bench| async move {
            let door = create(&bench, None).await;
            let run = bench.lifecycle.run_request().send();
            bench.until_running().await;
            if before {
                drop(door);
                bench.component.layers_request().send().promise.await.unwrap();
                assert_eq!(bench.world.alive.load(Ordering::SeqCst), 1, "its manager is there");
                drop((run, bench.component, bench.lifecycle, bench.connection));
                bench.exited.await.unwrap();
            } else {
                drop(run);
                let guest = orphan(bench, door);
                guest.come().attach().await;
                drop(guest.door);
                guest.exited.await.unwrap();
            }
        });
    }
}

#[test]
fn what_only_the_first_manager_may_say_is_refused() {
    bench(|bench| async move {
        let heir = Heir {
            component: bench.component.clone(),
            connection: bench.connection,
        };
        assert_eq!(heir.attach_with(|_| {}).await.err().unwrap().kind, Kind::NotCreated);
        assert_eq!(kind(heir.ended().await), Kind::NotCreated);
        let error = heir.attach_with(|mut host| host.set_durable(true)).await.err().unwrap();
        assert_eq!((error.kind, error.about.as_str()), (Kind::BadConfig, "host.durable"));
        let error = heir.attach_with(|mut host| host.set_cpuid(&[0])).await.err().unwrap();
        assert_eq!(error.about, "host.cpuid");
    });
    bench(|bench| async move {
        // A guest that is to go on needs a way for the next manager to come, and of the right kind.
        let durable = |host: &mut host_setup::Builder<'_>| host.set_durable(true);
        let without = bench.create_with(|params| durable(&mut params.get_host().unwrap()));
        assert_eq!(without.await.unwrap_err().about, "host.successors");
        let stream = bench.fds.send(UnixStream::pair().unwrap().0.into()).unwrap();
        let wrong = bench.create_with(|params| {
            let mut host = params.get_host().unwrap();
            durable(&mut host);
            host.init_successors().set_number(stream);
        });
        assert_eq!(wrong.await.unwrap_err().about, "host.successors");
    });
}

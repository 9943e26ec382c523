//! Events told to a hundred subscribers, each with a connection of its own to the guest manager, all in this process.
//!
//! The event is that a name is taken (`newGuest`): it costs the manager next to nothing, so that what is measured is the telling.

use std::{
    cell::{Cell, RefCell},
    io::{PipeReader, Read},
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::Path,
    process::{Child, Command, Stdio},
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use futures::{channel::oneshot, future::try_join_all};
use rustix::{
    io::{FdFlags, fcntl_setfd},
    process::{Pid, Signal, kill_process},
};
use sepal_integration::program;
use sepal_schema::{
    error::Outcome,
    guest_capnp::{event_sink, subscription},
    lifecycle_capnp::guest_lifecycle,
    manager_capnp::guest_manager,
    transport::{Connection, Limits, Reactor, connect, guard},
};

use super::{Part, rpc::within, units::milliseconds};
use crate::{bench::Bench, figure::Figure};

const LATENCY: Figure = Figure::cost(
    "events.last-of-100",
    "from the call that causes an event until the last of 100 subscribers has it",
    "ms",
)
.sepal_only();
const DELIVERED: Figure = Figure::rate(
    "events.delivered",
    "events delivered to 100 subscribers, a burst of 200 to each",
    "/s",
)
.sepal_only();

/// The part.
pub(crate) const PART: Part = Part {
    name: "events",
    about: "events told to 100 subscribers, each with a connection of its own",
    figures: &[&LATENCY, &DELIVERED],
    run,
};

const SUBSCRIBERS: usize = 100;
/// Events of a burst: fewer names than a manager has, and fewer events than it keeps, so that nobody loses any.
const BURST: usize = 200;

fn run(bench: &mut Bench) -> Result<()> {
    let (singles, bursts, burst) = bench.scaled((200, 10, BURST), (3, 1, 10));
    let mut audience = Audience::gather(&bench.scratch)?;
    // The first ones warm up.
    audience.round(1)?;
    audience.round(burst)?;
    for _ in 0..singles {
        bench.record(&LATENCY, milliseconds(audience.round(1)?));
    }
    for _ in 0..bursts {
        let took = audience.round(burst)?;
        bench.record(&DELIVERED, (burst * SUBSCRIBERS) as f64 / took.as_secs_f64());
    }
    Ok(())
}

/// A guest manager, who makes it tell something, and who is told.
struct Audience {
    reactor: Reactor,
    client: guest_manager::Client,
    heard: Rc<Heard>,
    /// How many names were taken.
    names: usize,
    _subscriptions: Vec<subscription::Client>,
    _connections: Vec<Connection>,
    _manager: Listening,
}

/// What the subscribers have heard together.
#[derive(Default)]
struct Heard {
    /// Events still to come, and who waits for the last.
    awaited: RefCell<Option<(usize, oneshot::Sender<()>)>>,
    lost: Cell<u64>,
}

impl Heard {
    /// Resolves when so many more events have come.
    fn wait_for(&self, count: usize) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        self.awaited.replace(Some((count, sender)));
        receiver
    }

    fn one(&self) {
        let mut awaited = self.awaited.borrow_mut();
        if let Some((left, _)) = awaited.as_mut() {
            *left -= 1;
            if *left == 0
                && let Some((_, sender)) = awaited.take()
            {
                // Nobody may be waiting any more.
                let _ = sender.send(());
            }
        }
    }
}

struct Subscriber(Rc<Heard>);

impl event_sink::Server for Subscriber {
    async fn event(self: Rc<Self>, params: event_sink::EventParams) -> capnp::Result<()> {
        let params = params.get()?;
        self.0.lost.set(self.0.lost.get() + params.get_dropped());
        // Names are taken or free again, never both in one wait.
        self.0.one();
        Ok(())
    }
}

impl Audience {
    /// Starts a manager that listens in `folder`, and subscribes.
    fn gather(folder: &Path) -> Result<Self> {
        let socket = folder.join("events.sock");
        let manager = Listening::start(&socket)?;
        let mut reactor = Reactor::single_threaded()?;
        let handle = reactor.handle();
        let heard = Rc::new(Heard::default());
        let connected = || connect::<guest_manager::Client>(&handle, UnixStream::connect(&socket)?, Limits::default());
        let (client, connection) = connected()?;
        let (mut connections, mut asked) = (vec![connection], Vec::new());
        for _ in 0..SUBSCRIBERS {
            let (client, connection) = connected()?;
            let mut request = client.subscribe_request();
            request.get().set_sink(guard::new_client(Subscriber(heard.clone())));
            asked.push(request.send().promise);
            connections.push(connection);
        }
        let subscriptions = within(&mut reactor, async move {
            let mut subscriptions = Vec::new();
            for response in try_join_all(asked).await? {
                subscriptions.push(response.get()?.get_subscription()?);
            }
            Ok(subscriptions)
        })?;
        Ok(Self {
            reactor,
            client,
            heard,
            names: 0,
            _subscriptions: subscriptions,
            _connections: connections,
            _manager: manager,
        })
    }

    /// Takes so many names, all calls at once; how long it takes until every subscriber has heard of every one. When this returns,
    /// the names are free again, and all have heard of that, too.
    fn round(&mut self, count: usize) -> Result<Duration> {
        let first = self.names;
        self.names += count;
        let (heard, client) = (self.heard.clone(), self.client.clone());
        within(&mut self.reactor, async move {
            let all_taken = heard.wait_for(count * SUBSCRIBERS);
            let start = Instant::now();
            let taken = try_join_all((first..first + count).map(|number| take(&client, number))).await?;
            all_taken.await.context("nobody listens")?;
            let took = start.elapsed();
            let all_free = heard.wait_for(count * SUBSCRIBERS);
            drop(taken);
            all_free.await.context("nobody listens")?;
            let lost = heard.lost.get();
            ensure!(lost == 0, "subscribers have lost {lost} events");
            Ok(took)
        })
    }
}

/// Takes a name, until what is returned is dropped.
async fn take(client: &guest_manager::Client, number: usize) -> Result<guest_lifecycle::Client> {
    let mut request = client.new_guest_request();
    request.get().set_name(format!("name{number}"));
    let response = request.send().promise.await?;
    Ok(response.get()?.outcome()?.get_lifecycle()?)
}

/// A guest manager that listens; it ends with this.
struct Listening(Child);

impl Listening {
    fn start(socket: &Path) -> Result<Self> {
        let (ready, tell) = std::io::pipe()?;
        fcntl_setfd(&tell, FdFlags::empty())?;
        let child = Command::new(program("guest-manager")?)
            .arg("--socket")
            .arg(socket)
            .args(["--ready-fd", &tell.as_raw_fd().to_string()])
            // Every name that is taken is audited: not between the lines of this program.
            .arg("--audit")
            .arg(socket.with_extension("audit"))
            .env("RUST_LOG", "warn")
            .stdin(Stdio::null())
            .spawn()
            .context("starting the guest manager")?;
        let manager = Self(child);
        drop(tell);
        manager.wait(ready)?;
        Ok(manager)
    }

    fn wait(&self, mut ready: PipeReader) -> Result<()> {
        let told = ready.read_exact(&mut [0]);
        told.context("the guest manager ended before it listened")
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let pid = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid {
            let _ = kill_process(pid, Signal::TERM);
        }
        let _ = self.0.wait();
    }
}

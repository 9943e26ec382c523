//! `guest metrics`: what there is to know about guests in the OpenMetrics text format, printed once or served over HTTP.
//!
//! ```text
//!   guests: the metrics, their names and units --> text: the format --> standard output
//!   listen: where                                               '----> http, to whoever asks on this machine (scrapers)
//! ```
//!
//! A server goes on while there is no guest manager, and says so (`sepal_up 0`); it finds the next one by itself.

mod guests;
mod http;
pub(crate) mod listen;
mod scrapers;
mod text;

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    pin::pin,
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use futures::{
    AsyncReadExt, AsyncWriteExt, FutureExt, StreamExt, future::select, lock::Mutex, pin_mut, select,
    stream::FuturesUnordered,
};
use sepal_schema::transport::{AsyncFd, Handle, reactor::Direction};

use self::{
    guests::Snapshot,
    http::{Refusal, Request},
    listen::{Listen, Socket},
    scrapers::{Scrapers, Served, Stage},
};
use crate::{
    args, calls, figures,
    manager::Manager,
    place::{Otherwise, Place},
    show, status, terminal,
};

/// Scrapers at a time; others wait until one has gone, or has to.
const MOST_SCRAPERS: usize = 64;
/// How long a scraper may take to ask, and then to listen.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the guest manager may take.
const MANAGER_PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait when a connection cannot be taken, as where there are no more descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// `guest metrics`.
pub(crate) async fn metrics(handle: &Handle, place: &Place, args: &args::Metrics) -> Result<u8> {
    match &args.listen {
        None => {
            let manager = Manager::running(handle, place)?;
            let text = guests::write(&snapshot(&manager).await?);
            show::print(text.as_bytes())?;
        }
        Some(at) => serve(handle, place, at).await?,
    }
    Ok(status::SUCCESS)
}

/// What the guest manager knows now.
async fn snapshot(manager: &Manager) -> Result<Snapshot> {
    let version = manager.client.version_request().send().promise;
    let figures = figures::of_all(&manager.client).await?;
    let guests = calls::browse(&manager.client).await?;
    let version = version.await?;
    Ok(Snapshot {
        version: Some(version.get()?.get_version()?.to_string()?),
        guests,
        figures,
    })
}

/// Where a server's metrics come from. One scraper at a time is in here, and the others get what was made for it, if that is of after they asked:
/// however many ask at once, the guest manager is asked twice at most.
struct Source<'a> {
    handle: &'a Handle,
    place: &'a Place,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The connection, made again when it has ended.
    manager: Option<Manager>,
    /// The last text, and when making it began.
    last: Option<(Instant, Rc<str>)>,
}

impl Source<'_> {
    /// The text for a scraper.
    async fn text(&self) -> Result<Rc<str>, Refusal> {
        let asked = Instant::now();
        let text = self.handle.timeout(MANAGER_PATIENCE, async {
            let mut state = self.state.lock().await;
            if let Some((begun, text)) = &state.last
                && *begun >= asked
            {
                return text.clone();
            }
            let begun = Instant::now();
            let text: Rc<str> = self.make(&mut state.manager).await.into();
            state.last = Some((begun, text.clone()));
            text
        });
        text.await.map_err(|_| Refusal::Unavailable)
    }

    /// Asks the guest manager by the connection that there is, or else by a new one.
    async fn make(&self, manager: &mut Option<Manager>) -> String {
        if let Some(known) = manager
            && let Ok(snapshot) = snapshot(known).await
        {
            return guests::write(&snapshot);
        }
        *manager = None;
        let new = async {
            // As long as there is none, there is nothing to be told; a scraper starts nothing.
            let new = manager.insert(Manager::connect(self.handle, self.place, Otherwise::Fail)?);
            snapshot(new).await
        };
        let snapshot = new.await.unwrap_or_else(|error: anyhow::Error| {
            say!("guest: {error:#}");
            Snapshot::default()
        });
        guests::write(&snapshot)
    }
}

fn cannot_listen(at: &Listen, error: io::Error) -> anyhow::Error {
    match (error.kind(), at) {
        (io::ErrorKind::AddrInUse, Listen::Unix(_)) => {
            anyhow!("listening on {at}: another program listens there, or it is another file's path")
        }
        (io::ErrorKind::AddrInUse, Listen::Tcp(_)) => anyhow!("listening on {at}: another program listens there"),
        _ => anyhow::Error::from(error).context(format!("listening on {at}")),
    }
}

/// Serves metrics until a signal ends it.
async fn serve(handle: &Handle, place: &Place, at: &Listen) -> Result<()> {
    let ending = terminal::endings(handle)?;
    let socket = Socket::bind(at).map_err(|error| cannot_listen(at, error))?;
    let on_port = matches!(socket.at, Listen::Tcp(_));
    let listener = handle.register(socket.fd.try_clone()?)?;
    let source = Source {
        handle,
        place,
        state: Mutex::default(),
    };
    say!("metrics are served on {}", socket.at);
    let (scrapers, mut served) = (Scrapers::new(MOST_SCRAPERS), FuturesUnordered::new());
    let sleep = |until: Option<Instant>| async move {
        match until {
            Some(then) => handle.sleep(then.saturating_duration_since(Instant::now())).await,
            None => std::future::pending().await,
        }
    };
    let ended = ending.next().fuse();
    pin_mut!(ended);
    loop {
        let next = async {
            // Nobody has to go before there is somebody to make room for.
            knocked(&listener).await?;
            scrapers.until_room(sleep).await;
            accept(&listener).await
        }
        .fuse();
        pin_mut!(next);
        select! {
            stream = next => match stream.and_then(|stream| handle.register(stream)) {
                Ok(stream) => {
                    let (one, go) = scrapers.enter(Instant::now());
                    let scrape = scrape(&source, stream, on_port, one);
                    served.push(async { drop(select(pin!(scrape), go).await) });
                }
                Err(error) => {
                    say!("guest: a connection could not be taken: {error}");
                    handle.sleep(PAUSE).await;
                }
            },
            () = served.select_next_some() => {}
            ended = ended => return ended.context("waiting for signals"),
        }
    }
}

/// Waits until somebody wants to be served.
async fn knocked(listener: &AsyncFd<OwnedFd>) -> io::Result<()> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let knocked = |fd: &OwnedFd| match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&Timespec::default()))? {
        0 => Err(io::ErrorKind::WouldBlock.into()),
        _ => Ok(()),
    };
    listener.io(Direction::Read, knocked).await
}

async fn accept(listener: &AsyncFd<OwnedFd>) -> io::Result<OwnedFd> {
    use rustix::net::{SocketFlags, accept_with};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let accept = |fd: &OwnedFd| Ok(accept_with(fd.as_fd(), flags)?);
    listener.io(Direction::Read, accept).await
}

/// Answers one scraper, whatever becomes of it.
async fn scrape(source: &Source<'_>, mut stream: AsyncFd<OwnedFd>, on_port: bool, served: Served) {
    let handle = source.handle;
    let mut bytes = Vec::with_capacity(1024);
    let request = handle.timeout(PATIENCE, read(&mut stream, on_port, &mut bytes)).await;
    served.goes_on(Stage::Waits, Instant::now());
    let head = http::is_head(&bytes);
    let answer = match request {
        Ok(Some(Request::Metrics)) => match source.text().await {
            Ok(text) => http::metrics(&text, head),
            Err(refusal) => http::refusal(refusal, head),
        },
        Ok(Some(Request::Refused(refusal))) => http::refusal(refusal, head),
        Ok(None) => return,
        Err(_) => http::refusal(Refusal::TooLate, head),
    };
    served.goes_on(Stage::Hears, Instant::now());
    let tell = async {
        stream.write_all(&answer).await?;
        stream.close().await?;
        // Until the other side has read it all: ending before that would take what is still on its way. What it says meanwhile is nobody's.
        let mut rest = [0; 512];
        while stream.read(&mut rest).await? > 0 {}
        io::Result::Ok(())
    };
    // A scraper that has gone is not missed.
    let _ = handle.timeout(PATIENCE, tell).await;
}

/// Reads a request into `bytes`; none if the scraper has gone before it was complete.
async fn read(stream: &mut AsyncFd<OwnedFd>, on_port: bool, bytes: &mut Vec<u8>) -> Option<Request> {
    loop {
        let mut buffer = [0; 1024];
        let room = (http::MOST - bytes.len()).min(buffer.len());
        match stream.read(&mut buffer[..room]).await {
            Ok(0) | Err(_) => return None,
            Ok(length) => bytes.extend_from_slice(&buffer[..length]),
        }
        // At the longest it is answered, whatever it is: there is always room here.
        if let Some(request) = http::read(bytes, on_port) {
            return Some(request);
        }
    }
}

//! A server that does what the tests of the transport need, and what they share.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]
#![allow(clippy::unwrap_used, reason = "a failed test panics")]

use std::{
    cell::{Cell, RefCell},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    rc::Rc,
    thread,
    time::Duration,
};

use futures::{future::LocalBoxFuture, future::join_all};
use sepal_schema::transport::{Connection, EndReason, FdTable, Handle, Limits, Reactor, connect, guard, serve};

#[allow(clippy::all, clippy::unwrap_used, clippy::undocumented_unsafe_blocks, missing_docs, unreachable_pub)]
#[rustfmt::skip]
pub mod transport_capnp;

pub mod raw;

pub use transport_capnp::probe;

/// Counts what is alive.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    pub probes: Rc<Cell<i64>>,
    pub hanging: Rc<Cell<i64>>,
    /// `hang` calls that have begun, ever.
    pub hung: Rc<Cell<i64>>,
}

/// Adds one while it lives.
pub struct Counted(Rc<Cell<i64>>);

impl Counted {
    pub fn new(count: &Rc<Cell<i64>>) -> Self {
        count.set(count.get() + 1);
        Self(count.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

pub struct Probe {
    handle: Handle,
    pub fds: Rc<RefCell<Option<FdTable>>>,
    counts: Counts,
    written: Cell<u64>,
    kept: RefCell<Vec<probe::Client>>,
    _counted: Counted,
}

impl Probe {
    pub fn new(handle: &Handle, counts: &Counts) -> Self {
        Self {
            handle: handle.clone(),
            fds: Rc::default(),
            counts: counts.clone(),
            written: Cell::new(0),
            kept: RefCell::default(),
            _counted: Counted::new(&counts.probes),
        }
    }

    fn child(&self) -> probe::Client {
        let child = Self {
            fds: self.fds.clone(),
            ..Self::new(&self.handle, &self.counts)
        };
        guard::new_client(child)
    }
}

pub fn inode(fd: impl AsFd) -> u64 {
    rustix::fs::fstat(fd).unwrap().st_ino
}

pub fn memfd() -> OwnedFd {
    rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap()
}

impl probe::Server for Probe {
    async fn ping(self: Rc<Self>, params: probe::PingParams, mut results: probe::PingResults) -> capnp::Result<()> {
        results.get().set_y(params.get()?.get_x() + 1);
        Ok(())
    }

    async fn hang(self: Rc<Self>, _: probe::HangParams, _: probe::HangResults) -> capnp::Result<()> {
        let _hanging = Counted::new(&self.counts.hanging);
        self.counts.hung.set(self.counts.hung.get() + 1);
        std::future::pending().await
    }

    #[allow(clippy::manual_async_fn, reason = "panics before there is a future")]
    fn panic_now(
        self: Rc<Self>,
        _: probe::PanicNowParams,
        _: probe::PanicNowResults,
    ) -> impl Future<Output = capnp::Result<()>> + 'static {
        if self.counts.probes.get() >= 0 {
            panic!("at once");
        }
        async { Ok(()) }
    }

    async fn panic_later(self: Rc<Self>, _: probe::PanicLaterParams, _: probe::PanicLaterResults) -> capnp::Result<()> {
        self.handle.sleep(Duration::from_millis(1)).await;
        panic!("later");
    }

    async fn take_fds(
        self: Rc<Self>,
        params: probe::TakeFdsParams,
        mut results: probe::TakeFdsResults,
    ) -> capnp::Result<()> {
        let table = self.fds.borrow().clone().unwrap();
        let numbers = params.get()?.get_numbers()?;
        let mut inodes = results.get().init_inodes(numbers.len());
        for (index, number) in numbers.iter().enumerate() {
            let fd = table
                .take(number)
                .map_err(|error| capnp::Error::failed(error.to_string()))?;
            inodes.set(index as u32, inode(fd));
        }
        Ok(())
    }

    async fn give_fd(self: Rc<Self>, _: probe::GiveFdParams, mut results: probe::GiveFdResults) -> capnp::Result<()> {
        let table = self.fds.borrow().clone().unwrap();
        let fd = memfd();
        let inode = inode(&fd);
        let number = table
            .send(fd)
            .map_err(|error| capnp::Error::failed(error.to_string()))?;
        results.get().set_number(number);
        results.get().set_inode(inode);
        Ok(())
    }

    async fn write(self: Rc<Self>, params: probe::WriteParams) -> capnp::Result<()> {
        self.written
            .set(self.written.get() + params.get()?.get_data()?.len() as u64);
        Ok(())
    }

    async fn total(self: Rc<Self>, _: probe::TotalParams, mut results: probe::TotalResults) -> capnp::Result<()> {
        results.get().set_bytes(self.written.get());
        Ok(())
    }

    async fn child(self: Rc<Self>, _: probe::ChildParams, mut results: probe::ChildResults) -> capnp::Result<()> {
        results.get().set_probe(Probe::child(&self));
        Ok(())
    }

    async fn call_back(
        self: Rc<Self>,
        params: probe::CallBackParams,
        mut results: probe::CallBackResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let client = params.get_probe()?;
        let pings = (0..params.get_count()).map(|n| ping(&client, n.into()));
        let mut sum = 0;
        for answer in join_all(pings).await {
            sum += answer?;
        }
        results.get().set_sum(sum);
        Ok(())
    }

    async fn keep(self: Rc<Self>, params: probe::KeepParams, _: probe::KeepResults) -> capnp::Result<()> {
        self.kept.borrow_mut().push(params.get()?.get_probe()?);
        Ok(())
    }

    async fn blob(self: Rc<Self>, params: probe::BlobParams, mut results: probe::BlobResults) -> capnp::Result<()> {
        results.get().init_data(params.get()?.get_size());
        Ok(())
    }

    async fn ignore(self: Rc<Self>, _: probe::IgnoreParams, _: probe::IgnoreResults) -> capnp::Result<()> {
        Ok(())
    }

    async fn slow_child(
        self: Rc<Self>,
        _: probe::SlowChildParams,
        mut results: probe::SlowChildResults,
    ) -> capnp::Result<()> {
        self.handle.sleep(Duration::from_millis(1)).await;
        results.get().set_probe(Probe::child(&self));
        Ok(())
    }
}

pub async fn ping(client: &probe::Client, x: u64) -> capnp::Result<u64> {
    let mut request = client.ping_request();
    request.get().set_x(x);
    Ok(request.send().promise.await?.get()?.get_y())
}

/// Serves a new probe.
pub fn serve_probe(handle: &Handle, socket: UnixStream, limits: Limits, counts: &Counts) -> Connection {
    let server = Probe::new(handle, counts);
    let fds = server.fds.clone();
    let client: probe::Client = guard::new_client(server);
    let connection = serve(
        handle,
        socket,
        limits,
        capnp::capability::Client::new(capnp::capability::FromClientHook::into_client_hook(client)),
    )
    .unwrap();
    *fds.borrow_mut() = Some(connection.fds());
    connection
}

/// A server in a thread of its own, which ends with its connections.
pub struct ServerThread(Option<thread::JoinHandle<Vec<EndReason>>>);

impl ServerThread {
    /// Serves a probe on each socket, and ends when all connections have.
    pub fn start(sockets: Vec<UnixStream>, limits: Limits) -> Self {
        Self(Some(thread::spawn(move || {
            let mut reactor = Reactor::single_threaded().unwrap();
            let handle = reactor.handle();
            let counts = Counts::default();
            let connections: Vec<_> = sockets
                .into_iter()
                .map(|socket| serve_probe(&handle, socket, limits, &counts))
                .collect();
            let reasons = reactor.run_until(join_all(connections)).unwrap();
            drop(reactor);
            assert_eq!(counts.probes.get(), 0, "every object is dropped with the connections");
            assert_eq!(counts.hanging.get(), 0);
            reasons
        })))
    }

    pub fn join(mut self) -> Vec<EndReason> {
        self.0.take().unwrap().join().unwrap()
    }
}

/// Runs `client` against a server in another thread; returns its result and why the server's connection ended.
pub fn with_server<T>(
    limits: Limits,
    client: impl FnOnce(Handle, probe::Client, Rc<Connection>) -> LocalBoxFuture<'static, T>,
) -> (T, EndReason) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = ServerThread::start(vec![theirs], limits);
    let mut reactor = Reactor::single_threaded().unwrap();
    let handle = reactor.handle();
    let (probe, connection) = connect(&handle, ours, limits).unwrap();
    let connection = Rc::new(connection);
    let result = reactor.run_until(client(handle, probe, connection.clone())).unwrap();
    drop(connection);
    drop(reactor);
    (result, server.join().remove(0))
}

//! A guest manager: one of one's own, that ends with its connection, or one that runs.

use std::{
    future::Future,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use capnp::capability::Request;
use rustix::io::FdFlags;
use sepal_schema::{
    error::Outcome,
    manager_capnp::guest_manager,
    transport::{Connection, Handle, Limits, Reactor, connect},
};

use crate::{
    boot::{Boot, Guest},
    error::HarnessError,
    programs::program,
};

/// How long the manager may take for anything that does not depend on the guest.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A call that launches a guest.
pub type LaunchRequest = Request<guest_manager::launch_params::Owned, guest_manager::launch_result::Owned>;

/// A guest manager, and the connection to it. Dropping one that was started here ends both, and every guest that is left.
pub struct Manager {
    reactor: Reactor,
    client: guest_manager::Client,
    connection: Option<Connection>,
    /// The process, if it was started here.
    child: Option<Child>,
}

impl Manager {
    /// Starts a private one.
    ///
    /// # Errors
    /// [`HarnessError`]: its program is missing, or the host refused something.
    pub fn start() -> Result<Self, HarnessError> {
        Self::start_with(&[])
    }

    /// Starts a private one with these options on its command line.
    ///
    /// # Errors
    /// As [`start`](Self::start). A manager that refuses the options ends, and every call says that the connection broke.
    pub fn start_with(options: &[&str]) -> Result<Self, HarnessError> {
        let (ours, theirs) = UnixStream::pair().map_err(HarnessError::io("making a socket pair"))?;
        let child = spawn(theirs.into(), options)?;
        Self::over(ours, Some(child))
    }

    /// Connects to the one that listens at `socket`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(socket: &Path) -> Result<Self, HarnessError> {
        let ours = UnixStream::connect(socket).map_err(HarnessError::io("connecting to the guest manager"))?;
        Self::over(ours, None)
    }

    fn over(ours: UnixStream, child: Option<Child>) -> Result<Self, HarnessError> {
        let reactor = Reactor::new().map_err(HarnessError::io("making the event loop"))?;
        let (client, connection) = connect::<guest_manager::Client>(&reactor.handle(), ours, Limits::default())
            .map_err(HarnessError::io("connecting to the guest manager"))?;
        Ok(Self {
            reactor,
            client,
            connection: Some(connection),
            child,
        })
    }

    /// Launches a guest; its vCPUs run when this returns.
    ///
    /// # Errors
    /// A file of the guest cannot be opened, or the manager refused.
    pub fn launch(mut self, boot: Boot) -> Result<Guest, HarnessError> {
        let request = self.launch_request(boot)?;
        let response = self.within(PATIENCE, request.send().promise)?;
        let response = response.unwrap_or_else(|| Err(capnp::Error::overloaded("launch was not answered".into())))?;
        let launched = response.get()?.outcome()?;
        let (guest, lease) = (launched.get_guest()?, launched.get_lease()?);
        Ok(Guest::new(self, guest, Some(lease)))
    }

    /// What makes calls that launch guests, for who sends several at once, or more behind one. Nothing has been sent when a call is made; it has to be
    /// sent before the next one is made, since its files travel with what is sent first.
    ///
    /// What is returned fails when a file of the guest cannot be opened.
    pub fn launches(&self) -> impl Fn(Boot) -> Result<LaunchRequest, HarnessError> + use<> {
        let client = self.client.clone();
        let fds = self.connection.as_ref().map(Connection::fds);
        move |boot| {
            let mut request = client.launch_request();
            if let Some(fds) = &fds {
                boot.config()?.encode(request.get().init_config(), fds)?;
            }
            Ok(request)
        }
    }

    /// One such call.
    ///
    /// # Errors
    /// A file of the guest cannot be opened.
    pub fn launch_request(&self, boot: Boot) -> Result<LaunchRequest, HarnessError> {
        self.launches()(boot)
    }

    /// The process, if it was started here.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// A guest that was launched by somebody else, and does not end with what is returned.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn find(mut self, name: &str) -> Result<Guest, HarnessError> {
        let mut request = self.client.lookup_request();
        request.get().set_name(name);
        let response = self.within(PATIENCE, request.send().promise)?;
        let response = response.unwrap_or_else(|| Err(capnp::Error::overloaded("lookup was not answered".into())))?;
        let guest = response.get()?.outcome()?.get_guest()?;
        Ok(Guest::new(self, guest, None))
    }

    /// The loop that the connection is on.
    pub fn handle(&self) -> Handle {
        self.reactor.handle()
    }

    /// The capability.
    pub fn client(&self) -> &guest_manager::Client {
        &self.client
    }

    /// Ends the connection, and the manager with it if that was started here; how it ended, else a success.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn close(mut self) -> Result<ExitStatus, HarnessError> {
        self.let_go();
        match &mut self.child {
            Some(child) => child.wait().map_err(HarnessError::io("waiting for the guest manager")),
            None => Ok(ExitStatus::default()),
        }
    }

    /// A descriptor that came with an answer.
    pub(crate) fn take_fd(&self, number: u32) -> Result<OwnedFd, HarnessError> {
        let taken = match &self.connection {
            Some(connection) => connection.fds().take(number).map_err(io::Error::other),
            None => Err(io::ErrorKind::NotConnected.into()),
        };
        taken.map_err(HarnessError::io("taking a descriptor"))
    }

    /// Runs a future on the loop, and with it what was sent; `None` if it takes longer than `patience`.
    ///
    /// # Errors
    /// When the loop fails.
    pub fn within<F: Future>(&mut self, patience: Duration, future: F) -> Result<Option<F::Output>, HarnessError> {
        let handle = self.reactor.handle();
        let outcome = self
            .reactor
            .run_until(async move { handle.timeout(patience, future).await });
        Ok(outcome.map_err(HarnessError::io("running the event loop"))?.ok())
    }

    fn let_go(&mut self) {
        if let Some(connection) = self.connection.take() {
            connection.disconnect();
            // The loop is what closes it.
            let _ = self.reactor.run_until(connection);
        }
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        self.let_go();
        if let Some(child) = &mut self.child {
            let _ = child.wait();
        }
    }
}

/// A manager that serves one connection and ends with it.
fn spawn(connection: OwnedFd, options: &[&str]) -> Result<Child, HarnessError> {
    let mut command = Command::new(program("guest-manager")?);
    command
        .arg("--fd")
        .arg(connection.as_raw_fd().to_string())
        .args(options)
        .stdin(Stdio::null());
    rustix::io::fcntl_setfd(&connection, FdFlags::empty()).map_err(|errno| HarnessError::Io {
        step: "passing the connection on",
        source: errno.into(),
    })?;
    command.spawn().map_err(HarnessError::io("starting the guest manager"))
}

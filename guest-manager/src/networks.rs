//! The networks of a guest: made on worker threads, and taken away again. That what serves one is gone, the component tells: its end of the socket is closed.
//!
//! ```text
//!   taps, once: names become descriptors --> start, for each of the guest's runs: what else has to serve a network --> end
//! ```

use sepal_schema::{
    config::device::{Link, Network},
    error::{Error, Kind},
    transport::Handle,
};

use crate::network::{self, Guard};

/// What serves the networks of a guest. [`Networks::end`] waits for its end, dropping it does not.
#[derive(Default)]
pub(crate) struct Networks {
    handle: Option<Handle>,
    guards: Vec<Guard>,
}

/// Opens or makes the taps that `networks` name. `trusted` tells whether the client has the manager's own authority, which that needs.
///
/// # Errors
/// With the field's name: what is lacking.
pub(crate) async fn taps(handle: &Handle, networks: Vec<Network>, trusted: bool) -> Result<Vec<Network>, Error> {
    let is_named = |network: &Network| matches!(network.link, Link::TapNamed(_) | Link::Bridge(_));
    if !trusted {
        for (i, network) in networks.iter().enumerate() {
            let field = match network.link {
                Link::TapNamed(_) => "tapNamed",
                Link::Bridge(_) => "bridge",
                Link::User | Link::Tap(_) | Link::Socket(_) => continue,
            };
            let field = format!("networks[{i}].{field}");
            let message = format!("{field}: only a client with the manager's own uid may have the manager make a tap");
            return Err(Error::new(Kind::PermissionDenied, message).about(field));
        }
    }
    if !networks.iter().any(is_named) {
        return Ok(networks);
    }
    // Nothing has to be kept for a tap but its descriptors.
    let opened = open(handle, networks, is_named).await?;
    Ok(opened.into_iter().map(|(network, _)| network).collect())
}

/// Opens the other ends of those networks that `wanted` says, on a worker thread.
async fn open(
    handle: &Handle,
    networks: Vec<Network>,
    wanted: impl Fn(&Network) -> bool + Send + 'static,
) -> Result<Vec<(Network, Guard)>, Error> {
    let open = move || {
        let opened = networks
            .into_iter()
            .enumerate()
            .map(|(i, network)| match wanted(&network) {
                true => network::open(i, network),
                false => Ok((network, Guard::default())),
            });
        // Those that were opened go where the first failure is seen: here, on the worker.
        opened.collect::<Result<Vec<_>, _>>()
    };
    let opened = handle.spawn_blocking(open).await;
    opened.map_err(|error| Error::new(Kind::NoResources, format!("no network: {error}")))?
}

impl Networks {
    /// Starts what serves `networks` in one of the guest's runs.
    ///
    /// # Errors
    /// With the field's name: what is lacking.
    pub(crate) async fn start(handle: &Handle, networks: Vec<Network>) -> Result<(Vec<Network>, Self), Error> {
        if networks.is_empty() {
            return Ok((networks, Self::default()));
        }
        let opened = open(handle, networks, |_| true).await?;
        let (networks, guards) = opened.into_iter().unzip();
        let handle = Some(handle.clone());
        Ok((networks, Self { handle, guards }))
    }

    /// Ends what serves the networks, and returns when it is gone.
    pub(crate) async fn end(mut self) {
        let guards = std::mem::take(&mut self.guards);
        if let Some(handle) = self.handle.take() {
            // Without a thread they end all the same, unwaited for.
            let _ = handle.spawn_blocking(move || drop(guards)).await;
        }
    }
}

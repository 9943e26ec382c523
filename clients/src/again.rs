//! The way back to a guest that goes on while its guest manager ends: the manager after it is waited for, and asked for the guest.
//!
//! ```text
//!   connection lost --> nobody listens --> the next manager listens --+-- token of the lease --> guest, held as before
//!                            |                                        +-- name               --> guest
//!                            +-- for 30 s --> given up
//! ```

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use capnp::capability::FromClientHook;
use sepal_schema::{
    guest_capnp::{guest, serial},
    manager_capnp::guest_manager,
    transport::Handle,
};

use crate::{
    calls,
    launch::Launched,
    manager::Manager,
    place::{Otherwise, Place},
};

/// How long the next guest manager is waited for: as long as a lease outlives the one before.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked for. Its socket is made anew, so there is nothing whose change could be waited for.
const PERIOD: Duration = Duration::from_millis(100);

/// What leads to a guest again.
pub(crate) struct Back<'a> {
    place: &'a Place,
    name: String,
    /// What stands for the lease, of whoever holds one.
    token: Option<String>,
    /// The port of the console; none for the serial port.
    console: Option<u32>,
}

/// A guest that was found again.
pub(crate) struct Found {
    pub(crate) manager: Manager,
    pub(crate) guest: guest::Client,
    /// To be kept as long as the guest shall run.
    pub(crate) lease: Option<guest_manager::lease::Client>,
    pub(crate) port: serial::Client,
}

impl<'a> Back<'a> {
    /// The way back for who has launched a guest that is durable; none where the guest manager has no token for its lease.
    pub(crate) async fn of_lease(place: &'a Place, launched: &Launched) -> Option<Self> {
        let response = launched.lease.token_request().send().promise.await.ok()?;
        let guest_manager::lease::token_result::Token(token) = response.get().ok()?.which().ok()? else {
            return None;
        };
        let token = token.ok()?.to_string().ok()?;
        place.is_here().then(|| Self {
            place,
            name: launched.name.clone(),
            token: Some(token),
            console: None,
        })
    }

    /// The way back for who looks at a guest that is durable, at its serial port or a port of its console.
    pub(crate) fn of_name(place: &'a Place, name: &str, console: Option<u32>) -> Option<Self> {
        place.is_here().then(|| Self {
            place,
            name: name.to_owned(),
            token: None,
            console,
        })
    }

    /// Waits for the next guest manager, and for the guest.
    ///
    /// # Errors
    /// There is none in time, or it knows no such guest.
    pub(crate) async fn find(&self, handle: &Handle) -> Result<Found> {
        let begun = Instant::now();
        loop {
            let error = match self.try_find(handle).await {
                Ok(found) => return Ok(found),
                Err(error) => error,
            };
            let answered = crate::status::is_answer(&error);
            if answered || begun.elapsed() >= PATIENCE {
                return Err(error).with_context(|| format!("finding {} again", self.name));
            }
            handle.sleep(PERIOD).await;
        }
    }

    async fn try_find(&self, handle: &Handle) -> Result<Found> {
        // Whoever replaces the one that was is not to find another in its place.
        let manager = Manager::connect(handle, self.place, Otherwise::Fail)?;
        let (guest, lease) = match &self.token {
            None => (calls::lookup(&manager.client, &self.name).await?, None),
            Some(token) => {
                let mut request = manager.client.redeem_lease_request();
                request.get().set_token(token);
                let launched = Launched::read(request.send().promise.await?.get()?)?;
                (launched.guest, Some(launched.lease))
            }
        };
        let port = match self.console {
            None => calls::serial(&guest),
            Some(port) => calls::console(&guest, port).await?.cast_to(),
        };
        Ok(Found {
            manager,
            guest,
            lease,
            port,
        })
    }
}

//! `Guest` as clients hold it: a capability of its own for each thing that can be done with it.

use std::{future::Future, rc::Rc, time::Instant};

use capnp::capability::FromClientHook;
use sepal_schema::{
    answer,
    error::{Error, write_completion},
    facet::Right,
    guest_capnp::guest,
};

use crate::{
    access::{
        facet::{closed, facets},
        holder::{Deed, Holder},
        thing::{Thing, serve_as},
    },
    client::Client,
    facets::{self, check_device},
    guest::Guest,
};

type Reply = Result<(), capnp::Error>;

const SHARES: Deed = Deed::new("Guest.shares", &[Right::Share]).only_looks();
const REVOKE_SHARE: Deed = Deed::new("Guest.revokeShare", &[Right::Share]);

fn reply(result: Reply) -> impl Future<Output = Reply> + 'static {
    futures::future::ready(result)
}

/// All of a guest.
pub struct GuestServer(pub(crate) Holder);

facets!(GuestServer { 0 });

impl GuestServer {
    /// Gives a client a guest, and what its role permits.
    pub fn new_client(client: Client, guest: Rc<Guest>) -> guest::Client {
        serve_as(Holder::of_role(client, guest))
    }

    /// A part of it; needs no right.
    fn part<C: FromClientHook>(&self, thing: Thing) -> Result<C, Error> {
        self.0.check_live()?;
        Ok(serve_as(self.0.part(thing)))
    }

    /// A part that is there for every guest.
    fn plain<C: FromClientHook>(&self, thing: Thing) -> Result<C, capnp::Error> {
        self.part(thing).map_err(|error| error.exception())
    }

    /// A part that is there for guests with the device.
    async fn device<C: FromClientHook>(&self, thing: Thing) -> Result<C, Error> {
        self.0.check_live()?;
        self.0.while_live(check_device(&self.0.guest, thing)).await?;
        self.part(thing)
    }
}

impl guest::Server for GuestServer {
    fn serial(
        self: Rc<Self>,
        _: guest::SerialParams,
        mut results: guest::SerialResults,
    ) -> impl Future<Output = Reply> + 'static {
        let serial = self.plain(Thing::Serial);
        reply(serial.map(|serial| results.get().set_serial(serial)))
    }

    fn power(
        self: Rc<Self>,
        _: guest::PowerParams,
        mut results: guest::PowerResults,
    ) -> impl Future<Output = Reply> + 'static {
        reply(self.plain(Thing::Power).map(|power| results.get().set_power(power)))
    }

    fn observer(
        self: Rc<Self>,
        _: guest::ObserverParams,
        mut results: guest::ObserverResults,
    ) -> impl Future<Output = Reply> + 'static {
        let observer = self.plain(Thing::Observer);
        reply(observer.map(|observer| results.get().set_observer(observer)))
    }

    fn console(
        self: Rc<Self>,
        params: guest::ConsoleParams,
        mut results: guest::ConsoleResults,
    ) -> impl Future<Output = Reply> + 'static {
        reply(params.get().map(|params| {
            let number = params.get_port();
            let console = self
                .part(Thing::Console(number))
                .and_then(|console| facets::console_port(&self.0.guest, number).map(|_| console));
            answer!(results, set_console, console);
        }))
    }

    async fn balloon_controller(
        self: Rc<Self>,
        _: guest::BalloonControllerParams,
        mut results: guest::BalloonControllerResults,
    ) -> Reply {
        answer!(results, set_controller, self.device(Thing::Balloon).await);
        Ok(())
    }

    async fn mem_controller(
        self: Rc<Self>,
        _: guest::MemControllerParams,
        mut results: guest::MemControllerResults,
    ) -> Reply {
        answer!(results, set_controller, self.device(Thing::Memory).await);
        Ok(())
    }

    async fn host_vsock_endpoint(
        self: Rc<Self>,
        _: guest::HostVsockEndpointParams,
        mut results: guest::HostVsockEndpointResults,
    ) -> Reply {
        answer!(results, set_endpoint, self.device(Thing::Vsock).await);
        Ok(())
    }

    async fn disk_controller(
        self: Rc<Self>,
        _: guest::DiskControllerParams,
        mut results: guest::DiskControllerResults,
    ) -> Reply {
        answer!(results, set_controller, self.device(Thing::Disks).await);
        Ok(())
    }

    async fn net_controller(
        self: Rc<Self>,
        _: guest::NetControllerParams,
        mut results: guest::NetControllerResults,
    ) -> Reply {
        answer!(results, set_controller, self.device(Thing::Networks).await);
        Ok(())
    }

    async fn agent(self: Rc<Self>, _: guest::AgentParams, mut results: guest::AgentResults) -> Reply {
        answer!(results, set_agent, self.device(Thing::Agent).await);
        Ok(())
    }

    fn statistics(
        self: Rc<Self>,
        _: guest::StatisticsParams,
        mut results: guest::StatisticsResults,
    ) -> impl Future<Output = Reply> + 'static {
        let statistics = self.plain(Thing::Statistics);
        reply(statistics.map(|statistics| results.get().set_statistics(statistics)))
    }

    fn debug(
        self: Rc<Self>,
        _: guest::DebugParams,
        mut results: guest::DebugResults,
    ) -> impl Future<Output = Reply> + 'static {
        reply(self.plain(Thing::Debug).map(|debug| results.get().set_debug(debug)))
    }

    fn cpu_controller(
        self: Rc<Self>,
        _: guest::CpuControllerParams,
        mut results: guest::CpuControllerResults,
    ) -> impl Future<Output = Reply> + 'static {
        answer!(results, set_controller, self.part(Thing::Cpus));
        reply(Ok(()))
    }

    fn shares(
        self: Rc<Self>,
        _: guest::SharesParams,
        mut results: guest::SharesResults,
    ) -> impl Future<Output = Reply> + 'static {
        match self.0.admit(SHARES) {
            Ok(()) => {
                let mut shares = self.0.guest.access.shares.borrow_mut();
                let shares = shares.list(&self.0.grant, Instant::now());
                let count = u32::try_from(shares.len()).unwrap_or(u32::MAX);
                let mut to = results.get().init_shares(count);
                for (i, share) in (0..count).zip(&shares) {
                    share.write(to.reborrow().get(i));
                }
            }
            Err(error) => error.write(results.get().init_error()),
        }
        reply(Ok(()))
    }

    async fn revoke_share(
        self: Rc<Self>,
        params: guest::RevokeShareParams,
        mut results: guest::RevokeShareResults,
    ) -> Reply {
        let id = params.get()?.get_id();
        let revoke = async {
            let mut shares = self.0.guest.access.shares.borrow_mut();
            shares.revoke(&self.0.grant, id, Instant::now())
        };
        let detail = match id {
            0 => "all shares".to_owned(),
            id => format!("share {id}"),
        };
        let outcome = self.0.perform(REVOKE_SHARE, detail, revoke).await;
        self.0.guest.save();
        closed().await;
        write_completion(&outcome, results.get());
        Ok(())
    }
}

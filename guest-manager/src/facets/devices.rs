//! Controllers of a guest's devices.

use std::rc::Rc;

use sepal_schema::{
    device_capnp::{balloon_controller, disk_controller, mem_controller, net_controller},
    error::{Error, Outcome, write_completion},
    facet::Right,
    guest_capnp::guest,
};

use super::{Reply, complete, facet, pass};
use crate::{
    access::{
        facet::facets,
        holder::{Deed, Holder},
        thing::Thing,
    },
    guest::Guest,
    vsock,
};

const GET_BALLOON_SIZE: Deed = Deed::new("BalloonController.getBalloonSize", &[Right::Observe]);
const REQUEST_BALLOON_SIZE: Deed = Deed::new("BalloonController.requestBalloonSize", &[Right::Balloon]);
const GET_MEM_STATS: Deed = Deed::new("BalloonController.getMemStats", &[Right::Observe]);
const GET_MEM_SIZE: Deed = Deed::new("MemController.getMemSize", &[Right::Observe]);
const REQUEST_SIZE: Deed = Deed::new("MemController.requestSize", &[Right::Memory]);
const LIST_DISKS: Deed = Deed::new("DiskController.list", &[Right::Observe]);
const RESIZE_DISK: Deed = Deed::new("DiskController.resize", &[Right::Disk]);
const LIST_NETWORKS: Deed = Deed::new("NetController.list", &[Right::Observe]);
const SET_LINK: Deed = Deed::new("NetController.setLink", &[Right::Network]);

/// How much memory the guest lends back.
pub(crate) struct BalloonServer(pub(crate) Holder);

/// Memory that is plugged.
pub(crate) struct MemoryServer(pub(crate) Holder);

/// Disks.
pub(crate) struct DiskServer(pub(crate) Holder);

/// Network devices.
pub(crate) struct NetworkServer(pub(crate) Holder);

facets!(BalloonServer { 0 }, MemoryServer { 0 }, DiskServer { 0 }, NetworkServer { 0 });

/// Asks a component for the controller of a kind.
macro_rules! controllers {
    ($($name:ident, $ask:ident, $module:ident;)*) => {$(
        #[doc = concat!("The component's `", stringify!($module), "`.")]
        async fn $name(guest: &Guest) -> Result<$module::Client, Error> {
            let ask = |remote: &guest::Client| remote.$ask().send().promise;
            facet(guest, ask, |answer| Ok(answer.outcome()?.get_controller()?)).await
        }
    )*};
}

controllers! {
    balloon, balloon_controller_request, balloon_controller;
    memory, mem_controller_request, mem_controller;
    disks, disk_controller_request, disk_controller;
    networks, net_controller_request, net_controller;
}

/// Whether the guest has the device that a capability is for.
///
/// # Errors
/// `DEVICE_NOT_PRESENT`, or that the guest does not answer.
pub(crate) async fn check_device(guest: &Guest, thing: Thing) -> Result<(), Error> {
    match thing {
        Thing::Balloon => balloon(guest).await.map(drop),
        Thing::Memory => memory(guest).await.map(drop),
        Thing::Disks => disks(guest).await.map(drop),
        Thing::Networks => networks(guest).await.map(drop),
        Thing::Vsock => vsock::remote(guest).await.map(drop),
        Thing::Agent if !guest.has_agent => Err(super::not_there("agent")),
        _ => Ok(()),
    }
}

/// Asks a guest's component for a balloon of so many pages.
///
/// # Errors
/// As [`check_device`], or what the component answers.
pub(crate) async fn set_balloon(guest: &Guest, pages: u32) -> Result<(), Error> {
    let remote = balloon(guest).await?;
    let mut call = remote.request_balloon_size_request();
    call.get().set_pages(pages);
    complete(guest, call.send().promise).await
}

impl balloon_controller::Server for BalloonServer {
    async fn get_balloon_size(
        self: Rc<Self>,
        _: balloon_controller::GetBalloonSizeParams,
        mut results: balloon_controller::GetBalloonSizeResults,
    ) -> Reply {
        let guest = &self.0.guest;
        let ask = async {
            let remote = balloon(guest).await?;
            guest.answer(remote.get_balloon_size_request().send().promise).await
        };
        pass!(
            self.0.perform(GET_BALLOON_SIZE, "", ask).await,
            results,
            balloon_controller::size_result
        )
    }

    async fn request_balloon_size(
        self: Rc<Self>,
        params: balloon_controller::RequestBalloonSizeParams,
        mut results: balloon_controller::RequestBalloonSizeResults,
    ) -> Reply {
        let pages = params.get()?.get_pages();
        let guest = &self.0.guest;
        let ask = async {
            self.0.grant.check_balloon(pages.into())?;
            // Before the component knows, so that nothing is asked of it after this that nobody asked for.
            let before = guest.ballast.set_by_hand(pages);
            guest.save();
            let set = set_balloon(guest, pages).await;
            if set.is_err() {
                guest.ballast.put_back(&before);
                guest.save();
            }
            set
        };
        let outcome = self
            .0
            .perform(REQUEST_BALLOON_SIZE, format!("{pages} pages"), ask)
            .await;
        write_completion(&outcome, results.get());
        Ok(())
    }

    async fn get_mem_stats(
        self: Rc<Self>,
        _: balloon_controller::GetMemStatsParams,
        mut results: balloon_controller::GetMemStatsResults,
    ) -> Reply {
        let guest = &self.0.guest;
        let ask = async {
            let remote = balloon(guest).await?;
            guest.answer(remote.get_mem_stats_request().send().promise).await
        };
        pass!(
            self.0.perform(GET_MEM_STATS, "", ask).await,
            results,
            balloon_controller::stats_result
        )
    }
}

impl mem_controller::Server for MemoryServer {
    async fn get_mem_size(
        self: Rc<Self>,
        _: mem_controller::GetMemSizeParams,
        mut results: mem_controller::GetMemSizeResults,
    ) -> Reply {
        let guest = &self.0.guest;
        let ask = async {
            let remote = memory(guest).await?;
            guest.answer(remote.get_mem_size_request().send().promise).await
        };
        pass!(
            self.0.perform(GET_MEM_SIZE, "", ask).await,
            results,
            mem_controller::size_result
        )
    }

    async fn request_size(
        self: Rc<Self>,
        params: mem_controller::RequestSizeParams,
        mut results: mem_controller::RequestSizeResults,
    ) -> Reply {
        let bytes = params.get()?.get_bytes();
        let guest = &self.0.guest;
        let ask = async {
            self.0.grant.check_memory(bytes)?;
            let remote = memory(guest).await?;
            let mut call = remote.request_size_request();
            call.get().set_bytes(bytes);
            complete(guest, call.send().promise).await
        };
        let outcome = self.0.perform(REQUEST_SIZE, format!("{bytes} bytes"), ask).await;
        write_completion(&outcome, results.get());
        Ok(())
    }
}

impl disk_controller::Server for DiskServer {
    async fn list(self: Rc<Self>, _: disk_controller::ListParams, mut results: disk_controller::ListResults) -> Reply {
        let guest = &self.0.guest;
        let ask = async {
            let remote = disks(guest).await?;
            guest.answer(remote.list_request().send().promise).await
        };
        pass!(
            self.0.perform(LIST_DISKS, "", ask).await,
            results,
            disk_controller::list_result
        )
    }

    async fn resize(
        self: Rc<Self>,
        params: disk_controller::ResizeParams,
        mut results: disk_controller::ResizeResults,
    ) -> Reply {
        let (disk, bytes, shrink) = {
            let params = params.get()?;
            (params.get_disk()?.to_string()?, params.get_bytes(), params.get_shrink())
        };
        let guest = &self.0.guest;
        let ask = async {
            let remote = disks(guest).await?;
            let mut call = remote.resize_request();
            call.get().set_disk(&disk);
            call.get().set_bytes(bytes);
            call.get().set_shrink(shrink);
            complete(guest, call.send().promise).await
        };
        let outcome = self
            .0
            .perform(
                RESIZE_DISK,
                format!("{disk}, {bytes} bytes{}", if shrink { ", cut" } else { "" }),
                ask,
            )
            .await;
        write_completion(&outcome, results.get());
        Ok(())
    }
}

impl net_controller::Server for NetworkServer {
    async fn list(self: Rc<Self>, _: net_controller::ListParams, mut results: net_controller::ListResults) -> Reply {
        let guest = &self.0.guest;
        let ask = async {
            let remote = networks(guest).await?;
            guest.answer(remote.list_request().send().promise).await
        };
        pass!(
            self.0.perform(LIST_NETWORKS, "", ask).await,
            results,
            net_controller::list_result
        )
    }

    async fn set_link(
        self: Rc<Self>,
        params: net_controller::SetLinkParams,
        mut results: net_controller::SetLinkResults,
    ) -> Reply {
        let (network, up) = {
            let params = params.get()?;
            (params.get_network()?.to_string()?, params.get_up())
        };
        let guest = &self.0.guest;
        let ask = async {
            let remote = networks(guest).await?;
            let mut call = remote.set_link_request();
            call.get().set_network(&network);
            call.get().set_up(up);
            complete(guest, call.send().promise).await
        };
        let way = if up { "up" } else { "down" };
        let outcome = self.0.perform(SET_LINK, format!("{network} {way}"), ask).await;
        write_completion(&outcome, results.get());
        Ok(())
    }
}

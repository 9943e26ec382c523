//! The devices of the fake component: each answers at once, and remembers what it was told last.

use std::{cell::Cell, rc::Rc};

use sepal_schema::{
    debug_capnp::debug,
    device_capnp::{balloon_controller, disk_controller, mem_controller, net_controller},
    error::{Error, write_completion},
    guest_capnp::{console, output, serial},
};

type Reply = Result<(), capnp::Error>;

/// The largest balloon: 256 MiB.
pub(crate) const MOST_PAGES: u32 = 256 * 256;

/// What a component's devices were told.
#[derive(Default)]
pub(crate) struct Told {
    pub(crate) pages: Cell<u32>,
    pub(crate) plugged: Cell<u64>,
    pub(crate) size: Cell<(u16, u16)>,
}

pub(crate) struct Devices(pub(crate) Rc<Told>);

impl sepal_schema::facet_capnp::facet::Server for Devices {}
impl output::Server for Devices {}
impl serial::Server for Devices {}

impl console::Server for Devices {
    async fn resize(self: Rc<Self>, params: console::ResizeParams, mut results: console::ResizeResults) -> Reply {
        let params = params.get()?;
        self.0.size.set((params.get_columns(), params.get_rows()));
        write_completion(&Ok(()), results.get());
        Ok(())
    }
}

impl balloon_controller::Server for Devices {
    async fn get_balloon_size(
        self: Rc<Self>,
        _: balloon_controller::GetBalloonSizeParams,
        mut results: balloon_controller::GetBalloonSizeResults,
    ) -> Reply {
        results.get().init_size().set_requested_pages(self.0.pages.get());
        Ok(())
    }

    async fn request_balloon_size(
        self: Rc<Self>,
        params: balloon_controller::RequestBalloonSizeParams,
        mut results: balloon_controller::RequestBalloonSizeResults,
    ) -> Reply {
        let pages = params.get()?.get_pages();
        let set = match pages {
            0..=MOST_PAGES => {
                self.0.pages.set(pages);
                Ok(())
            }
            _ => Err(Error::bad_config("pages", "the fake has less memory")),
        };
        write_completion(&set, results.get());
        Ok(())
    }

    async fn get_mem_stats(
        self: Rc<Self>,
        _: balloon_controller::GetMemStatsParams,
        mut results: balloon_controller::GetMemStatsResults,
    ) -> Reply {
        results.get().init_stats(0);
        Ok(())
    }
}

impl mem_controller::Server for Devices {
    async fn get_mem_size(
        self: Rc<Self>,
        _: mem_controller::GetMemSizeParams,
        mut results: mem_controller::GetMemSizeResults,
    ) -> Reply {
        results.get().init_size().set_requested_size(self.0.plugged.get());
        Ok(())
    }

    async fn request_size(
        self: Rc<Self>,
        params: mem_controller::RequestSizeParams,
        mut results: mem_controller::RequestSizeResults,
    ) -> Reply {
        self.0.plugged.set(params.get()?.get_bytes());
        write_completion(&Ok(()), results.get());
        Ok(())
    }
}

impl disk_controller::Server for Devices {
    async fn list(self: Rc<Self>, _: disk_controller::ListParams, mut results: disk_controller::ListResults) -> Reply {
        results.get().init_disks(0);
        Ok(())
    }

    async fn resize(
        self: Rc<Self>,
        _: disk_controller::ResizeParams,
        mut results: disk_controller::ResizeResults,
    ) -> Reply {
        write_completion(&Ok(()), results.get());
        Ok(())
    }
}

impl net_controller::Server for Devices {
    async fn list(self: Rc<Self>, _: net_controller::ListParams, mut results: net_controller::ListResults) -> Reply {
        results.get().init_networks(0);
        Ok(())
    }

    async fn set_link(
        self: Rc<Self>,
        _: net_controller::SetLinkParams,
        mut results: net_controller::SetLinkResults,
    ) -> Reply {
        write_completion(&Ok(()), results.get());
        Ok(())
    }
}

impl debug::Server for Devices {
    async fn registers(self: Rc<Self>, params: debug::RegistersParams, mut results: debug::RegistersResults) -> Reply {
        let vcpu = params.get()?.get_vcpu();
        results.get().init_registers().set_rip(0x1000 + u64::from(vcpu));
        Ok(())
    }

    async fn read_virtual(
        self: Rc<Self>,
        params: debug::ReadVirtualParams,
        mut results: debug::ReadVirtualResults,
    ) -> Reply {
        let params = params.get()?;
        let bytes = vec![params.get_vcpu(); params.get_length() as usize];
        results.get().set_bytes(&bytes);
        Ok(())
    }

    async fn translate(self: Rc<Self>, params: debug::TranslateParams, mut results: debug::TranslateResults) -> Reply {
        let address = params.get()?.get_address();
        results.get().init_translation().set_physical(address % 4096);
        Ok(())
    }

    async fn stack(self: Rc<Self>, params: debug::StackParams, mut results: debug::StackResults) -> Reply {
        let most = params.get()?.get_most();
        results.get().set_end("ends\x1b[2J here");
        results.get().init_frames(most.into());
        Ok(())
    }

    async fn read_physical(
        self: Rc<Self>,
        params: debug::ReadPhysicalParams,
        mut results: debug::ReadPhysicalResults,
    ) -> Reply {
        let length = usize::try_from(params.get()?.get_length()).unwrap().min(16);
        results.get().set_bytes(&[0xa5; 16][..length]);
        Ok(())
    }
}

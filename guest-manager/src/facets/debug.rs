//! Looking into a guest.

use std::rc::Rc;

use sepal_schema::{
    debug_capnp::debug::{self, memory_result, registers_result},
    error::Error,
    facet::Right,
};

use super::{Reply, pass};
use crate::{
    access::{
        facet::facets,
        holder::{Deed, Holder},
    },
    guest::Guest,
};

const REGISTERS: Deed = Deed::new("Debug.registers", &[Right::Debug]);
const READ_PHYSICAL: Deed = Deed::new("Debug.readPhysical", &[Right::Debug]);

/// See `debug.capnp`.
pub(crate) struct DebugServer(pub(crate) Holder);

facets!(DebugServer { 0 });

fn remote(guest: &Guest) -> Result<debug::Client, Error> {
    Ok(guest.remote()?.debug_request().send().pipeline.get_debug())
}

impl debug::Server for DebugServer {
    async fn registers(self: Rc<Self>, params: debug::RegistersParams, mut results: debug::RegistersResults) -> Reply {
        let vcpu = params.get()?.get_vcpu();
        let guest = &self.0.guest;
        let ask = async {
            let mut call = remote(guest)?.registers_request();
            call.get().set_vcpu(vcpu);
            guest.answer(call.send().promise).await
        };
        let answer = self.0.perform(REGISTERS, format!("vcpu{vcpu}"), ask).await;
        pass!(answer, results, registers_result)
    }

    async fn read_physical(
        self: Rc<Self>,
        params: debug::ReadPhysicalParams,
        mut results: debug::ReadPhysicalResults,
    ) -> Reply {
        let (address, length) = {
            let params = params.get()?;
            (params.get_address(), params.get_length())
        };
        let guest = &self.0.guest;
        let ask = async {
            let mut call = remote(guest)?.read_physical_request();
            call.get().set_address(address);
            call.get().set_length(length);
            guest.answer(call.send().promise).await
        };
        let detail = format!("{length} bytes from {address:#x}");
        let answer = self.0.perform(READ_PHYSICAL, detail, ask).await;
        pass!(answer, results, memory_result)
    }
}

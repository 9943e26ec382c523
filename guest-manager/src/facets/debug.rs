//! Looking into a guest.

use std::{future::Future, rc::Rc, time::Duration};

use sepal_schema::{
    debug_capnp::debug::{self, memory_result, registers_result, stack_result, translate_result},
    error::Error,
    facet::Right,
};

use super::{Reply, pass};
use crate::{
    access::{
        facet::facets,
        holder::{Deed, Holder},
    },
    guest::{Guest, within},
    model::cut,
};

const REGISTERS: Deed = Deed::new("Debug.registers", &[Right::Debug]);
const READ_PHYSICAL: Deed = Deed::new("Debug.readPhysical", &[Right::Debug]);
const READ_VIRTUAL: Deed = Deed::new("Debug.readVirtual", &[Right::Debug]);
const TRANSLATE: Deed = Deed::new("Debug.translate", &[Right::Debug]);
const STACK: Deed = Deed::new("Debug.stack", &[Right::Debug]);

/// How long a component may take for an answer: more than it gives a vCPU to come out of the guest.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest reason for a stack's end that is passed on, in bytes.
const MAX_END: usize = 256;

/// See `debug.capnp`.
pub(crate) struct DebugServer(pub(crate) Holder);

facets!(DebugServer { 0 });

fn remote(guest: &Guest) -> Result<debug::Client, Error> {
    Ok(guest.remote()?.debug_request().send().pipeline.get_debug())
}

impl DebugServer {
    /// Does what is permitted, as long as that does not take too long.
    async fn ask<T>(
        &self,
        deed: Deed,
        detail: String,
        answer: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let answer = async { within(self.0.handle(), PATIENCE, answer).await? };
        self.0.perform(deed, detail, answer).await
    }
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
        let answer = self.ask(REGISTERS, format!("vcpu{vcpu}"), ask).await;
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
        let answer = self.ask(READ_PHYSICAL, detail, ask).await;
        pass!(answer, results, memory_result)
    }

    async fn read_virtual(
        self: Rc<Self>,
        params: debug::ReadVirtualParams,
        mut results: debug::ReadVirtualResults,
    ) -> Reply {
        let (vcpu, address, length) = {
            let params = params.get()?;
            (params.get_vcpu(), params.get_address(), params.get_length())
        };
        let guest = &self.0.guest;
        let ask = async {
            let mut call = remote(guest)?.read_virtual_request();
            call.get().set_vcpu(vcpu);
            call.get().set_address(address);
            call.get().set_length(length);
            guest.answer(call.send().promise).await
        };
        let detail = format!("{length} bytes from {address:#x} of vcpu{vcpu}");
        let answer = self.ask(READ_VIRTUAL, detail, ask).await;
        pass!(answer, results, memory_result)
    }

    async fn translate(self: Rc<Self>, params: debug::TranslateParams, mut results: debug::TranslateResults) -> Reply {
        let (vcpu, address) = {
            let params = params.get()?;
            (params.get_vcpu(), params.get_address())
        };
        let guest = &self.0.guest;
        let ask = async {
            let mut call = remote(guest)?.translate_request();
            call.get().set_vcpu(vcpu);
            call.get().set_address(address);
            guest.answer(call.send().promise).await
        };
        let detail = format!("{address:#x} of vcpu{vcpu}");
        let answer = self.ask(TRANSLATE, detail, ask).await;
        pass!(answer, results, translate_result)
    }

    async fn stack(self: Rc<Self>, params: debug::StackParams, mut results: debug::StackResults) -> Reply {
        let (vcpu, most) = {
            let params = params.get()?;
            (params.get_vcpu(), params.get_most())
        };
        let guest = &self.0.guest;
        let ask = async {
            let mut call = remote(guest)?.stack_request();
            call.get().set_vcpu(vcpu);
            call.get().set_most(most);
            let answer = guest.answer(call.send().promise).await?;
            let end = cut(&String::from_utf8_lossy(answer.get()?.get_end()?.as_bytes()), MAX_END);
            Ok((answer, end))
        };
        let answer = self.ask(STACK, format!("vcpu{vcpu}"), ask).await;
        let (answer, end) = match answer {
            Ok((answer, end)) => (Ok(answer), end),
            Err(error) => (Err(error), String::new()),
        };
        let passed: Reply = pass!(answer, results, stack_result);
        // What a component says is fit to be shown only now.
        results.get().set_end(end.as_str());
        passed
    }
}

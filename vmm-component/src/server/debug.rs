//! Debug: looks into a guest. Registers, and what needs them, are told by the vCPU's thread, which leaves the guest for that; physical memory is read
//! from here.

use std::time::Duration;

use capnp::capability::Rc as ServerRc;
use futures::channel::oneshot;
use sepal_schema::{
    crash::Registers,
    debug_capnp::debug,
    error::{Error, Kind},
};

use super::guest::GuestServer;
use crate::machine::{Answer, MachineError, Question, RegisterDump};

type Reply = Result<(), capnp::Error>;

/// How long a vCPU may take to come out of the guest, which is far more than it needs.
const PATIENCE: Duration = Duration::from_secs(2);

impl GuestServer {
    /// The registers of a vCPU at this moment.
    async fn registers_of(&self, vcpu: u8) -> Result<RegisterDump, Error> {
        let (sender, receiver) = oneshot::channel();
        // Nobody listens any more if the call was dropped.
        let show = Box::new(move |registers| drop(sender.send(registers)));
        self.with_running(|vm| vm.registers(vcpu, show))?;
        self.shown(vcpu, receiver).await
    }

    /// What a vCPU sees at this moment.
    async fn look(&self, vcpu: u8, question: Question) -> Result<Answer, Error> {
        let (sender, receiver) = oneshot::channel();
        let show = Box::new(move |answer| drop(sender.send(answer)));
        self.with_running(|vm| vm.look(vcpu, question, show))?;
        self.shown(vcpu, receiver).await
    }

    /// What a vCPU's thread tells.
    async fn shown<T>(&self, vcpu: u8, receiver: oneshot::Receiver<Result<T, MachineError>>) -> Result<T, Error> {
        match self.spawner().timeout(PATIENCE, receiver).await {
            Ok(Ok(shown)) => shown.map_err(|error| error.to_error()),
            // The vCPU is gone, and its orders with it.
            Ok(Err(_)) => Err(Error::new(Kind::NotRunning, "the guest has ended")),
            Err(_) => {
                let message = format!("vCPU {vcpu} did not leave the guest within {PATIENCE:?}");
                Err(Error::new(Kind::TimedOut, message).about(format!("vcpu{vcpu}")))
            }
        }
    }
}

/// An answer to another question than was asked.
fn mistaken() -> Error {
    Error::new(Kind::InternalError, "the machine answered another question")
}

impl debug::Server for GuestServer {
    async fn registers(
        self: ServerRc<Self>,
        params: debug::RegistersParams,
        mut results: debug::RegistersResults,
    ) -> Reply {
        match self.registers_of(params.get()?.get_vcpu()).await {
            Ok(registers) => told(&registers).write(results.get().init_registers()),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn read_physical(
        self: ServerRc<Self>,
        params: debug::ReadPhysicalParams,
        mut results: debug::ReadPhysicalResults,
    ) -> Reply {
        let params = params.get()?;
        let (address, length) = (params.get_address(), params.get_length());
        match self.with_running(|vm| vm.read_memory(address, length)) {
            Ok(bytes) => results.get().set_bytes(&bytes),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn read_virtual(
        self: ServerRc<Self>,
        params: debug::ReadVirtualParams,
        mut results: debug::ReadVirtualResults,
    ) -> Reply {
        let params = params.get()?;
        let (vcpu, address, length) = (params.get_vcpu(), params.get_address(), params.get_length());
        match self.look(vcpu, Question::Memory { address, length }).await {
            Ok(Answer::Memory(bytes)) => results.get().set_bytes(&bytes),
            Ok(_) => mistaken().write(results.get().init_error()),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn translate(
        self: ServerRc<Self>,
        params: debug::TranslateParams,
        mut results: debug::TranslateResults,
    ) -> Reply {
        let params = params.get()?;
        let (vcpu, address) = (params.get_vcpu(), params.get_address());
        match self.look(vcpu, Question::Translation { address }).await {
            Ok(Answer::Translation(found)) => {
                let mut to = results.get().init_translation();
                to.set_physical(found.physical);
                to.set_page_size(found.page_size);
                to.set_writable(found.writable);
                to.set_user(found.user);
                to.set_executable(found.executable);
            }
            Ok(_) => mistaken().write(results.get().init_error()),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn stack(self: ServerRc<Self>, params: debug::StackParams, mut results: debug::StackResults) -> Reply {
        let params = params.get()?;
        let most = usize::from(params.get_most());
        match self.look(params.get_vcpu(), Question::Stack { most }).await {
            Ok(Answer::Stack(stack)) => {
                let mut to = results.get();
                to.set_end(stack.end.as_str());
                // No more than 256.
                let mut list = to.init_frames(stack.frames.len() as u32);
                for (i, frame) in (0..).zip(&stack.frames) {
                    let mut to = list.reborrow().get(i);
                    to.set_address(frame.address);
                    to.set_stack_pointer(frame.stack_pointer);
                    to.set_reliable(frame.reliable);
                }
            }
            Ok(_) => mistaken().write(results.get().init_error()),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }
}

/// The registers as they are told.
pub(super) fn told(from: &RegisterDump) -> Registers {
    let (regs, sregs) = (&from.regs, &from.sregs);
    Registers {
        rax: regs.rax,
        rbx: regs.rbx,
        rcx: regs.rcx,
        rdx: regs.rdx,
        rsi: regs.rsi,
        rdi: regs.rdi,
        rsp: regs.rsp,
        rbp: regs.rbp,
        r8: regs.r8,
        r9: regs.r9,
        r10: regs.r10,
        r11: regs.r11,
        r12: regs.r12,
        r13: regs.r13,
        r14: regs.r14,
        r15: regs.r15,
        rip: regs.rip,
        rflags: regs.rflags,
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        efer: sregs.efer,
        cs: sregs.cs.selector,
        ds: sregs.ds.selector,
        es: sregs.es.selector,
        fs: sregs.fs.selector,
        gs: sregs.gs.selector,
        ss: sregs.ss.selector,
        fs_base: sregs.fs.base,
        gs_base: sregs.gs.base,
        cpl: from.privilege(),
        halted: from.halted,
    }
}

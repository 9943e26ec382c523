//! Debug: looks into a guest. Registers are told by the vCPU's thread, which leaves the guest for that; memory is read from here.

use std::time::Duration;

use capnp::capability::Rc as ServerRc;
use futures::channel::oneshot;
use sepal_schema::{
    debug_capnp::{debug, registers},
    error::{Error, Kind},
};

use super::guest::GuestServer;
use crate::machine::RegisterDump;

type Reply = Result<(), capnp::Error>;

/// How long a vCPU may take to come out of the guest, which is far more than it needs.
const PATIENCE: Duration = Duration::from_secs(2);

impl GuestServer {
    /// The registers of a vCPU at this moment.
    async fn registers_of(&self, vcpu: u8) -> Result<RegisterDump, Error> {
        let (sender, receiver) = oneshot::channel();
        self.with_running(|vm| {
            vm.registers(
                vcpu,
                Box::new(move |registers| {
                    // Nobody listens any more if the call was dropped.
                    let _ = sender.send(registers);
                }),
            )
        })?;
        match self.spawner().timeout(PATIENCE, receiver).await {
            Ok(Ok(registers)) => registers.map_err(|error| error.to_error()),
            // The vCPU is gone, and its orders with it.
            Ok(Err(_)) => Err(Error::new(Kind::NotRunning, "the guest has ended")),
            Err(_) => {
                let message = format!("vCPU {vcpu} did not leave the guest within {PATIENCE:?}");
                Err(Error::new(Kind::TimedOut, message).about(format!("vcpu{vcpu}")))
            }
        }
    }
}

impl debug::Server for GuestServer {
    async fn registers(
        self: ServerRc<Self>,
        params: debug::RegistersParams,
        mut results: debug::RegistersResults,
    ) -> Reply {
        match self.registers_of(params.get()?.get_vcpu()).await {
            Ok(registers) => write_registers(&registers, results.get().init_registers()),
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
}

fn write_registers(from: &RegisterDump, mut to: registers::Builder<'_>) {
    let (regs, sregs) = (&from.regs, &from.sregs);
    to.set_rax(regs.rax);
    to.set_rbx(regs.rbx);
    to.set_rcx(regs.rcx);
    to.set_rdx(regs.rdx);
    to.set_rsi(regs.rsi);
    to.set_rdi(regs.rdi);
    to.set_rsp(regs.rsp);
    to.set_rbp(regs.rbp);
    to.set_r8(regs.r8);
    to.set_r9(regs.r9);
    to.set_r10(regs.r10);
    to.set_r11(regs.r11);
    to.set_r12(regs.r12);
    to.set_r13(regs.r13);
    to.set_r14(regs.r14);
    to.set_r15(regs.r15);
    to.set_rip(regs.rip);
    to.set_rflags(regs.rflags);
    to.set_cr0(sregs.cr0);
    to.set_cr2(sregs.cr2);
    to.set_cr3(sregs.cr3);
    to.set_cr4(sregs.cr4);
    to.set_cr8(sregs.cr8);
    to.set_efer(sregs.efer);
    to.set_cs(sregs.cs.selector);
    to.set_ds(sregs.ds.selector);
    to.set_es(sregs.es.selector);
    to.set_fs(sregs.fs.selector);
    to.set_gs(sregs.gs.selector);
    to.set_ss(sregs.ss.selector);
    to.set_fs_base(sregs.fs.base);
    to.set_gs_base(sregs.gs.base);
    to.set_cpl(from.privilege());
    to.set_halted(from.halted);
}

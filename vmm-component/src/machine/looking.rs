//! Looking into a machine that runs: its memory by physical address from wherever one is, and by virtual address as one of its vCPUs sees it.
//!
//! What needs a vCPU's registers is read on the vCPU's own thread, while it is out of the guest: it changes neither its stack nor its page tables
//! meanwhile. The other vCPUs go on.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::{Machine, MachineError, RegisterDump};
use crate::memory::GuestRam;
use crate::paging::{PageTables, Translation};
use crate::stack::{self, Stack, Start};

/// Most bytes that [`Machine::read_memory`] and [`Question::Memory`] read at once.
pub const MAX_READ: u32 = 64 << 10;

/// What can be asked about memory as a vCPU sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Question {
    /// What is there, by virtual address; at most [`MAX_READ`] bytes.
    Memory {
        /// The first byte.
        address: u64,
        /// How many bytes.
        length: u32,
    },
    /// Where a virtual address leads.
    Translation {
        /// The address.
        address: u64,
    },
    /// Which calls the vCPU is in.
    Stack {
        /// The most frames.
        most: usize,
    },
}

/// The answer to a [`Question`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// To [`Question::Memory`].
    Memory(Vec<u8>),
    /// To [`Question::Translation`].
    Translation(Translation),
    /// To [`Question::Stack`].
    Stack(Stack),
}

impl Machine {
    /// Guest memory by physical address, as it is at this moment; at most [`MAX_READ`] bytes.
    ///
    /// # Errors
    ///
    /// [`MachineError::BadConfig`]: too long, or part of the range is not memory.
    pub fn read_memory(&self, address: u64, length: u32) -> Result<Vec<u8>, MachineError> {
        check_length(length)?;
        let none = |address: u64| bad_address(format!("{address:#x} is not memory of this guest"));
        let ram = &self.shared.ram;
        if let Some(gap) = ram.first_gap(address, length.into()) {
            return Err(none(gap));
        }
        let mut bytes = vec![0; length as usize];
        let read = ram.memory().read_slice(&mut bytes, GuestAddress(address));
        read.map_err(|_| none(address))?;
        Ok(bytes)
    }

    /// Calls `show` with the answer, on the vCPU's thread. If the machine ends before, `show` is dropped uncalled.
    ///
    /// # Errors
    ///
    /// As [`Machine::registers`]; what else goes wrong is told to `show`: [`MachineError::BadConfig`] naming the first address of the range that is not
    /// mapped, or not to memory.
    pub fn look(
        &self,
        vcpu: u8,
        question: Question,
        show: impl FnOnce(Result<Answer, MachineError>) + Send + 'static,
    ) -> Result<(), MachineError> {
        if let Question::Memory { length, .. } = question {
            check_length(length)?;
        }
        let ram = Arc::clone(&self.shared.ram);
        self.registers(vcpu, move |dump| {
            show(dump.and_then(|dump| answer(&ram, &dump, question)));
        })
    }
}

fn check_length(length: u32) -> Result<(), MachineError> {
    if length <= MAX_READ {
        return Ok(());
    }
    Err(MachineError::BadConfig {
        field: "length",
        reason: format!("{length} bytes are too many at once, {MAX_READ} are the most"),
    })
}

fn bad_address(reason: String) -> MachineError {
    MachineError::BadConfig {
        field: "address",
        reason,
    }
}

fn answer(ram: &GuestRam, dump: &RegisterDump, question: Question) -> Result<Answer, MachineError> {
    let tables = PageTables::new(ram.memory(), &dump.sregs);
    Ok(match question {
        Question::Memory { address, length } => {
            let mut bytes = vec![0; length as usize];
            let read = tables.read(address, &mut bytes);
            read.map_err(|(at, hole)| bad_address(format!("{at:#x} {hole}")))?;
            Answer::Memory(bytes)
        }
        Question::Translation { address } => {
            let found = tables.translate(address);
            Answer::Translation(found.map_err(|hole| bad_address(format!("{address:#x} {hole}")))?)
        }
        Question::Stack { most } => Answer::Stack(stack::unwind(&tables, &Start::of(dump), most)),
    })
}

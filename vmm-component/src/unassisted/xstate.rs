//! Processor state as XSAVE and XRSTOR move it, in the standard form. Pure but for the guest's memory.
//!
//! A guest's kernel on such a host knows of two components, x87 and SSE: what would make it use the others is hidden from it. Yet
//! user space sees AVX and AVX-512 natively, which nothing can hide at CPL 3. So what the kernel does not keep for its processes is
//! kept here ([`Kept`]): XSAVE to an address puts the other components aside under that address, XRSTOR from it brings them back.
//!
//! ```text
//!   0   x87 control   24  MXCSR   32  ST0-ST7   160  XMM0-XMM15   416  not ours   512  XSTATE_BV, XCOMP_BV, reserved   576  others
//!   \____ to and from the guest's memory _____________________/                     \_____ likewise ____________/     \_ kept
//! ```
//!
//! Source: Intel SDM volume 1, chapter 13.

use std::collections::BTreeMap;
use std::ops::Range;

use super::paging::{AddressSpace, Fault};

/// Components, by their bit in XCR0 and XSTATE_BV.
const X87: u64 = 1;
const SSE: u64 = 1 << 1;
/// Those that a guest's kernel may enable in XCR0.
pub(super) const COMPONENTS: u64 = X87 | SSE;

/// Parts of the area.
const X87_CONTROL: Range<usize> = 0..24;
const MXCSR: Range<usize> = 24..28;
const X87_REGISTERS: Range<usize> = 32..160;
const XMM: Range<usize> = 160..416;
const LEGACY: usize = 512;
const IN_USE: Range<usize> = 512..520;
const RESERVED: Range<usize> = 520..536;
const OTHERS: usize = 576;
const ALIGNMENT: u64 = 64;

/// Bytes of the area that KVM gives and takes.
const AREA: usize = 4096;

/// The x87 control word after FNINIT.
const X87_INITIAL_CONTROL: u16 = 0x37f;
/// MXCSR after reset.
const MXCSR_INITIAL: u32 = 0x1f80;
/// Bits of MXCSR that processors have; loading any other is a general protection fault.
const MXCSR_BITS: u32 = 0xffff;

/// All extended state of a vCPU.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct XState {
    area: Box<[u8; AREA]>,
}

impl std::fmt::Debug for XState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("XState")
            .field("in_use", &self.in_use())
            .field("mxcsr", &self.mxcsr())
            .finish_non_exhaustive()
    }
}

/// What is loaded can't be: a general protection fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Invalid;

/// Why state can't be saved or restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Error {
    Invalid(Invalid),
    Memory(Fault),
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        Error::Memory(fault)
    }
}

impl From<Invalid> for Error {
    fn from(invalid: Invalid) -> Self {
        Error::Invalid(invalid)
    }
}

impl Default for XState {
    /// The initial state.
    fn default() -> Self {
        let mut state = Self {
            area: Box::new([0; AREA]),
        };
        state.init_x87();
        state.area[MXCSR].copy_from_slice(&MXCSR_INITIAL.to_le_bytes());
        state
    }
}

impl XState {
    /// The state in KVM's words.
    pub(super) fn from_words(words: &[u32; AREA / 4]) -> Self {
        let mut area = Box::new([0; AREA]);
        for (bytes, word) in area.chunks_exact_mut(4).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        Self { area }
    }

    /// The same back.
    pub(super) fn to_words(&self) -> [u32; AREA / 4] {
        std::array::from_fn(|i| word(&self.area[i * 4..i * 4 + 4]))
    }

    /// The SSE control and status register.
    pub(super) fn mxcsr(&self) -> u32 {
        word(&self.area[MXCSR])
    }

    /// Sets MXCSR.
    pub(super) fn set_mxcsr(&mut self, value: u32) -> Result<(), Invalid> {
        if value & !MXCSR_BITS != 0 {
            return Err(Invalid);
        }
        self.area[MXCSR].copy_from_slice(&value.to_le_bytes());
        // KVM takes MXCSR from the area only if this component is in use.
        if value != MXCSR_INITIAL {
            self.set_in_use(self.in_use() | SSE);
        }
        Ok(())
    }

    /// The components that are not in their initial state.
    fn in_use(&self) -> u64 {
        double_word(&self.area[IN_USE])
    }

    fn set_in_use(&mut self, components: u64) {
        self.area[IN_USE].copy_from_slice(&components.to_le_bytes());
    }

    fn init_x87(&mut self) {
        self.area[X87_CONTROL].fill(0);
        self.area[X87_REGISTERS].fill(0);
        self.area[..2].copy_from_slice(&X87_INITIAL_CONTROL.to_le_bytes());
    }
}

fn word(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte))
}

fn double_word(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
}

/// The components that a guest's kernel does not know of, by the address of the area where it saved the others.
#[derive(Debug, Default)]
pub(super) struct Kept {
    areas: BTreeMap<Key, Others>,
    /// Counts what was put in, to know the oldest.
    time: u64,
}

/// An area's address, and for one in user space, whose it is: the page tables' root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    root: Option<u64>,
    address: u64,
}

#[derive(Debug)]
struct Others {
    time: u64,
    in_use: u64,
    bytes: Box<[u8]>,
}

impl Kept {
    /// Most areas that are remembered, one for each process that was interrupted while it had something in these components. With
    /// more, the oldest is forgotten: a guest can't make us use more than 4 MiB.
    const MOST: usize = 1024;

    fn key(address: u64, space: &AddressSpace<'_>) -> Key {
        let kernel = address >> 63 != 0;
        Key {
            root: (!kernel).then_some(space.root()),
            address,
        }
    }

    fn put(&mut self, state: &XState, address: u64, space: &AddressSpace<'_>) {
        let key = Self::key(address, space);
        let in_use = state.in_use() & !COMPONENTS;
        if in_use == 0 {
            self.areas.remove(&key);
            return;
        }
        self.time += 1;
        let others = Others {
            time: self.time,
            in_use,
            bytes: state.area[OTHERS..].into(),
        };
        self.areas.insert(key, others);
        if self.areas.len() > Self::MOST {
            let oldest = self.areas.iter().min_by_key(|(_, others)| others.time);
            if let Some(key) = oldest.map(|(key, _)| *key) {
                self.areas.remove(&key);
            }
        }
    }

    /// Gives `state` what was put aside for the address, or initial components.
    fn get(&self, state: &mut XState, address: u64, space: &AddressSpace<'_>) {
        let known = state.in_use() & COMPONENTS;
        match self.areas.get(&Self::key(address, space)) {
            Some(others) => {
                state.set_in_use(known | others.in_use);
                state.area[OTHERS..].copy_from_slice(&others.bytes);
            }
            None => {
                state.set_in_use(known);
                state.area[OTHERS..].fill(0);
            }
        }
    }
}

/// XSAVE of the components in `wanted` to `address`.
pub(super) fn save(
    state: &XState,
    wanted: u64,
    address: u64,
    space: &AddressSpace<'_>,
    kept: &mut Kept,
) -> Result<(), Error> {
    check_alignment(address)?;
    let wanted = wanted & COMPONENTS;
    let header = address.wrapping_add(LEGACY as u64);
    let mut in_use = [0; 8];
    space.read(header, &mut in_use)?;
    let in_use = double_word(&in_use) & !wanted | state.in_use() & wanted;
    let x87 = [X87_CONTROL, X87_REGISTERS].map(|part| (X87, part));
    let sse = [MXCSR, XMM].map(|part| (SSE, part));
    for (component, part) in x87.into_iter().chain(sse) {
        if wanted & component != 0 {
            space.write(address.wrapping_add(part.start as u64), &state.area[part])?;
        }
    }
    space.write(header, &in_use.to_le_bytes())?;
    if wanted == COMPONENTS {
        kept.put(state, address, space);
    }
    Ok(())
}

/// XRSTOR of the components in `wanted` from `address`: the state after it.
pub(super) fn restore(
    before: &XState,
    wanted: u64,
    address: u64,
    space: &AddressSpace<'_>,
    kept: &Kept,
) -> Result<XState, Error> {
    check_alignment(address)?;
    let wanted = wanted & COMPONENTS;
    let mut area = [0; OTHERS];
    space.read(address, &mut area)?;
    let in_use = double_word(&area[IN_USE]);
    // A component that is not enabled, the compacted form, or reserved bytes.
    if in_use & !COMPONENTS != 0 || area[RESERVED].iter().any(|byte| *byte != 0) {
        return Err(Invalid.into());
    }
    let mut after = before.clone();
    after.set_in_use(before.in_use() & !wanted | in_use & wanted);
    if wanted & X87 != 0 {
        after.init_x87();
        if in_use & X87 != 0 {
            for part in [X87_CONTROL, X87_REGISTERS] {
                after.area[part.clone()].copy_from_slice(&area[part]);
            }
        }
    }
    if wanted & SSE != 0 {
        after.area[XMM].fill(0);
        if in_use & SSE != 0 {
            after.area[XMM].copy_from_slice(&area[XMM]);
        }
        // In this form MXCSR comes from memory whether the component is in use or not.
        after.set_mxcsr(word(&area[MXCSR]))?;
    }
    if wanted == COMPONENTS {
        kept.get(&mut after, address, space);
    }
    Ok(after)
}

fn check_alignment(address: u64) -> Result<(), Invalid> {
    if address.is_multiple_of(ALIGNMENT) {
        Ok(())
    } else {
        Err(Invalid)
    }
}

#[cfg(test)]
mod tests;

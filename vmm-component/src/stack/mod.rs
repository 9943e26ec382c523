//! The calls that a vCPU is in, read off its stack. Pure: registers and memory in, frames out.
//!
//! ```text
//!   where it is --> frame pointers lead on? --yes--> a frame that can be relied on --.
//!                      ^     | no        (before the first one: what looks like calls)   |
//!                      '-----+--------------------------------------------------------'
//!                            v
//!        each word of the stack from there on: does it look like a return address? --> a frame that can not
//! ```
//!
//! What looks like one: it points into a page that can be executed, and that programs can get at if they can get at the page where the vCPU is, and right
//! behind an instruction that calls. Or it is where an interrupt left off, as the processor pushes that (Intel SDM volume 3, "64-Bit Mode Stack Frame");
//! the search goes on at the stack pointer that was pushed with it, or ends where that was a program's. Where a stack ends, it goes on with the one that
//! the kernel left for it, as Linux notes that in the last word of its stacks for interrupts.
//!
//! Kernels are compiled without frame pointers as a rule. Then the search finds all calls that have not returned, and some that have: what they left on
//! the stack has not been written over. The stack of a kernel is taken to end where those of Linux on x86-64 do: one for interrupts at the end of the page
//! with that word, any other at a multiple of 16 KiB.
//!
//! A guest may be hostile: nothing here goes on for longer than the bounds below, whatever registers and memory contain.

use crate::{machine::RegisterDump, paging::PageTables};

/// The most frames that are told.
const MOST_FRAMES: usize = 256;

/// Size of the stacks of Linux kernels (THREAD_SIZE, IRQ_STACK_SIZE), and alignment of those of tasks.
const KERNEL_STACK: u64 = 16 << 10;
/// Alignment of those for interrupts: they lie anywhere in a processor's own memory.
const PAGE: u64 = 4 << 10;
/// What comes back from a stack for interrupts: `pop %rsp`, and `leave` in older kernels.
const BACK: [u8; 2] = [0x5c, 0xc9];
/// How many bytes of instructions come before that, at most: calls of what notes that an interrupt began, of its handler, of what notes its end.
const WAY_BACK: usize = 32;
/// How far a program's stack is searched.
const PROGRAM_STACK: u64 = 64 << 10;
/// How many stacks that interrupts left are gone on with.
const MOST_STACKS: usize = 4;
/// The most bytes between two frame pointers that lead on.
const LONGEST_FRAME: u64 = 64 << 10;
/// The longest instruction that calls: opcode, ModRM, SIB and four bytes of displacement.
const LONGEST_CALL: usize = 7;

/// The half of the addresses below this one is for programs, by convention.
const PROGRAMS: u64 = 1 << 56;

/// EFER.LMA.
const LONG_MODE_ACTIVE: u64 = 1 << 10;
/// Bits of RFLAGS that are not always zero (Intel SDM volume 1, "EFLAGS Register").
const FLAGS: u64 = 0x003f_7fd7;
/// The bit of RFLAGS that is always one.
const FLAGS_ONE: u64 = 1 << 1;

/// A call that the vCPU is in, or where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// Of the instruction: where the vCPU is, then where each call returns to.
    pub address: u64,
    /// Where that was read; of the first frame, the stack pointer.
    pub stack_pointer: u64,
    /// Frame pointers led there. Otherwise it only looks like a return address.
    pub reliable: bool,
}

/// What could be read of a stack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stack {
    /// Innermost first.
    pub frames: Vec<Frame>,
    /// Why it ends there.
    pub end: String,
}

/// Where a stack begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Start {
    pub(crate) instruction: u64,
    pub(crate) stack: u64,
    pub(crate) frame: u64,
    /// Bytes of a word on the stack: 8 or 4; `None` in modes whose stacks are not read.
    pub(crate) word: Option<u64>,
    /// At CPL 3.
    pub(crate) user: bool,
    pub(crate) code_segment: u16,
}

impl Start {
    /// Where a vCPU with these registers is.
    pub(crate) fn of(dump: &RegisterDump) -> Self {
        let (regs, sregs) = (&dump.regs, &dump.sregs);
        let long = sregs.efer & LONG_MODE_ACTIVE != 0 && sregs.cs.l != 0;
        let word = match (long, sregs.cs.db) {
            (true, _) => Some(8),
            (false, 0) => None,
            (false, _) => Some(4),
        };
        let linear = |base: u64, offset: u64| match long {
            true => offset,
            false => base.wrapping_add(offset) & u64::from(u32::MAX),
        };
        Self {
            instruction: linear(sregs.cs.base, regs.rip),
            stack: linear(sregs.ss.base, regs.rsp),
            frame: linear(sregs.ss.base, regs.rbp),
            word,
            user: dump.privilege() == 3,
            code_segment: sregs.cs.selector,
        }
    }
}

/// Memory as the vCPU sees it.
pub(crate) trait View {
    /// Fills `to` from `address` on; false if any of it is not there.
    fn read(&self, address: u64, to: &mut [u8]) -> bool;
    /// Whether instructions can be fetched from there: from a page that programs can get at if `user`, else from one that they cannot.
    fn is_text(&self, address: u64, user: bool) -> bool;
}

impl View for PageTables<'_> {
    fn read(&self, address: u64, to: &mut [u8]) -> bool {
        PageTables::read(self, address, to).is_ok()
    }

    fn is_text(&self, address: u64, user: bool) -> bool {
        self.translate(address)
            .is_ok_and(|page| page.executable && (page.page_size == 0 || page.user == user))
    }
}

/// Reads the stack that begins at `start`: at most `most` frames, and [`MOST_FRAMES`].
pub(crate) fn unwind(view: &impl View, start: &Start, most: usize) -> Stack {
    let mut unwinder = Unwinder {
        view,
        start,
        word: start.word.unwrap_or(8),
        // Small kernels make no difference between what is theirs and what is not.
        user_text: start.user || (view.is_text(start.instruction, true) && !view.is_text(start.instruction, false)),
        most: most.min(MOST_FRAMES),
        frames: Vec::new(),
    };
    let end = unwinder.run();
    Stack {
        frames: unwinder.frames,
        end,
    }
}

/// The reason for an end, once there are as many frames as were asked for.
struct Full;

struct Unwinder<'a, V> {
    view: &'a V,
    start: &'a Start,
    word: u64,
    /// Whether programs can get at the text.
    user_text: bool,
    most: usize,
    frames: Vec<Frame>,
}

impl<V: View> Unwinder<'_, V> {
    fn run(&mut self) -> String {
        self.frames().unwrap_or_else(|Full| match self.most {
            0 => "no frame was asked for".to_owned(),
            most => format!("there may be more: no more than {most} were asked for"),
        })
    }

    fn frames(&mut self) -> Result<String, Full> {
        let &Start {
            instruction,
            stack,
            word,
            ..
        } = self.start;
        self.add(instruction, stack, true)?;
        if word.is_none() {
            return Ok("the stacks of 16-bit code are not read".to_owned());
        }
        let next = self.by_frame_pointers()?;
        self.by_search(next)
    }

    fn add(&mut self, address: u64, stack_pointer: u64, reliable: bool) -> Result<(), Full> {
        if self.frames.len() == self.most {
            return Err(Full);
        }
        self.frames.push(Frame {
            address,
            stack_pointer,
            reliable,
        });
        Ok(())
    }

    /// Goes up the frame pointers as long as each leads to a return address, and to one further up. Returns where the stack goes on.
    fn by_frame_pointers(&mut self) -> Result<u64, Full> {
        let (mut lowest, mut frame) = (self.start.stack, self.start.frame);
        // Each round adds a frame, or is the last one.
        loop {
            let there =
                frame.is_multiple_of(self.word) && (lowest..lowest.saturating_add(LONGEST_FRAME)).contains(&frame);
            let Some(at) = frame.checked_add(self.word).filter(|_| there) else {
                return Ok(lowest);
            };
            let (Some(next), Some(address)) = (self.read(frame), self.read(at)) else {
                return Ok(lowest);
            };
            if !self.follows_call(address) {
                return Ok(lowest);
            }
            if self.frames.len() == 1 {
                self.by_functions_without(frame)?;
            }
            self.add(address, at, true)?;
            lowest = at.saturating_add(self.word);
            frame = next;
        }
    }

    /// Looks at what is on the stack before the first frame: the innermost functions may have none.
    fn by_functions_without(&mut self, frame: u64) -> Result<(), Full> {
        let Some(mut at) = self.start.stack.checked_next_multiple_of(self.word) else {
            return Ok(());
        };
        while at < frame {
            if let Some(value) = self.read(at).filter(|value| self.follows_call(*value)) {
                self.add(value, at, false)?;
            }
            at += self.word;
        }
        Ok(())
    }

    /// Looks at every word from `from` on. Returns why it ends.
    fn by_search(&mut self, from: u64) -> Result<String, Full> {
        let mut at = from.checked_next_multiple_of(self.word).unwrap_or(u64::MAX);
        for _ in 0..MOST_STACKS {
            let end = self.end_of(at);
            let mut left = None;
            while at < end && left.is_none() {
                let Some(value) = self.read(at) else {
                    return Ok(format!("nothing is mapped at {at:#x}, where the stack goes on"));
                };
                let mut next = at.saturating_add(self.word);
                if self.follows_call(value) {
                    self.add(value, at, false)?;
                } else if self.left_program(at, value) {
                    self.add(value, at, false)?;
                    return Ok("a program, from which the kernel was entered, was there".to_owned());
                } else if let Some(stack) = self.interrupted(at, value) {
                    self.add(value, at, false)?;
                    match (at..end).contains(&stack) {
                        true => next = stack,
                        false => left = Some(stack),
                    }
                }
                at = next;
            }
            match left.or_else(|| self.switched_from(end)) {
                Some(stack) => at = stack,
                None if self.start.user => {
                    return Ok(format!(
                        "{} KiB of the stack were searched, up to {end:#x}",
                        PROGRAM_STACK >> 10
                    ));
                }
                None => return Ok(format!("a stack of {} KiB ends at {end:#x}", KERNEL_STACK >> 10)),
            }
        }
        Ok(format!("{MOST_STACKS} stacks were searched, and no more are"))
    }

    /// The stack pointer at which the kernel left another stack for the one that ends at `end`: Linux keeps it in the last word of those for interrupts.
    /// Before that word there is where the call on that stack returns to, in order to leave it.
    fn switched_from(&self, end: u64) -> Option<u64> {
        if self.word != 8 || self.start.user {
            return None;
        }
        let this_one = end.checked_sub(KERNEL_STACK)?..end;
        let stack = self.read(end - 8)?;
        let is_kernels = stack >> 63 == 1 && stack.is_multiple_of(8) && !this_one.contains(&stack);
        let back = self.read(end - 16).filter(|_| is_kernels)?;
        let mut text = [0; WAY_BACK];
        let is_left =
            self.follows_call(back) && self.view.read(back, &mut text) && text.iter().any(|byte| BACK.contains(byte));
        (is_left && self.read(stack).is_some()).then_some(stack)
    }

    fn end_of(&self, stack: u64) -> u64 {
        if self.start.user {
            return stack.saturating_add(PROGRAM_STACK);
        }
        let behind = |size: u64| (stack | (size - 1)).saturating_add(1);
        let mut pages = (0..KERNEL_STACK / PAGE).map(|n| behind(PAGE).saturating_add(n * PAGE));
        let for_interrupts = pages.find(|end| self.switched_from(*end).is_some());
        for_interrupts.unwrap_or_else(|| behind(KERNEL_STACK))
    }

    fn read(&self, address: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        let part = &mut bytes[..self.word as usize];
        self.view.read(address, part).then(|| u64::from_le_bytes(bytes))
    }

    /// Whether it is the address of an instruction that comes after a call.
    fn follows_call(&self, address: u64) -> bool {
        let Some(first) = address.checked_sub(LONGEST_CALL as u64) else {
            return false;
        };
        // Most words are no addresses of text at all.
        if !self.view.is_text(address, self.user_text) {
            return false;
        }
        let mut before = [0; LONGEST_CALL];
        self.view.read(first, &mut before) && ends_with_call(&before)
    }

    /// The word so many behind the one at `at`.
    fn beside(&self, at: u64, words: u64) -> Option<u64> {
        self.read(at.checked_add(self.word * words)?)
    }

    /// Whether `address`, which is at `at`, is where a program was when the kernel was entered from it.
    fn left_program(&self, at: u64, address: u64) -> bool {
        // A kernel whose own stack is among the addresses of programs does not go by that convention: any word may look like a program's address.
        let by_convention = self.word == 8 && !self.start.user && self.start.stack >= PROGRAMS;
        if !by_convention || address >= PROGRAMS || address == 0 {
            return false;
        }
        let is_segment: fn(u64) -> bool = |selector| selector & 3 == 3 && selector <= u64::from(u16::MAX);
        let pushed = |words, is: fn(u64) -> bool| self.beside(at, words).is_some_and(is);
        pushed(1, is_segment)
            && pushed(2, are_flags)
            && pushed(3, |stack| stack < PROGRAMS)
            && pushed(4, is_segment)
            && self.view.read(address, &mut [0])
    }

    /// The stack pointer that an interrupt left, if `address`, which is at `at`, is where it left off at the same privilege.
    fn interrupted(&self, at: u64, address: u64) -> Option<u64> {
        if self.word != 8 || self.start.user || !self.view.is_text(address, self.user_text) {
            return None;
        }
        let (code_segment, flags, stack) = (self.beside(at, 1)?, self.beside(at, 2)?, self.beside(at, 3)?);
        let is_it = code_segment == u64::from(self.start.code_segment)
            && are_flags(flags)
            && stack.is_multiple_of(8)
            // On the same stack it is further up, so that the search ends.
            && (stack > at || self.end_of(stack) != self.end_of(at));
        is_it.then_some(stack)
    }
}

/// Whether it can be what RFLAGS was.
fn are_flags(value: u64) -> bool {
    value & !FLAGS == 0 && value & FLAGS_ONE != 0
}

/// Whether the last of these bytes can be the end of an instruction that calls: `call rel32` (E8), or through a register or memory (FF /2).
fn ends_with_call(before: &[u8; LONGEST_CALL]) -> bool {
    let [.., b6, b5, b4, b3, b2, b1] = *before;
    let b7 = before[0];
    // ModRM with /2: the mode in the upper two bits; 4 as the register means that a SIB byte follows.
    let through = |modrm: u8, mode: u8| modrm >> 3 == mode << 3 | 2;
    let indexed = |modrm: u8, mode: u8| modrm == mode << 6 | 2 << 3 | 4;
    let plain = |modrm: u8, mode: u8| through(modrm, mode) && modrm & 7 != 4;
    (b5 == 0xe8)
        || (b2 == 0xff && (through(b1, 3) || (plain(b1, 0) && b1 & 7 != 5)))
        || (b3 == 0xff && (plain(b2, 1) || indexed(b2, 0)))
        || (b4 == 0xff && indexed(b3, 1))
        || (b6 == 0xff && (plain(b5, 2) || b5 == 0x15))
        || (b7 == 0xff && (indexed(b6, 2) || (indexed(b6, 0) && b5 & 7 == 5)))
}

#[cfg(test)]
mod tests;

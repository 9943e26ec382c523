//! Turns the table into one BPF program a role; while this crate is compiled, so that a start finds its programs ready.
//!
//! The program is a search tree, not a list: the kernel runs every filter for some 900 call numbers when it is installed
//! (to find those that need no filter), translates it, and every thread of a component installs one. The tree takes
//! less than a quarter of the time that a list of the same rules takes. The tests compare the two call by call.
//!
//! ```text
//!   architecture ── other ──> kill
//!        │
//!   call number: halve until few are left ──> compare one by one ──> none: kill
//!                                                    │
//!                           allow, or an errno, or conditions on the arguments; for ioctl the same search again
//! ```
//!
//! It is written from its end to its beginning: all jumps lead forward, so each one's distance is known when it is written.

use libc::sock_filter;

use super::ThreadRole;
use super::table::{ANSWERED, Argument, CALLS, IOCTLS, Value};

// linux/bpf_common.h: load a word of the call's data, compare and jump, mask, return.
const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_AT_LEAST: u16 = 0x35;
const AND: u16 = 0x54;
const RETURN: u16 = 0x06;

// linux/seccomp.h, `struct seccomp_data`: call number, architecture, instruction pointer, six arguments of 8 bytes.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// linux/audit.h, `AUDIT_ARCH_X86_64`.
const X86_64: u32 = 0xc000_003e;

/// Up to this many values are compared one by one.
const FEW: usize = 4;

/// The longest program, in instructions.
const LONGEST: usize = 1024;

/// The most values that one search tells apart.
const MOST_CASES: usize = 192;

/// A filter program; while it is being written, its end.
pub(super) struct Program {
    code: [sock_filter; LONGEST],
    start: usize,
}

/// What follows when a searched word is found.
#[derive(Clone, Copy)]
enum Then {
    Answer(u32),
    /// Allow if any of the alternatives holds, else kill.
    Conditions(&'static [&'static [Argument]]),
    /// Search the request of an `ioctl`.
    Requests,
}

/// Sorted words, and what follows each.
struct Cases {
    list: [(u32, Then); MOST_CASES],
    count: usize,
}

impl Cases {
    const fn new() -> Self {
        Self {
            list: [(0, Then::Requests); MOST_CASES],
            count: 0,
        }
    }

    /// Puts a word in its place.
    const fn insert(&mut self, word: u32, then: Then) {
        let mut at = self.count;
        while at > 0 && self.list[at - 1].0 > word {
            self.list[at] = self.list[at - 1];
            at -= 1;
        }
        self.list[at] = (word, then);
        self.count += 1;
    }

    /// What a role may call.
    const fn calls(role: ThreadRole) -> Self {
        let mut cases = Self::new();
        let mut i = 0;
        while i < CALLS.len() {
            if CALLS[i].roles & role.bit() != 0 {
                cases.insert(CALLS[i].number as u32, Then::Conditions(CALLS[i].when));
            }
            i += 1;
        }
        let mut i = 0;
        while i < ANSWERED.len() {
            if ANSWERED[i].request.is_none() {
                let answer = Then::Answer(libc::SECCOMP_RET_ERRNO | ANSWERED[i].errno);
                cases.insert(ANSWERED[i].number as u32, answer);
            }
            i += 1;
        }
        cases.insert(libc::SYS_ioctl as u32, Then::Requests);
        cases
    }

    /// The requests with which a role may call `ioctl`.
    const fn requests(role: ThreadRole) -> Self {
        let mut cases = Self::new();
        let mut i = 0;
        while i < IOCTLS.len() {
            if IOCTLS[i].roles & role.bit() != 0 {
                cases.insert(IOCTLS[i].request, Then::Answer(libc::SECCOMP_RET_ALLOW));
            }
            i += 1;
        }
        let mut i = 0;
        while i < ANSWERED.len() {
            if let Some(request) = ANSWERED[i].request {
                cases.insert(request, Then::Answer(libc::SECCOMP_RET_ERRNO | ANSWERED[i].errno));
            }
            i += 1;
        }
        cases
    }
}

impl Program {
    /// Its instructions.
    pub(super) fn code(&self) -> &[sock_filter] {
        &self.code[self.start..]
    }

    /// How many instructions it has.
    pub(super) const fn len(&self) -> usize {
        LONGEST - self.start
    }

    /// Its instructions, of which there are `N`.
    pub(super) const fn exact<const N: usize>(&self) -> [sock_filter; N] {
        let mut code = [self.code[LONGEST - 1]; N];
        let mut i = 0;
        while i < N {
            code[i] = self.code[self.start + i];
            i += 1;
        }
        code
    }

    /// Puts an instruction before all others.
    const fn put(&mut self, code: u16, jt: u8, jf: u8, k: u32) {
        self.start -= 1;
        self.code[self.start] = sock_filter { code, jt, jf, k };
    }

    const fn answer(&mut self, action: u32) {
        self.put(RETURN, 0, 0, action);
    }

    const fn kill(&mut self) {
        self.answer(libc::SECCOMP_RET_KILL_PROCESS);
    }

    const fn load(&mut self, offset: u32) {
        self.put(LOAD, 0, 0, offset);
    }

    /// Goes on with what was written since `end` if the comparison comes out as `when`; jumps over it otherwise.
    const fn guard(&mut self, comparison: u16, value: u32, when: bool, end: usize) {
        let over = end - self.start;
        if over <= u8::MAX as usize {
            let over = over as u8;
            let (jt, jf) = if when { (0, over) } else { (over, 0) };
            self.put(comparison, jt, jf, value);
        } else {
            // Conditional jumps reach 255 instructions.
            self.put(JUMP, 0, 0, over as u32);
            let (jt, jf) = if when { (1, 0) } else { (0, 1) };
            self.put(comparison, jt, jf, value);
        }
    }

    /// Finds the loaded word among cases `from..to` and goes on with what follows it; kills if it is none of them.
    const fn search(&mut self, role: ThreadRole, cases: &Cases, from: usize, to: usize, pid: u32) {
        if to - from > FEW {
            let middle = from + (to - from) / 2;
            self.search(role, cases, middle, to, pid);
            let end = self.start;
            self.search(role, cases, from, middle, pid);
            self.guard(JUMP_IF_AT_LEAST, cases.list[middle].0, false, end);
            return;
        }
        self.kill();
        let mut i = to;
        while i > from {
            i -= 1;
            let (word, then) = cases.list[i];
            let end = self.start;
            match then {
                Then::Answer(action) => self.answer(action),
                Then::Conditions(alternatives) => self.conditions(alternatives, pid),
                Then::Requests => {
                    let requests = Cases::requests(role);
                    self.search(role, &requests, 0, requests.count, pid);
                    // The kernel takes the request, the second argument, as an unsigned int.
                    self.load(ARGUMENTS + 8);
                }
            }
            self.guard(JUMP_IF_EQUAL, word, true, end);
        }
    }

    /// Allows if any of the alternatives holds, or there are none; else kills.
    const fn conditions(&mut self, alternatives: &[&[Argument]], pid: u32) {
        if alternatives.is_empty() {
            return self.answer(libc::SECCOMP_RET_ALLOW);
        }
        self.kill();
        let mut i = alternatives.len();
        while i > 0 {
            i -= 1;
            let end = self.start;
            self.answer(libc::SECCOMP_RET_ALLOW);
            let mut j = alternatives[i].len();
            while j > 0 {
                j -= 1;
                self.condition(&alternatives[i][j], pid, end);
            }
        }
    }

    /// Goes on if the argument is as it has to be; else skips what was written since `end`.
    const fn condition(&mut self, argument: &Argument, pid: u32, end: usize) {
        // The machine is little-endian.
        let low = ARGUMENTS + 8 * argument.index as u32;
        match argument.value {
            Value::Is(value) => self.test(low, u32::MAX, value, end),
            Value::IsOwnPid => self.test(low, u32::MAX, pid, end),
            Value::IsNull => {
                self.test(low + 4, u32::MAX, 0, end);
                self.test(low, u32::MAX, 0, end);
            }
            Value::Masked { mask, value } => {
                self.test(low + 4, (mask >> 32) as u32, (value >> 32) as u32, end);
                self.test(low, mask as u32, value as u32, end);
            }
        }
    }

    const fn test(&mut self, offset: u32, mask: u32, value: u32, end: usize) {
        if mask == 0 {
            return;
        }
        self.guard(JUMP_IF_EQUAL, value, true, end);
        if mask != u32::MAX {
            self.put(AND, 0, 0, mask);
        }
        self.load(offset);
    }
}

/// Compiles a role's filter for the process `pid` (as it sees itself).
pub(super) const fn compile(role: ThreadRole, pid: u32) -> Program {
    let nothing = sock_filter {
        code: 0,
        jt: 0,
        jf: 0,
        k: 0,
    };
    let mut program = Program {
        code: [nothing; LONGEST],
        start: LONGEST,
    };
    let calls = Cases::calls(role);
    program.search(role, &calls, 0, calls.count, pid);
    program.load(NUMBER);
    let end = program.start;
    program.kill();
    program.guard(JUMP_IF_EQUAL, X86_64, false, end);
    program.load(ARCHITECTURE);
    program
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;
    use seccompiler::{
        BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
        TargetArch,
    };

    use super::*;

    const PID: u32 = 77;

    #[derive(Clone, Copy, Debug)]
    struct Data {
        number: u32,
        architecture: u32,
        arguments: [u64; 6],
    }

    impl Data {
        fn word(&self, offset: u32) -> u32 {
            let argument = |offset: u32| self.arguments[offset as usize / 8] >> (offset % 8 * 8);
            match offset {
                NUMBER => self.number,
                ARCHITECTURE => self.architecture,
                _ => argument(offset - ARGUMENTS) as u32,
            }
        }
    }

    /// The kernel's interpreter, as far as filters use it.
    fn interpret(program: &[(u16, u8, u8, u32)], data: &Data) -> u32 {
        let (mut position, mut word) = (0, 0);
        loop {
            let (code, jt, jf, k) = program[position];
            position += 1;
            let mut branch = |taken: bool| position += usize::from(if taken { jt } else { jf });
            match code {
                LOAD => word = data.word(k),
                AND => word &= k,
                JUMP_IF_EQUAL => branch(word == k),
                JUMP_IF_AT_LEAST => branch(word >= k),
                0x25 => branch(word > k),
                JUMP => position += k as usize,
                RETURN => return k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn ours(role: ThreadRole) -> Vec<(u16, u8, u8, u32)> {
        compile(role, PID)
            .code()
            .iter()
            .map(|i| (i.code, i.jt, i.jf, i.k))
            .collect()
    }

    /// The same table through the crate's compiler, as a list; it has no third action, so what is answered is killed.
    fn listed(role: ThreadRole) -> Vec<(u16, u8, u8, u32)> {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        for call in CALLS.iter().filter(|call| call.roles & role.bit() != 0) {
            let alternatives = rules.entry(call.number).or_default();
            for arguments in call.when {
                let conditions = arguments.iter().map(|argument| {
                    let (length, operator, value) = match argument.value {
                        Value::Is(value) => (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value.into()),
                        Value::IsOwnPid => (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, PID.into()),
                        Value::IsNull => (SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0),
                        Value::Masked { mask, value } => (SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(mask), value),
                    };
                    SeccompCondition::new(argument.index, length, operator, value).unwrap()
                });
                alternatives.push(SeccompRule::new(conditions.collect()).unwrap());
            }
        }
        for ioctl in IOCTLS.iter().filter(|ioctl| ioctl.roles & role.bit() != 0) {
            let request =
                SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, ioctl.request.into()).unwrap();
            rules
                .entry(libc::SYS_ioctl)
                .or_default()
                .push(SeccompRule::new(vec![request]).unwrap());
        }
        let (kill, allow) = (SeccompAction::KillProcess, SeccompAction::Allow);
        let program: BpfProgram = SeccompFilter::new(rules, kill, allow, TargetArch::x86_64)
            .unwrap()
            .try_into()
            .unwrap();
        program.iter().map(|i| (i.code, i.jt, i.jf, i.k)).collect()
    }

    fn assert_same(tree: &[(u16, u8, u8, u32)], list: &[(u16, u8, u8, u32)], data: &Data, role: ThreadRole) {
        let errno = ANSWERED
            .iter()
            .find(|a| {
                data.architecture == X86_64
                    && a.number as u32 == data.number
                    && a.request.is_none_or(|request| request == data.arguments[1] as u32)
            })
            .map(|answered| libc::SECCOMP_RET_ERRNO | answered.errno);
        let expected = errno.unwrap_or_else(|| interpret(list, data));
        assert_eq!(interpret(tree, data), expected, "{role}: {data:x?}");
    }

    #[test]
    fn every_call_and_request_is_decided_as_by_the_list() {
        for role in ThreadRole::ALL {
            let (tree, list) = (ours(role), listed(role));
            assert!(
                tree.len() < 4096 && tree.len() < list.len(),
                "{role}: {} {}",
                tree.len(),
                list.len()
            );
            for number in (0..1024).chain([u32::MAX, 0x4000_0000, 0x4000_0001]) {
                for fill in [0, 1, 4, u64::from(PID), u64::MAX] {
                    for architecture in [X86_64, 0x4000_0003] {
                        assert_same(
                            &tree,
                            &list,
                            &Data {
                                number,
                                architecture,
                                arguments: [fill; 6],
                            },
                            role,
                        );
                    }
                }
            }
            for ioctl in IOCTLS {
                for request in [
                    ioctl.request,
                    ioctl.request.wrapping_add(1),
                    ioctl.request.wrapping_sub(1),
                ] {
                    for high in [0, 1 << 32] {
                        let arguments = [3, u64::from(request) | high, 0, 0, 0, 0];
                        let number = libc::SYS_ioctl as u32;
                        assert_same(
                            &tree,
                            &list,
                            &Data {
                                number,
                                architecture: X86_64,
                                arguments,
                            },
                            role,
                        );
                    }
                }
            }
        }
    }

    /// Arguments near those that the table speaks of.
    fn argument() -> impl Strategy<Value = u64> {
        let mut known: BTreeSet<u64> = [0, 1, 2, 3, 4, 7, u64::from(PID), u64::MAX].into();
        for argument in CALLS.iter().flat_map(|call| call.when.iter().copied().flatten()) {
            known.extend(match argument.value {
                Value::Is(value) => vec![value.into(), u64::from(value) | 1 << 32],
                Value::Masked { mask, value } => vec![value, value ^ (mask & mask.wrapping_neg()), value | !mask],
                _ => Vec::new(),
            });
        }
        prop_oneof![
            proptest::sample::select(known.into_iter().collect::<Vec<_>>()),
            any::<u64>()
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]
        #[test]
        fn arguments_are_decided_as_by_the_list(
            role in proptest::sample::select(ThreadRole::ALL.to_vec()),
            call in proptest::sample::select((0..CALLS.len()).collect::<Vec<_>>()),
            arguments in proptest::array::uniform6(argument()),
        ) {
            let data = Data { number: CALLS[call].number as u32, architecture: X86_64, arguments };
            assert_same(&ours(role), &listed(role), &data, role);
        }

        #[test]
        fn what_a_role_may_the_control_thread_may(
            role in proptest::sample::select(ThreadRole::ALL.to_vec()),
            call in proptest::sample::select((0..CALLS.len()).collect::<Vec<_>>()),
            arguments in proptest::array::uniform6(argument()),
        ) {
            let data = Data { number: CALLS[call].number as u32, architecture: X86_64, arguments };
            if interpret(&ours(role), &data) == libc::SECCOMP_RET_ALLOW {
                prop_assert_eq!(interpret(&ours(ThreadRole::Control), &data), libc::SECCOMP_RET_ALLOW);
            }
        }
    }

    #[test]
    fn nothing_is_listed_twice_for_a_role() {
        for role in ThreadRole::ALL {
            let calls = CALLS
                .iter()
                .filter(|call| call.roles & role.bit() != 0)
                .map(|call| call.number);
            let ioctls = IOCTLS
                .iter()
                .filter(|ioctl| ioctl.roles & role.bit() != 0)
                .map(|ioctl| ioctl.request);
            for mut all in [calls.collect::<Vec<_>>(), ioctls.map(i64::from).collect()] {
                let count = all.len();
                all.sort_unstable();
                all.dedup();
                assert_eq!(all.len(), count, "{role}");
            }
        }
        // Every thread starts with the control thread's filter.
        assert!(CALLS.iter().all(|call| call.roles & ThreadRole::Control.bit() != 0));
        assert!(IOCTLS.iter().all(|ioctl| ioctl.roles & ThreadRole::Control.bit() != 0));
    }
}

//! Turns the table into one BPF program a role.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};

use super::ThreadRole;
use super::table::{ANSWERED, Answered, Argument, CALLS, IOCTLS, Value};

/// Why a role's filter is not in force.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// The table does not compile.
    #[error("the filter does not compile: {0}")]
    Backend(#[from] seccompiler::BackendError),
    /// The program is longer than the kernel takes.
    #[error("the filter has {0} instructions, more than the kernel takes")]
    TooLong(usize),
    /// The kernel refused it.
    #[error("the kernel refused the filter: {0}")]
    Refused(std::io::Error),
}

/// Compiles a role's filter for the process `pid` (as it sees itself).
pub(super) fn compile(role: ThreadRole, pid: u32) -> Result<BpfProgram, CompileError> {
    let filter = SeccompFilter::new(
        rules(role, pid)?,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    let allowed: BpfProgram = filter.try_into()?;
    let mut program = answers();
    program.extend(allowed);
    Ok(program)
}

fn rules(role: ThreadRole, pid: u32) -> Result<BTreeMap<i64, Vec<SeccompRule>>, CompileError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in CALLS.iter().filter(|call| call.roles & role.bit() != 0) {
        let alternatives = rules.entry(call.number).or_default();
        for arguments in call.when {
            alternatives.push(rule(arguments, pid)?);
        }
    }
    for ioctl in IOCTLS.iter().filter(|ioctl| ioctl.roles & role.bit() != 0) {
        // The kernel takes the request as an unsigned int.
        let condition = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, ioctl.request.into())?;
        rules
            .entry(libc::SYS_ioctl)
            .or_default()
            .push(SeccompRule::new(vec![condition])?);
    }
    Ok(rules)
}

fn rule(arguments: &[Argument], pid: u32) -> Result<SeccompRule, CompileError> {
    let conditions = arguments
        .iter()
        .map(|argument| {
            let (length, operator, value) = match argument.value {
                Value::Is(value) => (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value.into()),
                Value::IsOwnPid => (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, pid.into()),
                Value::IsNull => (SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0),
                Value::Masked { mask, value } => (SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(mask), value),
            };
            SeccompCondition::new(argument.index, length, operator, value)
        })
        .collect::<Result<Vec<_>, _>>()?;
    Ok(SeccompRule::new(conditions)?)
}

// linux/bpf_common.h and linux/seccomp.h.
const LOAD_WORD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
const OFFSET_OF_NUMBER: u32 = 0;
const OFFSET_OF_ARGUMENTS: u32 = 16;

/// The calls that answer with an error: `seccompiler` has one action for what matches and one for what does not, so
/// this third one stands before its program. The architecture is not checked yet, which at worst lets a foreign call be
/// answered with an error instead of a signal.
fn answers() -> BpfProgram {
    let load = |k| sock_filter {
        code: LOAD_WORD,
        jt: 0,
        jf: 0,
        k,
    };
    let unless_equal = |k, skip| sock_filter {
        code: JUMP_IF_EQUAL,
        jt: 0,
        jf: skip,
        k,
    };
    let mut program = BpfProgram::new();
    for Answered { number, second, errno } in ANSWERED {
        program.push(load(OFFSET_OF_NUMBER));
        if let Some(value) = second {
            program.push(unless_equal(*number, 3));
            program.push(load(OFFSET_OF_ARGUMENTS + 8));
            program.push(unless_equal(*value, 1));
        } else {
            program.push(unless_equal(*number, 1));
        }
        program.push(sock_filter {
            code: RETURN,
            jt: 0,
            jf: 0,
            k: libc::SECCOMP_RET_ERRNO | errno,
        });
    }
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_role_compiles_and_is_part_of_the_control_filter() {
        let control = rules(ThreadRole::Control, 1).unwrap();
        for role in ThreadRole::ALL {
            let program = compile(role, 1).unwrap();
            assert!(program.len() < 4096, "{role}: {}", program.len());
            for (number, alternatives) in rules(role, 1).unwrap() {
                let whole = &control[&number];
                // No alternatives = allowed with any arguments.
                assert!(whole.is_empty() || !alternatives.is_empty(), "{role}: call {number}");
                assert!(
                    whole.is_empty() || alternatives.iter().all(|a| whole.contains(a)),
                    "{role}: call {number}"
                );
            }
        }
    }

    #[test]
    fn no_call_is_listed_twice_for_a_role() {
        for role in ThreadRole::ALL {
            let mut numbers: Vec<_> = CALLS
                .iter()
                .filter(|call| call.roles & role.bit() != 0)
                .map(|call| call.number)
                .collect();
            let all = numbers.len();
            numbers.sort_unstable();
            numbers.dedup();
            assert_eq!(numbers.len(), all, "{role}");
            let mut requests: Vec<_> = IOCTLS
                .iter()
                .filter(|ioctl| ioctl.roles & role.bit() != 0)
                .map(|ioctl| ioctl.request)
                .collect();
            let all = requests.len();
            requests.sort_unstable();
            requests.dedup();
            assert_eq!(requests.len(), all, "{role}");
        }
    }
}

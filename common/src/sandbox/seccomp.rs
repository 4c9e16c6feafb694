//! seccomp: which system calls the thread can still make.
//!
//! Contract: the calls of the list are made as ever, at no cost that could be measured where they have no condition (the
//! kernel remembers them); any other ends the process with SIGSYS, which the kernel's audit log tells with the number of
//! the call, or is only logged. The filter is the calling thread's, and is inherited.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter,
};

use super::{Call, Lacking};

/// What comes of a call that is not listed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Otherwise {
    /// The process ends.
    End,
    /// The kernel logs it.
    Log,
}

/// Holds the calling thread.
pub(super) fn enter(calls: &[Call], otherwise: Otherwise) -> Result<(), Lacking> {
    let program = compile(calls, otherwise).map_err(Lacking::Filter)?;
    apply_filter(&program).map_err(Lacking::Seccomp)
}

fn compile(calls: &[Call], otherwise: Otherwise) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let (free, conditional): (Vec<&Call>, Vec<&Call>) =
        calls.iter().partition(|call| call.condition.is_none());
    // A call without rules matches whatever its arguments are, so it must be given none.
    rules.extend(free.iter().map(|call| (call.number, Vec::new())));
    for call in conditional {
        let is_free = free.iter().any(|other| other.number == call.number);
        if let (Some(condition), false) = (call.condition, is_free) {
            let operator = SeccompCmpOp::MaskedEq(condition.mask);
            let condition = SeccompCondition::new(
                condition.argument,
                SeccompCmpArgLen::Dword,
                operator,
                condition.value,
            )?;
            let rule = SeccompRule::new(vec![condition])?;
            rules.entry(call.number).or_default().push(rule);
        }
    }
    let otherwise = match otherwise {
        Otherwise::End => SeccompAction::KillProcess,
        Otherwise::Log => SeccompAction::Log,
    };
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, otherwise, SeccompAction::Allow, arch)?.try_into()
}

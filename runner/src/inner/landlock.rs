//! The Landlock layer: a ruleset that handles every access the kernel knows and allows none.

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

/// The newest ABI that this code knows; older kernels enforce what they can.
const NEWEST: ABI = ABI::V6;

/// Denies the calling thread every file, network and scoped access. Returns the details for the report.
///
/// # Errors
///
/// In words, if the kernel enforces nothing.
pub(super) fn deny_all() -> Result<String, String> {
    let status = restrict().map_err(|error| error.to_string())?;
    let abi = match status.landlock {
        LandlockStatus::NotEnabled => return Err("the kernel has Landlock, but it was not enabled at boot".to_owned()),
        LandlockStatus::NotImplemented => return Err("the kernel has no Landlock".to_owned()),
        LandlockStatus::Available {
            effective_abi,
            kernel_abi,
        } => kernel_abi.unwrap_or(effective_abi as i32),
    };
    match status.ruleset {
        RulesetStatus::NotEnforced => Err("the kernel enforced no rule".to_owned()),
        RulesetStatus::PartiallyEnforced => Ok(format!("ABI {abi}: files, and what else it knows, denied")),
        RulesetStatus::FullyEnforced => Ok(format!("ABI {abi}: files, network and scopes denied")),
    }
}

fn restrict() -> Result<landlock::RestrictionStatus, RulesetError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?
        // A layer of its own, which is in force by now unless it was waived.
        .no_new_privs(false)
        .restrict_self()
}

//! Landlock: which names in the file system the thread can still use.
//!
//! Contract: all kinds of access are withheld that the kernel knows of, but in the places given; so are the ports of TCP, and
//! what lies outside the sandbox among abstract sockets and the receivers of signals. A place that is not there is left out.
//! Descriptors that are open stay as good as they were.

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, make_bitflags,
};

use super::{Access, Lacking, Place};

/// The newest kernel that this was tried with has this; an older one withholds what it can.
const NEWEST: ABI = ABI::V6;

/// Holds the calling thread.
pub(super) fn enter(places: &[Place]) -> Result<(), Lacking> {
    match restrict(places).map_err(Lacking::NoLandlock)? {
        RulesetStatus::FullyEnforced => Ok(()),
        RulesetStatus::PartiallyEnforced => Err(Lacking::OldLandlock),
        RulesetStatus::NotEnforced => Err(Lacking::Landlock),
    }
}

fn restrict(places: &[Place]) -> Result<RulesetStatus, RulesetError> {
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    for place in places {
        // What is not there cannot be named.
        let Ok(there) = PathFd::new(&place.path) else { continue };
        let allowed = allowed(place.access);
        let is_file = std::fs::metadata(&place.path).is_ok_and(|found| !found.is_dir());
        let allowed = if is_file { allowed & AccessFs::from_file(NEWEST) } else { allowed };
        if !allowed.is_empty() {
            rules = rules.add_rule(PathBeneath::new(there, allowed))?;
        }
    }
    Ok(rules.restrict_self()?.ruleset)
}

fn allowed(access: Access) -> BitFlags<AccessFs> {
    let open = make_bitflags!(AccessFs::{ReadFile | WriteFile | Truncate | IoctlDev});
    let keep = make_bitflags!(AccessFs::{ReadFile | WriteFile | Truncate | MakeReg | RemoveFile});
    match access {
        Access::Remove => AccessFs::RemoveFile.into(),
        Access::Read => make_bitflags!(AccessFs::{ReadFile | ReadDir}),
        Access::Open => open,
        Access::Keep => keep,
        Access::Make => keep | AccessFs::MakeSock | AccessFs::MakeSym,
        Access::MakeNodes => open | AccessFs::MakeChar | AccessFs::RemoveFile,
    }
}

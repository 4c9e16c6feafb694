//! Capabilities that are given up for good.
//!
//! Contract: the calling thread is left with those that it is to keep and that it had, as effective and permitted ones, and with
//! nothing that a program which it started could inherit. Where there is nothing to give up no system call says so: a
//! service manager's filter may refuse it.

use std::io;

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set,
    clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
    set_no_new_privs,
};

use super::Lacking;

/// Gives up all but `kept`.
pub(super) fn keep(kept: CapabilitySet) -> Result<(), Lacking> {
    give_up(kept).map_err(|errno| Lacking::Capabilities(io::Error::from(errno)))
}

fn give_up(kept: CapabilitySet) -> Result<(), Errno> {
    set_no_new_privs(true)?;
    clear_ambient_capability_set()?;
    let had = capabilities(None)?;
    // Who may not shrink the bounding set has no need to: nothing can be gained from it any more.
    if had.effective.contains(CapabilitySet::SETPCAP) {
        CapabilitySet::all().iter().try_for_each(leave_bounding_set)?;
    }
    let permitted = had.permitted & kept;
    let left =
        CapabilitySets { effective: permitted, permitted, inheritable: CapabilitySet::empty() };
    if left == had { Ok(()) } else { set_capabilities(None, left) }
}

fn leave_bounding_set(capability: CapabilitySet) -> Result<(), Errno> {
    match capability_is_in_bounding_set(capability) {
        Ok(true) => remove_capability_from_bounding_set(capability),
        // Not there, or not known to this kernel.
        Ok(false) | Err(Errno::INVAL) => Ok(()),
        Err(errno) => Err(errno),
    }
}

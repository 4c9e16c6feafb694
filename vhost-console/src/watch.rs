//! Waiting for any descriptor on the main thread.
//!
//! Contract: one function, which exists because the runtime's own has to be told that a descriptor stays the same file for as
//! long as it is waited for.

#![allow(unsafe_code, reason = "the runtime asks for a promise that only an owner can make")]

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Has the runtime wait for this descriptor, which does not block. Within the runtime.
///
/// # Errors
/// There are no descriptors left, or it is a file that is always ready (PERM).
pub(crate) fn watch(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: what is returned owns the descriptor and lends it only as a reference, so that it is open, and the same file,
    // until both go: and then the runtime forgets it first.
    let watched = unsafe { AsyncFd::register_with_interest(descriptor, interest) };
    Ok(watched?)
}

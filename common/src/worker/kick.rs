//! How a ring learns of new buffers.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{FileType, fstat};

/// A front end gave something as a kick that is none.
#[derive(Debug, thiserror::Error)]
#[error("the kick descriptor is no eventfd")]
pub struct NoEventfd;

/// Where kicks come from.
#[derive(Clone)]
pub enum Kick {
    /// The front end gave no descriptor: the ring is polled.
    Polled,
    /// An eventfd. It is never read: a watch fires at each write to it, and its count has room
    /// for 2^64 of them.
    Event(Arc<OwnedFd>),
}

impl Kick {
    /// A kick by what the front end sent with `SET_VRING_KICK`.
    ///
    /// # Errors
    /// It has a name in a file system or is a pipe or socket, so it is no eventfd: some of these
    /// are always readable, others fill up when nobody reads them.
    pub fn new(fd: Option<Arc<OwnedFd>>) -> Result<Self, NoEventfd> {
        let Some(fd) = fd else { return Ok(Self::Polled) };
        if is_nameless(&fd) { Ok(Self::Event(fd)) } else { Err(NoEventfd) }
    }

    /// The descriptor to watch.
    pub fn descriptor(&self) -> Option<&OwnedFd> {
        match self {
            Self::Polled => None,
            Self::Event(fd) => Some(fd),
        }
    }
}

/// Whether a descriptor is of the kind that an eventfd is: without a name in any file system, and
/// neither pipe nor socket. Eventfds are the only such that front ends pass for a ring.
pub(super) fn is_nameless(fd: &OwnedFd) -> bool {
    fstat(fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Unknown)
}

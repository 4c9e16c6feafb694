//! The fence between a killed daemon and its successor.
//!
//! What a process has submitted goes on when it is gone: a write would fall on what the successor has written since, a read into
//! memory that the guest uses for something else by then. So every description through which an image is written holds a
//! shared lock on one byte of it, requests in flight hold the description, and who opens the image to write waits until
//! nobody holds that lock.
//!
//! Contract: [`Fence::wait`] comes before the first request, [`Fence::hold`] before a description is used. The byte lies beyond
//! [QEMU's](super::lock), which belong to a description without I/O.
//!
//! What it deliberately does not do: anything for images that are opened to read only, of which there may be any number at
//! a time, nor without the image's lock, which keeps two successors apart.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use common::daemon::predecessor;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use thiserror::Error;

use super::lock::one_byte;

/// The byte that is locked: behind the last of QEMU's.
const FENCE_BYTE: libc::off_t = 300;

/// Why there is no fence.
#[derive(Debug, Error)]
pub(crate) enum FenceError {
    /// Requests of another process have not ended.
    #[error("requests of a process that had {path:?} open have not ended yet")]
    InFlight {
        /// As the operator gave it.
        path: PathBuf,
    },
    /// The file system has no open-file-description locks.
    #[error("{path:?} cannot be locked; --no-lock opens it unlocked")]
    Unsupported {
        /// As the operator gave it.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// See the module's head.
pub(super) struct Fence<'a> {
    path: &'a Path,
}

impl<'a> Fence<'a> {
    /// The fence of an image that nobody else writes.
    pub(super) fn new(path: &'a Path) -> Self {
        Self { path }
    }

    /// Waits until no request of a predecessor is in flight, if not for long.
    pub(super) fn wait(&self, image: BorrowedFd<'_>) -> Result<(), FenceError> {
        let is_in_flight = |error: &FenceError| matches!(error, FenceError::InFlight { .. });
        predecessor::outlast(is_in_flight, || self.look(image))
    }

    fn look(&self, image: BorrowedFd<'_>) -> Result<(), FenceError> {
        let mut byte = one_byte(libc::F_WRLCK, FENCE_BYTE);
        match fcntl(image, FcntlArg::F_OFD_GETLK(&mut byte)) {
            Ok(_) if i32::from(byte.l_type) == libc::F_UNLCK => Ok(()),
            Ok(_) => Err(FenceError::InFlight { path: self.path.to_owned() }),
            Err(errno) => Err(self.unsupported(errno)),
        }
    }

    /// Has a successor wait for what is in flight through this description.
    pub(super) fn hold(&self, description: impl AsFd) -> Result<(), FenceError> {
        let byte = one_byte(libc::F_RDLCK, FENCE_BYTE);
        let locked = fcntl(description.as_fd(), FcntlArg::F_OFD_SETLK(&byte));
        locked.map(drop).map_err(|errno| self.unsupported(errno))
    }

    fn unsupported(&self, errno: Errno) -> FenceError {
        FenceError::Unsupported { path: self.path.to_owned(), source: errno.into() }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::thread;

    use super::{Fence, FenceError};

    fn open(path: &std::path::Path) -> File {
        File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap()
    }

    #[test]
    fn successor_waits_until_the_last_request_lets_go_of_its_description() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let fence = Fence::new(&path);
        let (ours, first, second) = (open(&path), open(&path), open(&path));
        fence.wait(ours.as_fd()).unwrap();
        fence.hold(&first).unwrap();
        fence.hold(&second).unwrap();
        // A request in flight has the description open, as another descriptor does.
        let in_flight = second.try_clone().unwrap();
        drop((first, second));
        assert!(matches!(fence.look(ours.as_fd()), Err(FenceError::InFlight { .. })));
        thread::scope(|scope| {
            scope.spawn(move || drop(in_flight));
            fence.wait(ours.as_fd()).unwrap();
        });
    }

    #[test]
    fn requests_that_do_not_end_are_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let fence = Fence::new(&path);
        let (ours, other) = (open(&path), open(&path));
        fence.hold(&other).unwrap();
        let error = fence.wait(ours.as_fd()).unwrap_err();
        assert!(matches!(error, FenceError::InFlight { .. }), "{error}");
        // Its own is not in the way.
        drop(other);
        fence.hold(&ours).unwrap();
        fence.wait(ours.as_fd()).unwrap();
    }
}

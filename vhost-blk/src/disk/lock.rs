//! QEMU's image locks, so that QEMU's tools and we respect each other.
//!
//! Theory of operation (QEMU, `block/file-posix.c` and `docs/devel/` on image locking; the bytes
//! are an interface between versions of QEMU and thus frozen). A user of an image says which
//! permissions it *takes* (say, write) and which it does *not share* with others. Each is one byte
//! of the file, beyond no data and meaning nothing in itself: byte 100 + p is locked by whoever
//! takes permission p, byte 200 + p by whoever does not share it. All locks are shared (read)
//! locks, so that any number of users may hold each. A user first sets its own locks, then asks,
//! without setting anything, whether an exclusive lock *would* be possible on byte 200 + p for each
//! p that it takes and on byte 100 + p for each p that it does not share: it would not where
//! another process stands in the way. Of two that start at once both may be refused, never none.
//!
//! We take what QEMU takes for the disk of a guest: a writer takes *consistent read* and *write*, a
//! read-only disk only *consistent read*, and neither shares *write*: a guest's read-only disk must
//! not change under it. So several read-only users may share an image. *Resize* is neither taken
//! (we never change a file's length) nor withheld (as QEMU's virtio-blk; whoever resizes an image
//! wants to write to it too, and is refused for that).
//!
//! Contract: the locks belong to an open file description that is used for nothing else, and last
//! until it is closed, which the kernel does for a killed process too. Not the I/O description,
//! because that one may be handed to a successor or kept open by unfinished requests when the locks
//! must already be free, or the other way round. A killed process is there a moment longer than the
//! signal, so who finds an image in use tries again for a second. The locks are advisory: they stop
//! only those who ask.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use common::daemon::predecessor;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rustix::fs::{Mode, OFlags};
use thiserror::Error;

/// First of the bytes locked by those who take a permission.
const TAKEN_BASE: libc::off_t = 100;

/// First of the bytes locked by those who do not share a permission.
const UNSHARED_BASE: libc::off_t = 200;

/// From the first lock byte to behind the last one that could be (permissions are bits of 64).
const LOCK_BYTES: libc::off_t = UNSHARED_BASE + 64 - TAKEN_BASE;

/// A permission of QEMU's block layer: its bit number (`BLK_PERM_*`), the offset of its lock bytes,
/// and the name that QEMU's messages use.
#[derive(Clone, Copy, Debug)]
struct Permission {
    bit: libc::off_t,
    name: &'static str,
}

const CONSISTENT_READ: Permission = Permission { bit: 0, name: "consistent read" };
const WRITE: Permission = Permission { bit: 1, name: "write" };

/// What no disk of a guest shares with other users of its image.
const UNSHARED: [Permission; 1] = [WRITE];

/// Why an image was not locked.
#[derive(Debug, Error)]
pub(crate) enum LockError {
    /// Somebody uses the image in a way that does not go with ours. The kernel does not tell who.
    #[error(
        "{path:?} is in use by another process (lock on {permission} permission); --no-lock opens it all the same"
    )]
    InUse {
        /// As the operator gave it.
        path: PathBuf,
        /// The permission in dispute.
        permission: &'static str,
    },
    /// The file system has no open-file-description locks.
    #[error(
        "{path:?} cannot be locked, perhaps because its file system does not support it; --no-lock opens it unlocked"
    )]
    Unsupported {
        /// As the operator gave it.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The second opening of the path failed.
    #[error("cannot open {path:?} once more, to lock it")]
    Open {
        /// As the operator gave it.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The path leads to another file than a moment ago.
    #[error("{path:?} was replaced by another file while it was being opened")]
    Replaced {
        /// As the operator gave it.
        path: PathBuf,
    },
}

/// Locks on an image, released when this is dropped.
#[derive(Debug)]
pub(super) struct ImageLock {
    description: OwnedFd,
}

impl ImageLock {
    /// Locks the image at `path`, which must be the file that `image` has open, for a guest's disk. One that is in use is
    /// waited for, if not for long.
    pub(super) fn take(
        path: &Path,
        image: BorrowedFd<'_>,
        read_only: bool,
    ) -> Result<ImageLock, LockError> {
        let is_in_use = |error: &LockError| matches!(error, LockError::InUse { .. });
        predecessor::outlast(is_in_use, || Self::take_now(path, image, read_only))
    }

    fn take_now(
        path: &Path,
        image: BorrowedFd<'_>,
        read_only: bool,
    ) -> Result<ImageLock, LockError> {
        let lock = ImageLock { description: open_again(path, image)? };
        let taken: &[Permission] =
            if read_only { &[CONSISTENT_READ] } else { &[CONSISTENT_READ, WRITE] };
        for permission in taken {
            lock.set(path, *permission, TAKEN_BASE)?;
        }
        for permission in UNSHARED {
            lock.set(path, permission, UNSHARED_BASE)?;
        }
        // Only now, see above: whoever asks first and locks afterwards may miss another who does
        // the same.
        for permission in taken {
            lock.probe(path, *permission, UNSHARED_BASE)?;
        }
        for permission in UNSHARED {
            lock.probe(path, permission, TAKEN_BASE)?;
        }
        Ok(lock)
    }

    /// Sets our shared lock on a permission's byte.
    fn set(&self, path: &Path, permission: Permission, base: libc::off_t) -> Result<(), LockError> {
        let byte = one_byte(libc::F_RDLCK, base + permission.bit);
        match fcntl(self.description.as_fd(), FcntlArg::F_OFD_SETLK(&byte)) {
            Ok(_) => Ok(()),
            // Not QEMU, which sets shared locks only, but a program that locks the whole file for
            // itself.
            Err(Errno::EAGAIN | Errno::EACCES) => Err(in_use(path, permission)),
            Err(errno) => {
                Err(LockError::Unsupported { path: path.to_owned(), source: errno.into() })
            }
        }
    }

    /// Fails where another description holds a lock on a permission's byte.
    fn probe(
        &self,
        path: &Path,
        permission: Permission,
        base: libc::off_t,
    ) -> Result<(), LockError> {
        let mut byte = one_byte(libc::F_WRLCK, base + permission.bit);
        match fcntl(self.description.as_fd(), FcntlArg::F_OFD_GETLK(&mut byte)) {
            Ok(_) if i32::from(byte.l_type) == libc::F_UNLCK => Ok(()),
            Ok(_) => Err(in_use(path, permission)),
            Err(errno) => {
                Err(LockError::Unsupported { path: path.to_owned(), source: errno.into() })
            }
        }
    }
}

impl Drop for ImageLock {
    /// Unlocks, although closing would do: a child that another thread has just forked shares the
    /// description until it executes its program, and the locks would outlive us for that moment.
    fn drop(&mut self) {
        let all = libc::flock { l_len: LOCK_BYTES, ..one_byte(libc::F_UNLCK, TAKEN_BASE) };
        // Nothing is left to do about an error: the descriptor is closed next.
        let _ = fcntl(self.description.as_fd(), FcntlArg::F_OFD_SETLK(&all));
    }
}

fn in_use(path: &Path, permission: Permission) -> LockError {
    LockError::InUse { path: path.to_owned(), permission: permission.name }
}

/// The range of one lock byte. `l_pid` must be 0 for locks of open file descriptions (fcntl(2)).
pub(super) fn one_byte(kind: i32, offset: libc::off_t) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: offset,
        l_len: 1,
        l_pid: 0,
    }
}

/// A second description of the file behind `image`. Reading is all that shared locks and probes
/// need.
fn open_again(path: &Path, image: BorrowedFd<'_>) -> Result<OwnedFd, LockError> {
    let refused =
        |errno: rustix::io::Errno| LockError::Open { path: path.to_owned(), source: errno.into() };
    let description =
        rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(refused)?;
    let ours = rustix::fs::fstat(&description).map_err(refused)?;
    let images = rustix::fs::fstat(image).map_err(refused)?;
    if (ours.st_dev, ours.st_ino) != (images.st_dev, images.st_ino) {
        return Err(LockError::Replaced { path: path.to_owned() });
    }
    Ok(description)
}

#[cfg(test)]
mod tests;

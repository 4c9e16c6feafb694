//! Whether two descriptors lead to one file. A service manager that is given a file which it has already drops it in silence,
//! with the name that it was to have, so none is given twice: a front end may have one file for all its memory, or one eventfd
//! for several rings.
//!
//! `kcmp` would tell, but it is a debugger's tool, and a front end's memory is the same memory however it was opened. So: files
//! are told apart by inode and by how they were opened, eventfds, which have one inode in common, by the number that the kernel
//! has for each. What has neither is taken for a file of its own; if that is wrong, a successor misses it, and says so.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::fs::File;
use std::io::read_to_string;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fstat, openat};

/// proc(5): what the kernel says of each open descriptor.
pub(super) const FD_INFO: &str = "/proc/self/fdinfo";

/// That directory, held open: Landlock knows a directory of proc's by an inode that is another one when it is looked up anew.
pub(super) struct FdInfo(Option<File>);

impl FdInfo {
    /// Without proc, no eventfd can be told from another.
    pub(super) fn open() -> Self {
        Self(File::open(FD_INFO).ok())
    }

    /// The kernel's number of an eventfd, since Linux 5.2.
    fn eventfd_id(&self, fd: &OwnedFd) -> Option<u64> {
        let name = fd.as_raw_fd().to_string();
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let info = openat(self.0.as_ref()?, name, flags, Mode::empty()).ok()?;
        let info = read_to_string(File::from(info)).ok()?;
        info.lines().find_map(|line| line.strip_prefix("eventfd-id:"))?.trim().parse().ok()
    }
}

/// Equal if the files are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Identity {
    /// Device, inode, and how it was opened.
    Inode(u64, u64, OFlags),
    /// The kernel's number.
    Eventfd(u64),
}

impl Identity {
    /// `None`: it cannot be told from others.
    pub(super) fn of(fd: &OwnedFd, fd_info: &FdInfo) -> Option<Self> {
        let stat = fstat(fd).ok()?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile | FileType::Socket | FileType::Fifo => {
                let access = fcntl_getfl(fd).ok()? & (OFlags::RWMODE | OFlags::NONBLOCK);
                Some(Self::Inode(stat.st_dev, stat.st_ino, access))
            }
            // Without a type: an inode that many share.
            FileType::Unknown => fd_info.eventfd_id(fd).map(Self::Eventfd),
            _ => None,
        }
    }
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use rustix::event::{EventfdFlags, eventfd};

    use super::{FdInfo, Identity};
    use crate::memory::guest_file;

    fn identity(fd: &OwnedFd) -> Option<Identity> {
        Identity::of(fd, &FdInfo::open())
    }

    #[test]
    fn file_is_known_again_by_another_descriptor_and_no_other_is_taken_for_it() {
        let event = || eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let socket = || OwnedFd::from(UnixStream::pair().unwrap().0);
        let pairs =
            [(event(), event()), (guest_file(4096), guest_file(4096)), (socket(), socket())];
        for (one, other) in pairs {
            let again = one.try_clone().unwrap();
            assert!(identity(&one).is_some());
            assert_eq!(identity(&one), identity(&again));
            assert_ne!(identity(&one), identity(&other));
        }
    }

    #[test]
    fn ends_of_a_pipe_are_two_files() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        assert_ne!(identity(&reader), identity(&writer));
    }
}

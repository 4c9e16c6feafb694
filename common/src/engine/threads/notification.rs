//! A notification that is written without waiting for room.
//!
//! Contract: the front end chooses what the descriptor is, and may change at any time how full it
//! is and whether it blocks. Eventfds, pipes and sockets are written to; nothing else is, since a
//! file may wait for its storage.

use std::os::fd::BorrowedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat};
use rustix::io::{Errno, ReadWriteFlags};
use rustix::net::{SendFlags, send};

/// The number 1, as an eventfd wants it.
const ONE: [u8; 8] = 1u64.to_ne_bytes();

/// Writes eight bytes, if there is room: what became of it, or `None` where there is none.
///
/// An eventfd is written to when a look has found room, as there is no way to try it. A front end
/// that fills a blocking one in between holds its own guest's disk up until it reads it again.
pub(super) fn try_write(fd: BorrowedFd<'_>) -> Option<Result<usize, Errno>> {
    let kind = match fstat(fd) {
        Ok(stat) => FileType::from_raw_mode(stat.st_mode),
        Err(error) => return Some(Err(error)),
    };
    if !matches!(kind, FileType::Unknown | FileType::Fifo | FileType::Socket) {
        return Some(Err(Errno::INVAL));
    }
    match poll(&mut [PollFd::new(&fd, PollFlags::OUT)], Some(&Timespec::default())) {
        Ok(0) => return None,
        Ok(_) => {}
        Err(error) => return Some(Err(error)),
    }
    Some(match kind {
        FileType::Fifo => {
            let data = [std::io::IoSlice::new(&ONE)];
            // At the current position, as pipes have no other.
            match rustix::io::pwritev2(fd, &data, u64::MAX, ReadWriteFlags::NOWAIT) {
                // Pipes before Linux 6.5 cannot be tried either.
                Err(Errno::OPNOTSUPP) => rustix::io::write(fd, &ONE),
                tried => tried,
            }
        }
        FileType::Socket => send(fd, &ONE, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
        _ => rustix::io::write(fd, &ONE),
    })
}

//! Waiting for a process, bounded. A process's descriptor (`pidfd`) becomes readable when it ends, so nothing polls or sleeps.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// A descriptor of the process that is readable once it has ended.
pub(crate) fn process_descriptor(child: &Child) -> OwnedFd {
    pidfd_open(Pid::from_child(child), PidfdFlags::empty())
        .expect("the kernel has pidfd_open (Linux 5.3)")
}

/// Waits until one of `descriptors` is readable and returns its index, or `None` when `deadline` has passed.
pub(crate) fn first_readable(descriptors: &[BorrowedFd<'_>], deadline: Instant) -> Option<usize> {
    loop {
        let mut polled: Vec<_> =
            descriptors.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).expect("a deadline is minutes away at most");
        match poll(&mut polled, Some(&timeout)) {
            Ok(0) => return None,
            Ok(_) => return polled.iter().position(|fd| !fd.revents().is_empty()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("cannot poll: {error}"),
        }
    }
}

/// The status with which `child` ends, or `None` where it is still running after `limit`.
///
/// # Errors
/// Those of `waitpid`.
pub fn wait_for_exit(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let ended = process_descriptor(child);
    match first_readable(&[ended.as_fd()], Instant::now() + limit) {
        Some(_) => child.wait().map(Some),
        None => Ok(None),
    }
}

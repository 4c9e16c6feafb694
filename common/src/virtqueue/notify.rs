//! Notifications: the call and error descriptors of a ring to the driver, the kick from it.
//!
//! Contract: signalling never blocks and never fails the ring. The front end chooses what the
//! descriptor is (an eventfd, a pipe, a socket), whether it is blocking, and whether it still has
//! room; its own mistakes cost it its own notifications, which are counted.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat};
use rustix::net::{SendFlags, send};

use super::RingError;

/// How a ring learns of new buffers.
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
    pub fn new(fd: Option<Arc<OwnedFd>>) -> Result<Self, RingError> {
        match fd {
            None => Ok(Self::Polled),
            Some(fd) if file_type(&fd) == Some(FileType::Unknown) => Ok(Self::Event(fd)),
            Some(_) => Err(RingError::Kick),
        }
    }

    /// The descriptor to watch.
    pub fn descriptor(&self) -> Option<&OwnedFd> {
        match self {
            Self::Polled => None,
            Self::Event(fd) => Some(fd),
        }
    }
}

fn file_type(fd: &OwnedFd) -> Option<FileType> {
    fstat(fd).ok().map(|stat| FileType::from_raw_mode(stat.st_mode))
}

/// What became of a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signalled {
    /// It was written.
    Sent,
    /// Nothing was written: the descriptor is full or closed. A full one wakes its reader anyway.
    Dropped,
    /// The front end gave no descriptor: the driver polls.
    Nobody,
}

/// A descriptor that wakes somebody when eight bytes are written to it.
#[derive(Clone, Default)]
pub struct Notifier(Option<Target>);

#[derive(Clone)]
struct Target {
    fd: Arc<OwnedFd>,
    socket: bool,
}

impl Notifier {
    /// A notifier for what the front end sent with `SET_VRING_CALL` or `SET_VRING_ERR`.
    pub fn new(fd: Option<Arc<OwnedFd>>) -> Self {
        Self(fd.map(|fd| {
            let socket = file_type(&fd) == Some(FileType::Socket);
            Target { fd, socket }
        }))
    }

    /// Signals once.
    pub fn signal(&self) -> Signalled {
        let Some(target) = &self.0 else { return Signalled::Nobody };
        let one = 1u64.to_ne_bytes();
        let sent = if target.socket {
            send(&target.fd, &one, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).is_ok()
        } else {
            // The descriptor may be blocking, and O_NONBLOCK belongs to the description that the
            // front end uses too; so ask for room first.
            is_ready(&target.fd, PollFlags::OUT) && rustix::io::write(&target.fd, &one).is_ok()
        };
        if sent { Signalled::Sent } else { Signalled::Dropped }
    }
}

fn is_ready(fd: &OwnedFd, how: PollFlags) -> bool {
    let mut fds = [PollFd::new(fd, how)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready == 1)
        && fds.iter().all(|fd| fd.revents().contains(how))
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::sync::Arc;

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::pipe::pipe;

    use super::{Notifier, Signalled};

    fn notifier(fd: OwnedFd) -> Notifier {
        Notifier::new(Some(Arc::new(fd)))
    }

    #[test]
    fn full_blocking_eventfd_drops_the_signal_and_returns() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        assert_eq!(notifier(fd).signal(), Signalled::Dropped);
    }

    #[test]
    fn full_blocking_pipe_drops_the_signal_and_returns() {
        let (reader, writer) = pipe().unwrap();
        let notifier = notifier(writer);
        let mut sent = 0;
        while notifier.signal() == Signalled::Sent {
            sent += 1;
        }
        assert!(sent > 0);
        drop(reader);
        assert_eq!(notifier.signal(), Signalled::Dropped);
    }

    #[test]
    fn socket_whose_peer_is_gone_drops_the_signal() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let notifier = notifier(ours.into());
        assert_eq!(notifier.signal(), Signalled::Sent);
        drop(theirs);
        assert_eq!(notifier.signal(), Signalled::Dropped);
    }

    #[test]
    fn no_descriptor_is_nobody() {
        assert_eq!(Notifier::new(None).signal(), Signalled::Nobody);
    }
}

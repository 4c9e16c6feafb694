//! Kick, call and err descriptors: eventfds, pipes and sockets, empty or full.
//!
//! vhost-user, "Communication": what is written has eight bytes and no meaning. User-Mode Linux
//! passes sockets, other front ends pass pipes on systems without eventfd, and nothing obliges a
//! front end to read what it is sent.

use crate::Error;
use crate::wire::readable;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, read, write};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::pipe::{PipeFlags, pipe_with};
use std::time::Duration;

/// Bytes of one notification.
const NOTIFICATION_BYTES: usize = 8;
/// An eventfd's counter cannot go beyond this, and a write that would takes it to wait for a reader
/// (`eventfd(2)`).
const EVENTFD_MAX: u64 = u64::MAX - 1;

/// Both ends of a notification.
#[derive(Debug)]
pub struct Notifier {
    ours: OwnedFd,
    /// The other end where there are two: an eventfd is its own.
    theirs: Option<OwnedFd>,
}

impl Notifier {
    /// A non-blocking eventfd, as QEMU makes them.
    ///
    /// # Errors
    /// What the system says.
    pub fn eventfd() -> Result<Self, Error> {
        Ok(Notifier {
            ours: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            theirs: None,
        })
    }

    /// A *blocking* eventfd whose counter is at its maximum: the next careless write to it never
    /// returns.
    ///
    /// # Errors
    /// What the system says.
    pub fn full_blocking_eventfd() -> Result<Self, Error> {
        let ours = eventfd(0, EventfdFlags::CLOEXEC)?;
        write(&ours, &EVENTFD_MAX.to_ne_bytes())?;
        Ok(Notifier { ours, theirs: None })
    }

    /// A pipe that the back end writes to; blocking, as `pipe` makes them.
    ///
    /// # Errors
    /// What the system says.
    pub fn pipe() -> Result<Self, Error> {
        let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
        Ok(Notifier { ours, theirs: Some(theirs) })
    }

    /// A blocking pipe that has no room for another byte.
    ///
    /// # Errors
    /// What the system says.
    pub fn full_pipe() -> Result<Self, Error> {
        let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
        fill(&theirs)?;
        Ok(Notifier { ours, theirs: Some(theirs) })
    }

    /// A pipe whose reading end is closed: whoever writes to it gets SIGPIPE.
    ///
    /// # Errors
    /// What the system says.
    pub fn broken_pipe() -> Result<Self, Error> {
        let (reader, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
        drop(reader);
        Ok(Notifier { ours: theirs, theirs: None })
    }

    /// A connected pair of unix sockets, as User-Mode Linux passes them.
    ///
    /// # Errors
    /// What the system says.
    pub fn socket() -> Result<Self, Error> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        Ok(Notifier { ours, theirs: Some(theirs) })
    }

    /// A connected pair of unix sockets with no room for another byte towards us.
    ///
    /// # Errors
    /// What the system says.
    pub fn full_socket() -> Result<Self, Error> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        fill(&theirs)?;
        Ok(Notifier { ours, theirs: Some(theirs) })
    }

    /// The descriptor to pass to the back end.
    #[must_use]
    pub fn back_end_fd(&self) -> BorrowedFd<'_> {
        self.theirs.as_ref().unwrap_or(&self.ours).as_fd()
    }

    /// Our end.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.ours.as_fd()
    }

    /// Notifies the back end.
    ///
    /// # Errors
    /// What `write` says, but for a full one, which is notified already.
    pub fn signal(&self) -> Result<(), Error> {
        match write(&self.ours, &1_u64.to_ne_bytes()) {
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Waits for a notification and takes it. Returns how many there were: all so far of an
    /// eventfd, one of a pipe or socket, and 0 if none came within `patience`.
    ///
    /// # Errors
    /// What `poll` and `read` say.
    pub fn wait(&self, patience: Duration) -> Result<u64, Error> {
        if !readable(self.ours.as_fd(), patience)? {
            return Ok(0);
        }
        let mut notification = [0_u8; NOTIFICATION_BYTES];
        match read(&self.ours, &mut notification) {
            Ok(NOTIFICATION_BYTES) if self.theirs.is_none() => Ok(u64::from_ne_bytes(notification)),
            Ok(taken_bytes) => Ok(u64::from(taken_bytes > 0)),
            Err(Errno::AGAIN) => Ok(0),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Writes until nothing more fits, and leaves the descriptor blocking as it was.
fn fill(fd: &OwnedFd) -> Result<(), Error> {
    let flags = fcntl_getfl(fd)?;
    fcntl_setfl(fd, flags | OFlags::NONBLOCK)?;
    // From pages to single bytes: the last byte of room must go too.
    for chunk in [4096, NOTIFICATION_BYTES, 1] {
        loop {
            match write(fd, &[0_u8; 4096][..chunk]) {
                Ok(_) => {}
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    Ok(fcntl_setfl(fd, flags)?)
}

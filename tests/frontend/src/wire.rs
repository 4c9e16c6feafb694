//! Bytes and file descriptors over a vhost-user socket, well formed or not.
//!
//! Nothing here knows what a request means. Every wait has a limit, so that a back end that goes
//! silent fails a test instead of hanging it. Sending may block when the back end does not read: a
//! test that wants that must use few bytes.

use crate::Error;
use crate::message::{HEADER_BYTES, VHOST_USER_VERSION, header};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long an answer may take: far more than any back end needs on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Descriptors in one message: the kernel's own limit (`SCM_MAX_FD`), so that a test can send more
/// than any back end takes.
pub const MAX_DESCRIPTORS: usize = 253;
/// The longest payload that is taken from a back end: a broken one must not make the test allocate
/// without bound.
pub const MAX_REPLY_BYTES: usize = 64 << 10;

/// A message from the back end.
#[derive(Debug)]
pub struct Reply {
    /// The request's number.
    pub request: u32,
    /// Version, reply flag and whatever else is set.
    pub flags: u32,
    /// The bytes after the header.
    pub payload: Vec<u8>,
    /// The descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

impl Reply {
    /// The 64-bit number at `offset_bytes` in the payload, if it is long enough.
    #[must_use]
    pub fn word(&self, offset_bytes: usize) -> Option<u64> {
        let bytes = self.payload.get(offset_bytes..offset_bytes.checked_add(8)?)?;
        Some(u64::from_ne_bytes(bytes.try_into().ok()?))
    }

    /// The 32-bit number at `offset_bytes` in the payload, if it is long enough.
    #[must_use]
    pub fn half(&self, offset_bytes: usize) -> Option<u32> {
        let bytes = self.payload.get(offset_bytes..offset_bytes.checked_add(4)?)?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?))
    }
}

/// One connected vhost-user socket.
#[derive(Debug)]
pub struct Wire {
    stream: UnixStream,
}

impl Wire {
    /// Connects to a listening back end.
    ///
    /// # Errors
    /// What `connect` says.
    pub fn connect(path: &Path) -> Result<Self, Error> {
        Ok(Wire { stream: UnixStream::connect(path)? })
    }

    /// Takes a socket that is connected already.
    #[must_use]
    pub fn from_stream(stream: UnixStream) -> Self {
        Wire { stream }
    }

    /// The socket itself, for tests that shut down one side of it or poll it.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends a message whose header tells the truth about the payload.
    ///
    /// # Errors
    /// [`Error::HangUp`] when the back end has closed the connection.
    pub fn send(
        &self,
        request: u32,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        let size = u32::try_from(payload.len()).expect("a test's payload is short");
        let mut bytes = header(request, VHOST_USER_VERSION | flags, size);
        bytes.extend(payload);
        self.send_bytes(&bytes, fds)
    }

    /// Sends bytes as they are, `fds` with the first of them.
    ///
    /// # Errors
    /// [`Error::HangUp`] when the back end has closed the connection.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let mut fds = fds;
        let mut rest = bytes;
        while !rest.is_empty() {
            let mut space =
                [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() {
                assert!(
                    control.push(SendAncillaryMessage::ScmRights(fds)),
                    "too many descriptors for one message"
                );
            }
            let sent = match sendmsg(
                &self.stream,
                &[IoSlice::new(rest)],
                &mut control,
                SendFlags::NOSIGNAL,
            ) {
                Ok(sent) => sent,
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(Error::HangUp),
                Err(errno) => return Err(errno.into()),
            };
            fds = &[];
            rest = &rest[sent..];
        }
        Ok(())
    }

    /// The next message.
    ///
    /// # Errors
    /// [`Error::Silence`] after `patience`, [`Error::HangUp`] when the connection ends instead,
    /// [`Error::WrongReply`] for a payload beyond [`MAX_REPLY_BYTES`].
    pub fn receive(&self, patience: Duration) -> Result<Reply, Error> {
        let deadline = Instant::now() + patience;
        let mut head = [0_u8; HEADER_BYTES];
        let mut fds = Vec::new();
        self.fill(&mut head, &mut fds, (deadline, patience))?;
        let [request, flags, size] = [0, 4, 8]
            .map(|at| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]));
        let size_bytes = size as usize;
        if size_bytes > MAX_REPLY_BYTES {
            return Err(Error::WrongReply { request, answered: request, flags, size_bytes });
        }
        let mut payload = vec![0_u8; size_bytes];
        self.fill(&mut payload, &mut fds, (deadline, patience))?;
        Ok(Reply { request, flags, payload, fds })
    }

    /// Waits until the back end has closed the connection; messages that arrive before are dropped.
    ///
    /// # Errors
    /// [`Error::Silence`] if the connection is still there after `patience`.
    pub fn wait_for_hang_up(&self, patience: Duration) -> Result<(), Error> {
        let deadline = Instant::now() + patience;
        loop {
            match self.receive(deadline.saturating_duration_since(Instant::now())) {
                Ok(_) => {}
                Err(Error::HangUp) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn fill(
        &self,
        into: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        (deadline, patience): (Instant, Duration),
    ) -> Result<(), Error> {
        let mut filled = 0;
        while filled < into.len() {
            if !readable(self.stream.as_fd(), deadline.saturating_duration_since(Instant::now()))? {
                return Err(Error::Silence(patience));
            }
            let mut space =
                [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut slices = [IoSliceMut::new(&mut into[filled..])];
            let received =
                match recvmsg(&self.stream, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
                    Ok(received) => received,
                    Err(Errno::CONNRESET) => return Err(Error::HangUp),
                    Err(errno) => return Err(errno.into()),
                };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            assert!(
                !received.flags.contains(ReturnFlags::CTRUNC),
                "descriptors of the back end were lost"
            );
            if received.bytes == 0 {
                return Err(Error::HangUp);
            }
            filled += received.bytes;
        }
        Ok(())
    }
}

/// Whether `fd` can be read, or has ended, within `patience`.
///
/// # Errors
/// What `poll` says.
pub fn readable(fd: BorrowedFd<'_>, patience: Duration) -> Result<bool, Error> {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).expect("a test's patience is short");
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)) {
            Ok(count) => return Ok(count > 0),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

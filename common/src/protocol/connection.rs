//! The socket to the front end: bytes and descriptors in, messages out, and replies.
//!
//! # Contract
//! - [`Connection::receive`] may be dropped at any point and called again (`tokio::select!`): what has arrived of a
//!   message is kept in the connection. [`Connection::reply`] may be dropped too, for instance after a time limit on a
//!   front end that never reads; a part of the reply may be gone by then, so the connection must then be closed.
//! - After [`ReceiveError::Refused`] the message has been read whole, its descriptors are closed, and the next call
//!   reads the next message. After any other error the connection is of no more use.
//! - Nothing is read beyond the end of the message being received, so descriptors belong to that message: the kernel
//!   hands them over with the first byte that they were sent with, wherever a front end cuts its writes.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::message::{HEADER_BYTES, Header, MAX_PAYLOAD_BYTES, Message, Refusal};
use super::table::MAX_FDS;

/// Why no message could be received.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The message was read but cannot be used. The connection is still in step: the caller may answer with
    /// [`Connection::acknowledge`] and go on.
    #[error("refused")]
    Refused {
        /// The request's number, which an answer repeats.
        request_id: u32,
        /// Whether the message asks for an answer.
        need_reply: bool,
        /// What is wrong with it.
        #[source]
        reason: Refusal,
    },
    /// The message is of another version of the protocol.
    #[error("request {request_id} has protocol version {version} instead of 1")]
    Version {
        /// The request's number.
        request_id: u32,
        /// The version.
        version: u32,
    },
    /// The message is marked as a reply, and nothing was asked.
    #[error("request {request_id} is marked as a reply")]
    UnexpectedReply {
        /// The request's number.
        request_id: u32,
    },
    /// The payload is longer than any may be.
    #[error("request {request_id} has a payload of {size} bytes, more than {MAX_PAYLOAD_BYTES}")]
    PayloadTooLong {
        /// The request's number.
        request_id: u32,
        /// The size that the header gives.
        size: u32,
    },
    /// There are more descriptors than a message may have, or than this process may have open.
    #[error("a message has more than {MAX_FDS} file descriptors, or this process is out of them")]
    TooManyFds,
    /// The front end hung up in the middle of a message.
    #[error("the front end hung up after {received} of {expected} bytes of a message")]
    Truncated {
        /// Bytes of the message that have arrived.
        received: usize,
        /// Bytes of the message as far as its length is known.
        expected: usize,
    },
    /// The socket failed.
    #[error("cannot receive from the front end")]
    Io(#[from] io::Error),
}

/// A connected vhost-user socket.
#[derive(Debug)]
pub struct Connection {
    socket: UnixStream,
    incoming: Incoming,
}

/// The part of a message that has arrived.
#[derive(Debug, Default)]
struct Incoming {
    header: [u8; HEADER_BYTES],
    /// As long as the header says, once that is complete.
    payload: Vec<u8>,
    /// Bytes of header and payload so far.
    received: usize,
    fds: Vec<OwnedFd>,
}

impl Connection {
    /// A connection over this socket, which becomes non-blocking. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The socket cannot be made non-blocking or watched.
    pub fn new(socket: std::os::unix::net::UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket: UnixStream::from_std(socket)?, incoming: Incoming::default() })
    }

    /// The next message; `None` if the front end has hung up between messages.
    ///
    /// # Errors
    /// See [`ReceiveError`]; only after `Refused` may this be called again.
    pub async fn receive(&mut self) -> Result<Option<Message>, ReceiveError> {
        self.receive_marked(|_| ()).await
    }

    /// The same. `mark` is told true before anything is taken from the socket, and false if there was nothing: from the one to
    /// the other, and from the last true until the message has been dealt with, the connection is nobody else's to go on with.
    ///
    /// # Errors
    /// As for [`receive`](Self::receive).
    pub async fn receive_marked(
        &mut self,
        mark: impl Fn(bool),
    ) -> Result<Option<Message>, ReceiveError> {
        loop {
            let receive = || {
                mark(true);
                let received = self.incoming.receive_some(&self.socket);
                let nothing =
                    received.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock);
                mark(!nothing || self.incoming.received > 0);
                received
            };
            let received = self.socket.async_io(Interest::READABLE, receive).await;
            let (count, flags) = match received {
                Ok(received) => received,
                // A front end that died with replies unread: a hang-up like any other.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    (0, ReturnFlags::empty())
                }
                Err(error) => return Err(error.into()),
            };
            if flags.contains(ReturnFlags::CTRUNC) || self.incoming.fds.len() > MAX_FDS {
                return Err(ReceiveError::TooManyFds);
            }
            if count == 0 {
                return self.incoming.hang_up();
            }
            if let Some(header) = self.incoming.advance(count)? {
                return self.incoming.take(header).map(Some);
            }
        }
    }

    /// Sends the reply to a request: a header that repeats its number, and `body`.
    ///
    /// Waits until the socket takes it all; the time that this may last is the caller's to limit.
    ///
    /// # Errors
    /// The socket failed, or the body is longer than any payload may be.
    pub async fn reply(&mut self, to: impl Into<u32>, body: &[u8]) -> io::Result<()> {
        self.send(to.into(), body, None).await
    }

    /// The same with a descriptor.
    ///
    /// # Errors
    /// As for [`reply`](Self::reply).
    pub async fn reply_with(
        &mut self,
        to: impl Into<u32>,
        body: &[u8],
        fd: BorrowedFd<'_>,
    ) -> io::Result<()> {
        self.send(to.into(), body, Some(fd)).await
    }

    async fn send(
        &mut self,
        to: u32,
        body: &[u8],
        mut fd: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        if body.len() > MAX_PAYLOAD_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the reply is too long"));
        }
        let header = Header::reply(to, body.len() as u32);
        let message = [&header.to_bytes(), body].concat();
        let mut rest = message.as_slice();
        while !rest.is_empty() {
            let send = || send_some(&self.socket, rest, fd);
            match self.socket.async_io(Interest::WRITABLE, send).await {
                // The descriptor has gone with the first byte.
                Ok(sent) => (rest, fd) = (rest.get(sent..).unwrap_or_default(), None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends success or failure in reply to a request that has no reply of its own (vhost-user,
    /// "VHOST_USER_PROTOCOL_F_REPLY_ACK": zero is success).
    ///
    /// # Errors
    /// As for [`reply`](Self::reply).
    pub async fn acknowledge(&mut self, to: impl Into<u32>, ok: bool) -> io::Result<()> {
        self.reply(to, &u64::from(!ok).to_ne_bytes()).await
    }
}

/// Sends once; how many bytes.
fn send_some(socket: &UnixStream, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = fd.as_slice();
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("there is no room for the descriptor"));
    }
    let bytes = [IoSlice::new(bytes)];
    Ok(rustix::net::sendmsg(socket, &bytes, &mut ancillary, SendFlags::NOSIGNAL)?)
}

impl Incoming {
    /// Receives once: what is there of the header, or else of the payload. Keeps the descriptors that come with it.
    fn receive_some(&mut self, socket: &UnixStream) -> io::Result<(usize, ReturnFlags)> {
        let into = match self.received.checked_sub(HEADER_BYTES) {
            None => self.header.get_mut(self.received..),
            Some(received) => self.payload.get_mut(received..),
        };
        let mut into = [IoSliceMut::new(into.unwrap_or_default())];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        // Close-on-exec from the first moment: another thread may be starting a process.
        let received = loop {
            match rustix::net::recvmsg(socket, &mut into, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                received => break received?,
            }
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        Ok((received.bytes, received.flags))
    }

    /// Counts bytes that have arrived. The header, once the message is complete.
    fn advance(&mut self, count: usize) -> Result<Option<Header>, ReceiveError> {
        let before = self.received;
        self.received = before.saturating_add(count);
        if self.received < HEADER_BYTES {
            return Ok(None);
        }
        let Some(header) = Header::parse(self.header) else {
            return Ok(None);
        };
        if before < HEADER_BYTES {
            let size = check(header)?;
            self.payload.clear();
            self.payload.resize(size, 0);
        }
        Ok((self.received >= self.expected()).then_some(header))
    }

    /// The complete message. What comes next is another one.
    fn take(&mut self, header: Header) -> Result<Message, ReceiveError> {
        self.received = 0;
        let fds = std::mem::take(&mut self.fds);
        Message::new(header, &self.payload, fds).map_err(|reason| ReceiveError::Refused {
            request_id: header.request_id,
            need_reply: header.need_reply(),
            reason,
        })
    }

    fn hang_up(&self) -> Result<Option<Message>, ReceiveError> {
        if self.received == 0 {
            return Ok(None);
        }
        Err(ReceiveError::Truncated { received: self.received, expected: self.expected() })
    }

    /// Bytes of the message, as far as its length is known.
    fn expected(&self) -> usize {
        if self.received < HEADER_BYTES {
            HEADER_BYTES
        } else {
            HEADER_BYTES.saturating_add(self.payload.len())
        }
    }
}

/// What [`Connection::receive`] makes of a message once all of it has arrived; a payload that is shorter than the header
/// says ends in zeros. For fuzzers: it takes no socket. `None` never comes of it.
///
/// # Errors
/// As for [`Connection::receive`].
#[cfg(feature = "fuzzing")]
pub fn parse(
    header: [u8; HEADER_BYTES],
    payload: &[u8],
    fds: Vec<OwnedFd>,
) -> Result<Option<Message>, ReceiveError> {
    let mut incoming = Incoming { header, fds, ..Incoming::default() };
    let mut complete = incoming.advance(HEADER_BYTES)?;
    if complete.is_none() {
        for (to, from) in incoming.payload.iter_mut().zip(payload) {
            *to = *from;
        }
        complete = incoming.advance(incoming.payload.len())?;
    }
    complete.map(|header| incoming.take(header)).transpose()
}

/// Checks what must be right for the end of the message to be known; returns the size of its payload.
fn check(header: Header) -> Result<usize, ReceiveError> {
    let Header { request_id, size, .. } = header;
    header.version().map_err(|version| ReceiveError::Version { request_id, version })?;
    if header.is_reply() {
        return Err(ReceiveError::UnexpectedReply { request_id });
    }
    match usize::try_from(size) {
        Ok(size) if size <= MAX_PAYLOAD_BYTES => Ok(size),
        _ => Err(ReceiveError::PayloadTooLong { request_id, size }),
    }
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]
mod tests {
    use std::io::{IoSlice, Read, Write};
    use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
    use std::os::unix::net::UnixStream;

    use rustix::io::FdFlags;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage};
    use rustix::process::Resource;

    use super::super::table::UnknownRequest;
    use super::super::{Payload, Request};
    use super::*;

    fn pair() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        (Connection::new(ours).expect("connection"), theirs)
    }

    fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
        let header = Header { request_id: request, flags, size: payload.len() as u32 };
        [&header.to_bytes(), payload].concat()
    }

    fn send_with_fds(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = vec![MaybeUninit::uninit(); SendAncillaryMessage::ScmRights(fds).size()];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        let sent = rustix::net::sendmsg(
            socket,
            &[IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::empty(),
        );
        assert_eq!(sent, Ok(bytes.len()));
    }

    async fn received(connection: &mut Connection) -> Message {
        connection.receive().await.expect("a good message").expect("no hang-up")
    }

    /// Lets `receive` take what there is, and drops it, until `count` bytes of a message have arrived.
    async fn receive_in_vain(connection: &mut Connection, count: usize) {
        while connection.incoming.received < count {
            tokio::select! {
                biased;
                message = connection.receive() => unreachable!("not complete: {message:?}"),
                () = tokio::task::yield_now() => {}
            }
        }
    }

    #[tokio::test]
    async fn message_that_comes_byte_by_byte_survives_dropped_receives() {
        let (mut connection, mut theirs) = pair();
        let bytes = message(8, 0x9, &[2, 0, 0, 0, 0, 1, 0, 0]);
        let (last, first) = bytes.split_last().expect("not empty");
        for (count, byte) in first.iter().enumerate() {
            theirs.write_all(&[*byte]).expect("sent");
            receive_in_vain(&mut connection, count + 1).await;
        }
        theirs.write_all(&[*last]).expect("sent");
        let message = received(&mut connection).await;
        assert_eq!((message.request, message.need_reply), (Request::SetVringNum, true));
        let state = Payload::VringState {
            index: u32::from_ne_bytes([2, 0, 0, 0]),
            num: u32::from_ne_bytes([0, 1, 0, 0]),
        };
        assert_eq!(message.payload, state);
    }

    #[tokio::test]
    async fn descriptors_belong_to_their_message_wherever_they_come() {
        let (mut connection, mut theirs) = pair();
        let file = crate::memory::guest_file(0x1000);
        let inode = rustix::fs::fstat(&file).expect("fstat").st_ino;
        let kick = message(12, 1, &7u64.to_ne_bytes());
        // With the header, in the middle of the header, with the payload; with a message before and one behind.
        for cut in [0, 5, 12, 19] {
            theirs.write_all(&message(1, 1, &[])).expect("sent");
            theirs.write_all(&kick[..cut]).expect("sent");
            send_with_fds(&theirs, &kick[cut..], &[file.as_fd()]);
            theirs.write_all(&message(3, 1, &[])).expect("sent");
            assert!(received(&mut connection).await.fds.is_empty());
            let message = received(&mut connection).await;
            assert_eq!(message.payload, Payload::VringFd { index: 7, no_fd: false });
            assert_eq!(message.fds.len(), 1);
            assert_eq!(rustix::fs::fstat(&message.fds[0]).expect("fstat").st_ino, inode);
            let flags = rustix::io::fcntl_getfd(&message.fds[0]).expect("flags");
            assert!(flags.contains(FdFlags::CLOEXEC));
            assert!(received(&mut connection).await.fds.is_empty());
        }
    }

    #[tokio::test]
    async fn memory_table_comes_with_a_descriptor_for_each_region() {
        let (mut connection, theirs) = pair();
        let file = crate::memory::guest_file(0x1000);
        let table = [&32u32.to_ne_bytes()[..], &[0; 4 + 32 * 32]].concat();
        send_with_fds(&theirs, &message(5, 1, &table), &[file.as_fd(); MAX_FDS]);
        assert_eq!(received(&mut connection).await.fds.len(), MAX_FDS);
    }

    #[tokio::test]
    async fn too_many_descriptors_end_the_connection() {
        let file = crate::memory::guest_file(0x1000);
        for count in [MAX_FDS + 1, MAX_FDS + 2, 200] {
            let (mut connection, theirs) = pair();
            send_with_fds(&theirs, &message(1, 1, &[]), &vec![file.as_fd(); count]);
            let error = connection.receive().await.expect_err("too many");
            assert!(matches!(error, ReceiveError::TooManyFds), "{error}");
        }
        // No limit can be passed by sending them in parts.
        let (mut connection, theirs) = pair();
        for part in message(2, 1, &[0; 8]).chunks(10) {
            send_with_fds(&theirs, part, &[file.as_fd(); MAX_FDS]);
        }
        assert!(matches!(connection.receive().await, Err(ReceiveError::TooManyFds)));
    }

    /// Set in the process of its own in which a test runs that takes the process's descriptors away.
    const CHILD: &str = "OUTBOARD_TEST_CHILD";

    #[tokio::test]
    async fn process_without_free_descriptors_ends_the_connection() {
        if std::env::var_os(CHILD).is_none() {
            let (_crate, module) = module_path!().split_once("::").expect("a path in this crate");
            let test = format!("{module}::process_without_free_descriptors_ends_the_connection");
            let mut child = std::process::Command::new(std::env::current_exe().expect("program"));
            let output = child.args(["--exact", &test]).env(CHILD, "1").output().expect("run it");
            assert!(output.status.success(), "{output:?}");
            return;
        }
        let (mut connection, theirs) = pair();
        let file = crate::memory::guest_file(0x1000);
        // The lowest free number becomes the limit, so that none is free below it.
        let free = rustix::io::dup(&file).expect("dup").as_raw_fd();
        let mut limit = rustix::process::getrlimit(Resource::Nofile);
        limit.current = Some(free as u64);
        rustix::process::setrlimit(Resource::Nofile, limit).expect("limit");
        send_with_fds(&theirs, &message(38, 1, &[0; 40]), &[file.as_fd()]);
        let error = connection.receive().await.expect_err("no room");
        assert!(matches!(error, ReceiveError::TooManyFds), "{error}");
    }

    /// Sends a message that asks for an answer and is to be refused; checks that the answer reaches
    /// the front end and that the message behind it is the next one. Returns the reason.
    async fn refusal(request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Refusal {
        let (mut connection, mut theirs) = pair();
        send_with_fds(&theirs, &message(request, 0x9, payload), fds);
        theirs.write_all(&message(1, 1, &[])).expect("sent");
        let error = connection.receive().await.expect_err("refused");
        let ReceiveError::Refused { request_id, need_reply, reason } = error else {
            unreachable!("{error}")
        };
        assert_eq!((request_id, need_reply), (request, true));
        connection.acknowledge(request_id, false).await.expect("acknowledged");
        let mut answer = [0; 20];
        theirs.read_exact(&mut answer).expect("answer");
        assert_eq!(answer.to_vec(), message(request, 0x5, &1u64.to_ne_bytes()));
        assert_eq!(received(&mut connection).await.request, Request::GetFeatures);
        reason
    }

    #[tokio::test]
    async fn unknown_request_or_wrong_size_leaves_the_stream_in_step() {
        let unknown = refusal(45, &[1, 2, 3], &[]).await;
        assert_eq!(unknown, Refusal::UnknownRequest(UnknownRequest(45)));
        let request = Request::SetFeatures;
        let size = Refusal::PayloadSize { request, actual: 7, min: 8, max: 8 };
        assert_eq!(refusal(2, &[0; 7], &[]).await, size);
    }

    #[tokio::test]
    async fn wrong_count_of_descriptors_leaves_the_stream_in_step_and_none_open() {
        let (reader, writer) = rustix::pipe::pipe().expect("pipe");
        let fd = writer.as_fd();
        let (set, no_fd) = (0u64.to_ne_bytes(), 256u64.to_ne_bytes());
        let cases: [(Request, &[u8], &[BorrowedFd<'_>], usize); 5] = [
            (Request::GetFeatures, &[], &[fd], 0),
            (Request::SetVringKick, &no_fd, &[fd], 0),
            (Request::SetVringCall, &set, &[], 1),
            (Request::AddMemReg, &[0; 40], &[fd, fd], 1),
            (Request::SetMemTable, &[0; 8], &[fd], 0),
        ];
        for (request, payload, fds, due) in cases {
            let actual = fds.len();
            let expected = Refusal::FdCount { request, actual, min: due, max: due };
            assert_eq!(refusal(request.into(), payload, fds).await, expected);
        }
        drop(writer);
        let end = rustix::io::read(&reader, &mut [0; 1]);
        assert_eq!(end, Ok(0), "no write end is left open");
    }

    #[tokio::test]
    async fn old_front_end_may_send_a_descriptor_to_be_closed_with_rem_mem_reg() {
        let (mut connection, mut theirs) = pair();
        let file = crate::memory::guest_file(0x1000);
        theirs.write_all(&message(38, 1, &[0; 40])).expect("sent");
        send_with_fds(&theirs, &message(38, 1, &[0; 40]), &[file.as_fd()]);
        assert_eq!(received(&mut connection).await.fds.len(), 0);
        assert_eq!(received(&mut connection).await.fds.len(), 1);
    }

    #[tokio::test]
    async fn header_that_cannot_be_trusted_ends_the_connection() {
        let header = |flags, size| Header { request_id: 9, flags, size }.to_bytes();
        let error = |bytes: [u8; HEADER_BYTES]| async move {
            let (mut connection, mut theirs) = pair();
            theirs.write_all(&bytes).expect("sent");
            connection.receive().await.expect_err("a bad header")
        };
        for flags in [0, 2, 3, 8] {
            let got = error(header(flags, 40)).await;
            let version = flags & 3;
            assert!(
                matches!(got, ReceiveError::Version { request_id: 9, version: v } if v == version),
                "{got}"
            );
        }
        assert!(matches!(
            error(header(5, 40)).await,
            ReceiveError::UnexpectedReply { request_id: 9 }
        ));
        for size in [4097, u32::MAX] {
            let got = error(header(1, size)).await;
            assert!(
                matches!(got, ReceiveError::PayloadTooLong { request_id: 9, size: s } if s == size),
                "{got}"
            );
        }
    }

    #[tokio::test]
    async fn longest_payload_is_read_whole() {
        let (mut connection, mut theirs) = pair();
        theirs.write_all(&message(99, 1, &[0; MAX_PAYLOAD_BYTES])).expect("sent");
        theirs.write_all(&message(3, 1, &[])).expect("sent");
        assert!(matches!(
            connection.receive().await,
            Err(ReceiveError::Refused { request_id: 99, .. })
        ));
        assert_eq!(received(&mut connection).await.request, Request::SetOwner);
    }

    #[tokio::test]
    async fn hang_up_between_messages_is_the_end_and_within_one_an_error() {
        let whole = message(2, 1, &[0; 8]);
        for (cut, expected) in [(0, 12), (1, 12), (11, 12), (12, 20), (19, 20), (20, 12)] {
            let (mut connection, mut theirs) = pair();
            theirs.write_all(&whole[..cut]).expect("sent");
            drop(theirs);
            if cut == whole.len() {
                assert_eq!(received(&mut connection).await.request, Request::SetFeatures);
            }
            match connection.receive().await {
                Ok(None) => assert!(cut == 0 || cut == whole.len()),
                Err(ReceiveError::Truncated { received, expected: known }) => {
                    assert_eq!((received, known), (cut, expected));
                }
                other => unreachable!("{other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn front_end_that_dies_with_replies_unread_has_hung_up() {
        let (mut connection, theirs) = pair();
        connection.reply(Request::GetFeatures, &[0; 8]).await.expect("sent");
        drop(theirs);
        assert!(matches!(connection.receive().await, Ok(None)));
        assert!(connection.reply(Request::GetFeatures, &[0; 8]).await.is_err());
    }

    #[tokio::test]
    async fn reply_repeats_the_request_and_is_marked() {
        let (mut connection, mut theirs) = pair();
        connection.reply(Request::GetQueueNum, &4u64.to_ne_bytes()).await.expect("sent");
        connection.acknowledge(Request::SetMemTable, true).await.expect("sent");
        let mut answers = [0; 40];
        theirs.read_exact(&mut answers).expect("answers");
        assert_eq!(answers[..20].to_vec(), message(17, 0x5, &4u64.to_ne_bytes()));
        assert_eq!(answers[20..].to_vec(), message(5, 0x5, &0u64.to_ne_bytes()));
        assert!(connection.reply(Request::GetConfig, &[0; MAX_PAYLOAD_BYTES + 1]).await.is_err());
    }

    #[tokio::test]
    async fn reply_to_a_front_end_that_does_not_read_waits_until_it_does_or_is_dropped() {
        let (mut connection, mut theirs) = pair();
        let body = [7; MAX_PAYLOAD_BYTES];
        let mut whole = 0;
        // The socket's buffer is bounded, so this ends: in a reply that waits, and is dropped.
        loop {
            tokio::select! {
                biased;
                sent = connection.reply(Request::GetConfig, &body) => sent.expect("sent"),
                () = tokio::task::yield_now() => break,
            }
            whole += HEADER_BYTES + body.len();
        }
        let reader = std::thread::spawn(move || {
            let mut read = Vec::new();
            theirs.read_to_end(&mut read).expect("read");
            read.len()
        });
        for _ in 0..3 {
            connection
                .reply(Request::GetConfig, &body)
                .await
                .expect("sent, now that the other side reads");
        }
        drop(connection);
        let read = reader.join().expect("the reader");
        assert!(read >= whole + 3 * (HEADER_BYTES + body.len()));
    }
}

//! A stream of messages over a real socket, cut anywhere, with descriptors anywhere: what arrives must be what the
//! parser makes of each message by itself, and no descriptor may be left open.
//!
//! Input: the number of writes before the last (modulo 8), for each its length (2 bytes) and its number of
//! descriptors, and that number for the last; then the stream.

use std::io::{ErrorKind, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use common::protocol::table::MAX_FDS;
use common::protocol::{Connection, Message, ReceiveError, parse};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tokio::runtime::Runtime;

use crate::message::descriptors;
use crate::script::Script;

const HEADER_BYTES: usize = 12;
const WRITES_LIMIT: usize = 8;
/// More descriptors than a message may have.
const FDS_LIMIT: usize = MAX_FDS + 2;

thread_local! {
    static RUNTIME: Runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .expect("a runtime");
}

/// A write of the front end: so many bytes, and so many descriptors.
struct Write<'a> {
    at: usize,
    bytes: &'a [u8],
    fds: usize,
}

/// Sends a stream and receives it.
pub fn run(data: &[u8]) {
    let mut script = Script::new(data);
    let count = script.below(WRITES_LIMIT);
    let plan: Vec<(usize, usize)> =
        (0..count).map(|_| (usize::from(script.u16()), script.below(FDS_LIMIT))).collect();
    let last = (usize::MAX, script.below(FDS_LIMIT));
    let stream = script.rest();
    let mut writes = Vec::new();
    for (len, fds) in plan.into_iter().chain([last]) {
        let bytes = script.bytes(len);
        // Descriptors travel with a byte, or not at all.
        if !bytes.is_empty() {
            writes.push(Write { at: stream.len() - script.rest().len() - bytes.len(), bytes, fds });
        }
    }
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    RUNTIME
        .with(|runtime| runtime.block_on(exchange(stream, &writes, OwnedFd::from(writer).as_fd())));
    // Were a write end open somewhere, this would wait for ever: the kernel must say at once that there is none.
    rustix::fs::fcntl_setfl(&reader, rustix::fs::OFlags::NONBLOCK).expect("a pipe");
    let end = reader.read(&mut [0]).map_err(|error| error.kind());
    assert_ne!(end, Err(ErrorKind::WouldBlock), "a descriptor is left open");
}

/// Lets the two ends talk, write by write.
async fn exchange(stream: &[u8], writes: &[Write<'_>], fd: BorrowedFd<'_>) {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let mut connection = Connection::new(ours).expect("a connection");
    let mut oracle = Oracle { stream, writes, at: 0 };
    for write in writes {
        if !send(&theirs, write, fd) {
            break;
        }
        loop {
            // The second turn of the runtime is the first that knows what the socket has.
            let received = tokio::select! {
                biased;
                received = connection.receive() => received,
                () = async { for _ in 0..2 { tokio::task::yield_now().await } } => break,
            };
            if !oracle.compare(received) {
                return;
            }
        }
    }
    drop(theirs);
    while oracle.compare(connection.receive().await) {}
}

fn send(socket: &UnixStream, write: &Write<'_>, fd: BorrowedFd<'_>) -> bool {
    let fds = vec![fd; write.fds];
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_LIMIT))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    let bytes = [IoSlice::new(write.bytes)];
    let sent = rustix::net::sendmsg(socket, &bytes, &mut ancillary, SendFlags::NOSIGNAL);
    sent.expect("inputs are shorter than a socket's buffer") == write.bytes.len()
}

/// What ought to be received.
struct Oracle<'a> {
    stream: &'a [u8],
    writes: &'a [Write<'a>],
    /// Where the next message begins.
    at: usize,
}

impl Oracle<'_> {
    /// Compares what was received with what is due; whether more may follow.
    fn compare(&mut self, received: Result<Option<Message>, ReceiveError>) -> bool {
        let rest = &self.stream[self.at..];
        let header = rest.first_chunk::<HEADER_BYTES>();
        let size = header.map_or(0, |header| {
            u32::from_ne_bytes([header[8], header[9], header[10], header[11]]) as usize
        });
        let end = HEADER_BYTES.saturating_add(size);
        let within = self.at..self.at.saturating_add(end.min(rest.len()));
        let fds = self.writes.iter().filter(|write| within.contains(&write.at));
        let fds = fds.map(|write| write.fds).sum();
        if fds > MAX_FDS {
            assert!(received.is_err(), "{fds} descriptors came with {received:?}");
            return false;
        }
        let Some(header) = header else {
            self.compare_end(received, HEADER_BYTES);
            return false;
        };
        let payload = rest.get(HEADER_BYTES..end).unwrap_or_default();
        let due = parse(*header, payload, descriptors(fds));
        match (due, received) {
            (Err(due), received) if !matches!(due, ReceiveError::Refused { .. }) => {
                let received = received.expect_err("a header that cannot be trusted");
                assert_eq!(format!("{due:?}"), format!("{received:?}"));
                return false;
            }
            (_, received) if end > rest.len() => {
                self.compare_end(received, end);
                return false;
            }
            (Ok(Some(due)), Ok(Some(received))) => {
                assert_eq!((due.request, due.need_reply), (received.request, received.need_reply));
                assert_eq!((due.payload, due.fds.len()), (received.payload, received.fds.len()));
            }
            (Err(due), Err(received)) => assert_eq!(format!("{due:?}"), format!("{received:?}")),
            (due, received) => unreachable!("{due:?} is due, {received:?} came"),
        }
        self.at += end;
        true
    }

    fn compare_end(&self, received: Result<Option<Message>, ReceiveError>, due: usize) {
        match (self.stream.len() - self.at, received) {
            (0, Ok(None)) => {}
            (rest, Err(ReceiveError::Truncated { received, expected })) if rest > 0 => {
                assert_eq!((received, expected), (rest, due));
            }
            (rest, other) => unreachable!("{other:?} at a hang-up {rest} bytes into a message"),
        }
    }
}

//! What executes a device's I/O, its requests' system calls.
//!
//! Contract: a device names an [`Op`]; the engine runs it and gives back one [`Completion`] with
//! the same [`Token`]. The buffers that an operation names stay mapped and unused by others until
//! then: the virtqueue's slot sees to that. The [`Op`] enum is the whole system-call surface of
//! every device's requests, so most of a sandbox's rules can be read off it; what comes and goes through a
//! channel (a tap, a socket) does so by `readv` and `writev` ([`ChannelIndex`]). What workers and the main
//! thread do besides: a blocking eventfd is written by the worker (`worker/bell.rs`), and a disk measures
//! itself and, on a thread of its own, syncs once after a switch of its cache.
//!
//! [`Engine`] is what a worker knows of it. With `uring`, everything that a turn of the worker's loop
//! has to say to the kernel goes into one `io_uring_enter`, which also waits. `threads`, epoll and a
//! pool of threads, is for hosts that forbid io_uring. [`EngineKind`] names the two, and says which of
//! them there can be.

mod channel;
mod event;
mod kind;
mod op;
#[cfg(test)]
pub(crate) mod tests;
mod threads;
mod uring;

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;

use crate::memory::HostBuffer;

pub(crate) use self::channel::Channels;
pub use self::channel::{ChannelIndex, Readiness};
pub(crate) use self::event::{Event, Subject, Wait};
pub use self::kind::{EngineKind, Unavailable};
pub use self::op::{Completion, FileIndex, Op, Token, Zeroing};

/// Executes operations, watches kicks and writes calls, for one worker.
pub(crate) trait Engine {
    /// Queues an operation; the kernel sees it with the next [`turn`](Self::turn).
    ///
    /// # Errors
    /// The kernel refused to take the submissions that were in the way.
    fn submit(&mut self, queue: u16, token: Token, op: Op<'_>) -> io::Result<()>;

    /// Receives from a channel what is there, at once.
    ///
    /// # Errors
    /// The kernel's: `AGAIN` where there is nothing.
    fn receive(&mut self, channel: ChannelIndex, into: &[HostBuffer]) -> Result<usize, Errno>;

    /// Sends over a channel what finds room, at once.
    ///
    /// # Errors
    /// The kernel's: `AGAIN` where there is no room.
    fn send_to(&mut self, channel: ChannelIndex, from: &[HostBuffer]) -> Result<usize, Errno>;

    /// Waits for a channel on behalf of a queue, which waits for one at a time: one [`Event`] when it
    /// is ready.
    ///
    /// # Errors
    /// As for [`submit`](Self::submit).
    fn await_channel(
        &mut self,
        queue: u16,
        channel: ChannelIndex,
        readiness: Readiness,
    ) -> io::Result<()>;

    /// Watches a descriptor for being readable: an [`Event`] each time it becomes so, until one
    /// without `more`.
    ///
    /// # Errors
    /// As for [`submit`](Self::submit).
    fn watch(&mut self, subject: Subject, fd: &OwnedFd) -> io::Result<()>;

    /// Writes a notification: eight bytes, the number 1, as an eventfd wants it. The descriptor
    /// must stay open until the event comes.
    ///
    /// # Errors
    /// As for [`submit`](Self::submit).
    fn signal(&mut self, subject: Subject, fd: &OwnedFd) -> io::Result<()>;

    /// Ends a watch or a write: its last event comes soon. Another event tells whether the kernel
    /// found it: it may not while a watch is just firing (`EALREADY`).
    ///
    /// # Errors
    /// As for [`submit`](Self::submit).
    fn call_off(&mut self, what: Subject) -> io::Result<()>;

    /// Whether a turn would bring something: a look at shared memory, not a system call.
    fn has_events(&mut self) -> bool;

    /// Hands what is queued to the kernel, if anything is, and waits for nothing.
    ///
    /// # Errors
    /// The kernel refused the submissions.
    fn send(&mut self) -> io::Result<()>;

    /// Hands everything queued to the kernel, waits, and appends what has completed to `events`.
    ///
    /// # Errors
    /// The kernel refused the submissions.
    fn turn(&mut self, wait: Wait, events: &mut Vec<Event>) -> io::Result<()>;
}

/// Why there is no engine.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The kernel gave a worker no ring, though it had given one before.
    #[error("a worker gets no io_uring (--aio threads does without)")]
    Uring(#[from] Unavailable),
    /// A worker's threads, or what it waits with, could not be made.
    #[error("a worker gets no I/O threads")]
    Threads(#[source] io::Error),
    /// A worker's thread or mailbox could not be made.
    #[error("a worker cannot be started")]
    Worker(#[source] io::Error),
}

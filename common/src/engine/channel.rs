//! Channels: what frames or bytes come and go through, a tap or a socket.
//!
//! Contract: a channel's descriptor never blocks, so that moving data ends at once: in the worker's own
//! thread, by one plain system call, whichever the engine. A copy that waits for nothing gains nothing by a
//! detour through the engine's rings; what there is to wait for is the channel's becoming ready, and that
//! goes through the engine ([`Engine::await_channel`](super::Engine::await_channel)). A channel is named by its
//! place among [`Device::channels`](crate::device::Device::channels) and used by its descriptor's number:
//! whoever opens it anew puts it under the same number (`dup3`), and nobody else need hear of it.

#![allow(unsafe_code, reason = "system calls take addresses that the kernel will use")]

use std::os::fd::RawFd;

use rustix::io::Errno;

use crate::memory::HostBuffer;
use crate::virtqueue::MAX_CHAIN_DESCRIPTORS;

/// Which of the device's channels is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ChannelIndex(pub u16);

/// What a channel is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// There is something to receive, or the channel is gone.
    Readable,
    /// There is room to send, or the channel is gone.
    Writable,
}

impl Readiness {
    /// As `poll(2)` asks for it.
    pub(super) fn poll_bits(self) -> u32 {
        match self {
            Self::Readable => libc::POLLIN as u32,
            Self::Writable => libc::POLLOUT as u32,
        }
    }
}

/// The device's channels, by their numbers.
#[derive(Default)]
pub(crate) struct Channels(Vec<RawFd>);

impl Channels {
    pub(crate) fn new(descriptors: Vec<RawFd>) -> Self {
        Self(descriptors)
    }

    pub(super) fn descriptor(&self, channel: ChannelIndex) -> RawFd {
        self.0[usize::from(channel.0)]
    }

    /// Fills `into` from its first byte on; how many bytes there were.
    pub(super) fn receive(
        &self,
        channel: ChannelIndex,
        into: &[HostBuffer],
    ) -> Result<usize, Errno> {
        let (list, count) = as_kernel_takes_it(into);
        // SAFETY: a buffer has the layout of an `iovec` and is mapped until its chain ends, which it does not while
        // the call lasts; the kernel writes to no others.
        until_uninterrupted(|| unsafe { libc::readv(self.descriptor(channel), list, count) })
    }

    /// Sends the bytes of `from`; how many were taken.
    pub(super) fn send(&self, channel: ChannelIndex, from: &[HostBuffer]) -> Result<usize, Errno> {
        let file = self.descriptor(channel);
        if let [only] = from {
            let bytes = only.address() as *const libc::c_void;
            // SAFETY: as below, of one buffer: the kernel looks at no list.
            return until_uninterrupted(|| unsafe { libc::write(file, bytes, only.len()) });
        }
        let (list, count) = as_kernel_takes_it(from);
        // SAFETY: as in `receive`, with the directions exchanged.
        until_uninterrupted(|| unsafe { libc::writev(file, list, count) })
    }
}

/// Address and length of a list.
fn as_kernel_takes_it(list: &[HostBuffer]) -> (*const libc::iovec, libc::c_int) {
    let limit = usize::from(MAX_CHAIN_DESCRIPTORS);
    assert!(list.len() <= limit, "the kernel takes {limit} buffers in one call");
    (list.as_ptr().cast(), list.len() as libc::c_int)
}

/// Calls until no signal came in between.
fn until_uninterrupted(call: impl Fn() -> isize) -> Result<usize, Errno> {
    loop {
        match usize::try_from(call()) {
            Ok(moved) => return Ok(moved),
            Err(_negative) => match Errno::from_io_error(&std::io::Error::last_os_error()) {
                Some(Errno::INTR) => {}
                errno => return Err(errno.unwrap_or(Errno::IO)),
            },
        }
    }
}

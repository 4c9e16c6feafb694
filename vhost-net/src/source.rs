//! Where received frames come from, as a receiving queue knows it.
//!
//! Contract: [`Source::receive`] receives one frame, its virtio header before it, into a [`Landing`], which has room for
//! the longest. It says how long the frame is, or gives the kernel's error: `AGAIN` where there is none.

mod stream;

use common::device::QueueIo;
use common::engine::ChannelIndex;
use common::memory::HostBuffer;
use common::virtqueue::Buffers;
use rustix::io::Errno;

use crate::backend::Backend;
use crate::backend::null::HEAD;
use crate::header::{ETHERNET_BYTES, HEADER_BYTES};

pub(crate) use self::stream::{Inlet, StreamSource};

/// Where a frame goes: memory of ours for its head, guest memory, and the spill, one behind the other.
#[derive(Clone, Copy)]
pub(crate) struct Landing<'a>(pub(crate) &'a [HostBuffer]);

impl<'a> Landing<'a> {
    /// The first of it, with the header.
    fn head(self) -> Buffers<'a> {
        Buffers::new(self.0)
    }

    /// Without the header.
    fn frame(self) -> Buffers<'a> {
        Buffers::new(self.0).slice(HEADER_BYTES, usize::MAX)
    }
}

/// See the module's head.
pub(crate) enum Source {
    /// A tap: one call brings one frame and its header.
    Tap(ChannelIndex),
    /// A stream of bytes.
    Stream(StreamSource),
    /// Nobody; but where a length is given, there is always a frame of that length.
    Null {
        /// Those.
        flood: Option<Flood>,
    },
}

/// Frames without end.
pub(crate) struct Flood {
    pub(crate) frame_bytes: usize,
    /// What each begins with.
    pub(crate) head: [u8; HEADER_BYTES + ETHERNET_BYTES],
}

impl Flood {
    /// Frames of this length.
    pub(crate) fn new(frame_bytes: u16) -> Self {
        let mut head = [0; HEADER_BYTES + ETHERNET_BYTES];
        head[HEADER_BYTES..].copy_from_slice(&HEAD);
        Self { frame_bytes: usize::from(frame_bytes), head }
    }
}

impl Source {
    /// What to wait for, where there is something that frames come through.
    pub(crate) fn channel(&self) -> Option<ChannelIndex> {
        match self {
            Self::Tap(channel) => Some(*channel),
            Self::Stream(stream) => Some(stream.channel),
            Self::Null { .. } => None,
        }
    }

    /// How long the next frame is, where that is known.
    pub(crate) fn next_bytes(&mut self) -> Option<usize> {
        match self {
            Self::Stream(stream) => stream.next_bytes(),
            Self::Null { flood: Some(flood) } => Some(flood.frame_bytes),
            Self::Tap(_) | Self::Null { flood: None } => None,
        }
    }

    /// See the module's head. `list` is kept for its capacity. `PIPE`: whoever sent frames has gone.
    pub(crate) fn receive(
        &mut self,
        landing: Landing<'_>,
        list: &mut Vec<HostBuffer>,
        backend: &Backend,
        io: &mut QueueIo<'_>,
    ) -> Result<usize, Errno> {
        match self {
            Self::Tap(channel) => {
                let received = io.receive(*channel, landing.0)?;
                // A tap that is being taken down may bring nothing.
                received.checked_sub(HEADER_BYTES).ok_or(Errno::AGAIN)
            }
            Self::Stream(stream) => stream.receive(landing, list, backend, io),
            Self::Null { flood: Some(flood) } => {
                landing.head().write(&flood.head);
                Ok(flood.frame_bytes)
            }
            Self::Null { flood: None } => Err(Errno::AGAIN),
        }
    }
}

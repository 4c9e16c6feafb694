//! Where received frames come from, as a receiving queue knows it.
//!
//! Contract: [`Source::receive`] receives one frame: its virtio header and its first bytes into `head`, what follows
//! into the room in guest memory, and what finds none there into the spill, which takes the longest frame's. It says
//! how long the frame is, or gives the kernel's error: `AGAIN` where there is none.

use common::device::QueueIo;
use common::engine::ChannelIndex;
use common::memory::HostBuffer;
use common::virtqueue::Buffers;
use rustix::io::Errno;

use crate::backend::null::HEAD;
use crate::header::{ETHERNET_BYTES, HEADER_BYTES};

/// Where a frame goes.
pub(crate) struct Landing<'a> {
    /// For its header and its first bytes.
    pub(crate) head: HostBuffer,
    /// Guest memory for what follows.
    pub(crate) room: Buffers<'a>,
    /// For what finds no place there.
    pub(crate) spill: HostBuffer,
}

/// See the module's head.
pub(crate) enum Source {
    /// A tap: one call brings one frame and its header.
    Tap(ChannelIndex),
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
            Self::Null { .. } => None,
        }
    }

    /// How long the next frame is, where that is known.
    pub(crate) fn next_bytes(&self) -> Option<usize> {
        match self {
            Self::Null { flood: Some(flood) } => Some(flood.frame_bytes),
            Self::Tap(_) | Self::Null { flood: None } => None,
        }
    }

    /// See the module's head. `list` is kept for its capacity.
    pub(crate) fn receive(
        &mut self,
        landing: Landing<'_>,
        list: &mut Vec<HostBuffer>,
        io: &mut QueueIo<'_>,
    ) -> Result<usize, Errno> {
        match self {
            Self::Tap(channel) => {
                list.clear();
                list.push(landing.head);
                list.extend(landing.room.iter());
                list.push(landing.spill);
                let received = io.receive(*channel, list)?;
                // A tap that is being taken down may bring nothing.
                received.checked_sub(HEADER_BYTES).ok_or(Errno::AGAIN)
            }
            Self::Null { flood: Some(flood) } => {
                landing.head.write(0, &flood.head);
                Ok(flood.frame_bytes)
            }
            Self::Null { flood: None } => Err(Errno::AGAIN),
        }
    }
}

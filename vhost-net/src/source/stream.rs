//! Frames that come in a stream of bytes.
//!
//! Contract: a frame that is there whole goes where it is to go, by the one read that also brings the length of the next
//! ([`Inbound`]). What is there in part is copied to memory of ours ([`Inlet`]), since the chains that it landed in go
//! back to the ring meanwhile, and is copied from there when the rest has come. The inlet outlives its queue: a stream
//! goes on where it was, whether or not a ring runs.

use common::device::QueueIo;
use common::engine::ChannelIndex;
use common::memory::{HostBuffer, OwnMemory};
use common::virtqueue::Buffers;
use rustix::io::Errno;

use super::Landing;
use crate::backend::framing::{Fault, Inbound, PREFIX_BYTES, Progress};
use crate::backend::{Backend, Side};
use crate::header::{FRAME_BYTES_MAX, HEADER_BYTES};

/// Reads in which a frame is to be whole, or it is another turn's: a peer that sends byte after byte is not waited for.
/// Most frames take one; after a pause there is a length to read before.
const READS_MAX: u32 = 8;

/// Where a stream has got to.
#[derive(Default)]
pub(crate) struct Inlet {
    /// The opening of the back end that it is of.
    generation: u32,
    inbound: Inbound,
    /// The frame of which only a part is there; made when it is first wanted.
    part: Option<OwnMemory>,
}

/// See the module's head.
pub(crate) struct StreamSource {
    pub(super) channel: ChannelIndex,
    inlet: Inlet,
    /// Where the next length is read to.
    prefix: OwnMemory,
}

impl StreamSource {
    pub(crate) fn new(channel: ChannelIndex, inlet: Inlet) -> Self {
        Self { channel, inlet, prefix: OwnMemory::new(PREFIX_BYTES) }
    }

    /// For the next queue.
    pub(crate) fn into_inlet(self) -> Inlet {
        self.inlet
    }

    /// How long the next frame is, once its length is there.
    pub(super) fn next_bytes(&mut self) -> Option<usize> {
        let want = self.inlet.inbound.wants().ok()?;
        let len_bytes = want.frame_received_bytes + want.frame_rest_bytes;
        (len_bytes > 0).then_some(len_bytes)
    }

    /// As [`Source::receive`](super::Source::receive), but that `AGAIN` may also mean that there is more. `PIPE`: the peer has gone; `PROTO`:
    /// what it sent is no frame, and the connection is given up.
    pub(super) fn receive(
        &mut self,
        landing: Landing<'_>,
        list: &mut Vec<HostBuffer>,
        backend: &Backend,
        io: &mut QueueIo<'_>,
    ) -> Result<usize, Errno> {
        if self.inlet.generation != backend.link().generation() {
            let generation = backend.adopt(Side::Receive)?;
            (self.inlet.generation, self.inlet.inbound) = (generation, Inbound::default());
        }
        for _ in 0..READS_MAX {
            match self.advance(landing, list, io) {
                Ok(None) => {}
                Ok(Some(len_bytes)) => return Ok(len_bytes),
                Err(End::Kernel(errno)) => return Err(errno),
                Err(End::Fault(Fault::Ended)) => return Err(Errno::PIPE),
                Err(End::Fault(Fault::Length(_))) => {
                    backend.give_up(Side::Receive);
                    return Err(Errno::PROTO);
                }
            }
        }
        Err(Errno::AGAIN)
    }

    /// One read: a frame may be whole then.
    fn advance(
        &mut self,
        landing: Landing<'_>,
        list: &mut Vec<HostBuffer>,
        io: &mut QueueIo<'_>,
    ) -> Result<Option<usize>, End> {
        let Inlet { inbound, part, .. } = &mut self.inlet;
        let want = inbound.wants().map_err(End::Fault)?;
        let before = want.frame_received_bytes;
        list.clear();
        if before == 0 {
            list.extend(landing.frame().slice(0, want.frame_rest_bytes).iter());
        } else {
            list.extend(part.iter().map(|part| part.buffer().slice(before, want.frame_rest_bytes)));
        }
        list.push(self.prefix.buffer().slice(0, want.prefix_bytes));
        let received = io.receive(self.channel, list).map_err(End::Kernel)?;
        let mut prefix = [0; PREFIX_BYTES];
        self.prefix.buffer().read(0, &mut prefix);
        match inbound.received(received, &prefix).map_err(End::Fault)? {
            Progress::Frame { len_bytes } => {
                if let (true, Some(part)) = (before > 0, part) {
                    landing.frame().copy_from(Buffers::new(&[part.buffer().slice(0, len_bytes)]));
                }
                // The protocol has no header: nothing is left to the driver.
                landing.head().write(&[0; HEADER_BYTES]);
                Ok(Some(len_bytes))
            }
            Progress::Partial => {
                if before == 0 {
                    let part = part.get_or_insert_with(|| OwnMemory::new(FRAME_BYTES_MAX));
                    let come = landing.frame().slice(0, received.min(want.frame_rest_bytes));
                    Buffers::new(&[part.buffer()]).copy_from(come);
                }
                Ok(None)
            }
        }
    }
}

/// Why there is no frame.
enum End {
    Kernel(Errno),
    Fault(Fault),
}

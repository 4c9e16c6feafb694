//! Transmitting: a chain of the driver's, a frame on the back end.
//!
//! Contract: what decides about a frame (its header, its Ethernet header) is copied out of guest memory once, looked
//! at there, and sent from there, so that a driver which changes it meanwhile changes nothing. All that follows goes
//! from guest memory to the back end as it lies. A frame that may not be sent is dropped and counted, and its chain
//! ends like any other: VIRTIO has no way to tell a driver.

use std::sync::Arc;

use common::device::{Account, HostFault, QueueIo};
use common::engine::{ChannelIndex, Readiness};
use common::memory::{HostBuffer, OwnMemory};
use common::rate_limit;
use common::virtqueue::{Buffers, Chain, MAX_CHAIN_DESCRIPTORS};
use rustix::io::Errno;

use crate::backend::Side;
use crate::capture::{Direction, Recorder};
use crate::device::{Kind, Shared};
use crate::drops::Reason;
use crate::header::{
    ETHERNET_BYTES, HEADER_BYTES, Head, Header, LEGACY_HEADER_BYTES, Malformed, VLAN_TAG_BYTES,
    header_bytes, insert_vlan_tag, widened,
};
use crate::outbox::Outbox;

/// What is looked at: the header, and the Ethernet header with a tag.
const HEAD_BYTES: usize = HEADER_BYTES + ETHERNET_BYTES + VLAN_TAG_BYTES;
/// A payload as short as this is copied behind its head: one buffer costs the kernel less than two, by more than the copy
/// does.
const COPIED_BYTES_MAX: usize = 256;
/// Before a frame on a stream: its length.
const PREFIX_BYTES: usize = 4;

/// What stands before each frame on the back end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    /// A virtio header: a tap.
    Header,
    /// The frame's length: a stream.
    Length,
    /// Nobody reads it.
    Nobody,
}

/// The transmitting half of a queue pair.
pub(crate) struct Transmitter {
    shared: Arc<Shared>,
    pair: u16,
    channel: ChannelIndex,
    framing: Framing,
    features: u64,
    header_bytes: usize,
    outbox: Outbox,
    /// What stands before a frame's payload, and a short one itself.
    head: OwnMemory,
    /// The frame, as it is sent.
    list: Vec<HostBuffer>,
    recorder: Option<Recorder>,
}

/// What has become of a chain.
enum Outcome {
    /// Its frame of this length is sent, or in the outbox.
    Sent {
        frame_bytes: usize,
    },
    Dropped(Reason),
    /// It is over a limit: its time will come.
    Throttled,
}

/// A frame's private half.
struct Frame {
    /// Bytes of [`Transmitter::head`].
    head_bytes: usize,
    /// Bytes of the chain that these stand for.
    taken_bytes: usize,
    frame_bytes: usize,
}

impl Transmitter {
    pub(crate) fn new(shared: Arc<Shared>, pair: u16, features: u64) -> Self {
        let outbox = shared.take_outbox(pair);
        Self {
            channel: shared.transmit_channel(pair),
            framing: shared.framing(),
            pair,
            features,
            header_bytes: header_bytes(features),
            outbox,
            head: OwnMemory::new(HEAD_BYTES + COPIED_BYTES_MAX),
            list: Vec::with_capacity(usize::from(MAX_CHAIN_DESCRIPTORS)),
            recorder: shared.recorder(),
            shared,
        }
    }

    pub(crate) fn process(&mut self, io: &mut QueueIo<'_>) {
        if !self.empty_outbox(io) {
            return;
        }
        while let Some(chain) = io.pop() {
            let (bytes, failed) = match self.transmit(&chain, io) {
                Outcome::Sent { frame_bytes } => (frame_bytes as u64, false),
                Outcome::Dropped(reason) => {
                    io.give_up(reason.place());
                    (0, true)
                }
                Outcome::Throttled => return io.retract(chain),
            };
            io.finish(chain, 0, Account { kind: Kind::Transmit as usize, bytes, failed });
            if !self.empty_outbox(io) {
                return;
            }
        }
    }

    /// Sends what is in the outbox; false while it is not empty.
    fn empty_outbox(&mut self, io: &mut QueueIo<'_>) -> bool {
        if self.outbox.generation != self.shared.link().generation() {
            if !self.outbox.is_empty() {
                self.outbox.discard();
                io.give_up(Reason::LinkDown.place());
            }
            match self.shared.backend().adopt(Side::Transmit) {
                Ok(generation) => self.outbox.generation = generation,
                Err(errno) => drop(self.lose(errno, io)),
            }
        }
        while let Some(rest) = self.outbox.rest() {
            match io.send(self.channel, &[rest]) {
                Ok(bytes) => self.outbox.sent(bytes),
                Err(Errno::AGAIN) => {
                    io.await_channel(self.channel, Readiness::Writable);
                    return false;
                }
                Err(errno) => {
                    self.outbox.discard();
                    let reason = self.lose(errno, io);
                    io.give_up(reason.place());
                }
            }
        }
        true
    }

    fn transmit(&mut self, chain: &Chain, io: &mut QueueIo<'_>) -> Outcome {
        let frame = match self.examine(io.readable(chain)) {
            Ok(frame) => frame,
            Err(reason) => return Outcome::Dropped(reason),
        };
        let payload = io.readable(chain).slice(frame.taken_bytes, usize::MAX);
        let head = self.head.buffer();
        self.list.clear();
        if payload.len_bytes() <= COPIED_BYTES_MAX {
            let copied =
                Buffers::new(&[head.slice(frame.head_bytes, usize::MAX)]).copy_from(payload);
            self.list.push(head.slice(0, frame.head_bytes + copied));
        } else {
            self.list.push(head.slice(0, frame.head_bytes));
            self.list.extend(payload.iter());
        }
        if self.list.len() > usize::from(MAX_CHAIN_DESCRIPTORS) {
            return Outcome::Dropped(Reason::Scattered);
        }
        if !self.shared.link().is_up() {
            return Outcome::Dropped(Reason::LinkDown);
        }
        // Last: what is admitted has paid, and is not put back.
        if !io.admit(rate_limit::Direction::FromDriver, frame.frame_bytes as u64) {
            return Outcome::Throttled;
        }
        let sent = match self.framing {
            Framing::Nobody => Ok(usize::MAX),
            Framing::Header | Framing::Length => io.send(self.channel, &self.list),
        };
        match (sent, self.framing) {
            (Ok(bytes), Framing::Length) if bytes < self.list_bytes() => {
                self.outbox.keep(&self.list, bytes);
            }
            (Ok(_), _) => {}
            (Err(Errno::AGAIN), _) => self.outbox.keep(&self.list, 0),
            (Err(errno), _) => return Outcome::Dropped(self.lose(errno, io)),
        }
        if let Some(recorder) = &self.recorder {
            let sent = Buffers::new(&self.list).slice(self.before_frame(), usize::MAX);
            recorder.record(Direction::Outbound, frame.frame_bytes, |into| sent.read(into));
        }
        Outcome::Sent { frame_bytes: frame.frame_bytes }
    }

    /// Looks at the beginning of a chain, and writes what is sent in its place to `head`.
    fn examine(&mut self, chain: Buffers<'_>) -> Result<Frame, Reason> {
        let mut bytes = [0; HEAD_BYTES];
        let read = chain.read(&mut bytes);
        let (header, ethernet) =
            bytes[..read].split_at_checked(self.header_bytes).ok_or(Malformed::NoHeader)?;
        let frame_bytes = chain.len_bytes() - self.header_bytes;
        let header = if self.header_bytes == HEADER_BYTES {
            header.first_chunk().copied().ok_or(Malformed::NoHeader)?
        } else {
            let legacy: Option<&[u8; LEGACY_HEADER_BYTES]> = header.first_chunk();
            widened(*legacy.ok_or(Malformed::NoHeader)?)
        };
        let header = Header::from_driver(header, frame_bytes, self.features)?;
        let head = Head::parse(ethernet)?;
        if !self.shared.may_send_from(head.source) {
            return Err(Reason::Spoofed);
        }
        let untagged = *ethernet.first_chunk::<ETHERNET_BYTES>().ok_or(Malformed::Runt)?;
        let taken_bytes = self.header_bytes + ETHERNET_BYTES;
        match self.shared.vlan() {
            None => {
                let head_bytes = self.write_head(header, frame_bytes, &untagged);
                Ok(Frame { head_bytes, taken_bytes, frame_bytes })
            }
            // Only the port says which VLAN a frame is in.
            Some(_) if head.has_tag => Err(Reason::Vlan),
            Some(vlan) => {
                let header = header.tagged(frame_bytes)?;
                let frame_bytes = frame_bytes + VLAN_TAG_BYTES;
                let tagged = insert_vlan_tag(untagged, vlan);
                let head_bytes = self.write_head(header, frame_bytes, &tagged);
                Ok(Frame { head_bytes, taken_bytes, frame_bytes })
            }
        }
    }

    fn write_head(&self, header: Header, frame_bytes: usize, ethernet: &[u8]) -> usize {
        let head = self.head.buffer();
        let before = match self.framing {
            Framing::Header | Framing::Nobody => head.write(0, &header.bytes()),
            // A frame has far fewer than 2^32 bytes.
            Framing::Length => head.write(0, &(frame_bytes as u32).to_be_bytes()),
        };
        before + head.write(before, ethernet)
    }

    /// Bytes of [`list`](Self::list) that are not the frame's.
    fn before_frame(&self) -> usize {
        match self.framing {
            Framing::Header | Framing::Nobody => HEADER_BYTES,
            Framing::Length => PREFIX_BYTES,
        }
    }

    fn list_bytes(&self) -> usize {
        self.list.iter().map(HostBuffer::len).sum()
    }

    /// The back end is gone, or does not take a frame: why that is dropped.
    fn lose(&self, errno: Errno, io: &mut QueueIo<'_>) -> Reason {
        // What a tap says of a frame that is not what its header says (segments of a protocol that has none, say): the
        // guest's fault, which is none of the log's business.
        if (self.framing, errno) == (Framing::Header, Errno::INVAL) {
            return Reason::Refused;
        }
        // A link that has just fallen says so itself.
        if self.shared.link().is_up() && errno != Errno::PIPE {
            io.report(HostFault { what: "sending a frame", offset: 0, errno });
        }
        Reason::Host
    }
}

impl Drop for Transmitter {
    fn drop(&mut self) {
        self.shared.leave_outbox(self.pair, std::mem::take(&mut self.outbox));
    }
}

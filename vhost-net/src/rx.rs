//! Receiving: a frame on the back end, chains of the driver's.
//!
//! Contract: a frame goes from the back end to guest memory as it lies, but for its *head*: the virtio header and the
//! first bytes of the frame, which are received into memory of ours, looked at there, and copied. How long a frame is, a
//! tap tells only when it has been received. So chains are gathered for a frame as long as lately ones were
//! ([`Expectation`]); what is longer ends in the *spill*, memory of ours, and is copied to further chains. A chain that
//! was not needed waits for the next frame, and goes back to the ring when there is none. On a port of a VLAN every
//! frame lands in the spill, since others may be none of the guest's business.
//!
//! A frame that cannot be delivered as it came is *held*, one at a time, in memory of ours: over a limit until its
//! time, or while the driver gives too few buffers. Then nothing more is received: what comes waits in the back end's
//! own queue, which is bounded, and where the kernel drops and counts what finds no room.

use std::sync::Arc;

use common::device::{Account, HostFault, MAX_CHAINS_PER_TURN, QueueIo};
use common::engine::Readiness;
use common::memory::{HostBuffer, OwnMemory};
use common::rate_limit;
use common::virtqueue::{Buffers, Chain};
use rustix::io::Errno;

use crate::capture::{Direction, Recorder};
use crate::config::VIRTIO_NET_F_MRG_RXBUF;
use crate::device::{Kind, Shared};
use crate::drops::Reason;
use crate::header::{
    ETHERNET_BYTES, FRAME_BYTES_MAX, HEADER_BYTES, Head, Header, Malformed, VLAN_TAG_BYTES,
    header_bytes, strip_vlan_tag,
};
use crate::source::{Landing, Source};

/// The Ethernet header, with room for a tag.
const ETHERNET_HEAD_BYTES: usize = ETHERNET_BYTES + VLAN_TAG_BYTES;
/// The head of a frame, as a tap has it.
pub(crate) const HEAD_BYTES: usize = HEADER_BYTES + ETHERNET_HEAD_BYTES;
/// Frames that are looked at in one turn: those that the driver does not want cost no chain, but time.
const FRAMES_PER_TURN: u32 = 256;
/// Failures of the back end in a row after which it is asked no more until there is news of it: more than a tap's queue
/// has frames (500, unless it was told otherwise), each of which may be one that it cannot give.
const FAILURES_MAX: u32 = 1024;
/// Buffers of gathered chains, at most: the kernel takes 1024 in one call, and there are others beside them.
const ROOM_BUFFERS_MAX: usize = 1000;

/// The receiving half of a queue pair.
pub(crate) struct Receiver {
    shared: Arc<Shared>,
    pair: u16,
    source: Source,
    features: u64,
    /// Bytes of a header, as the driver has it.
    header_bytes: usize,
    merges: bool,
    expectation: Expectation,
    room: Room,
    /// Header and Ethernet header of the frame that has come last.
    head: OwnMemory,
    /// What of it found no room in the chains that were gathered.
    spill: OwnMemory,
    /// The body of the frame that is held; made when it is first wanted.
    held_body: Option<OwnMemory>,
    held: Option<Held>,
    /// What frames are received into: the head, the room, the spill.
    places: Vec<HostBuffer>,
    /// What one call receives into, where that is not the same.
    list: Vec<HostBuffer>,
    recorder: Option<Recorder>,
    /// How often the back end has failed in a row.
    failures: u32,
}

/// A frame that the driver is to have.
#[derive(Clone, Copy)]
struct Frame {
    header: Header,
    /// What it begins with; `ethernet_bytes` of them.
    ethernet: [u8; ETHERNET_HEAD_BYTES],
    ethernet_bytes: usize,
    /// What follows that.
    body_bytes: usize,
}

/// A frame that waits.
struct Held {
    frame: Frame,
    /// It has been admitted, and waits for room alone.
    admitted: bool,
}

impl Frame {
    fn len_bytes(&self) -> usize {
        self.ethernet_bytes + self.body_bytes
    }
}

/// Whether the driver's ring has more to give.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Gathered {
    Enough,
    Short,
}

/// Why no more is received in this turn.
enum Pause {
    /// The ring, a limit or the channel says when to go on.
    Waits,
    /// The driver has given too few chains for the frame that is held.
    Short,
    /// There may be more, in another turn.
    Again,
}

impl Receiver {
    pub(crate) fn new(shared: Arc<Shared>, pair: u16, features: u64, queue_size: u16) -> Self {
        Self {
            pair,
            source: shared.source(pair),
            features,
            header_bytes: header_bytes(features),
            merges: features & VIRTIO_NET_F_MRG_RXBUF != 0,
            expectation: Expectation::default(),
            room: Room::new(queue_size),
            head: OwnMemory::new(HEAD_BYTES),
            spill: OwnMemory::new(FRAME_BYTES_MAX),
            held_body: None,
            held: None,
            places: Vec::with_capacity(ROOM_BUFFERS_MAX + 2),
            list: Vec::new(),
            recorder: shared.recorder(),
            failures: 0,
            shared,
        }
    }

    pub(crate) fn process(&mut self, io: &mut QueueIo<'_>) {
        let pause = self.receive_frames(io);
        self.room.give_back(io);
        match pause {
            Pause::Waits => {}
            Pause::Short => io.want_more(),
            Pause::Again => io.again(),
        }
    }

    /// The ring is to stop: what is held has nobody to go to.
    pub(crate) fn stop(&mut self, io: &mut QueueIo<'_>) {
        if self.held.take().is_some() {
            io.give_up(Reason::Stopped.place());
        }
    }

    fn receive_frames(&mut self, io: &mut QueueIo<'_>) -> Pause {
        for _ in 0..FRAMES_PER_TURN {
            let delivered = match self.held.take() {
                Some(held) => self.deliver_held(held, io),
                None => self.receive_one(io),
            };
            if let Err(pause) = delivered {
                return pause;
            }
        }
        Pause::Again
    }

    /// Receives a frame and delivers it, or drops it.
    fn receive_one(&mut self, io: &mut QueueIo<'_>) -> Result<(), Pause> {
        if !self.shared.link().is_up() || !self.is_used() {
            return Err(Pause::Waits);
        }
        let body_at = self.body_at();
        let expected_bytes = self.source.next_bytes().unwrap_or(self.expectation.bytes());
        let wanted = if self.merges { body_at + expected_bytes } else { 1 };
        self.room.gather(wanted, io);
        if self.room.is_empty() {
            return Err(Pause::Waits);
        }
        let room_bytes =
            if self.is_isolated() { 0 } else { self.room.len_bytes().saturating_sub(body_at) };
        let room = Buffers::new(&self.room.buffers).slice(body_at, room_bytes);
        self.places.clear();
        self.places.push(self.head.buffer());
        self.places.extend(room.iter());
        self.places.push(self.spill.buffer());
        let (landing, backend) = (Landing(&self.places), self.shared.backend());
        match self.source.receive(landing, &mut self.list, backend, io) {
            Ok(frame_bytes) => {
                self.failures = 0;
                self.take(frame_bytes, room_bytes, io)
            }
            Err(Errno::AGAIN) => {
                self.failures = 0;
                if let Some(channel) = self.source.channel() {
                    io.await_channel(channel, Readiness::Readable);
                }
                Err(Pause::Waits)
            }
            // The link will say so.
            Err(Errno::PIPE) => Err(Pause::Waits),
            Err(errno) => {
                self.fail(errno, io);
                Err(Pause::Waits)
            }
        }
    }

    /// The back end has failed to give a frame. A link that has just fallen says so itself.
    fn fail(&mut self, errno: Errno, io: &mut QueueIo<'_>) {
        self.failures = self.failures.saturating_add(1);
        if !self.shared.link().is_up() {
            return;
        }
        io.report(HostFault { what: "receiving a frame", offset: 0, errno });
        // It may concern one frame, which is lost then (EINVAL: a kind of segments that its header has no word for;
        // EFAULT: the guest's memory is gone). What fails again and again does not get better by asking, and where the
        // interface or the connection is over the link says so.
        let is_over = matches!(errno, Errno::BADFD | Errno::PROTO);
        let is_one_frame_s = !is_over && self.failures <= FAILURES_MAX;
        if let (true, Some(channel)) = (is_one_frame_s, self.source.channel()) {
            io.give_up(Reason::Host.place());
            io.await_channel(channel, Readiness::Readable);
        }
    }

    /// Whether the driver receives on this pair.
    fn is_used(&self) -> bool {
        self.pair < self.shared.state().active_pairs()
    }

    /// Whether frames may come that are none of the guest's business: those of other VLANs. A driver could find them in
    /// buffers that it has not got back, so they are looked at before anything is in guest memory.
    fn is_isolated(&self) -> bool {
        self.shared.vlan().is_some()
    }

    /// Where the body of a frame begins in guest memory.
    fn body_at(&self) -> usize {
        let tag = if self.shared.vlan().is_some() { 0 } else { VLAN_TAG_BYTES };
        self.header_bytes + ETHERNET_BYTES + tag
    }

    /// A frame of `frame_bytes` has come: its head is in `head`, its body in the room, of which `room_bytes` were there
    /// for it, and in the spill.
    fn take(
        &mut self,
        frame_bytes: usize,
        room_bytes: usize,
        io: &mut QueueIo<'_>,
    ) -> Result<(), Pause> {
        self.expectation.learn(frame_bytes);
        let frame = match self.examine(frame_bytes) {
            Ok(frame) => frame,
            Err(reason) => {
                io.give_up(reason.place());
                return Ok(());
            }
        };
        let body_at = self.body_at();
        let in_place = room_bytes.min(frame.body_bytes);
        if !io.admit(rate_limit::Direction::ToDriver, frame.len_bytes() as u64) {
            self.hold(frame, in_place, false);
            return Err(Pause::Waits);
        }
        if self.make_room(&frame, io) == Gathered::Short {
            if self.room.is_all_there_can_be(self.merges) {
                io.give_up(Reason::TooLong.place());
                return Ok(());
            }
            self.hold(frame, in_place, true);
            return Err(Pause::Short);
        }
        let spilt = frame.body_bytes - in_place;
        if spilt > 0 {
            let rest = Buffers::new(&self.room.buffers).slice(body_at + in_place, spilt);
            rest.copy_from(Buffers::new(&[self.spill.buffer()]));
        }
        self.hand_over(frame, io);
        Ok(())
    }

    /// Looks at a frame's head.
    fn examine(&self, frame_bytes: usize) -> Result<Frame, Reason> {
        let mut bytes = [0; HEAD_BYTES];
        self.head.buffer().read(0, &mut bytes);
        let (header, ethernet) = bytes.split_first_chunk().ok_or(Malformed::NoHeader)?;
        let ethernet: [u8; ETHERNET_HEAD_BYTES] =
            *ethernet.first_chunk().ok_or(Malformed::NoHeader)?;
        let in_force = self.shared.features_in_force(self.features);
        let header = Header::from_host(*header, frame_bytes, in_force)?;
        let head = Head::parse(&ethernet[..frame_bytes.min(ETHERNET_HEAD_BYTES)])?;
        let ethernet_bytes = frame_bytes.min(ETHERNET_HEAD_BYTES);
        let body_bytes = frame_bytes - ethernet_bytes;
        let frame = match self.shared.vlan() {
            None => Frame { header, ethernet, ethernet_bytes, body_bytes },
            // What is not there of it, `head` has of another frame.
            vlan @ Some(_) if head.vlan == vlan && frame_bytes < ETHERNET_HEAD_BYTES => {
                return Err(Malformed::Runt.into());
            }
            Some(vlan) if head.vlan == Some(vlan) => {
                let header = header.untagged()?;
                let mut stripped = [0; ETHERNET_HEAD_BYTES];
                stripped[..ETHERNET_BYTES].copy_from_slice(&strip_vlan_tag(ethernet));
                Frame { header, ethernet: stripped, ethernet_bytes: ETHERNET_BYTES, body_bytes }
            }
            Some(_) => return Err(Reason::Vlan),
        };
        let seen = Head::parse(&frame.ethernet[..frame.ethernet_bytes])?;
        self.shared.wants(&seen)?;
        let mtu = self.shared.mtu_in_force(self.features);
        if mtu.is_some_and(|mtu| !header.fits_mtu(frame.len_bytes(), seen.ethernet_bytes(), mtu)) {
            return Err(Reason::TooLong);
        }
        Ok(frame)
    }

    /// Gathers chains until a frame has room.
    fn make_room(&mut self, frame: &Frame, io: &mut QueueIo<'_>) -> Gathered {
        let wanted = self.header_bytes + frame.len_bytes();
        if self.merges || self.room.is_empty() {
            let wanted = if self.merges { wanted } else { 1 };
            self.room.gather(wanted, io);
        }
        if self.room.len_bytes() >= wanted { Gathered::Enough } else { Gathered::Short }
    }

    /// Copies the body of a frame that has just been received, `in_place` bytes of it from the room, to where it can
    /// stay.
    fn hold(&mut self, frame: Frame, in_place: usize, admitted: bool) {
        let memory = self.held_body.get_or_insert_with(|| OwnMemory::new(FRAME_BYTES_MAX));
        let body = memory.buffer();
        let received = Buffers::new(&self.room.buffers).slice(self.body_at(), in_place);
        Buffers::new(&[body]).copy_from(received);
        body.slice(in_place, frame.body_bytes - in_place).copy_from(&self.spill.buffer());
        self.held = Some(Held { frame, admitted });
    }

    /// Delivers the frame that is held, or holds it further.
    fn deliver_held(&mut self, held: Held, io: &mut QueueIo<'_>) -> Result<(), Pause> {
        if !self.is_used() {
            io.give_up(Reason::Stopped.place());
            return Ok(());
        }
        let Held { frame, admitted } = held;
        let admitted =
            admitted || io.admit(rate_limit::Direction::ToDriver, frame.len_bytes() as u64);
        if !admitted {
            self.held = Some(held);
            return Err(Pause::Waits);
        }
        if self.make_room(&frame, io) == Gathered::Short {
            if self.room.is_all_there_can_be(self.merges) {
                io.give_up(Reason::TooLong.place());
                return Ok(());
            }
            self.held = Some(Held { frame, admitted });
            return Err(Pause::Short);
        }
        if let Some(memory) = &self.held_body {
            let body_at = self.header_bytes + frame.ethernet_bytes;
            let room = Buffers::new(&self.room.buffers).slice(body_at, frame.body_bytes);
            room.copy_from(Buffers::new(&[memory.buffer()]));
        }
        self.hand_over(frame, io);
        Ok(())
    }

    /// Gives the driver a frame whose body is in the room: writes the head, and ends the chains.
    fn hand_over(&mut self, mut frame: Frame, io: &mut QueueIo<'_>) {
        let total = self.header_bytes + frame.len_bytes();
        frame.header.set_num_buffers(self.room.chains_for(total));
        let room = Buffers::new(&self.room.buffers);
        room.write(&frame.header.bytes()[..self.header_bytes]);
        room.slice(self.header_bytes, usize::MAX).write(&frame.ethernet[..frame.ethernet_bytes]);
        if let Some(recorder) = &self.recorder {
            let received = room.slice(self.header_bytes, frame.len_bytes());
            recorder.record(Direction::Inbound, frame.len_bytes(), |into| received.read(into));
        }
        let bytes = frame.len_bytes() as u64;
        let account = Account { kind: Kind::Receive as usize, bytes, failed: false };
        self.room.finish(total, account, io);
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let nobody = Source::Null { flood: None };
        if let Source::Stream(stream) = std::mem::replace(&mut self.source, nobody) {
            self.shared.leave_inlet(stream.into_inlet());
        }
    }
}

/// How long frames have lately been: a guess that is too low costs a copy, one that is too high the gathering of
/// chains in vain.
#[derive(Default)]
struct Expectation {
    bytes: usize,
}

impl Expectation {
    fn bytes(&self) -> usize {
        self.bytes
    }

    /// Up at once, since long frames come in rows; down slowly.
    fn learn(&mut self, frame_bytes: usize) {
        self.bytes = frame_bytes.max(self.bytes - self.bytes / 8);
    }
}

/// Chains that were gathered for frames, in the order of the ring.
struct Room {
    chains: Vec<Gathering>,
    /// Their buffers, one chain's after the other's.
    buffers: Vec<HostBuffer>,
    len_bytes: usize,
    /// The next chain has more buffers than find a place, or none.
    is_full: bool,
    /// Chains that can be gathered: those of a ring, but no more than are popped in one turn. Where more were asked for,
    /// each turn would end with the wish for another.
    chains_max: usize,
}

/// A chain and its share of the room.
struct Gathering {
    chain: Chain,
    buffer_count: usize,
    len_bytes: usize,
}

impl Room {
    fn new(queue_size: u16) -> Self {
        let chains_max = usize::from(queue_size).min(MAX_CHAINS_PER_TURN as usize);
        let chains = Vec::with_capacity(chains_max);
        let buffers = Vec::with_capacity(ROOM_BUFFERS_MAX);
        Self { chains, buffers, len_bytes: 0, is_full: false, chains_max }
    }

    fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Pops chains until there is room for `wanted` bytes, or there are no more.
    fn gather(&mut self, wanted: usize, io: &mut QueueIo<'_>) {
        while self.len_bytes < wanted && !self.is_full && self.chains.len() < self.chains_max {
            let Some(chain) = io.pop() else { return };
            let writable = io.writable(&chain);
            let before = self.buffers.len();
            if writable.len_bytes() == 0 && self.is_empty() {
                return io.reject(chain, "it has no room for a frame");
            }
            if writable.len_bytes() == 0 {
                // Those before it may go back yet, which they could not behind one that has ended: its turn comes.
                self.is_full = true;
                return io.retract(chain);
            }
            // What is beyond the limit in a chain that is alone is not used.
            self.buffers.extend(writable.iter().take(ROOM_BUFFERS_MAX));
            let buffer_count = self.buffers.len() - before;
            self.is_full = self.buffers.len() >= ROOM_BUFFERS_MAX;
            if self.buffers.len() > ROOM_BUFFERS_MAX {
                self.buffers.truncate(before);
                return io.retract(chain);
            }
            let len_bytes = self.buffers[before..].iter().map(HostBuffer::len).sum();
            self.len_bytes += len_bytes;
            self.chains.push(Gathering { chain, buffer_count, len_bytes });
        }
    }

    /// Whether waiting brings no more room for a frame: it is in one chain, or in all.
    fn is_all_there_can_be(&self, merges: bool) -> bool {
        let is_all = self.is_full || self.chains.len() >= self.chains_max;
        !self.is_empty() && (!merges || is_all)
    }

    /// How many chains `total` bytes take.
    fn chains_for(&self, total: usize) -> u16 {
        let mut left = total;
        let mut count = 0;
        for gathering in &self.chains {
            if left == 0 {
                break;
            }
            left = left.saturating_sub(gathering.len_bytes);
            count += 1;
        }
        count
    }

    /// Ends the chains that `total` bytes have filled, of which the first is counted.
    fn finish(&mut self, total: usize, account: Account, io: &mut QueueIo<'_>) {
        let count = usize::from(self.chains_for(total));
        let (mut left, mut buffer_count) = (total, 0);
        let mut account = Some(account);
        for gathering in self.chains.drain(..count) {
            let written = left.min(gathering.len_bytes);
            left -= written;
            buffer_count += gathering.buffer_count;
            self.len_bytes -= gathering.len_bytes;
            match account.take() {
                // A frame has far fewer than 2^32 bytes.
                Some(account) => io.finish(gathering.chain, written as u32, account),
                None => io.finish_more(gathering.chain, written as u32),
            }
        }
        self.buffers.drain(..buffer_count);
        self.is_full = false;
    }

    /// Gives all chains back to the ring.
    fn give_back(&mut self, io: &mut QueueIo<'_>) {
        while let Some(gathering) = self.chains.pop() {
            io.retract(gathering.chain);
        }
        self.buffers.clear();
        (self.len_bytes, self.is_full) = (0, false);
    }
}

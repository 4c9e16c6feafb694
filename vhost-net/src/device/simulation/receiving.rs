//! The receiving side of a pair: what has come, and what the driver must find.
//!
//! Contract: each frame that the device has taken is delivered once, whole and in order, or dropped for a reason that is
//! true of it and counted; one at most is held.

use std::collections::{BTreeMap, VecDeque};

use common::engine::ChannelIndex;
use common::simulation::{Given, Guest, PIECES_MAX, Random, Ring, Stage};

use super::frame::{Fields, Inbound, Reason};
use super::listening::Listening;
use super::mode::{Buffers, Mode, RING_SIZE_MAX};
use crate::device::NetDevice;
use crate::drops::DROPS;

/// The most buffers that a frame is received into at once.
const ROOM_BUFFERS_MAX: usize = 1000;

/// A frame that the device has taken, and what it may make of it.
struct Taken {
    /// As the driver may see it.
    seen: Vec<(Fields, Vec<u8>)>,
    /// Why it may be dropped.
    reasons: Vec<Reason>,
}

/// See the module's head.
pub(super) struct Receiving {
    pub(super) ring: Ring,
    pub(super) channel: ChannelIndex,
    /// Frames that have come and were not taken.
    waiting: VecDeque<Inbound>,
    held: Option<Taken>,
    drops: Drops,
    pub(super) delivered: u64,
    pub(super) spread: u64,
    pub(super) dropped: u64,
}

/// What the device has counted.
#[derive(Default)]
pub(super) struct Drops(Vec<u64>);

impl Drops {
    /// What has been counted since this was asked the last time.
    pub(super) fn news(&mut self, stage: &Stage<NetDevice>, queue: u16) -> BTreeMap<Reason, u64> {
        let drops = &stage.metrics().queues[usize::from(queue)].drops;
        let counts: Vec<u64> = drops.iter().map(|counter| counter.get()).collect();
        self.0.resize(counts.len(), 0);
        let before = std::mem::replace(&mut self.0, counts);
        let news = self.0.iter().zip(before).map(|(now, before)| now - before);
        DROPS.iter().copied().zip(news).filter(|(_, count)| *count > 0).collect()
    }
}

impl Receiving {
    pub(super) fn new(ring: Ring, channel: ChannelIndex) -> Self {
        Self {
            ring,
            channel,
            waiting: VecDeque::new(),
            held: None,
            drops: Drops::default(),
            delivered: 0,
            spread: 0,
            dropped: 0,
        }
    }

    /// A frame comes.
    pub(super) fn deliver(&mut self, frame: Inbound, stage: &Stage<NetDevice>) {
        stage.kernel().deliver(self.channel, frame.on_the_wire());
        self.waiting.push_back(frame);
    }

    /// The driver gives the device buffers; false where the ring has no room for any.
    pub(super) fn post(
        &mut self,
        (buffers, is_scattered): (Buffers, bool),
        stage: &Stage<NetDevice>,
        random: &mut Random,
    ) -> bool {
        let before = self.ring.given.len();
        for _ in 0..random.within(1..u64::from(RING_SIZE_MAX)) {
            let kind = match buffers {
                Buffers::Any => random.pick(&[Buffers::Big, Buffers::Page, Buffers::Tiny]),
                kind => kind,
            };
            let len_bytes = match kind {
                Buffers::Big => random.within(65_565..65_600),
                Buffers::Page | Buffers::Any => random.within(1_500..1_600),
                Buffers::Tiny => random.within(1..80),
            };
            let indirect = self.ring.has_indirect && (is_scattered || random.once_in(2));
            let pieces = match random.pick(&[1, 4]) {
                _ if indirect && is_scattered => PIECES_MAX - random.within(0..4),
                most => random.within(0..most) + 1,
            };
            let mut lens = vec![(len_bytes / pieces) as u32; pieces as usize];
            lens[0] += (len_bytes % pieces) as u32;
            lens.retain(|len_bytes| *len_bytes > 0);
            if !self.ring.give(&[], &lens, indirect, random) {
                break;
            }
        }
        self.ring.publish(stage, random);
        self.ring.given.len() > before
    }

    /// What a turn has brought. `states`: what the driver had told the device before it, and while it lasted.
    pub(super) fn observe(
        &mut self,
        stage: &Stage<NetDevice>,
        guest: &Guest,
        mode: &Mode,
        states: &[Listening],
    ) {
        let left = stage.kernel().waiting(self.channel);
        let taken = self.waiting.len() - left;
        let new = self.waiting.drain(..taken).map(|frame| Taken::judge(&frame, mode, states));
        let mut taken: VecDeque<Taken> = self.held.take().into_iter().chain(new).collect();
        let is_full = self.ring.given.len() == usize::from(mode.ring_size);
        let given = self.ring.given.clone();
        let mut used: VecDeque<(Given, usize)> = self.ring.take_used().into();
        let mut dropped = Vec::new();
        let pair = self.ring.index() / 2;
        let is_used = states.iter().any(|state| pair < state.pairs);
        assert!(
            is_used || used.is_empty(),
            "pair {pair} gets frames, which the driver does not use"
        );
        let mut room = &given[..];
        while let Some((first, _)) = used.front() {
            let header = first.bytes(mode.header_bytes().min(first.len_bytes()), guest);
            let chains = if mode.merges() { chains_of(&used, mode, guest) } else { 1 };
            let frame = frame_of(&mut used, chains, guest);
            let mut passed = Vec::new();
            loop {
                let candidate = taken.pop_front().unwrap_or_else(|| {
                    let len_bytes = frame.len();
                    panic!(
                        "queue {}: no such frame came: {header:x?}, {len_bytes} bytes, {passed:x?}",
                        self.ring.index()
                    )
                });
                if candidate.is(&frame, mode, chains) {
                    break;
                }
                dropped.push(candidate.why_dropped(room, is_full, mode));
                passed.extend(candidate.seen.iter().map(|(fields, frame)| (*fields, frame.len())));
            }
            self.delivered += 1;
            self.spread += u64::from(chains > 1);
            room = &room[chains..];
        }
        let news = self.drops.news(stage, self.ring.index());
        let count: u64 = news.values().sum();
        let missing = (count as usize).saturating_sub(dropped.len());
        for candidate in taken.drain(..missing.min(taken.len())) {
            let mut reasons = candidate.why_dropped(room, is_full, mode);
            if !self.ring.is_running() || states.iter().any(|state| pair >= state.pairs) {
                reasons.push("stopped");
            }
            dropped.push(reasons);
        }
        assert_eq!(
            count as usize,
            dropped.len(),
            "frames of queue {} that are dropped are counted: {news:?}",
            self.ring.index()
        );
        self.dropped += count;
        must_explain(&news, &dropped);
        self.held = taken.pop_front();
        assert!(taken.is_empty(), "queue {} holds more than one frame", self.ring.index());
        if let Some(held) = &self.held {
            assert!(!held.seen.is_empty(), "what nobody wants is not held: {:?}", held.reasons);
        }
    }

    /// The worker sleeps, and nothing is in the way: no frame waits that has room.
    pub(super) fn must_rest(&self, mode: &Mode) {
        let room: usize = self.ring.given.iter().map(Given::len_bytes).sum();
        match &self.held {
            None if self.waiting.is_empty() => {}
            None => assert!(
                self.ring.given.is_empty(),
                "queue {} sleeps over {} frames, with {} chains",
                self.ring.index(),
                self.waiting.len(),
                self.ring.given.len()
            ),
            Some(held) => {
                let least = held.seen.iter().map(|(_, frame)| frame.len()).min().unwrap_or(0);
                let has_room = !mode.merges() && room > 0 || least + mode.header_bytes() <= room;
                assert!(!has_room, "queue {} sleeps over a frame that has room", self.ring.index());
            }
        }
    }

    pub(super) fn has_undelivered(&self) -> bool {
        self.held.is_some() || !self.waiting.is_empty()
    }
}

impl Taken {
    fn judge(frame: &Inbound, mode: &Mode, states: &[Listening]) -> Self {
        let mut taken = Self { seen: Vec::new(), reasons: Vec::new() };
        for state in states {
            match frame.seen(mode, state.allowed(), |frame| state.wants(frame)) {
                Ok(seen) => taken.seen.push(seen),
                Err(reason) => taken.reasons.push(reason),
            }
        }
        taken
    }

    /// Whether the driver has found this frame, spread over so many chains.
    fn is(&self, found: &[u8], mode: &Mode, chains: usize) -> bool {
        self.seen.iter().any(|(fields, frame)| {
            let mut header = fields.bytes();
            header[10..].copy_from_slice(&(chains as u16).to_le_bytes());
            let (before, rest) = found.split_at(mode.header_bytes().min(found.len()));
            header[..mode.header_bytes()] == *before && frame == rest
        })
    }

    /// Why the frame may have been dropped while there was this room.
    fn why_dropped(&self, room: &[Given], is_full: bool, mode: &Mode) -> Vec<Reason> {
        let mut reasons = self.reasons.clone();
        let (bytes, is_cut) = if mode.merges() {
            within_reach(room)
        } else {
            (room.first().map_or(0, Given::len_bytes), true)
        };
        let is_long = self.seen.iter().any(|(_, frame)| frame.len() + mode.header_bytes() > bytes);
        if is_long && (is_full || is_cut) {
            reasons.push("too_long");
        }
        reasons
    }
}

/// The bytes of the first chains that can be one frame's room, and whether there are others.
fn within_reach(room: &[Given]) -> (usize, bool) {
    let (mut bytes, mut buffers) = (0, 0);
    for given in room {
        buffers += given.buffers.len();
        if buffers > ROOM_BUFFERS_MAX {
            return (bytes, true);
        }
        bytes += given.len_bytes();
    }
    (bytes, buffers == ROOM_BUFFERS_MAX)
}

/// Over how many chains the first frame is spread.
fn chains_of(used: &VecDeque<(Given, usize)>, mode: &Mode, guest: &Guest) -> usize {
    let header = used.iter().flat_map(|(given, written)| given.bytes(*written, guest));
    let header: Vec<u8> = header.take(mode.header_bytes()).collect();
    assert_eq!(header.len(), 12, "a frame begins with a header");
    let chains = usize::from(u16::from_le_bytes([header[10], header[11]]));
    assert!((1..=used.len()).contains(&chains), "{chains} chains of {}", used.len());
    chains
}

/// The bytes of the first frame, of which each chain but the last is full.
fn frame_of(used: &mut VecDeque<(Given, usize)>, chains: usize, guest: &Guest) -> Vec<u8> {
    let mut frame = Vec::new();
    for (at, (given, written)) in used.drain(..chains).enumerate() {
        assert!(written > 0 && written <= given.len_bytes(), "{written} bytes of {given:?}");
        assert!(at + 1 == chains || written == given.len_bytes(), "a gap within a frame");
        frame.extend(given.bytes(written, guest));
    }
    frame
}

/// The reasons that were counted are those of the frames that were dropped.
pub(super) fn must_explain(news: &BTreeMap<Reason, u64>, dropped: &[Vec<Reason>]) {
    for (reason, count) in news {
        let may = dropped.iter().filter(|reasons| reasons.contains(reason)).count() as u64;
        assert!(*count <= may, "{count} are counted as {reason:?}, of {dropped:?}");
    }
    for reasons in dropped {
        assert!(!reasons.is_empty(), "a frame is dropped without reason");
        let counted = reasons.iter().any(|reason| news.contains_key(reason));
        assert!(counted, "{reasons:?} is counted as {news:?}");
    }
}

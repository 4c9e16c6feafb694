//! The transmitting side of a pair: what the driver has sent, and what must be on the wire.
//!
//! Contract: each chain comes back in order, unwritten; its frame is on the wire once, byte for byte and in order, or is
//! dropped for the one reason that is true of it and counted. One at most waits for room.

use std::collections::VecDeque;

use common::engine::ChannelIndex;
use common::simulation::{Random, Ring, Stage};

use super::frame::{Outbound, Reason};
use super::receiving::{Drops, must_explain};
use crate::device::NetDevice;

/// What becomes of frames in a turn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weather {
    pub(super) link_is_up: bool,
    /// How often the back end was opened anew.
    pub(super) generation: u32,
    /// The channel fails.
    pub(super) fails: bool,
}

/// See the module's head.
pub(super) struct Transmitting {
    pub(super) ring: Ring,
    pub(super) channel: ChannelIndex,
    /// What the device has not looked at, or not given back.
    sent: VecDeque<Outbound>,
    /// A frame whose chain has come back, and which had no room; with the generation that it was of.
    outbox: Option<(u32, Vec<u8>)>,
    pub(super) room: Option<usize>,
    drops: Drops,
    pub(super) on_the_wire: u64,
    pub(super) dropped: u64,
}

impl Transmitting {
    pub(super) fn new(ring: Ring, channel: ChannelIndex) -> Self {
        Self {
            ring,
            channel,
            sent: VecDeque::new(),
            outbox: None,
            room: None,
            drops: Drops::default(),
            on_the_wire: 0,
            dropped: 0,
        }
    }

    /// The driver sends a frame; false where the ring has no room.
    pub(super) fn send(&mut self, frame: Outbound, random: &mut Random) -> bool {
        let indirect = random.once_in(2) && self.ring.has_indirect;
        let given = self.ring.give(&frame.chain, &[], indirect, random);
        if given {
            self.sent.push_back(frame);
        }
        given
    }

    /// So many frames find room from now on.
    pub(super) fn set_room(&mut self, room: Option<usize>, stage: &Stage<NetDevice>) {
        self.room = room;
        stage.kernel().set_room(self.channel, room);
    }

    /// What a turn has brought.
    pub(super) fn observe(&mut self, stage: &Stage<NetDevice>, weather: Weather) {
        let Weather { link_is_up, generation, fails } = weather;
        let mut outbox = self.outbox.take();
        let mut due: VecDeque<Vec<u8>> = VecDeque::new();
        let mut dropped: Vec<Vec<Reason>> = Vec::new();
        for (given, written) in self.ring.take_used() {
            assert_eq!(written, 0, "nothing is written to {given:?}");
            let frame = self.sent.pop_front().expect("the driver's books");
            match frame.wire {
                Err(reason) => dropped.push(vec![reason]),
                Ok(_) if !link_is_up => dropped.push(vec!["link_down"]),
                Ok(_) if fails => dropped.push(vec!["host"]),
                Ok(wire) => due.push_back(wire),
            }
        }
        let news = self.drops.news(stage, self.ring.index());
        let count: u64 = news.values().sum();
        if count as usize > dropped.len()
            && let Some((of, _)) = outbox.take()
        {
            let may = [(fails, "host"), (of != generation, "link_down")];
            dropped.push(may.iter().filter(|(may, _)| *may).map(|(_, reason)| *reason).collect());
        }
        assert_eq!(count as usize, dropped.len(), "frames that are dropped are counted: {news:?}");
        must_explain(&news, &dropped);
        self.dropped += count;
        let is_of_before = outbox.as_ref().is_some_and(|(of, _)| *of != generation);
        let sent = stage.kernel().take_sent(self.channel);
        self.room = self.room.map(|room| room - sent.len());
        self.on_the_wire += sent.len() as u64;
        if is_of_before {
            // Until the queue looks again.
            assert!(sent.is_empty() && due.is_empty(), "a frame of before goes nowhere");
            self.outbox = outbox;
            return;
        }
        let was_waiting = outbox.is_some();
        if let Some((_, wire)) = outbox {
            due.push_front(wire);
        }
        for wire in sent {
            let expected = due.pop_front();
            assert_eq!(Some(wire), expected, "queue {}: what is on the wire", self.ring.index());
        }
        self.outbox = due.pop_front().map(|wire| (generation, wire));
        let waits = self.outbox.is_none() || self.room == Some(0) || was_waiting;
        assert!(due.is_empty() && waits, "queue {} keeps frames back", self.ring.index());
    }

    /// The worker sleeps, and nothing is in the way: all is sent that finds room.
    pub(super) fn must_rest(&self) {
        let is_stuck = self.outbox.is_some() && self.room == Some(0);
        assert!(!self.has_unsent() || is_stuck, "queue {} sleeps over frames", self.ring.index());
    }

    pub(super) fn has_unsent(&self) -> bool {
        self.outbox.is_some() || !self.sent.is_empty()
    }
}

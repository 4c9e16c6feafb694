//! Channels, played by the test: frames that it has given are received, frames that are sent are kept for it.
//!
//! Contract: as a tap's, one transfer is one frame; one that is longer than its buffers is cut. A channel has room
//! for as many frames as the test says; at first for any number.

use std::collections::{BTreeMap, VecDeque};

use rustix::io::Errno;

use crate::engine::{ChannelIndex, Readiness};
use crate::memory::HostBuffer;

/// All channels, and who waits for them.
#[derive(Default)]
pub(super) struct Channels {
    by_index: BTreeMap<ChannelIndex, Channel>,
    /// By queue: what it waits for.
    awaited: BTreeMap<u16, (ChannelIndex, Readiness)>,
}

/// One channel, seen from the host.
#[derive(Default)]
struct Channel {
    inbound: VecDeque<Vec<u8>>,
    outbound: Vec<Vec<u8>>,
    /// Frames that may still be sent; `None`: any number.
    room: Option<usize>,
    /// What every transfer ends with.
    fault: Option<Errno>,
}

impl Channels {
    /// A frame comes in.
    pub(super) fn deliver(&mut self, channel: ChannelIndex, frame: Vec<u8>) {
        self.channel(channel).inbound.push_back(frame);
    }

    /// The frames that were sent since this was asked the last time.
    pub(super) fn take_sent(&mut self, channel: ChannelIndex) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.channel(channel).outbound)
    }

    /// The frames that have come in and were not received yet.
    pub(super) fn waiting(&self, channel: ChannelIndex) -> usize {
        self.by_index.get(&channel).map_or(0, |channel| channel.inbound.len())
    }

    /// From now on so many frames find room.
    pub(super) fn set_room(&mut self, channel: ChannelIndex, room: Option<usize>) {
        self.channel(channel).room = room;
    }

    /// From now on every transfer fails, or none does.
    pub(super) fn set_fault(&mut self, channel: ChannelIndex, fault: Option<Errno>) {
        self.channel(channel).fault = fault;
    }

    pub(super) fn receive(
        &mut self,
        channel: ChannelIndex,
        into: &[HostBuffer],
    ) -> Result<usize, Errno> {
        let channel = self.channel(channel);
        if let Some(fault) = channel.fault {
            return Err(fault);
        }
        let frame = channel.inbound.pop_front().ok_or(Errno::AGAIN)?;
        let mut done = 0;
        for buffer in into {
            done += buffer.write(0, &frame[done..]);
        }
        Ok(done)
    }

    pub(super) fn send(
        &mut self,
        channel: ChannelIndex,
        from: &[HostBuffer],
    ) -> Result<usize, Errno> {
        let channel = self.channel(channel);
        if let Some(fault) = channel.fault {
            return Err(fault);
        }
        if channel.room == Some(0) {
            return Err(Errno::AGAIN);
        }
        channel.room = channel.room.map(|room| room - 1);
        let mut frame = vec![0; from.iter().map(HostBuffer::len).sum()];
        let mut done = 0;
        for buffer in from {
            done += buffer.read(0, &mut frame[done..]);
        }
        channel.outbound.push(frame);
        Ok(done)
    }

    /// A queue waits for a channel.
    pub(super) fn wait(&mut self, queue: u16, channel: ChannelIndex, readiness: Readiness) {
        let before = self.awaited.insert(queue, (channel, readiness));
        assert!(before.is_none(), "queue {queue} waits for two channels");
    }

    /// A queue waits no more; false when it did not.
    pub(super) fn call_off(&mut self, queue: u16) -> bool {
        self.awaited.remove(&queue).is_some()
    }

    /// A queue whose channel is ready; it waits no more.
    pub(super) fn next_ready(&mut self) -> Option<u16> {
        let Self { by_index, awaited } = self;
        let is_ready = |(_, (channel, readiness)): &(&u16, &(ChannelIndex, Readiness))| {
            by_index.get(channel).is_some_and(|channel| match readiness {
                _ if channel.fault.is_some() => true,
                Readiness::Readable => !channel.inbound.is_empty(),
                Readiness::Writable => channel.room != Some(0),
            })
        };
        let queue = awaited.iter().find(is_ready).map(|(queue, _)| *queue)?;
        awaited.remove(&queue);
        Some(queue)
    }

    fn channel(&mut self, channel: ChannelIndex) -> &mut Channel {
        self.by_index.entry(channel).or_default()
    }
}

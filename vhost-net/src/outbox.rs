//! A frame that did not go out whole: the back end had no room for it, or for its end.
//!
//! Contract: one frame at most, in memory of ours; it goes before any other does. A chain ends when its frame is
//! here: what is in the outbox is the host's, as what is in the back end's own queue is. Over a stream it must go to
//! its last byte even if its ring has stopped meanwhile, so it is handed from a queue to its successor.

use common::memory::{HostBuffer, OwnMemory};
use common::virtqueue::Buffers;

use crate::header::{FRAME_BYTES_MAX, HEADER_BYTES, VLAN_TAG_BYTES};

/// The longest frame, whatever stands before it.
const OUTBOX_BYTES: usize = HEADER_BYTES + FRAME_BYTES_MAX + VLAN_TAG_BYTES;

/// See the module's head.
#[derive(Default)]
pub(crate) struct Outbox {
    /// The opening of the back end that it is of.
    pub(crate) generation: u32,
    /// Made when it is first wanted.
    memory: Option<OwnMemory>,
    from: usize,
    end: usize,
}

impl Outbox {
    pub(crate) fn is_empty(&self) -> bool {
        self.from == self.end
    }

    /// Keeps what is left of `frame` behind its first `sent` bytes. The outbox must be empty.
    pub(crate) fn keep(&mut self, frame: &[HostBuffer], sent: usize) {
        assert!(self.is_empty(), "the frame in the outbox goes first");
        let memory = self.memory.get_or_insert_with(|| OwnMemory::new(OUTBOX_BYTES));
        let rest = Buffers::new(frame).slice(sent, OUTBOX_BYTES);
        let room = memory.buffer();
        (self.from, self.end) = (0, Buffers::new(std::slice::from_ref(&room)).copy_from(rest));
    }

    /// What is to go next.
    pub(crate) fn rest(&self) -> Option<HostBuffer> {
        let memory = self.memory.as_ref().filter(|_| !self.is_empty())?;
        Some(memory.buffer().slice(self.from, self.end - self.from))
    }

    /// So many bytes have gone.
    pub(crate) fn sent(&mut self, bytes: usize) {
        self.from = self.end.min(self.from + bytes);
    }

    /// The frame is lost: there is nobody any more to whom its end is of use.
    pub(crate) fn discard(&mut self) {
        self.from = self.end;
    }
}

#[cfg(test)]
mod tests {
    use common::memory::OwnMemory;

    use super::Outbox;

    #[test]
    fn rest_of_a_frame_goes_to_its_last_byte() {
        let memory = OwnMemory::new(100);
        memory.buffer().write(0, &(0..100).collect::<Vec<u8>>());
        let frame = [memory.buffer().slice(0, 40), memory.buffer().slice(40, 60)];
        let mut outbox = Outbox::default();
        assert!(outbox.is_empty() && outbox.rest().is_none());
        outbox.keep(&frame, 30);
        let mut bytes = [0; 70];
        assert_eq!(outbox.rest().unwrap().read(0, &mut bytes), 70);
        assert_eq!((bytes[0], bytes[69]), (30, 99));
        outbox.sent(69);
        assert_eq!(outbox.rest().unwrap().len(), 1);
        outbox.sent(1);
        assert!(outbox.is_empty());
        outbox.keep(&frame, 0);
        outbox.discard();
        assert!(outbox.rest().is_none());
    }
}

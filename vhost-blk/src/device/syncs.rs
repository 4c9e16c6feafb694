//! Which requests of a queue wait for a sync, and which the one under way serves.
//!
//! Linux tells of data that it failed to write once for each open description, and tells the sync
//! that looks first. So each queue syncs on a description of its own, and never has two syncs under
//! way: else one may be told of the loss of what the other was to make stable, and that one
//! succeeds. Waiting is no loss: one sync serves all that have gathered until it begins.
//!
//! What the storage itself tells of its own volatile cache goes to the one sync that asked it. Another queue's sync that
//! ended in the same moment, on another thread, may be answered before that is latched.
//!
//! Contract: [`wait`](Syncs::wait) for a request whose data has been written; at the end of the
//! turn [`begin`](Syncs::begin) names the request that carries the next sync, if there is to be one,
//! and when that has ended, [`end`](Syncs::end) names all whom it served. What began in a turn
//! begins after all writes that the turn has brought, whatever their order. Nothing is allocated
//! after the start. What it does not do: submit, answer, or know what a slot is.

use std::mem;

use common::engine::FileIndex;

/// See the module's head. All are slots.
pub(super) struct Syncs {
    file: FileIndex,
    /// Whom the sync under way serves, of whom the first carries it; nobody: there is none.
    served: Vec<u16>,
    /// Who waits for the next.
    waiting: Vec<u16>,
}

impl Syncs {
    /// No syncs on `file` yet, for a queue of this size.
    pub(super) fn new(file: FileIndex, queue_size: u16) -> Self {
        let room = || Vec::with_capacity(queue_size.into());
        Self { file, served: room(), waiting: room() }
    }

    /// The description to sync.
    pub(super) fn file(&self) -> FileIndex {
        self.file
    }

    /// A request waits for the next sync to begin, and to end.
    pub(super) fn wait(&mut self, slot: u16) {
        self.waiting.push(slot);
    }

    /// The request that is to carry a sync now; `None` while one is under way, or where nobody waits.
    pub(super) fn begin(&mut self) -> Option<u16> {
        if !self.served.is_empty() {
            return None;
        }
        mem::swap(&mut self.served, &mut self.waiting);
        self.served.first().copied()
    }

    /// The sync under way has ended: whom it served, in the order in which they waited. The list is
    /// to be [given back](Self::give_back).
    pub(super) fn end(&mut self) -> Vec<u16> {
        mem::take(&mut self.served)
    }

    /// Takes a list back for its capacity.
    pub(super) fn give_back(&mut self, mut served: Vec<u16>) {
        served.clear();
        self.served = served;
    }
}

#[cfg(test)]
mod tests {
    use super::Syncs;
    use common::engine::FileIndex;

    #[test]
    fn one_sync_at_a_time_serves_all_who_waited_before_it_began() {
        let mut syncs = Syncs::new(FileIndex(2), 8);
        assert_eq!(syncs.begin(), None, "nobody waits");
        syncs.wait(3);
        syncs.wait(5);
        assert_eq!(syncs.begin(), Some(3));
        syncs.wait(1);
        assert_eq!(syncs.begin(), None, "one is under way");
        let served = syncs.end();
        assert_eq!(served, [3, 5]);
        syncs.give_back(served);
        assert_eq!(syncs.begin(), Some(1));
        assert_eq!(syncs.end(), [1]);
    }

    #[test]
    fn lists_keep_their_room() {
        let mut syncs = Syncs::new(FileIndex(2), 8);
        for slot in 0..100 {
            syncs.wait(slot);
            assert_eq!(syncs.begin(), Some(slot));
            let served = syncs.end();
            assert!(served.capacity() >= 8 && syncs.waiting.capacity() >= 8);
            syncs.give_back(served);
        }
    }
}

//! A queue's hand at doorbells.
//!
//! Contract: a queue rings the main thread ([`Ringer::ring_main`]) once its news is visible, and sleeps by
//! [`Ringer::await_bell`], after which its `process` is called for the bell or for a kick, whichever is first.

use common::device::QueueIo;
use common::engine::{ChannelIndex, Readiness};
use common::memory::OwnMemory;

use crate::device::MAIN_CHANNEL;
use crate::doorbell::Doorbell;

/// See the module's head.
pub(crate) struct Ringer {
    /// The 1 that is added to an eventfd.
    one: OwnMemory,
    /// Where an eventfd's count is read to.
    count: OwnMemory,
    awaits: bool,
}

impl Ringer {
    pub(crate) fn new() -> Self {
        let one = OwnMemory::new(8);
        one.buffer().write(0, &1u64.to_ne_bytes());
        Self { one, count: OwnMemory::new(8), awaits: false }
    }

    /// Rings the main thread if it sleeps.
    pub(crate) fn ring_main(&self, bell: &Doorbell, io: &mut QueueIo<'_>) {
        if bell.is_to_ring() {
            // The count never nears 2^64, the only way in which this can fail.
            let rung = io.send(MAIN_CHANNEL, &[self.one.buffer()]);
            debug_assert!(rung.is_ok(), "an eventfd always has room");
        }
    }

    /// Sleeps until `bell` rings, unless `is_there`, what it would ring for, is there already: then false, and the queue
    /// goes on.
    pub(crate) fn await_bell(
        &mut self,
        bell: &Doorbell,
        channel: ChannelIndex,
        io: &mut QueueIo<'_>,
        is_there: impl Fn() -> bool,
    ) -> bool {
        if self.awaits {
            // What has rung is taken back: a count that stays is heard for ever. Whether there is one, the bell does not tell:
            // it may have been armed anew before the one who rings came to count. `AGAIN` if there is none.
            let _ = io.receive(channel, &[self.count.buffer()]);
        }
        bell.arm();
        if is_there() {
            bell.disarm();
            return false;
        }
        self.awaits = true;
        io.await_channel(channel, Readiness::Readable);
        true
    }
}

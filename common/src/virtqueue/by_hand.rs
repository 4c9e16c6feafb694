//! A virtqueue that is turned by hand, without a worker: for fuzzers.
//!
//! Contract: each function is one verb of [`Virtqueue`], with its rules; whoever calls them is the
//! runtime, and breaks the ring off after an error as the runtime does. Not for daemons: there a
//! ring is reached through [`QueueIo`](crate::device::QueueIo) alone.

use std::sync::Arc;

use super::{Buffers, Chain, RingError, RingSetup, Virtqueue};
use crate::memory::MemoryMap;

/// A virtqueue and all its verbs.
pub struct Ring(Virtqueue);

impl Ring {
    /// As [`Virtqueue::new`].
    ///
    /// # Errors
    /// As [`Virtqueue::new`].
    pub fn new(setup: RingSetup) -> Result<Self, RingError> {
        Virtqueue::new(setup).map(Self)
    }

    /// What anyone may ask of a virtqueue.
    pub fn queue(&self) -> &Virtqueue {
        &self.0
    }

    /// Takes the next chain.
    ///
    /// # Errors
    /// The driver broke a rule: [`break_off`](Self::break_off) is next.
    pub fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        self.0.pop(0)
    }

    /// The chain's device-readable bytes.
    pub fn readable(&self, chain: &Chain) -> Buffers<'_> {
        self.0.readable(chain)
    }

    /// The chain's device-writable bytes.
    pub fn writable(&self, chain: &Chain) -> Buffers<'_> {
        self.0.writable(chain)
    }

    /// Ends a chain as used with `written_bytes` written.
    pub fn used(&mut self, chain: Chain, written_bytes: u32) {
        self.0.used(chain, written_bytes);
    }

    /// Ends the newest chain as never popped.
    pub fn retract(&mut self, chain: Chain) {
        self.0.retract(chain);
    }

    /// Shows the driver what was used; whether it wants to be called.
    pub fn publish(&mut self) -> bool {
        self.0.publish()
    }

    /// Tells the driver that kicks are not needed for now.
    pub fn suppress_kicks(&self) {
        self.0.suppress_kicks();
    }

    /// Asks for a kick; true when a chain is available already.
    ///
    /// # Errors
    /// The driver broke a rule: [`break_off`](Self::break_off) is next.
    pub fn request_kick(&mut self) -> Result<bool, RingError> {
        self.0.request_kick(0)
    }

    /// Whether the driver seems to have made chains available.
    pub fn has_available(&self) -> bool {
        self.0.has_available(0)
    }

    /// Marks the ring broken.
    pub fn break_off(&mut self) {
        self.0.break_off();
    }

    /// Uses another memory map from the next chain on.
    ///
    /// # Errors
    /// The ring is not in it: [`break_off`](Self::break_off) is next.
    pub fn set_memory(&mut self, memory: Arc<MemoryMap>) -> Result<(), RingError> {
        self.0.set_memory(memory)
    }

    /// Whether no chain refers to a replaced memory map.
    pub fn is_settled(&self) -> bool {
        self.0.is_settled()
    }
}

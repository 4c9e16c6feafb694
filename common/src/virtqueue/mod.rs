//! A virtqueue as the device side sees it: chains out of the ring, used entries back.
//!
//! Contract: a [`Virtqueue`] belongs to one thread at a time and is moved, not shared. A chain is
//! popped once and ends once. Used entries become visible with [`Virtqueue::publish`], one store
//! for all of a turn. A ring whose driver breaks the rules is *broken*: it gives no more chains,
//! chains that are out still end normally.
//!
//! The parts: [`split`] is the ring in memory, [`chain`] the walk, [`slots`] the chains that are
//! out, [`inflight`] what a successor is to know of them. A packed ring is a sibling of [`split`] with
//! the same verbs (take, put back, push used, publish, wants call, request kick). What it never
//! sees: a file, nor the descriptors by which the two sides wake each other.

#[cfg(feature = "fuzzing")]
pub mod by_hand;
mod chain;
mod inflight;
mod slots;
mod split;

use std::sync::Arc;

use self::chain::Extent;
use self::inflight::Left;
use self::slots::Slots;
use self::split::SplitRing;
use crate::memory::{AccessError, FrontendAddress, GuestAddress, MemoryMap};

pub use self::chain::{Buffers, Chain, MAX_CHAIN_DESCRIPTORS};
pub use self::inflight::{InflightRegion, InflightShape, Record};
pub use self::split::RingAddresses;

/// VIRTIO 1.3, 6: indirect descriptors.
pub const VIRTIO_F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO 1.3, 6: `used_event` and `avail_event`.
pub const VIRTIO_F_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO 1.3, 6: the device follows the specification, not its predecessors.
pub const VIRTIO_F_VERSION_1: u64 = 1 << 32;
/// The feature bits that a ring serves for every device.
pub const RING_FEATURES: u64 = VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX | VIRTIO_F_VERSION_1;
/// VIRTIO 1.3, 2.7: the largest queue size.
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// How many chains before its turn a chain's descriptor is fetched…
const DESCRIPTOR_AHEAD: u16 = 8;
/// …and its first buffer, by when the descriptor has come.
const BUFFER_AHEAD: u16 = 4;

/// What a driver or front end did wrong with a ring.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum RingError {
    #[error("queue size {size} is not a power of two")]
    Size { size: u16 },
    #[error("the {area} is not in the guest's memory")]
    Unmapped { area: &'static str, source: AccessError },
    #[error("the {area} at {at:#x?} is not aligned to {align} bytes")]
    Misaligned { area: &'static str, at: FrontendAddress, align: u64 },
    #[error("available index jumped to {index}, more than {size} past {next}")]
    IndexJump { index: u16, next: u16, size: u16 },
    #[error("head {head} is outside the table of {size} descriptors")]
    Head { head: u16, size: u16 },
    #[error("head {head} was made available again before it was used")]
    HeadInUse { head: u16 },
    #[error("chain {head} goes on at {next}, outside the table of {size} descriptors")]
    Next { head: u16, next: u16, size: u16 },
    #[error("chain {head} is longer than {limit} descriptors, or a loop")]
    ChainTooLong { head: u16, limit: u16 },
    #[error("chain {head} is longer than 4 GiB")]
    ChainTooManyBytes { head: u16 },
    #[error("chain {head} has a readable buffer after a writable one")]
    ReadableAfterWritable { head: u16 },
    #[error("chain {head} has an indirect descriptor where none may be")]
    Indirect { head: u16 },
    #[error("chain {head} has an indirect table of {len_bytes} bytes")]
    IndirectLength { head: u16, len_bytes: u32 },
    #[error("chain {head} has an indirect table at {at:#x?}, across regions or misaligned")]
    IndirectPlace { head: u16, at: GuestAddress },
    #[error("a buffer is not in the guest's memory")]
    Buffer { source: AccessError },
    #[error("the region for requests in flight has version {version}, not 1")]
    InflightVersion { version: u16 },
    #[error("the region for requests in flight is for {recorded} descriptors, not {size}")]
    InflightSize { size: u16, recorded: u16 },
    #[error("chain {head} is no request: {why}")]
    Request { head: u16, why: &'static str },
}

/// What a ring needs to start, as the session has collected it.
pub struct RingSetup {
    /// Where its areas lie.
    pub addresses: RingAddresses,
    /// Its number of entries.
    pub size: u16,
    /// The next available entry to take.
    pub base: u16,
    /// The feature bits that the driver acknowledged.
    pub features: u64,
    /// The guest's memory.
    pub memory: Arc<MemoryMap>,
    /// Where chains in flight are recorded. What a predecessor has left there comes first, and then tells the base.
    pub record: Option<Record>,
}

/// A running virtqueue; see the module's head.
pub struct Virtqueue {
    ring: SplitRing,
    /// Keeps the ring's own areas mapped, also when a newer map lacks them.
    ring_memory: Arc<MemoryMap>,
    slots: Slots,
    record: Option<Record>,
    indirect: bool,
    region_hint: usize,
    broken: bool,
}

impl Virtqueue {
    /// Resolves the ring's areas in guest memory, and takes up what a predecessor has left of it.
    ///
    /// # Errors
    /// The size is not a power of two, or an area is misaligned or not in guest memory, or the record is for another ring.
    pub fn new(setup: RingSetup) -> Result<Self, RingError> {
        let event_idx = setup.features & VIRTIO_F_EVENT_IDX != 0;
        let RingSetup { addresses, size, base, memory, mut record, .. } = setup;
        let mut ring = SplitRing::new(addresses, size, base, event_idx, &memory)?;
        if let Some(record) = &mut record
            && let Left::Heads(heads) = record.recover(size, ring.published())?
        {
            ring.resume(heads);
        }
        Ok(Self {
            ring,
            record,
            ring_memory: Arc::clone(&memory),
            slots: Slots::new(size, memory),
            indirect: setup.features & VIRTIO_F_INDIRECT_DESC != 0,
            region_hint: 0,
            broken: false,
        })
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// The next available entry to take.
    pub fn next_available(&self) -> u16 {
        self.ring.next_available()
    }

    /// Chains that a predecessor has left, and that are yet to be popped.
    pub fn left(&self) -> usize {
        self.ring.left()
    }

    /// Chains that are out.
    pub fn chains_out(&self) -> u32 {
        self.slots.count()
    }

    /// Takes the next chain, popped at `now_ns`; `None` when the driver has made none available.
    ///
    /// # Errors
    /// The driver broke a rule; the ring is broken from now on.
    pub(crate) fn pop(&mut self, now_ns: u64) -> Result<Option<Chain>, RingError> {
        if self.broken {
            return Ok(None);
        }
        let position = self.ring.next_available();
        let Some(head) = self.ring.take()? else { return Ok(None) };
        let extent = match self.walk(head) {
            Ok(extent) => extent,
            Err(fault) => {
                // What is no chain was not popped: the chain before it stays the newest.
                self.ring.put_back();
                return Err(fault);
            }
        };
        // What a predecessor had popped is recorded, in its order.
        if let Some(record) = &mut self.record
            && self.ring.is_newest_new()
        {
            record.popped(head);
        }
        self.slots.open(head, position, extent, now_ns);
        self.fetch_ahead();
        Ok(Some(Chain::new(head)))
    }

    /// Has the CPU fetch what is wanted for the chains that are popped soon: what the driver's CPU has written last is
    /// in the cache of that one, from where it takes as long as a request does to arrive.
    #[inline]
    fn fetch_ahead(&self) {
        let table = self.ring.descriptors();
        if let Some(head) = self.ring.ahead(DESCRIPTOR_AHEAD) {
            chain::fetch_descriptor(table, head);
        }
        if let Some(head) = self.ring.ahead(BUFFER_AHEAD) {
            chain::fetch_buffer(table, head, self.slots.map(), self.region_hint);
        }
    }

    /// Fills the slot of `head` with the chain's buffers.
    fn walk(&mut self, head: u16) -> Result<Extent, RingError> {
        let (buffers, memory) = self.slots.vacant(head).ok_or(RingError::HeadInUse { head })?;
        let place = chain::Walk {
            table: self.ring.descriptors(),
            size: self.ring.size(),
            indirect: self.indirect,
            memory,
            region_hint: &mut self.region_hint,
        };
        chain::walk(place, head, buffers)
    }

    /// The chain's device-readable bytes.
    pub(crate) fn readable(&self, chain: &Chain) -> Buffers<'_> {
        Buffers::new(self.slots.readable(chain.slot()))
    }

    /// The chain's device-writable bytes.
    pub(crate) fn writable(&self, chain: &Chain) -> Buffers<'_> {
        Buffers::new(self.slots.writable(chain.slot()))
    }

    /// Gives the chain a bounce buffer until it ends; false where all of the ring are out.
    pub(crate) fn give_bounce(&mut self, chain: &Chain) -> bool {
        self.slots.give_bounce(chain.slot())
    }

    /// The chain's bounce buffer; no bytes where it has none.
    pub(crate) fn bounce(&self, chain: &Chain) -> Buffers<'_> {
        Buffers::new(self.slots.bounce(chain.slot()))
    }

    /// Ends a chain as used with `written_bytes` written; the nanosecond at which it was popped.
    pub(crate) fn used(&mut self, chain: Chain, written_bytes: u32) -> u64 {
        let head = chain.end();
        let (popped_ns, _) = self.slots.close(head);
        if let Some(record) = &mut self.record {
            record.used(head);
        }
        self.ring.push_used(head, written_bytes);
        popped_ns
    }

    /// Ends a chain as never popped.
    ///
    /// Only the newest chain that is out can be put back, so several are put back newest first.
    pub(crate) fn retract(&mut self, chain: Chain) {
        let newest = self.ring.next_available().wrapping_sub(1);
        assert!(
            self.slots.position(chain.slot()) == Some(newest),
            "chain {} is not the newest: retract in the reverse order of pops",
            chain.slot()
        );
        let head = chain.end();
        self.slots.close(head);
        if let Some(record) = &mut self.record
            && self.ring.is_newest_new()
        {
            record.put_back(head);
        }
        self.ring.put_back();
    }

    /// Counts an operation on the chain in `slot` that begins (`true`) or has ended.
    pub(crate) fn operation(&mut self, slot: u16, begins: bool) {
        self.slots.operation(slot, begins);
    }

    /// Shows the driver what was used since the last time; whether it wants to be called.
    pub(crate) fn publish(&mut self) -> bool {
        if !self.ring.publish() {
            return false;
        }
        if let Some(record) = &mut self.record {
            record.published(self.ring.published());
        }
        self.ring.wants_call()
    }

    /// Whether the driver was ever given a buffer back: a call for it may have been lost with a
    /// back end that is gone.
    pub(crate) fn has_used(&self) -> bool {
        self.ring.has_used()
    }

    /// Tells the driver that kicks are not needed for now.
    pub(crate) fn suppress_kicks(&self) {
        self.ring.suppress_kicks();
    }

    /// Asks for a kick; true when a chain is available already, beside `known` ones that were
    /// retracted.
    ///
    /// # Errors
    /// The driver's index jumped; the ring is broken from now on.
    pub(crate) fn request_kick(&mut self, known: u16) -> Result<bool, RingError> {
        if self.broken { Ok(false) } else { self.ring.request_kick(known) }
    }

    /// Whether the driver seems to have made chains available, beside `known` ones that were
    /// retracted.
    pub(crate) fn has_available(&self, known: u16) -> bool {
        !self.broken && self.ring.has_available(known)
    }

    /// Marks the ring broken.
    pub(crate) fn break_off(&mut self) {
        self.broken = true;
    }

    /// Whether the driver broke the rules.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Uses another memory map from the next chain on.
    ///
    /// # Errors
    /// The ring itself is not in it; the ring is broken from now on.
    pub(crate) fn set_memory(&mut self, memory: Arc<MemoryMap>) -> Result<(), RingError> {
        let moved = self.ring.relocate(&memory);
        if moved.is_ok() {
            self.ring_memory = Arc::clone(&memory);
        }
        self.slots.replace_map(memory);
        self.region_hint = 0;
        moved
    }

    /// Whether no chain refers to a replaced memory map.
    pub(crate) fn is_settled(&self) -> bool {
        self.slots.is_settled()
    }

    /// Whether the front end took away memory that is mapped.
    pub(crate) fn is_poisoned(&self) -> bool {
        self.ring_memory.is_poisoned()
            || self.slots.map().is_poisoned()
            || self.record.as_ref().is_some_and(Record::is_poisoned)
    }
}

#[cfg(test)]
mod tests;

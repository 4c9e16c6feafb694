//! The split virtqueue in guest memory: loads of the available ring, stores to the used ring.
//!
//! Contract: the three areas were resolved when the ring started and stay mapped while this value
//! lives (its owner holds the memory map). Everything read from them is foreign: an index is
//! masked or checked before it is used. What it does not do: walk chains ([`super::chain`]),
//! remember which heads are out ([`super::slots`]).

// tidy(parsers): sums here are of 16-bit indexes, widened; ring indexes wrap by name.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::sync::atomic::{Ordering, fence};

use super::RingError;
use crate::memory::{AccessError, FrontendAddress, HostBuffer, MemoryMap};

/// VIRTIO 1.3, 2.7.5: a descriptor is 16 bytes.
pub(super) const DESCRIPTOR_BYTES: usize = 16;
/// VIRTIO 1.3, 2.7.8: a used element is 8 bytes.
const USED_ELEMENT_BYTES: usize = 8;
/// VIRTIO 1.3, 2.7.6 and 2.7.8: `flags` and `idx` stand before the entries of both rings.
const RING_HEADER_BYTES: usize = 4;
/// Offset of `idx` in both rings.
const INDEX: usize = 2;
/// VIRTIO 1.3, 2.7.7: the driver asks for no interrupts (only without `EVENT_IDX`).
const VIRTQ_AVAIL_F_NO_INTERRUPT: u16 = 1;
/// VIRTIO 1.3, 2.7.10: the device asks for no kicks (only without `EVENT_IDX`).
const VIRTQ_USED_F_NO_NOTIFY: u16 = 1;

/// Where the front end says that a ring's three areas lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// The descriptor table.
    pub descriptor: FrontendAddress,
    /// The available ring, which the driver writes.
    pub available: FrontendAddress,
    /// The used ring, which the device writes.
    pub used: FrontendAddress,
}

impl RingAddresses {
    /// Whether a ring of `size` entries is all in this memory.
    pub(crate) fn lie_in(self, size: u16, memory: &MemoryMap) -> bool {
        areas(self, size, memory).is_ok()
    }
}

/// The ring itself and the device's place in it.
pub(super) struct SplitRing {
    descriptors: HostBuffer,
    available: HostBuffer,
    used: HostBuffer,
    addresses: RingAddresses,
    size: u16,
    event_idx: bool,
    /// The next available entry to take.
    next_available: u16,
    /// The driver's index as last loaded; entries before it may be read without another barrier.
    seen_available: u16,
    /// The next used entry to write; ahead of `published` within a turn.
    next_used: u16,
    /// The used index that the driver can see.
    published: u16,
    /// The used index when the driver was last told or found not to want it.
    considered: u16,
    /// Heads that a predecessor has taken and not used: they come first, whatever stands in their entries by now.
    left: Vec<u16>,
    /// So many of them were taken.
    left_taken: usize,
    /// Heads that were taken since, less those that were put back.
    taken: u64,
}

impl SplitRing {
    /// Resolves the ring's areas and takes up its indexes: `base` is the next available entry, the
    /// used index is read from the ring.
    pub(super) fn new(
        addresses: RingAddresses,
        size: u16,
        base: u16,
        event_idx: bool,
        memory: &MemoryMap,
    ) -> Result<Self, RingError> {
        // VIRTIO 1.3, 2.7: "Queue Size value is always a power of 2. The maximum is 32768."
        if !size.is_power_of_two() {
            return Err(RingError::Size { size });
        }
        let (descriptors, available, used) = areas(addresses, size, memory)?;
        let published = used.load_u16(INDEX, Ordering::Relaxed);
        Ok(Self {
            descriptors,
            available,
            used,
            addresses,
            size,
            event_idx,
            next_available: base,
            seen_available: base,
            next_used: published,
            published,
            considered: published,
            left: Vec::new(),
            left_taken: 0,
            taken: 0,
        })
    }

    /// Goes on where a predecessor has left the ring: all before its used index is done, but for these heads.
    pub(super) fn resume(&mut self, left: Vec<u16>) {
        // As many entries as are out were taken beyond those that are used.
        self.next_available = self.published;
        self.seen_available = self.published;
        self.left = left;
    }

    /// Heads that a predecessor had taken, and that are yet to be taken again.
    pub(super) fn left(&self) -> usize {
        self.left.len() - self.left_taken
    }

    /// The used index that the driver can see.
    pub(super) fn published(&self) -> u16 {
        self.published
    }

    /// Finds the ring's areas anew in another memory map; the indexes stay.
    pub(super) fn relocate(&mut self, memory: &MemoryMap) -> Result<(), RingError> {
        (self.descriptors, self.available, self.used) = areas(self.addresses, self.size, memory)?;
        Ok(())
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    pub(super) fn descriptors(&self) -> HostBuffer {
        self.descriptors
    }

    /// The next available entry to take: what `GET_VRING_BASE` answers.
    pub(super) fn next_available(&self) -> u16 {
        self.next_available
    }

    /// Takes the head of the next available chain, or `None` when the driver has made none
    /// available.
    pub(super) fn take(&mut self) -> Result<Option<u16>, RingError> {
        if self.next_available == self.seen_available && !self.look()? {
            return Ok(None);
        }
        if let Some(head) = self.left.get(self.left_taken) {
            self.left_taken += 1;
            self.next_available = self.next_available.wrapping_add(1);
            return Ok(Some(*head));
        }
        let entry = usize::from(self.next_available & (self.size - 1));
        let head = self.available.load_u16(RING_HEADER_BYTES + 2 * entry, Ordering::Relaxed);
        if head >= self.size {
            return Err(RingError::Head { head, size: self.size });
        }
        self.taken += 1;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(head))
    }

    /// The head of the chain that is taken after `distance` others, if it is known to be available: a hint, since it is
    /// read again when its time comes.
    #[inline]
    pub(super) fn ahead(&self, distance: u16) -> Option<u16> {
        let known = self.seen_available.wrapping_sub(self.next_available);
        let entry = usize::from(self.next_available.wrapping_add(distance) & (self.size - 1));
        let head = || self.available.load_u16(RING_HEADER_BYTES + 2 * entry, Ordering::Relaxed);
        (distance < known).then(head).filter(|head| *head < self.size)
    }

    /// Whether the newest taken entry is one that no predecessor had taken.
    pub(super) fn is_newest_new(&self) -> bool {
        self.taken > 0
    }

    /// Puts the newest taken entry back: the next [`take`](Self::take) finds it again.
    pub(super) fn put_back(&mut self) {
        self.next_available = self.next_available.wrapping_sub(1);
        match self.taken.checked_sub(1) {
            Some(fewer) => self.taken = fewer,
            None => self.left_taken -= 1,
        }
    }

    /// Whether the driver's index has moved on, beyond the next `known` entries: a hint, for who does not sleep.
    pub(super) fn has_available(&self, known: u16) -> bool {
        self.available.load_u16(INDEX, Ordering::Relaxed) != self.next_available.wrapping_add(known)
    }

    /// Loads the driver's index; true when there is something to take.
    fn look(&mut self) -> Result<bool, RingError> {
        // Acquire pairs with the driver's write barrier between filling an entry and raising idx
        // (VIRTIO 1.3, 2.7.13.3.1: "a suitable memory barrier before the idx update").
        let index = self.available.load_u16(INDEX, Ordering::Acquire);
        let ahead = index.wrapping_sub(self.next_available);
        if ahead > self.size {
            return Err(RingError::IndexJump { index, next: self.next_available, size: self.size });
        }
        self.seen_available = index;
        Ok(ahead != 0)
    }

    /// Writes a used entry that the driver sees after the next [`publish`](Self::publish).
    pub(super) fn push_used(&mut self, head: u16, written_bytes: u32) {
        let entry = usize::from(self.next_used & (self.size - 1));
        let at = RING_HEADER_BYTES + USED_ELEMENT_BYTES * entry;
        self.used.store_u32(at, u32::from(head));
        self.used.store_u32(at + 4, written_bytes);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the driver all used entries written so far, with one store; true when there were any.
    pub(super) fn publish(&mut self) -> bool {
        if self.next_used == self.published {
            return false;
        }
        // Release pairs with the driver's read barrier after loading used.idx: the entries, and
        // the data that they stand for, are visible before the index is (VIRTIO 1.3, 2.7.8.2).
        self.used.store_u16(INDEX, self.next_used, Ordering::Release);
        self.published = self.next_used;
        true
    }

    /// Whether the driver was ever given a buffer back, as far as indexes tell.
    pub(super) fn has_used(&self) -> bool {
        self.published != 0 || self.next_available != 0
    }

    /// Whether the driver wants a call for what was published since the last time this was asked.
    pub(super) fn wants_call(&mut self) -> bool {
        let (old, new) = (self.considered, self.published);
        if old == new {
            return false;
        }
        self.considered = new;
        // The store of used.idx before the load of used_event or flags; pairs with the driver's
        // full barrier between writing those and re-reading used.idx. Release and acquire do not
        // order a store before a later load: without SeqCst both sides may see the old value and
        // the call is lost (VIRTIO 1.3, 2.7.7.2 and 2.7.13.4.1).
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.available.load_u16(self.used_event_offset(), Ordering::Relaxed);
            passed(event, old, new)
        } else {
            // VIRTIO 1.3, 2.7.7.2: flags 1 means that the device SHOULD NOT send a notification.
            self.available.load_u16(0, Ordering::Relaxed) & VIRTQ_AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Tells the driver that kicks are not needed for now. With `EVENT_IDX` nothing is written:
    /// the event index stays behind and the driver, once past it, does not kick again.
    pub(super) fn suppress_kicks(&self) {
        if !self.event_idx {
            self.used.store_u16(0, VIRTQ_USED_F_NO_NOTIFY, Ordering::Relaxed);
        }
    }

    /// Asks for a kick at the available entry after the next `known` ones, and looks once more: true means that one
    /// came in between, whose kick may have been suppressed.
    pub(super) fn request_kick(&mut self, known: u16) -> Result<bool, RingError> {
        let awaited = self.next_available.wrapping_add(known);
        if self.event_idx {
            let offset = self.available_event_offset();
            self.used.store_u16(offset, awaited, Ordering::Relaxed);
        } else {
            self.used.store_u16(0, 0, Ordering::Relaxed);
        }
        // The request for a kick before the last look at avail.idx; pairs with the driver's full
        // barrier between raising idx and reading the event index or flags (VIRTIO 1.3,
        // 2.7.13.4.1). Anything weaker lets both sides miss each other and the ring sleeps.
        fence(Ordering::SeqCst);
        self.look()?;
        Ok(self.seen_available != awaited)
    }

    /// VIRTIO 1.3, 2.7.6: `used_event` follows the available ring's entries.
    fn used_event_offset(&self) -> usize {
        RING_HEADER_BYTES + 2 * usize::from(self.size)
    }

    /// VIRTIO 1.3, 2.7.8: `avail_event` follows the used ring's entries.
    fn available_event_offset(&self) -> usize {
        RING_HEADER_BYTES + USED_ELEMENT_BYTES * usize::from(self.size)
    }
}

/// Resolves and checks the three areas: descriptor table, available ring, used ring.
fn areas(
    addresses: RingAddresses,
    size: u16,
    memory: &MemoryMap,
) -> Result<(HostBuffer, HostBuffer, HostBuffer), RingError> {
    let entries = u64::from(size);
    let find = |area: &'static str, at: FrontendAddress, len_bytes: u64, align: u64| {
        // VIRTIO 1.3, 2.7: the areas are aligned to 16, 2 and 4 bytes.
        let found = memory
            .resolve_frontend(at, len_bytes)
            .map_err(|source| RingError::Unmapped { area, source })?;
        if !(found.address() as u64).is_multiple_of(align) {
            return Err(RingError::Misaligned { area, at, align });
        }
        Ok(found)
    };
    // The event indexes count as part of the rings whether or not EVENT_IDX was negotiated: both
    // are two bytes that every known driver allocates.
    Ok((
        find("descriptor table", addresses.descriptor, 16 * entries, 16)?,
        find("available ring", addresses.available, 2 * entries + 6, 2)?,
        find("used ring", addresses.used, 8 * entries + 6, 4)?,
    ))
}

/// VIRTIO 1.3, 2.7.10.1 (`vring_need_event`): whether the step from `old` to `new` passed `event`.
fn passed(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// Why a range of guest memory could not be had, with what was sought.
impl From<AccessError> for RingError {
    fn from(source: AccessError) -> Self {
        Self::Buffer { source }
    }
}

#[cfg(test)]
mod tests {
    use super::passed;

    #[test]
    fn event_inside_the_step_wants_a_call() {
        assert!(passed(5, 5, 6));
        assert!(passed(5, 3, 9));
        assert!(!passed(9, 3, 9));
        assert!(!passed(2, 3, 9));
    }

    #[test]
    fn event_comparison_wraps() {
        assert!(passed(0xffff, 0xfffe, 1));
        assert!(passed(0, 0xfffe, 1));
        assert!(!passed(1, 0xfffe, 1));
    }
}

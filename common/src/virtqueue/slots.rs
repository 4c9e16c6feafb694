//! The chains that are out: one slot for each head, and the memory map that each was popped under.
//!
//! Contract: a slot is keyed by its chain's head index, as the vhost-user in-flight region is
//! ("Inflight I/O tracking"), so that recovery and bookkeeping share one picture; [`Slots::open`]
//! and [`Slots::close`] are the two moments that such a region records. Memory that a popped
//! chain may still reach stays mapped: a replaced map is kept until its last chain is closed.
//! A bounce buffer that a chain was given stays with its slot, and so allocated, until the chain is
//! closed, which is never while an operation may reach it. Nothing is allocated after the start but
//! a slot's buffer list, which grows to the longest chain that the slot has carried, and the bounce
//! buffers, of which there are at most [`BOUNCE_BUFFERS_MAX`].

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;

use super::chain::Extent;
use crate::memory::{BOUNCE_BYTES, HostBuffer, MemoryMap, OwnMemory};

/// Bounce buffers of a ring: 2 MiB, and as many requests at a time. More would hide from nobody
/// that misaligned requests are slow, and a guest could have us hold more memory.
const BOUNCE_BUFFERS_MAX: usize = 16;

/// Buffers that a slot holds without growing: header, a few data segments, status.
const USUAL_BUFFERS: usize = 8;

/// One head's place.
#[derive(Default)]
pub(super) struct Slot {
    /// Kept from chain to chain for its capacity.
    pub(super) buffers: Vec<HostBuffer>,
    readable: usize,
    out: Option<Out>,
    bounce: Option<OwnMemory>,
}

/// The ring's bounce buffers: made when they are first wanted, and kept.
#[derive(Default)]
struct Bounces {
    free: Vec<OwnMemory>,
    made: usize,
}

impl Bounces {
    fn take(&mut self) -> Option<OwnMemory> {
        if self.free.is_empty() && self.made < BOUNCE_BUFFERS_MAX {
            self.made += 1;
            return Some(OwnMemory::new(BOUNCE_BYTES));
        }
        self.free.pop()
    }
}

/// What is known of a chain while it is out.
#[derive(Clone, Copy)]
struct Out {
    /// The memory generation it was popped under.
    generation: u64,
    /// The available index it was taken from.
    position: u16,
    /// Operations that the engine has not ended.
    operations: u16,
    popped_ns: u64,
}

/// A memory map that is no longer current, and how many chains still refer to it.
struct Replaced {
    generation: u64,
    chains: u32,
    _map: Arc<MemoryMap>,
}

/// All slots of a ring and the maps that they hold.
pub(super) struct Slots {
    slots: Box<[Slot]>,
    map: Arc<MemoryMap>,
    generation: u64,
    /// Chains popped under the current map.
    chains: u32,
    replaced: Vec<Replaced>,
    bounces: Bounces,
}

impl Slots {
    pub(super) fn new(size: u16, map: Arc<MemoryMap>) -> Self {
        let slot = || Slot { buffers: Vec::with_capacity(USUAL_BUFFERS), ..Slot::default() };
        Self {
            slots: (0..size).map(|_| slot()).collect(),
            map,
            generation: 0,
            chains: 0,
            replaced: Vec::new(),
            bounces: Bounces::default(),
        }
    }

    pub(super) fn map(&self) -> &Arc<MemoryMap> {
        &self.map
    }

    /// A free slot's buffer list, emptied, and the map to fill it from; `None` when the head is
    /// out already: the driver offered a buffer that it had not got back.
    pub(super) fn vacant(&mut self, head: u16) -> Option<(&mut Vec<HostBuffer>, &MemoryMap)> {
        let slot = self.slots.get_mut(usize::from(head)).filter(|slot| slot.out.is_none())?;
        slot.buffers.clear();
        Some((&mut slot.buffers, &self.map))
    }

    /// Records a popped chain, before any work on it starts.
    pub(super) fn open(&mut self, head: u16, position: u16, extent: Extent, now_ns: u64) {
        let slot = &mut self.slots[usize::from(head)];
        slot.readable = extent.readable;
        let generation = self.generation;
        slot.out = Some(Out { generation, position, operations: 0, popped_ns: now_ns });
        self.chains += 1;
    }

    /// Records that a chain has ended; the nanosecond at which it was popped, and its position.
    pub(super) fn close(&mut self, head: u16) -> (u64, u16) {
        let slot = &mut self.slots[usize::from(head)];
        let out = slot.out.take();
        let Some(out) = out else { unreachable!("chain {head} ended twice: a Chain is unique") };
        assert!(out.operations == 0, "chain {head} ended while the engine may reach its buffers");
        self.bounces.free.extend(slot.bounce.take());
        if out.generation == self.generation {
            self.chains -= 1;
        } else if let Some(at) =
            self.replaced.iter().position(|map| map.generation == out.generation)
        {
            self.replaced[at].chains -= 1;
            if self.replaced[at].chains == 0 {
                self.replaced.swap_remove(at);
            }
        }
        (out.popped_ns, out.position)
    }

    /// Counts an operation on a chain in (`true`) or out.
    pub(super) fn operation(&mut self, head: u16, begins: bool) {
        if let Some(out) = self.slots[usize::from(head)].out.as_mut() {
            out.operations = if begins { out.operations + 1 } else { out.operations - 1 };
        }
    }

    /// The available index that a chain was taken from.
    pub(super) fn position(&self, head: u16) -> Option<u16> {
        self.slots[usize::from(head)].out.map(|out| out.position)
    }

    pub(super) fn readable(&self, head: u16) -> &[HostBuffer] {
        let slot = &self.slots[usize::from(head)];
        &slot.buffers[..slot.readable]
    }

    pub(super) fn writable(&self, head: u16) -> &[HostBuffer] {
        let slot = &self.slots[usize::from(head)];
        &slot.buffers[slot.readable..]
    }

    /// Gives the chain a bounce buffer until it is closed; false where all are out.
    pub(super) fn give_bounce(&mut self, head: u16) -> bool {
        let slot = &mut self.slots[usize::from(head)];
        if slot.bounce.is_none() {
            slot.bounce = self.bounces.take();
        }
        slot.bounce.is_some()
    }

    /// The chain's bounce buffer, or no buffer.
    pub(super) fn bounce(&self, head: u16) -> &[HostBuffer] {
        self.slots[usize::from(head)].bounce.as_ref().map_or(&[], OwnMemory::list)
    }

    /// Makes `map` current; chains that are out keep theirs.
    pub(super) fn replace_map(&mut self, map: Arc<MemoryMap>) {
        let old = std::mem::replace(&mut self.map, map);
        let stays = |region| self.map.regions().iter().any(|kept| Arc::ptr_eq(kept, region));
        if old.regions().iter().all(stays) {
            // Memory was only added: chains that are out are as good under the new map, and who
            // waits for the change need not wait for them.
            return;
        }
        if self.chains > 0 {
            let (generation, chains) = (self.generation, self.chains);
            self.replaced.push(Replaced { generation, chains, _map: old });
        }
        self.generation += 1;
        self.chains = 0;
    }

    /// Whether no chain refers to a replaced map.
    pub(super) fn is_settled(&self) -> bool {
        self.replaced.is_empty()
    }

    /// Chains that are out.
    pub(super) fn count(&self) -> u32 {
        self.chains + self.replaced.iter().map(|map| map.chains).sum::<u32>()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use std::os::fd::AsFd;

    use super::{BOUNCE_BUFFERS_MAX, Extent, Slots};
    use crate::memory::{FrontendAddress, GuestAddress, MemoryMap, Region, RegionSpec};

    #[test]
    fn replaced_map_lives_until_its_last_chain_is_closed() {
        let old = map_of_one_region();
        let mut slots = Slots::new(4, Arc::clone(&old));
        slots.open(1, 0, Extent::default(), 0);
        slots.open(3, 1, Extent::default(), 0);
        slots.replace_map(Arc::new(MemoryMap::empty()));
        slots.open(2, 2, Extent::default(), 0);
        assert!(!slots.is_settled());
        slots.close(3);
        assert_eq!(Arc::strong_count(&old), 2);
        slots.close(1);
        assert!(slots.is_settled());
        assert_eq!(Arc::strong_count(&old), 1);
        assert_eq!(slots.count(), 1);
    }

    #[test]
    fn memory_that_is_only_added_is_settled_at_once() {
        let old = map_of_one_region();
        let mut slots = Slots::new(4, Arc::clone(&old));
        slots.open(1, 0, Extent::default(), 0);
        let new = MemoryMap::new(old.regions().to_vec()).expect("the same region");
        slots.replace_map(Arc::new(new));
        assert!(slots.is_settled());
        assert_eq!((Arc::strong_count(&old), slots.count()), (1, 1));
        slots.close(1);
        assert_eq!(slots.count(), 0);
    }

    fn map_of_one_region() -> Arc<MemoryMap> {
        let file = crate::memory::guest_file(0x1000);
        let spec = RegionSpec {
            guest: GuestAddress(0),
            frontend: FrontendAddress(0),
            len_bytes: 0x1000,
            file_offset_bytes: 0,
        };
        let region = Region::map(spec, file.as_fd()).expect("map");
        Arc::new(MemoryMap::new(vec![Arc::new(region)]).expect("one region"))
    }

    #[test]
    fn bounce_buffer_is_the_chain_s_until_it_ends_and_there_are_not_many() {
        let head = |number: usize| u16::try_from(number).expect("small");
        let mut slots = Slots::new(64, Arc::new(MemoryMap::empty()));
        for number in 0..=BOUNCE_BUFFERS_MAX {
            slots.open(head(number), head(number), Extent::default(), 0);
            assert!(slots.bounce(head(number)).is_empty());
            assert_eq!(slots.give_bounce(head(number)), number < BOUNCE_BUFFERS_MAX);
        }
        let address = |slots: &Slots, number| slots.bounce(number).first().map(|b| b.address());
        let second = address(&slots, 1);
        assert!(slots.give_bounce(1) && address(&slots, 1) == second, "it has one already");
        slots.close(1);
        assert!(slots.bounce(1).is_empty());
        assert!(slots.give_bounce(head(BOUNCE_BUFFERS_MAX)));
        assert_eq!(address(&slots, head(BOUNCE_BUFFERS_MAX)), second, "it is used again");
    }

    #[test]
    fn head_that_is_out_is_not_vacant() {
        let mut slots = Slots::new(4, Arc::new(MemoryMap::empty()));
        assert!(slots.vacant(2).is_some());
        slots.open(2, 0, Extent::default(), 7);
        assert!(slots.vacant(2).is_none());
        assert_eq!(slots.close(2), (7, 0));
        assert!(slots.vacant(2).is_some());
        assert!(slots.vacant(4).is_none());
    }
}

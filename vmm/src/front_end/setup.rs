//! What a driver has set up, checked, as a daemon is told of it.
//!
//! Contract: the areas of a [`RingSetup`] lie in guest memory, each in one region, aligned as the specification wants them.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::interrupts::Call;
use crate::virtio::common::Queue;

/// Bytes of a descriptor, of an entry of the available and of the used ring.
const ENTRY_BYTES: [usize; 3] = [16, 2, 8];
/// Bytes of an area beside its entries: flags, index and event index of the rings.
const OTHER_BYTES: [usize; 3] = [0, 6, 6];
/// VIRTIO 1.3, 2.7: the areas are aligned so.
const ALIGN: [u64; 3] = [16, 2, 4];
const AREAS: [&str; 3] = ["descriptor table", "available ring", "used ring"];

/// Why a driver's queue cannot be served.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error("the {area} of queue {index} is at {at:#x}, which is no multiple of {align}")]
    Misaligned { index: u16, area: &'static str, at: u64, align: u64 },
    #[error(
        "the {area} of queue {index} is at {at:#x}, where guest memory has no {len} bytes in a row"
    )]
    NoMemory {
        index: u16,
        area: &'static str,
        at: u64,
        len: usize,
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

/// A queue that the driver has enabled.
pub(crate) struct RingSetup {
    pub(crate) index: u16,
    pub(crate) size: u16,
    /// Addresses in this process of the descriptor table, the available and the used ring.
    pub(crate) addresses: [u64; 3],
    /// Where these are in guest memory.
    pub(crate) places: [u64; 3],
    pub(crate) kick: Arc<EventFd>,
    pub(crate) call: Call,
}

impl RingSetup {
    /// Checks a queue. The eventfds are the vring's kick and call.
    pub(crate) fn new(
        memory: &GuestMemoryMmap,
        index: u16,
        queue: &Queue,
        (kick, call): (Arc<EventFd>, Call),
    ) -> Result<Self, Error> {
        let places = [queue.descriptors, queue.driver, queue.device];
        let mut addresses = [0; 3];
        let areas = AREAS.into_iter().zip(ALIGN).zip(ENTRY_BYTES.into_iter().zip(OTHER_BYTES));
        for ((at, address), ((area, align), (entry, other))) in
            places.into_iter().zip(&mut addresses).zip(areas)
        {
            if !at.is_multiple_of(align) {
                return Err(Error::Misaligned { index, area, at, align });
            }
            let len = usize::from(queue.size).saturating_mul(entry).saturating_add(other);
            let slice = memory
                .get_slice(GuestAddress(at), len)
                .map_err(|source| Error::NoMemory { index, area, at, len, source })?;
            *address = slice.ptr_guard().as_ptr().addr() as u64;
        }
        Ok(Self { index, size: queue.size, addresses, places, kick, call })
    }

    /// The used ring's index: where a daemon goes on that knows nothing of its predecessor.
    pub(crate) fn used_index(&self, memory: &GuestMemoryMmap) -> u16 {
        let [_, _, used] = self.places;
        // The predecessor's stores are over: its end, or our last message to it, has come since.
        index_of(memory, used)
    }

    /// How many chains the driver has made available, and has not been given back.
    pub(crate) fn in_flight(&self, memory: &GuestMemoryMmap) -> u16 {
        let [_, available, used] = self.places;
        index_of(memory, available).wrapping_sub(index_of(memory, used))
    }
}

/// The index of an available or used ring. Its area was checked, so the fallback is never taken.
fn index_of(memory: &GuestMemoryMmap, ring: u64) -> u16 {
    let index = memory.load::<u16>(GuestAddress(ring.saturating_add(2)), Ordering::Acquire);
    index.map_or(0, u16::from_le)
}

/// All that a daemon needs in order to serve the driver.
pub(crate) struct Setup {
    /// The features that the driver has accepted.
    pub(crate) features: u64,
    /// The enabled queues, by their index.
    pub(crate) rings: Vec<RingSetup>,
    /// A network's control queue, which is not among them: this process serves it.
    pub(crate) control: Option<RingSetup>,
    /// A daemon has been told of it: the rings may be anywhere.
    has_run: AtomicBool,
}

impl Setup {
    /// What a driver has set up; the queue of index `control` is its control queue.
    pub(crate) fn new(features: u64, mut rings: Vec<RingSetup>, control: Option<u16>) -> Self {
        let at = rings.iter().position(|ring| Some(ring.index) == control);
        let control = at.map(|at| rings.remove(at));
        Self { features, rings, control, has_run: AtomicBool::new(false) }
    }

    /// Says that a daemon is about to be told, and whether another was told before.
    pub(crate) fn begin(&self) -> bool {
        self.has_run.swap(true, Ordering::Relaxed)
    }
}

//! The record of requests in flight, in memory that the front end keeps for the daemon's successor (vhost-user, "Inflight I/O
//! tracking", split virtqueues).
//!
//! Contract: a chain is in the [`Record`] from before any work on it begins until the driver can see that it was used; at
//! whatever store the process ends, a successor that [recovers](Record::recover) from it knows each chain that is still to be
//! used, in the order in which they were popped. The region is foreign memory: its numbers are checked before they are
//! used, its lists are followed no further than the ring is long.
//!
//! What it does not do: wait until the predecessor's operations have ended. Who opens the device has done so.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::RingError;
use crate::memory::{FrontendAddress, GuestAddress, HostBuffer, MapError, Region, RegionSpec};

// `QueueRegionSplit`: where its fields are.
const VERSION: usize = 8;
const DESCRIPTOR_COUNT: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_INDEX: usize = 14;
const HEADER_BYTES: usize = 16;
// `DescStateSplit`: one for each descriptor.
const STATE_BYTES: usize = 16;
/// One byte, and padding.
const IN_FLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// The region of a queue that was never started: all zeros.
const UNINITIALIZED: u16 = 0;
const OUR_VERSION: u16 = 1;
/// A queue's region begins on a cache line of its own: each is another worker's.
const ALIGN_BYTES: u64 = 64;

/// What a region is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InflightShape {
    /// Number of queues.
    pub queue_count: u16,
    /// The largest size of one.
    pub queue_size: u16,
}

impl InflightShape {
    /// Bytes of all.
    pub fn len_bytes(self) -> u64 {
        u64::from(self.queue_count).saturating_mul(self.queue_bytes())
    }

    /// Bytes of one queue's region.
    fn queue_bytes(self) -> u64 {
        let states = u64::from(self.queue_size).saturating_mul(STATE_BYTES as u64);
        states.saturating_add(HEADER_BYTES as u64).next_multiple_of(ALIGN_BYTES)
    }

    /// A file for a region in which nothing is recorded. It cannot shrink.
    ///
    /// # Errors
    /// There is no memory or no descriptor for it.
    pub fn create(self) -> io::Result<OwnedFd> {
        let file = memfd_create("inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, self.len_bytes())?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(file)
    }
}

/// A region, mapped.
#[derive(Debug)]
pub struct InflightRegion {
    shape: InflightShape,
    region: Arc<Region>,
}

impl InflightRegion {
    /// Maps the region that begins at this offset of a file.
    ///
    /// # Errors
    /// The file is none of memory, or too short.
    pub fn map(
        shape: InflightShape,
        file_offset_bytes: u64,
        file: BorrowedFd<'_>,
    ) -> Result<Self, MapError> {
        let (guest, frontend) = (GuestAddress(0), FrontendAddress(0));
        let len_bytes = shape.len_bytes();
        let spec = RegionSpec { guest, frontend, len_bytes, file_offset_bytes };
        Ok(Self { shape, region: Arc::new(Region::map(spec, file)?) })
    }

    /// The record of a queue; `None`: there is no room for it.
    pub fn record(&self, queue: u16) -> Option<Record> {
        if queue >= self.shape.queue_count {
            return None;
        }
        let queue_bytes = usize::try_from(self.shape.queue_bytes()).ok()?;
        let bytes = self.region.bytes();
        let bytes = bytes.slice(usize::from(queue).checked_mul(queue_bytes)?, queue_bytes);
        let (region, queue_size) = (Arc::clone(&self.region), self.shape.queue_size);
        Some(Record { bytes, region, queue_size, counter: 0, batch: Vec::new() })
    }
}

/// One queue's record.
#[derive(Debug)]
pub struct Record {
    bytes: HostBuffer,
    /// Keeps the bytes mapped.
    region: Arc<Region>,
    /// So many descriptors have a place.
    queue_size: u16,
    /// The place of the next chain in their order.
    counter: u64,
    /// Heads whose use the driver cannot see yet.
    batch: Vec<u16>,
}

/// What a predecessor has left of a ring.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// It never ran: the front end says where it begins.
    Nothing,
    /// It ran; these heads were popped and not used, in this order.
    Heads(Vec<u16>),
}

impl Record {
    /// Forgets what is recorded of a ring of this size: it begins where the front end says.
    pub fn forget(&self, size: u16) {
        for head in 0..size.min(self.queue_size) {
            self.set_in_flight(head, false);
        }
        self.bytes.store_u16(VERSION, UNINITIALIZED, Ordering::Release);
    }

    /// Finishes what the predecessor was about, and returns what it has left of a ring of this size whose used index is this.
    pub(super) fn recover(&mut self, size: u16, used_index: u16) -> Result<Left, RingError> {
        let (recorded, version) =
            (self.queue_size, self.bytes.load_u16(VERSION, Ordering::Acquire));
        if size > recorded {
            return Err(RingError::InflightSize { size, recorded });
        }
        self.batch.reserve(usize::from(size));
        match version {
            UNINITIALIZED => {
                self.bytes.store_u16(DESCRIPTOR_COUNT, recorded, Ordering::Release);
                self.bytes.store_u16(USED_INDEX, used_index, Ordering::Release);
                self.bytes.store_u16(VERSION, OUR_VERSION, Ordering::Release);
                return Ok(Left::Nothing);
            }
            OUR_VERSION => {}
            version => return Err(RingError::InflightVersion { version }),
        }
        let found = self.bytes.load_u16(DESCRIPTOR_COUNT, Ordering::Relaxed);
        if found != recorded {
            return Err(RingError::InflightSize { size: found, recorded });
        }
        self.finish_batch(size, used_index);
        let mut heads: Vec<_> = (0..size).filter(|head| self.is_in_flight(*head)).collect();
        heads.sort_by_key(|head| self.counter_of(*head));
        self.counter = heads.last().map_or(0, |head| self.counter_of(*head).wrapping_add(1));
        Ok(Left::Heads(heads))
    }

    /// The driver may have been shown more used chains than the record says are no longer in flight.
    fn finish_batch(&mut self, size: u16, used_index: u16) {
        let recorded = self.bytes.load_u16(USED_INDEX, Ordering::Relaxed);
        let mut head = self.bytes.load_u16(LAST_BATCH_HEAD, Ordering::Relaxed);
        // More than all of the ring, and the ring is another one by now: none is in flight.
        for _ in 0..used_index.wrapping_sub(recorded).min(size) {
            if head >= size {
                break;
            }
            self.set_in_flight(head, false);
            head = self.bytes.load_u16(self.place(head, NEXT), Ordering::Relaxed);
        }
        self.bytes.store_u16(USED_INDEX, used_index, Ordering::Release);
    }

    /// A chain was popped. Nothing has been done about it.
    pub(super) fn popped(&mut self, head: u16) {
        self.bytes.store_u64(self.place(head, COUNTER), self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.set_in_flight(head, true);
    }

    /// Nothing was done about a chain: it was not popped.
    pub(super) fn put_back(&mut self, head: u16) {
        self.set_in_flight(head, false);
    }

    /// A chain is used; the driver cannot see it yet.
    pub(super) fn used(&mut self, head: u16) {
        let last = self.bytes.load_u16(LAST_BATCH_HEAD, Ordering::Relaxed);
        self.bytes.store_u16(self.place(head, NEXT), last, Ordering::Release);
        self.bytes.store_u16(LAST_BATCH_HEAD, head, Ordering::Release);
        self.batch.push(head);
    }

    /// The driver sees all that was used, up to this index.
    pub(super) fn published(&mut self, used_index: u16) {
        while let Some(head) = self.batch.pop() {
            self.set_in_flight(head, false);
        }
        self.bytes.store_u16(USED_INDEX, used_index, Ordering::Release);
    }

    /// Whether the front end took the region away.
    pub(super) fn is_poisoned(&self) -> bool {
        self.region.is_poisoned()
    }

    fn is_in_flight(&self, head: u16) -> bool {
        let [in_flight, _padding] =
            self.bytes.load_u16(self.place(head, IN_FLIGHT), Ordering::Relaxed).to_le_bytes();
        in_flight != 0
    }

    /// Release: whoever reads this after the process's end sees what was stored before.
    fn set_in_flight(&self, head: u16, is_so: bool) {
        self.bytes.store_u16(self.place(head, IN_FLIGHT), u16::from(is_so), Ordering::Release);
    }

    fn counter_of(&self, head: u16) -> u64 {
        self.bytes.load_u64(self.place(head, COUNTER))
    }

    /// Where a field of a descriptor's state is.
    fn place(&self, head: u16, field: usize) -> usize {
        let states = usize::from(head).saturating_mul(STATE_BYTES);
        states.saturating_add(HEADER_BYTES).saturating_add(field)
    }
}

//! The fields of a split virtqueue in guest memory, each readable and writable on its own.
//!
//! Nothing here keeps a driver honest: any descriptor, index or flag can be written at any time
//! (VIRTIO 1.3, 2.7 has the layout). [`crate::virtqueue`] is the driver that plays by the rules.

use crate::memory::GuestMemory;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

/// The descriptor continues at `next`.
pub const VIRTQ_DESC_F_NEXT: u16 = 1;
/// The buffer is device-writable.
pub const VIRTQ_DESC_F_WRITE: u16 = 2;
/// The buffer holds a table of descriptors.
pub const VIRTQ_DESC_F_INDIRECT: u16 = 4;
/// In the available ring's flags: the driver wants no notifications.
pub const VIRTQ_AVAIL_F_NO_INTERRUPT: u16 = 1;
/// In the used ring's flags: the device wants no notifications.
pub const VIRTQ_USED_F_NO_NOTIFY: u16 = 1;
/// Length of one descriptor.
pub const DESCRIPTOR_BYTES: u64 = 16;
/// Length of one element of the used ring.
const USED_ELEMENT_BYTES: u64 = 8;

/// One descriptor, whatever it may say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest address of the buffer.
    pub address: u64,
    /// Its length.
    pub len_bytes: u32,
    /// `VIRTQ_DESC_F_*`.
    pub flags: u16,
    /// Index of the next descriptor, if the flags say so.
    pub next: u16,
}

impl Descriptor {
    /// The 16 bytes of the descriptor in guest memory.
    #[must_use]
    pub fn encode(&self) -> [u8; DESCRIPTOR_BYTES as usize] {
        let mut bytes = [0; DESCRIPTOR_BYTES as usize];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len_bytes.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// Where the three parts of a ring are, and the fields in them.
#[derive(Clone, Debug)]
pub struct SplitRing {
    memory: Arc<GuestMemory>,
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl SplitRing {
    /// A ring of `size` entries from guest address `at`, which is a multiple of 16; its memory is
    /// zeroed.
    #[must_use]
    pub fn new(memory: Arc<GuestMemory>, at: u64, size: u16) -> Self {
        let available = at + DESCRIPTOR_BYTES * u64::from(size);
        // VIRTIO 1.3, 2.7: the used ring is aligned to 4 bytes.
        let used = (available + Self::available_bytes(size)).next_multiple_of(4);
        let ring = SplitRing { memory, size, descriptors: at, available, used };
        ring.memory.write(at, &vec![0; Self::total_bytes(size)]);
        ring
    }

    /// Guest memory that a ring of `size` entries takes.
    #[must_use]
    pub fn total_bytes(size: u16) -> usize {
        let before =
            (DESCRIPTOR_BYTES * u64::from(size) + Self::available_bytes(size)).next_multiple_of(4);
        let used = 2 + 2 + USED_ELEMENT_BYTES * u64::from(size) + 2;
        usize::try_from(before + used).expect("the largest ring has less than a MiB")
    }

    fn available_bytes(size: u16) -> u64 {
        2 + 2 + 2 * u64::from(size) + 2
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The memory that the ring is in.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Guest address of the descriptor table.
    #[must_use]
    pub fn descriptors_address(&self) -> u64 {
        self.descriptors
    }

    /// Guest address of the available ring.
    #[must_use]
    pub fn available_address(&self) -> u64 {
        self.available
    }

    /// Guest address of the used ring.
    #[must_use]
    pub fn used_address(&self) -> u64 {
        self.used
    }

    /// Writes one descriptor.
    pub fn write_descriptor(&self, index: u16, descriptor: &Descriptor) {
        self.memory
            .write(self.descriptors + DESCRIPTOR_BYTES * u64::from(index), &descriptor.encode());
    }

    /// Writes an entry of the available ring; `position` counts on and on, as the index does.
    pub fn write_available(&self, position: u16, head: u16) {
        let slot = u64::from(position % self.size);
        self.memory.store_u16(self.available + 4 + 2 * slot, head, Ordering::Relaxed);
    }

    /// Publishes the available index. Pairs with the device's acquire load of it (VIRTIO 1.3,
    /// 2.7.13.3.1).
    pub fn set_available_index(&self, index: u16) {
        self.memory.store_u16(self.available + 2, index, Ordering::Release);
    }

    /// The available index that was published last.
    #[must_use]
    pub fn available_index(&self) -> u16 {
        self.memory.load_u16(self.available + 2, Ordering::Relaxed)
    }

    /// Writes the available ring's flags.
    pub fn set_available_flags(&self, flags: u16) {
        self.memory.store_u16(self.available, flags, Ordering::Relaxed);
    }

    /// Asks for a notification once the used index passes `index` (with `VIRTIO_F_EVENT_IDX`).
    pub fn set_used_event(&self, index: u16) {
        self.memory.store_u16(
            self.available + 4 + 2 * u64::from(self.size),
            index,
            Ordering::Relaxed,
        );
    }

    /// The used index. Pairs with the device's release store of it: the elements before it can be
    /// read.
    #[must_use]
    pub fn used_index(&self) -> u16 {
        self.memory.load_u16(self.used + 2, Ordering::Acquire)
    }

    /// Writes the used index, which is the device's: for tests of back ends that trust it.
    pub fn set_used_index(&self, index: u16) {
        self.memory.store_u16(self.used + 2, index, Ordering::Release);
    }

    /// The used ring's flags.
    #[must_use]
    pub fn used_flags(&self) -> u16 {
        self.memory.load_u16(self.used, Ordering::Relaxed)
    }

    /// The element at `position` of the used ring: head and length.
    #[must_use]
    pub fn used_element(&self, position: u16) -> (u32, u32) {
        let at = self.used + 4 + USED_ELEMENT_BYTES * u64::from(position % self.size);
        (self.memory.load_u32(at), self.memory.load_u32(at + 4))
    }

    /// The available index at which the device wants a notification (with `VIRTIO_F_EVENT_IDX`).
    #[must_use]
    pub fn available_event(&self) -> u16 {
        let at = self.used + 4 + USED_ELEMENT_BYTES * u64::from(self.size);
        self.memory.load_u16(at, Ordering::Relaxed)
    }

    /// Whether the device asks to be notified of the available index having gone from `before` to
    /// `now`, which has been published (VIRTIO 1.3, 2.7.10.1).
    #[must_use]
    pub fn wants_kick(&self, event_idx: bool, before: u16, now: u16) -> bool {
        self.full_barrier();
        if event_idx {
            let past_event = now.wrapping_sub(self.available_event()).wrapping_sub(1);
            past_event < now.wrapping_sub(before)
        } else {
            self.used_flags() & VIRTQ_USED_F_NO_NOTIFY == 0
        }
    }

    /// Orders a store to one part of the ring before a load from another: pairs with the device's
    /// own full barrier between publishing a used index or an event index and looking at the
    /// driver's side (VIRTIO 1.3, 2.7.7.2 and 2.7.10). Release and acquire alone would let the load
    /// go first, and both sides sleep.
    pub fn full_barrier(&self) {
        fence(Ordering::SeqCst);
    }
}

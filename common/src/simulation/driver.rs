//! A driver: descriptors and the available ring written store by store, the used ring read.
//!
//! Two layers: [`describe`](Driver::describe) and [`offer`](Driver::offer) write whatever a test
//! says, good or bad; [`add`](Driver::add), [`publish`](Driver::publish) and
//! [`take_used`](Driver::take_used) keep a well-behaved driver's books, and check the device's.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::Guest;
use super::random::Random;
use crate::memory::HostBuffer;
use crate::virtqueue::{RingAddresses, RingSetup, VIRTIO_F_EVENT_IDX};

/// VIRTIO 1.3, 2.7.5: the flags of a descriptor.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Where a ring lies in the guest, and how large it is.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Number of entries.
    pub size: u16,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub available: u64,
    /// Guest address of the used ring.
    pub used: u64,
}

/// A buffer in the guest's memory: address and bytes.
pub type Buffer = (u64, u32);

/// A used entry as the driver finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The chain's head.
    pub head: u16,
    /// Bytes that the device says it wrote.
    pub written_bytes: u32,
}

/// The driver of one ring.
pub struct Driver {
    guest: Arc<Guest>,
    layout: Layout,
    features: u64,
    available: HostBuffer,
    used: HostBuffer,
    /// The next available entry to write.
    next_available: u16,
    /// The available index that the device can see.
    published: u16,
    /// The next used entry to read.
    next_used: u16,
    /// Descriptors that nothing uses.
    free: Vec<u16>,
    /// By head: the descriptors of the chain that the device has.
    chains: Vec<Option<Vec<u16>>>,
}

impl Driver {
    /// A driver that negotiated `features`, of a ring of zeros.
    ///
    /// # Panics
    /// The ring is not in one region of the guest's memory.
    pub fn new(guest: Arc<Guest>, layout: Layout, features: u64) -> Self {
        let area = |at, len_bytes| {
            let found = guest.map().resolve_frontend(Guest::frontend(at), len_bytes);
            found.expect("a ring in memory")
        };
        let entries = u64::from(layout.size);
        Self {
            available: area(layout.available, 2 * entries + 6),
            used: area(layout.used, 8 * entries + 6),
            guest,
            layout,
            features,
            next_available: 0,
            published: 0,
            next_used: 0,
            free: (0..layout.size).rev().collect(),
            chains: (0..layout.size).map(|_| None).collect(),
        }
    }

    /// Begins both rings at this index.
    pub fn start_at(&mut self, index: u16) {
        (self.next_available, self.published, self.next_used) = (index, index, index);
        self.available.store_u16(2, index, Ordering::Relaxed);
        self.used.store_u16(2, index, Ordering::Relaxed);
    }

    /// What a device needs to serve the ring from `base` on.
    pub fn setup(&self, base: u16) -> RingSetup {
        let Layout { size, descriptors, available, used } = self.layout;
        let addresses = RingAddresses {
            descriptor: Guest::frontend(descriptors),
            available: Guest::frontend(available),
            used: Guest::frontend(used),
        };
        RingSetup {
            addresses,
            size,
            base,
            features: self.features,
            memory: self.guest.map(),
            record: None,
        }
    }

    /// Writes one descriptor at a guest address.
    pub fn describe_at(&self, at: u64, buffer: Buffer, flags: u16, next: u16) {
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&buffer.0.to_le_bytes());
        descriptor[8..12].copy_from_slice(&buffer.1.to_le_bytes());
        descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
        descriptor[14..].copy_from_slice(&next.to_le_bytes());
        self.guest.write(at, &descriptor);
    }

    /// Writes one descriptor of the ring's table.
    pub fn describe(&self, index: u16, buffer: Buffer, flags: u16, next: u16) {
        self.describe_at(self.layout.descriptors + 16 * u64::from(index), buffer, flags, next);
    }

    /// Makes a chain available, whatever it is.
    pub fn offer(&mut self, head: u16) {
        self.enter(head);
        self.show(self.next_available);
    }

    /// Writes the next entry of the available ring.
    fn enter(&mut self, head: u16) {
        let entry = usize::from(self.next_available % self.layout.size);
        self.available.store_u16(4 + 2 * entry, head, Ordering::Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
    }

    /// Writes the available index, whatever it is.
    pub fn show(&mut self, index: u16) {
        self.published = index;
        self.available.store_u16(2, index, Ordering::Release);
    }

    /// Writes the available ring's flags: 1 means no interrupts.
    pub fn set_flags(&self, flags: u16) {
        self.available.store_u16(0, flags, Ordering::Relaxed);
    }

    /// Writes `used_event`: the used index that is to be told.
    pub fn set_used_event(&self, index: u16) {
        let offset = 4 + 2 * usize::from(self.layout.size);
        self.available.store_u16(offset, index, Ordering::Relaxed);
    }

    /// What the device wrote as `avail_event`.
    pub fn available_event(&self) -> u16 {
        self.used.load_u16(4 + 8 * usize::from(self.layout.size), Ordering::Relaxed)
    }

    /// What the device wrote as the used ring's flags: 1 means no kicks.
    pub fn used_flags(&self) -> u16 {
        self.used.load_u16(0, Ordering::Relaxed)
    }

    /// The used index as the device shows it.
    pub fn used_index(&self) -> u16 {
        self.used.load_u16(2, Ordering::Acquire)
    }

    /// The used entry for an index, (head, bytes written).
    pub fn used(&self, index: u16) -> (u32, u32) {
        let at = 4 + 8 * usize::from(index % self.layout.size);
        (self.used.load_u32(at), self.used.load_u32(at + 4))
    }

    /// Writes a chain of these readable, then writable, buffers into free descriptors, which `random` picks. With a `table`, a guest address, all but the head go
    /// there. The head, or `None` where there is no room. The device does not see it yet.
    pub fn add(
        &mut self,
        buffers: (&[Buffer], &[Buffer]),
        table: Option<u64>,
        random: &mut Random,
    ) -> Option<u16> {
        let (readable, writable) = buffers;
        let count = readable.len() + writable.len();
        let wanted = if table.is_some() { 1 } else { count };
        if self.free.len() < wanted {
            return None;
        }
        let taken: Vec<u16> =
            (0..wanted).map(|_| self.free.swap_remove(random.index(self.free.len()))).collect();
        let place = |at: usize| table.map_or_else(|| taken[at], |_| at as u16);
        let flags = std::iter::repeat_n(0, readable.len())
            .chain(std::iter::repeat_n(WRITE, writable.len()));
        for (at, (buffer, flags)) in readable.iter().chain(writable).zip(flags).enumerate() {
            let (flags, next) =
                if at + 1 < count { (flags | NEXT, place(at + 1)) } else { (flags, 0) };
            match table {
                Some(table) => self.describe_at(table + 16 * at as u64, *buffer, flags, next),
                None => self.describe(taken[at], *buffer, flags, next),
            }
        }
        let head = taken[0];
        if let Some(table) = table {
            self.describe(head, (table, 16 * count as u32), INDIRECT, 0);
        }
        self.chains[usize::from(head)] = Some(taken);
        self.enter(head);
        Some(head)
    }

    /// Shows the device all that was added; whether it wants to be kicked for it.
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_available);
        self.show(new);
        fence(Ordering::SeqCst);
        if self.features & VIRTIO_F_EVENT_IDX == 0 {
            return old != new && self.used_flags() & 1 == 0;
        }
        // VIRTIO 1.3, 2.7.10.1: the step from old to new passed the event.
        let event = self.available_event();
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    /// The available index after all that was added.
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    /// Takes the used entries that have come; their descriptors are free again.
    ///
    /// # Panics
    /// The device used a chain that it had not got, or used one twice.
    pub fn take_used(&mut self) -> Vec<Used> {
        let mut taken = Vec::new();
        while self.next_used != self.used_index() {
            let (head, written_bytes) = self.used(self.next_used);
            let chain = self.chains.get_mut(head as usize).and_then(Option::take);
            let chain = chain.unwrap_or_else(|| {
                panic!("the device used chain {head}, which it had not got, or had given back")
            });
            self.free.extend(chain);
            self.next_used = self.next_used.wrapping_add(1);
            taken.push(Used { head: head as u16, written_bytes });
        }
        taken
    }

    /// Asks for a call at the next used entry; false when one has come already, so that the driver
    /// must not wait.
    pub fn want_call(&self) -> bool {
        self.set_flags(0);
        self.set_used_event(self.next_used);
        fence(Ordering::SeqCst);
        self.used_index() == self.next_used
    }

    /// Asks for no calls.
    pub fn want_no_call(&self) {
        // With EVENT_IDX: an index that was just passed is far ahead.
        self.set_flags(u16::from(self.features & VIRTIO_F_EVENT_IDX == 0));
        self.set_used_event(self.next_used.wrapping_sub(1));
    }
}

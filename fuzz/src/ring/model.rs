//! A split virtqueue as VIRTIO 1.3, 2.7 has it: written from the text, for reading rather than for speed. It reads the
//! guest's memory as it ought to be, and records there what the device is due to write.

use common::virtqueue::{MAX_CHAIN_DESCRIPTORS, MAX_QUEUE_SIZE};

use super::guest::{FILE_BYTES, Guest, Span, Table};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const DESCRIPTOR_BYTES: usize = 16;

/// Why there is no ring, or no chain.
#[derive(Debug, PartialEq)]
pub(super) struct Wrong;

/// What a front end says of a ring: front-end addresses of its areas, its size, and what was negotiated.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) descriptor: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    pub(super) size: u16,
    pub(super) indirect: bool,
    pub(super) event_idx: bool,
}

/// Where the areas are in the guest's file.
#[derive(Clone, Copy, Debug)]
struct Areas {
    descriptor: usize,
    available: usize,
    used: usize,
}

impl Shape {
    fn areas(&self, table: &Table) -> Result<Areas, Wrong> {
        // 2.7: alignment and size of each part; the event indexes included.
        let entries = u64::from(self.size);
        let area = |at, len_bytes, align| match table.frontend(at, len_bytes) {
            Some((offset, address)) if address.is_multiple_of(align) => Ok(offset),
            _ => Err(Wrong),
        };
        if !self.size.is_power_of_two() || self.size > MAX_QUEUE_SIZE {
            return Err(Wrong);
        }
        Ok(Areas {
            descriptor: area(self.descriptor, 16 * entries, 16)?,
            available: area(self.available, 2 * entries + 6, 2)?,
            used: area(self.used, 8 * entries + 6, 4)?,
        })
    }

    /// Whether an area lies where nothing may be written.
    pub(super) fn touches_large(&self, table: &Table) -> bool {
        self.areas(table)
            .is_ok_and(|areas| areas.descriptor.max(areas.available).max(areas.used) >= FILE_BYTES)
    }
}

/// A chain as the device must see it.
#[derive(Clone, Debug)]
pub(super) struct Chain<'g> {
    pub(super) head: u16,
    pub(super) readable: Vec<Span>,
    pub(super) writable: Vec<Span>,
    /// The available index that it was taken from.
    position: u16,
    /// The memory table under which it was popped, by a number of its generation.
    generation: u64,
    pub(super) table: &'g Table,
}

/// The device's side of a ring, as it must be.
pub(super) struct Model<'g> {
    guest: &'g Guest,
    shape: Shape,
    areas: Areas,
    table: &'g Table,
    generation: u64,
    pub(super) next_available: u16,
    /// The driver's index when it was last looked at: what is before it may be taken without another look.
    seen: u16,
    next_used: u16,
    published: u16,
    pub(super) out: Vec<Chain<'g>>,
    pub(super) broken: bool,
}

struct Descriptor {
    address: u64,
    len_bytes: u32,
    flags: u16,
    next: u16,
}

impl<'g> Model<'g> {
    pub(super) fn new(
        guest: &'g Guest,
        shape: Shape,
        base: u16,
        table: &'g Table,
    ) -> Result<Self, Wrong> {
        let areas = shape.areas(table)?;
        let used = guest.load_u16(areas.used + 2);
        Ok(Self {
            guest,
            shape,
            areas,
            table,
            generation: 0,
            next_available: base,
            seen: base,
            next_used: used,
            published: used,
            out: Vec::new(),
            broken: false,
        })
    }

    fn available_index(&self) -> u16 {
        self.guest.load_u16(self.areas.available + 2)
    }

    pub(super) fn has_available(&self) -> bool {
        !self.broken && self.available_index() != self.next_available
    }

    /// Looks at the driver's index; how many chains wait.
    fn look(&mut self) -> Result<u16, Wrong> {
        let index = self.available_index();
        let waiting = index.wrapping_sub(self.next_available);
        if waiting > self.shape.size {
            return Err(Wrong);
        }
        self.seen = index;
        Ok(waiting)
    }

    /// The next chain. One that is wrong stays where it is.
    pub(super) fn pop(&mut self) -> Result<Option<Chain<'g>>, Wrong> {
        if self.broken || self.next_available == self.seen && self.look()? == 0 {
            return Ok(None);
        }
        let entry = usize::from(self.next_available % self.shape.size);
        let head = self.guest.load_u16(self.areas.available + 4 + 2 * entry);
        if head >= self.shape.size || self.out.iter().any(|chain| chain.head == head) {
            return Err(Wrong);
        }
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        let mut bytes = 0u64;
        for descriptor in self.descriptors(head)? {
            let spans = self.table.guest(descriptor.address, descriptor.len_bytes).ok_or(Wrong)?;
            bytes += u64::from(descriptor.len_bytes);
            if descriptor.flags & WRITE != 0 {
                writable.extend(spans);
            } else if writable.is_empty() {
                readable.extend(spans);
            } else {
                return Err(Wrong);
            }
            if bytes > u64::from(u32::MAX)
                || readable.len() + writable.len() > usize::from(MAX_CHAIN_DESCRIPTORS)
            {
                return Err(Wrong);
            }
        }
        let (generation, table) = (self.generation, self.table);
        let position = self.next_available;
        let chain = Chain { head, readable, writable, position, generation, table };
        self.next_available = self.next_available.wrapping_add(1);
        self.out.push(chain.clone());
        Ok(Some(chain))
    }

    /// All descriptors of a chain, those of an indirect table in place of the one that refers to it.
    fn descriptors(&self, head: u16) -> Result<Vec<Descriptor>, Wrong> {
        let size = usize::from(self.shape.size);
        let mut list = self.follow(self.areas.descriptor, size, head)?;
        let Some(last) = list.pop_if(|last| last.flags & INDIRECT != 0) else {
            return if list.iter().any(is_indirect) { Err(Wrong) } else { Ok(list) };
        };
        // 2.7.5.3.1: only if negotiated, never with NEXT, and of whole descriptors.
        if !self.shape.indirect || last.flags & NEXT != 0 || list.iter().any(is_indirect) {
            return Err(Wrong);
        }
        let len = last.len_bytes as usize;
        let entries = len / DESCRIPTOR_BYTES;
        if !len.is_multiple_of(DESCRIPTOR_BYTES) || entries > usize::from(MAX_CHAIN_DESCRIPTORS) {
            return Err(Wrong);
        }
        let spans = self.table.guest(last.address, last.len_bytes).ok_or(Wrong)?;
        let [span] = spans[..] else { return Err(Wrong) };
        // Ours: whatever lies off its alignment in this process is refused.
        if self.table.address(span).is_none_or(|address| !address.is_multiple_of(8)) {
            return Err(Wrong);
        }
        let within = self.follow(span.offset, entries, 0)?;
        if within.iter().any(is_indirect) {
            return Err(Wrong);
        }
        list.extend(within);
        Ok(list)
    }

    /// The descriptors from one on, up to the first without NEXT or with INDIRECT; each at most once.
    fn follow(&self, table: usize, size: usize, from: u16) -> Result<Vec<Descriptor>, Wrong> {
        let mut list = Vec::new();
        let mut index = usize::from(from);
        loop {
            if index >= size || list.len() >= size.min(usize::from(MAX_CHAIN_DESCRIPTORS)) {
                return Err(Wrong);
            }
            let descriptor = self.descriptor(table + DESCRIPTOR_BYTES * index);
            let goes_on = descriptor.flags & (NEXT | INDIRECT) == NEXT;
            index = usize::from(descriptor.next);
            list.push(descriptor);
            if !goes_on {
                return Ok(list);
            }
        }
    }

    fn descriptor(&self, at: usize) -> Descriptor {
        Descriptor {
            address: u64::from_le_bytes(self.guest.load(at)),
            len_bytes: u32::from_le_bytes(self.guest.load(at + 8)),
            flags: self.guest.load_u16(at + 12),
            next: self.guest.load_u16(at + 14),
        }
    }

    pub(super) fn used(&mut self, place: usize, written_bytes: u32) {
        let head = self.out.remove(place).head;
        let at = self.areas.used + 4 + 8 * usize::from(self.next_used % self.shape.size);
        self.guest.expect(at, &u32::from(head).to_le_bytes());
        self.guest.expect(at + 4, &written_bytes.to_le_bytes());
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// The chain that was popped last, if it is still out: the one that may be put back.
    pub(super) fn newest(&self) -> Option<usize> {
        let newest = self.next_available.wrapping_sub(1);
        self.out.iter().position(|chain| chain.position == newest)
    }

    pub(super) fn retract(&mut self, place: usize) {
        self.out.remove(place);
        self.next_available = self.next_available.wrapping_sub(1);
    }

    /// Whether the driver wants to hear of what was used since the last time.
    pub(super) fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return false;
        }
        self.guest.expect(self.areas.used + 2, &new.to_le_bytes());
        self.published = new;
        let Areas { available, .. } = self.areas;
        if !self.shape.event_idx {
            return self.guest.load_u16(available) & 1 == 0;
        }
        // 2.7.7.2: if the index that the driver named is among those that were used.
        let event = self.guest.load_u16(available + 4 + 2 * usize::from(self.shape.size));
        (0..new.wrapping_sub(old)).any(|step| old.wrapping_add(step) == event)
    }

    pub(super) fn suppress_kicks(&mut self) {
        if !self.shape.event_idx {
            self.guest.expect(self.areas.used, &1u16.to_le_bytes());
        }
    }

    pub(super) fn request_kick(&mut self) -> Result<bool, Wrong> {
        if self.broken {
            return Ok(false);
        }
        let (at, value) = if self.shape.event_idx {
            (4 + 8 * usize::from(self.shape.size), self.next_available)
        } else {
            (0, 0)
        };
        self.guest.expect(self.areas.used + at, &value.to_le_bytes());
        self.look().map(|waiting| waiting != 0)
    }

    pub(super) fn set_memory(&mut self, table: &'g Table) -> Result<(), Wrong> {
        if !self.table.is_kept_by(table) {
            self.generation += 1;
        }
        self.table = table;
        self.areas = self.shape.areas(table)?;
        Ok(())
    }

    /// Whether all chains that are out are of the memory that is current.
    pub(super) fn is_settled(&self) -> bool {
        self.out.iter().all(|chain| chain.generation == self.generation)
    }
}

fn is_indirect(descriptor: &Descriptor) -> bool {
    descriptor.flags & INDIRECT != 0
}

//! A descriptor chain, from the guest's table to host buffers.
//!
//! Contract: [`walk`] reads a chain's descriptors once each, so a driver that changes them meanwhile
//! gains nothing, and fills a slot with the buffers it names: device-readable ones first, then
//! device-writable ones. Whatever is wrong with the chain is a [`RingError`] that names it. What it
//! does not do: look into the buffers.

// tidy(parsers): sums here are of 16-bit indexes and lengths of buffers that were resolved.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use super::RingError;
use super::split::DESCRIPTOR_BYTES;
use crate::memory::{GuestAddress, HostBuffer, MemoryMap};

/// Longest chain in descriptors, indirect ones included. The kernel takes 1024 buffers in one
/// readv (`UIO_MAXIOV`), so that no chain ever needs two.
pub const MAX_CHAIN_DESCRIPTORS: u16 = 1024;

/// VIRTIO 1.3, 2.7.5: the chain goes on at `next`.
const VIRTQ_DESC_F_NEXT: u16 = 1;
/// VIRTIO 1.3, 2.7.5: the buffer is device-writable.
const VIRTQ_DESC_F_WRITE: u16 = 2;
/// VIRTIO 1.3, 2.7.5: the buffer holds a table of descriptors.
const VIRTQ_DESC_F_INDIRECT: u16 = 4;

/// A popped descriptor chain: the duty to end it in exactly one way, by
/// [`QueueIo::finish`](crate::device::QueueIo::finish) or
/// [`QueueIo::retract`](crate::device::QueueIo::retract). Until then it is parked with whoever
/// holds it, and its buffers stay mapped.
///
/// Dropping it would leak a ring entry: that is a bug of the device, and a development build
/// panics on it.
#[must_use]
#[derive(Debug)]
pub struct Chain {
    head: u16,
}

impl Chain {
    pub(super) fn new(head: u16) -> Self {
        Self { head }
    }

    /// The slot that keeps this chain: its head's index, below the queue size, and never that of
    /// two chains at a time.
    pub fn slot(&self) -> u16 {
        self.head
    }

    /// The duty is done: gives the head back to the ring.
    pub(super) fn end(self) -> u16 {
        let head = self.head;
        std::mem::forget(self);
        head
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        debug_assert!(
            std::thread::panicking(),
            "chain {} was dropped: a device must finish or retract it",
            self.head
        );
    }
}

/// Part of a chain's buffers: what one operation reads or writes.
#[derive(Clone, Copy)]
pub struct Buffers<'a> {
    buffers: &'a [HostBuffer],
    /// Bytes of the first buffer that are left out.
    skip: usize,
    len_bytes: usize,
}

impl<'a> Buffers<'a> {
    /// All of `buffers`.
    pub fn new(buffers: &'a [HostBuffer]) -> Self {
        let len_bytes = buffers.iter().map(HostBuffer::len).sum();
        Self { buffers, skip: 0, len_bytes }
    }

    /// Total length in bytes.
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// The part that starts `offset` bytes in and is `len` bytes long, cut to what there is.
    pub fn slice(self, offset: usize, len: usize) -> Self {
        let offset = offset.min(self.len_bytes);
        let mut skip = self.skip.saturating_add(offset);
        let mut buffers = self.buffers;
        while let [first, rest @ ..] = buffers {
            if skip < first.len() {
                break;
            }
            skip -= first.len();
            buffers = rest;
        }
        Self { buffers, skip, len_bytes: len.min(self.len_bytes - offset) }
    }

    /// The buffers one by one, cut to this part.
    pub fn iter(self) -> impl Iterator<Item = HostBuffer> + 'a {
        let (mut skip, mut left) = (self.skip, self.len_bytes);
        self.buffers.iter().map_while(move |buffer| {
            let part = buffer.slice(skip, left);
            skip = 0;
            left -= part.len();
            (!part.is_empty()).then_some(part)
        })
    }

    /// Copies bytes out; how many there were.
    #[inline]
    pub fn read(self, into: &mut [u8]) -> usize {
        match self.first(into.len()) {
            Some(first) => first.read(0, into),
            None => self.read_pieces(into),
        }
    }

    /// The first bytes, where they are in one buffer: then a copy has the length that its caller gave it, which the
    /// compiler may know.
    #[inline]
    fn first(self, len: usize) -> Option<HostBuffer> {
        let first = self.buffers.first()?.slice(self.skip, self.len_bytes.min(len));
        (first.len() == len).then_some(first)
    }

    fn read_pieces(self, into: &mut [u8]) -> usize {
        let mut done = 0;
        for buffer in self.iter() {
            let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) else { break };
            done += buffer.read(0, rest);
        }
        done
    }

    /// Copies bytes of other buffers in; how many there were, and found room.
    pub fn copy_from(self, from: Buffers<'_>) -> usize {
        let (mut rest, mut done) = (from, 0);
        for buffer in self.iter() {
            let mut room = buffer;
            for piece in rest.slice(0, buffer.len()).iter() {
                let copied = room.copy_from(&piece);
                room = room.slice(copied, usize::MAX);
                done += copied;
            }
            rest = rest.slice(buffer.len(), usize::MAX);
        }
        done
    }

    /// Copies bytes in; how many found room.
    #[inline]
    pub fn write(self, from: &[u8]) -> usize {
        match self.first(from.len()) {
            Some(first) => first.write(0, from),
            None => self.write_pieces(from),
        }
    }

    fn write_pieces(self, from: &[u8]) -> usize {
        let mut done = 0;
        for buffer in self.iter() {
            let Some(rest) = from.get(done..).filter(|rest| !rest.is_empty()) else { break };
            done += buffer.write(0, rest);
        }
        done
    }
}

/// What [`walk`] found: counts over the buffers that it appended.
#[derive(Clone, Copy, Default)]
pub(super) struct Extent {
    /// How many of the buffers are device-readable; they come first.
    pub(super) readable: usize,
    /// Bytes over all buffers.
    pub(super) bytes: u32,
}

struct Descriptor {
    address: GuestAddress,
    len_bytes: u32,
    flags: u16,
    next: u16,
}

/// VIRTIO 1.3, 2.7.5: `addr`, then `len`, `flags` and `next`, which have 64 bits together and are loaded at once.
fn load(table: HostBuffer, index: u16) -> Descriptor {
    let at = DESCRIPTOR_BYTES * usize::from(index);
    let rest = table.load_u64(at + 8);
    Descriptor {
        address: GuestAddress(table.load_u64(at)),
        len_bytes: rest as u32,
        flags: (rest >> 32) as u16,
        next: (rest >> 48) as u16,
    }
}

/// Has the CPU fetch the descriptor at `head`.
#[inline]
pub(super) fn fetch_descriptor(table: HostBuffer, head: u16) {
    table.slice(DESCRIPTOR_BYTES * usize::from(head), DESCRIPTOR_BYTES).fetch(false);
}

/// Has the CPU fetch what the descriptor at `head` names. That it is in the guest's memory is found out again when the
/// chain is walked.
#[inline]
pub(super) fn fetch_buffer(table: HostBuffer, head: u16, memory: &MemoryMap, region_hint: usize) {
    let descriptor = load(table, head);
    let to_write = descriptor.flags & VIRTQ_DESC_F_WRITE != 0;
    let mut hint = region_hint;
    let fetch = |piece: HostBuffer| piece.fetch(to_write);
    // What is not there is not fetched.
    let _ = memory.resolve(descriptor.address, descriptor.len_bytes, &mut hint, fetch);
}

/// Where a walk finds buffers, and what it may follow.
pub(super) struct Walk<'a> {
    pub(super) table: HostBuffer,
    pub(super) size: u16,
    pub(super) indirect: bool,
    pub(super) memory: &'a MemoryMap,
    /// The region that held the last buffer: the next one is likely there too.
    pub(super) region_hint: &'a mut usize,
}

/// Appends the buffers of the chain at `head` to `into`.
pub(super) fn walk(
    mut place: Walk<'_>,
    head: u16,
    into: &mut Vec<HostBuffer>,
) -> Result<Extent, RingError> {
    let mut extent = Extent::default();
    let mut index = head;
    let mut seen: u16 = 0;
    let mut in_indirect = false;
    loop {
        // A chain that is longer than its table visits a descriptor twice: a loop.
        if seen >= place.size.min(MAX_CHAIN_DESCRIPTORS) {
            return Err(RingError::ChainTooLong { head, limit: seen });
        }
        seen += 1;
        let descriptor = load(place.table, index);
        if descriptor.flags & VIRTQ_DESC_F_INDIRECT != 0 {
            // VIRTIO 1.3, 2.7.5.3.1: the driver MUST NOT set it unless negotiated, nor inside an
            // indirect table, nor together with NEXT.
            if !place.indirect || in_indirect || descriptor.flags & VIRTQ_DESC_F_NEXT != 0 {
                return Err(RingError::Indirect { head });
            }
            (place.table, place.size) = indirect_table(&mut place, head, &descriptor)?;
            (index, seen, in_indirect) = (0, 0, true);
            continue;
        }
        append(&mut place, head, &descriptor, &mut extent, into)?;
        if descriptor.flags & VIRTQ_DESC_F_NEXT == 0 {
            return Ok(extent);
        }
        index = descriptor.next;
        if index >= place.size {
            return Err(RingError::Next { head, next: index, size: place.size });
        }
    }
}

/// VIRTIO 1.3, 2.7.5.3: the table that an indirect descriptor refers to.
fn indirect_table(
    place: &mut Walk<'_>,
    head: u16,
    descriptor: &Descriptor,
) -> Result<(HostBuffer, u16), RingError> {
    let len_bytes = descriptor.len_bytes;
    let entries = len_bytes / DESCRIPTOR_BYTES as u32;
    let whole = len_bytes.is_multiple_of(DESCRIPTOR_BYTES as u32);
    let entries = match u16::try_from(entries) {
        Ok(entries) if whole && (1..=MAX_CHAIN_DESCRIPTORS).contains(&entries) => entries,
        _ => return Err(RingError::IndirectLength { head, len_bytes }),
    };
    let mut table = None;
    let mut pieces = 0;
    place.memory.resolve(descriptor.address, len_bytes, place.region_hint, |piece| {
        pieces += 1;
        table = Some(piece);
    })?;
    match table {
        // A table across two regions or off its 16-byte alignment: no driver makes one, and the
        // loads below want neither.
        Some(table) if pieces == 1 && table.address().is_multiple_of(8) => Ok((table, entries)),
        _ => Err(RingError::IndirectPlace { head, at: descriptor.address }),
    }
}

fn append(
    place: &mut Walk<'_>,
    head: u16,
    descriptor: &Descriptor,
    extent: &mut Extent,
    into: &mut Vec<HostBuffer>,
) -> Result<(), RingError> {
    let writable = descriptor.flags & VIRTQ_DESC_F_WRITE != 0;
    if !writable && into.len() > extent.readable {
        // VIRTIO 1.3, 2.7.4.2: device-readable elements come before device-writable ones.
        return Err(RingError::ReadableAfterWritable { head });
    }
    // VIRTIO 1.3, 2.7.5: a chain's total length is at most 2^32 bytes.
    extent.bytes = extent
        .bytes
        .checked_add(descriptor.len_bytes)
        .ok_or(RingError::ChainTooManyBytes { head })?;
    place.memory.resolve(descriptor.address, descriptor.len_bytes, place.region_hint, |piece| {
        into.push(piece);
    })?;
    if !writable {
        extent.readable = into.len();
    }
    // A buffer across regions counts once in the table but more than once for the kernel.
    if into.len() > usize::from(MAX_CHAIN_DESCRIPTORS) {
        return Err(RingError::ChainTooLong { head, limit: MAX_CHAIN_DESCRIPTORS });
    }
    Ok(())
}

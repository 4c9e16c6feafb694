//! The driver of a split virtqueue that plays by the rules: descriptors, notifications and used
//! elements kept in order.
//!
//! One thread drives it. Hostile tests write the ring's fields through [`Virtqueue::ring`] instead.

use crate::Error;
use crate::notifier::Notifier;
use crate::ring::{
    DESCRIPTOR_BYTES, Descriptor, SplitRing, VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_WRITE,
};
use std::time::{Duration, Instant};

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest address.
    pub address: u64,
    /// Length.
    pub len_bytes: u32,
    /// Device-writable, or else device-readable.
    pub writable: bool,
}

/// One element of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The chain's head.
    pub head: u16,
    /// Bytes that the device says it has written.
    pub len_bytes: u32,
}

/// A split virtqueue with the driver's bookkeeping.
#[derive(Debug)]
pub struct Virtqueue {
    ring: SplitRing,
    event_idx: bool,
    /// Descriptors of the ring that belong to nobody.
    free: Vec<u16>,
    /// The descriptors of each outstanding chain, by its head.
    outstanding: Vec<Option<Vec<u16>>>,
    next_available: u16,
    next_used: u16,
    /// The available index when the driver last looked whether a kick is wanted.
    told: u16,
    kick: Option<Notifier>,
    call: Option<Notifier>,
}

impl Virtqueue {
    /// A queue on a zeroed ring, both indexes at `base`. Without `kick` the device polls, without
    /// `call` the driver does.
    #[must_use]
    pub fn new(
        ring: SplitRing,
        base: u16,
        event_idx: bool,
        (kick, call): (Option<Notifier>, Option<Notifier>),
    ) -> Self {
        let size = ring.size();
        ring.set_available_index(base);
        ring.set_used_index(base);
        Virtqueue {
            event_idx,
            free: (0..size).rev().collect(),
            outstanding: vec![None; usize::from(size)],
            next_available: base,
            next_used: base,
            told: base,
            ring,
            kick,
            call,
        }
    }

    /// The ring's fields.
    #[must_use]
    pub fn ring(&self) -> &SplitRing {
        &self.ring
    }

    /// The available index that the next chain is published with, less one.
    #[must_use]
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    /// Chains that the device has not returned.
    #[must_use]
    pub fn outstanding_count(&self) -> usize {
        self.outstanding.iter().flatten().count()
    }

    /// The notifier for the device, if it does not poll.
    #[must_use]
    pub fn kick_notifier(&self) -> Option<&Notifier> {
        self.kick.as_ref()
    }

    /// The notifier for the driver, if it does not poll.
    #[must_use]
    pub fn call_notifier(&self) -> Option<&Notifier> {
        self.call.as_ref()
    }

    /// Makes a chain available, a descriptor a buffer, and returns its head. The device is not
    /// notified: see [`Virtqueue::kick`].
    ///
    /// # Panics
    /// If the ring has too few free descriptors: a test knows how much it has outstanding.
    pub fn submit(&mut self, buffers: &[Buffer]) -> u16 {
        let indexes: Vec<u16> =
            buffers.iter().map(|_| self.free.pop().expect("a free descriptor")).collect();
        for (position, (buffer, index)) in buffers.iter().zip(&indexes).enumerate() {
            self.ring
                .write_descriptor(*index, &chained(buffer, indexes.get(position + 1).copied()));
        }
        self.publish(indexes)
    }

    /// Makes a chain available through a table of descriptors that is written to guest address
    /// `table`.
    ///
    /// # Panics
    /// If the ring has no free descriptor.
    pub fn submit_indirect(&mut self, buffers: &[Buffer], table: u64) -> u16 {
        self.submit_partly_indirect(&[], buffers, (table, 0))
    }

    /// Makes a chain available of which the first buffers, `direct`, have descriptors of the ring
    /// and the others, `buffers`, are in a table that is written to a guest address; `flags` go
    /// into the descriptor that refers to it.
    ///
    /// # Panics
    /// If the ring has too few free descriptors.
    pub fn submit_partly_indirect(
        &mut self,
        direct: &[Buffer],
        buffers: &[Buffer],
        (table, flags): (u64, u16),
    ) -> u16 {
        let last = buffers.len().saturating_sub(1);
        for (position, buffer) in buffers.iter().enumerate() {
            let next = (position < last)
                .then(|| u16::try_from(position + 1).expect("a test's chain is short"));
            let at = table + DESCRIPTOR_BYTES * position as u64;
            self.ring.memory().write(at, &chained(buffer, next).encode());
        }
        let bytes = DESCRIPTOR_BYTES * buffers.len() as u64;
        let indexes: Vec<u16> =
            (0..=direct.len()).map(|_| self.free.pop().expect("a free descriptor")).collect();
        for (position, buffer) in direct.iter().enumerate() {
            let descriptor = chained(buffer, Some(indexes[position + 1]));
            self.ring.write_descriptor(indexes[position], &descriptor);
        }
        self.ring.write_descriptor(
            indexes[direct.len()],
            &Descriptor {
                address: table,
                len_bytes: u32::try_from(bytes).expect("a test's chain is short"),
                flags: VIRTQ_DESC_F_INDIRECT | flags,
                next: 0,
            },
        );
        self.publish(indexes)
    }

    fn publish(&mut self, indexes: Vec<u16>) -> u16 {
        let head = indexes[0];
        self.outstanding[usize::from(head)] = Some(indexes);
        self.ring.write_available(self.next_available, head);
        self.next_available = self.next_available.wrapping_add(1);
        self.ring.set_available_index(self.next_available);
        head
    }

    /// Notifies the device, whether or not it asked for that.
    ///
    /// # Errors
    /// What writing to the kick descriptor says.
    pub fn kick(&self) -> Result<(), Error> {
        self.kick.as_ref().map_or(Ok(()), Notifier::signal)
    }

    /// Notifies the device only if it asks for that, as drivers do.
    ///
    /// # Errors
    /// What writing to the kick descriptor says.
    pub fn kick_if_wanted(&mut self) -> Result<(), Error> {
        let before = std::mem::replace(&mut self.told, self.next_available);
        if self.ring.wants_kick(self.event_idx, before, self.next_available) {
            self.kick()?;
        }
        Ok(())
    }

    /// The next used element, if there is one.
    ///
    /// # Errors
    /// [`Error::WrongUsed`] for a head that is not outstanding.
    pub fn poll_used(&mut self) -> Result<Option<Used>, Error> {
        if self.ring.used_index() == self.next_used {
            return Ok(None);
        }
        let (head, len_bytes) = self.ring.used_element(self.next_used);
        let slot = usize::try_from(head).ok().and_then(|head| self.outstanding.get_mut(head));
        let Some(indexes) = slot.and_then(Option::take) else {
            return Err(Error::WrongUsed { head, len_bytes });
        };
        self.next_used = self.next_used.wrapping_add(1);
        let head = indexes[0];
        self.free.extend(indexes.into_iter().rev());
        Ok(Some(Used { head, len_bytes }))
    }

    /// Waits for the next used element: on the call descriptor if there is one, else by looking.
    ///
    /// # Errors
    /// [`Error::Silence`] if the device returns nothing, or does not notify, within `patience`.
    pub fn wait_used(&mut self, patience: Duration) -> Result<Used, Error> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(used) = self.poll_used()? {
                return Ok(used);
            }
            if self.event_idx {
                self.ring.set_used_event(self.next_used);
                self.ring.full_barrier();
                if let Some(used) = self.poll_used()? {
                    return Ok(used);
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Silence(patience));
            }
            match &self.call {
                Some(call) => {
                    call.wait(left)?;
                }
                None => std::thread::yield_now(),
            }
        }
    }

    /// Waits for the next used element by looking, whatever the call descriptor does.
    ///
    /// # Errors
    /// [`Error::Silence`] if the device returns nothing within `patience`.
    pub fn look_for_used(&mut self, patience: Duration) -> Result<Used, Error> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(used) = self.poll_used()? {
                return Ok(used);
            }
            if Instant::now() >= deadline {
                return Err(Error::Silence(patience));
            }
            std::thread::yield_now();
        }
    }
}

fn chained(buffer: &Buffer, next: Option<u16>) -> Descriptor {
    let write = if buffer.writable { VIRTQ_DESC_F_WRITE } else { 0 };
    let more = if next.is_some() { VIRTQ_DESC_F_NEXT } else { 0 };
    Descriptor {
        address: buffer.address,
        len_bytes: buffer.len_bytes,
        flags: write | more,
        next: next.unwrap_or(0),
    }
}

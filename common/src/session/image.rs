//! A session written down: what a successor takes up on the same connection.
//!
//! Contract: [`Session::save`] names all that was said, beside the descriptors that came with it; [`Session::restore`] makes the
//! same session of that. Nothing of it is believed: each value passes the check that the message had to pass which said it
//! first, and what no front end may say is a [`SavedFault`]. What a descriptor is called while it is written down is the type
//! parameter, and [`SavedSession::try_map`] changes names.
//!
//! What it deliberately does not do: say where the image is kept, or what the device has of its own.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::vring::{RingFault, SavedRing, Vring};
use super::{MAX_MEMORY_SLOTS, MemorySlot, Offer, Session};
use crate::memory::{FrontendAddress, GuestAddress, RegionSpec};
use crate::protocol::ProtocolFeatures;

/// What a front end has said, with descriptors named by `F`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedSession<F> {
    features: u64,
    protocol_features: u64,
    rings: Vec<SavedRing<F>>,
    memory: Vec<SavedRegion<F>>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedRegion<F> {
    guest: u64,
    frontend: u64,
    len_bytes: u64,
    file_offset_bytes: u64,
    times: u32,
    file: F,
}

/// Why there can be no such session.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum SavedFault {
    #[error("feature bits {extra:#x} were acknowledged and are not offered")]
    Features { extra: u64 },
    #[error("protocol feature bits {extra:#x} were acknowledged and are not offered")]
    ProtocolFeatures { extra: u64 },
    #[error("it has {found} rings, the device {count}")]
    RingCount { found: usize, count: u16 },
    #[error("it has {count} memory regions, more than {MAX_MEMORY_SLOTS}")]
    MemorySlots { count: usize },
    #[error("ring {index}")]
    Ring { index: usize, source: RingFault },
}

impl<F> SavedSession<F> {
    /// The same with other names for its descriptors.
    ///
    /// # Errors
    /// The first that `name` meets.
    pub fn try_map<G, E>(
        self,
        name: &mut impl FnMut(F) -> Result<G, E>,
    ) -> Result<SavedSession<G>, E> {
        let Self { features, protocol_features, rings, memory } = self;
        let rings = rings.into_iter().map(|ring| ring.try_map(name)).collect::<Result<_, E>>()?;
        let memory = memory.into_iter().map(|region| {
            let SavedRegion { guest, frontend, len_bytes, file_offset_bytes, times, file } = region;
            let file = name(file)?;
            Ok(SavedRegion { guest, frontend, len_bytes, file_offset_bytes, times, file })
        });
        let memory = memory.collect::<Result<_, E>>()?;
        Ok(SavedSession { features, protocol_features, rings, memory })
    }

    /// Whether the ring was on its worker when this was written.
    pub fn was_running(&self, index: u16) -> bool {
        self.rings.get(usize::from(index)).is_some_and(|ring| ring.running)
    }
}

impl Session {
    /// All that was said.
    pub fn save(&self) -> SavedSession<Arc<OwnedFd>> {
        let memory = self.memory.iter().map(|slot| SavedRegion {
            guest: slot.spec.guest.0,
            frontend: slot.spec.frontend.0,
            len_bytes: slot.spec.len_bytes,
            file_offset_bytes: slot.spec.file_offset_bytes,
            times: slot.times,
            file: Arc::clone(&slot.file),
        });
        SavedSession {
            features: self.features,
            protocol_features: self.protocol_features.bits(),
            rings: self.rings.iter().map(Vring::save).collect(),
            memory: memory.collect(),
        }
    }

    /// The session in which that was said, to a device that offers this. No ring of it runs, and no memory of it is mapped:
    /// that is for the caller, with the regions that come beside it.
    ///
    /// # Errors
    /// It cannot be what was said to this device.
    pub fn restore(
        offer: Offer,
        saved: SavedSession<Arc<OwnedFd>>,
    ) -> Result<(Self, Vec<MemorySlot>), SavedFault> {
        let mut session = Self::new(offer);
        let extra = saved.features & !session.offered_features();
        if extra != 0 {
            return Err(SavedFault::Features { extra });
        }
        let extra = saved.protocol_features & !session.offered_protocol_features();
        if extra != 0 {
            return Err(SavedFault::ProtocolFeatures { extra });
        }
        let (found, count) = (saved.rings.len(), offer.queue_count);
        if found != usize::from(count) {
            return Err(SavedFault::RingCount { found, count });
        }
        if saved.memory.len() > MAX_MEMORY_SLOTS {
            return Err(SavedFault::MemorySlots { count: saved.memory.len() });
        }
        session.features = saved.features;
        session.protocol_features = ProtocolFeatures::from_bits(saved.protocol_features);
        let rings = saved.rings.into_iter().enumerate().map(|(index, ring)| {
            Vring::restore(ring, offer.max_queue_size)
                .map_err(|source| SavedFault::Ring { index, source })
        });
        session.rings = rings.collect::<Result<_, _>>()?;
        let memory = saved.memory.into_iter().map(|region| MemorySlot {
            spec: RegionSpec {
                guest: GuestAddress(region.guest),
                frontend: FrontendAddress(region.frontend),
                len_bytes: region.len_bytes,
                file_offset_bytes: region.file_offset_bytes,
            },
            file: region.file,
            times: region.times,
        });
        Ok((session, memory.collect()))
    }
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]
mod tests;

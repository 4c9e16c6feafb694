//! An address space, of ports or of memory: which device answers to an address.
//!
//! Contract: an access goes to the region that holds all of its bytes. A read that no region holds is all ones, and such a
//! write is lost, as on a PC: a guest may probe what it likes.
//!
//! What it deliberately does not do: change while the machine runs. Processors look things up without a lock. A device
//! that moves (PCI's base address registers) has a region for all places that it may move to.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::collections::BTreeMap;
use std::sync::Arc;

/// What answers to a range of addresses. `offset` counts from the range's start, and all of an access lies within the range.
/// A processor waits for the answer, and several may ask at once.
pub(crate) trait Region: Send + Sync {
    /// Fills all of `data`.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes what the guest has written.
    fn write(&self, offset: u64, data: &[u8]);
}

/// The regions of one address space.
#[derive(Default)]
pub(crate) struct Bus {
    /// By the first address.
    regions: BTreeMap<u64, (u64, Arc<dyn Region>)>,
}

/// Why a region cannot be put into a bus.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Overlap {
    /// Another is there.
    #[error("{len:#x} bytes from {base:#x} overlap the region at {other:#x}")]
    Other { base: u64, len: u64, other: u64 },
    /// No bytes, or more than there are addresses.
    #[error("{len:#x} bytes from {base:#x} are no range of addresses")]
    NoRange { base: u64, len: u64 },
}

impl Bus {
    /// Has `region` answer to `len` addresses from `base` on.
    pub(crate) fn insert(
        &mut self,
        base: u64,
        len: u64,
        region: Arc<dyn Region>,
    ) -> Result<(), Overlap> {
        let last = match len.checked_sub(1).and_then(|beyond| base.checked_add(beyond)) {
            Some(last) => last,
            None => return Err(Overlap::NoRange { base, len }),
        };
        if let Some((&other, &(other_len, _))) = self.regions.range(..=last).next_back()
            && other.saturating_add(other_len) > base
        {
            return Err(Overlap::Other { base, len, other });
        }
        self.regions.insert(base, (len, region));
        Ok(())
    }

    /// Reads; says whether anything was there.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, region)) => {
                region.read(offset, data);
                true
            }
            None => {
                data.fill(0xFF);
                false
            }
        }
    }

    /// Writes; says whether anything was there.
    pub(crate) fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((offset, region)) = self.find(address, data.len()) else { return false };
        region.write(offset, data);
        true
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, &dyn Region)> {
        let (&base, (region_len, region)) = self.regions.range(..=address).next_back()?;
        let offset = address.checked_sub(base)?;
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        (end <= *region_len).then_some((offset, &**region))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Answers with the offset, and remembers what it was given.
    #[derive(Default)]
    struct Probe(Mutex<Vec<(u64, Vec<u8>)>>);

    impl Region for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn an_access_goes_to_the_region_that_holds_it() {
        let (low, high) = (Arc::new(Probe::default()), Arc::new(Probe::default()));
        let mut bus = Bus::default();
        bus.insert(0x100, 0x10, low.clone()).unwrap();
        bus.insert(0x110, 0x10, high.clone()).unwrap();
        let mut data = [0; 2];
        assert!(bus.read(0x10E, &mut data));
        assert_eq!(data, [0xE, 0xE]);
        assert!(bus.write(0x110, &[1, 2, 3, 4]));
        assert_eq!(*high.0.lock().unwrap(), [(0, vec![1, 2, 3, 4])]);
        assert!(low.0.lock().unwrap().is_empty());
    }

    #[test]
    fn where_nothing_is_reads_are_all_ones() {
        let mut bus = Bus::default();
        bus.insert(0x100, 0x10, Arc::new(Probe::default())).unwrap();
        for address in [0, 0xFF, 0x10F, 0x110, u64::MAX] {
            let mut data = [0; 4];
            assert!(!bus.read(address, &mut data), "{address:#x}");
            assert_eq!(data, [0xFF; 4]);
            assert!(!bus.write(address, &data));
        }
    }

    #[test]
    fn regions_do_not_overlap() {
        let mut bus = Bus::default();
        let probe = || Arc::new(Probe::default());
        bus.insert(0x100, 0x10, probe()).unwrap();
        for (base, len) in [(0x100, 1), (0xF0, 0x11), (0x10F, 1), (0, 0x1000)] {
            let other = 0x100;
            assert_eq!(bus.insert(base, len, probe()), Err(Overlap::Other { base, len, other }));
        }
        assert!(matches!(bus.insert(8, 0, probe()), Err(Overlap::NoRange { .. })));
        assert!(matches!(bus.insert(u64::MAX, 2, probe()), Err(Overlap::NoRange { .. })));
        bus.insert(0x110, 1, probe()).unwrap();
        bus.insert(0xFF, 1, probe()).unwrap();
        bus.insert(u64::MAX, 1, probe()).unwrap();
    }
}

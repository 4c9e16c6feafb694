//! The table of regions: which bytes of this process a guest's or a front end's address means.
//!
//! A map never changes. The translation of a guest address is on the path of every descriptor, so it looks first where
//! the previous one was found, takes no lock and counts no reference.

use std::fmt;
use std::sync::Arc;

use super::{HostBuffer, MapError, Region, sigbus};

/// An address in the guest's physical memory, as descriptors hold it ("guest address" of the vhost-user text).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestAddress(pub u64);

/// An address in the front end's own memory ("user address" of the vhost-user text): what ring addresses are given in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendAddress(pub u64);

impl fmt::Display for GuestAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for FrontendAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// One region as the front end describes it (vhost-user, "Memory regions description").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// Where the guest sees it.
    pub guest: GuestAddress,
    /// Where the front end sees it.
    pub frontend: FrontendAddress,
    /// Its length.
    pub len_bytes: u64,
    /// Where it begins in the file that the front end sent along ("mmap offset").
    pub file_offset_bytes: u64,
}

/// Why a range of addresses has no bytes here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// The range is empty, so that it lies nowhere.
    #[error("the range at guest address {0} is empty")]
    ZeroLength(GuestAddress),
    /// A byte of the range lies in no region, or the range ends beyond the last address.
    #[error("guest memory {at}+{len_bytes:#x} is not mapped")]
    Unmapped {
        /// The range's first address.
        at: GuestAddress,
        /// The range's length.
        len_bytes: u32,
    },
    /// The range does not lie within one region, as ring memory must; or it is empty.
    #[error("front-end memory {at}+{len_bytes:#x} does not lie in one region")]
    FrontendUnmapped {
        /// The range's first address.
        at: FrontendAddress,
        /// The range's length.
        len_bytes: u64,
    },
}

/// A set of regions that do not overlap, sorted by guest address. Immutable; shared as `Arc<MemoryMap>`.
#[derive(Debug, Default)]
pub struct MemoryMap {
    regions: Vec<Arc<Region>>,
    /// What translation needs of each region, in the order of `regions`: one cache line holds more than one of them,
    /// and no pointer is followed.
    spans: Box<[Span]>,
}

#[derive(Clone, Copy, Debug)]
struct Span {
    guest: u64,
    len_bytes: u64,
    host: HostBuffer,
}

impl MemoryMap {
    /// A map in which no address lies.
    pub fn empty() -> Self {
        Self::default()
    }

    /// A map of these regions, in any order.
    ///
    /// # Errors
    /// Two regions overlap, in the guest's or in the front end's addresses.
    pub fn new(mut regions: Vec<Arc<Region>>) -> Result<Self, MapError> {
        // The spec of a mapped region has been checked: no sum of an address and a length overflows.
        regions.sort_unstable_by_key(|region| region.spec().frontend);
        for [first, second] in neighbours(&regions) {
            if second.frontend.0 - first.frontend.0 < first.len_bytes {
                return Err(MapError::FrontendOverlap { first, second });
            }
        }
        regions.sort_unstable_by_key(|region| region.spec().guest);
        for [first, second] in neighbours(&regions) {
            if second.guest.0 - first.guest.0 < first.len_bytes {
                return Err(MapError::GuestOverlap { first, second });
            }
        }
        let spans = regions.iter().map(|region| Span::of(region)).collect();
        Ok(Self { regions, spans })
    }

    /// The regions, sorted by guest address.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// Whether the file of a region turned out to be shorter than it was when it was mapped. Cheap enough to ask at
    /// every turn of a loop.
    #[inline]
    pub fn is_poisoned(&self) -> bool {
        sigbus::any_poisoned() && self.regions.iter().any(|region| region.is_poisoned())
    }

    /// Gives `each` the host bytes of a guest range: one buffer, or several in order where the range spans regions that
    /// adjoin. `hint` is the caller's: it remembers the region of the last answer (start with 0).
    ///
    /// # Errors
    /// The range is empty, or a part of it is not mapped. Buffers that `each` has got by then are to be discarded.
    #[inline]
    pub fn resolve(
        &self,
        at: GuestAddress,
        len_bytes: u32,
        hint: &mut usize,
        mut each: impl FnMut(HostBuffer),
    ) -> Result<(), AccessError> {
        if let Some(span) = self.spans.get(*hint) {
            let offset = at.0.wrapping_sub(span.guest);
            if len_bytes > 0
                && offset < span.len_bytes
                && u64::from(len_bytes) <= span.len_bytes - offset
            {
                each(span.host.slice(offset as usize, len_bytes as usize));
                return Ok(());
            }
        }
        self.search(at, len_bytes, hint, &mut each)
    }

    /// `resolve` for a range that is not within the last region.
    fn search(
        &self,
        at: GuestAddress,
        len_bytes: u32,
        hint: &mut usize,
        each: &mut dyn FnMut(HostBuffer),
    ) -> Result<(), AccessError> {
        if len_bytes == 0 {
            return Err(AccessError::ZeroLength(at));
        }
        let unmapped = AccessError::Unmapped { at, len_bytes };
        let mut left = u64::from(len_bytes);
        let mut next = at.0;
        let mut index =
            self.spans.partition_point(|span| span.guest <= next).checked_sub(1).ok_or(unmapped)?;
        loop {
            let span = self.spans.get(index).ok_or(unmapped)?;
            // After the first region, this fails where the next one does not begin at the address that is next.
            let offset = next.checked_sub(span.guest).ok_or(unmapped)?;
            let here = span.len_bytes.checked_sub(offset).ok_or(unmapped)?.min(left);
            if here == 0 {
                return Err(unmapped);
            }
            each(span.host.slice(offset as usize, here as usize));
            *hint = index;
            left -= here;
            if left == 0 {
                return Ok(());
            }
            // The end of a mapped region, which does not overflow.
            next += here;
            index += 1;
        }
    }

    /// The host bytes of a range in the front end's addresses, which must lie in one region: ring memory.
    ///
    /// Called when a ring starts, not per request.
    ///
    /// # Errors
    /// The range is empty, or no region holds all of it.
    pub fn resolve_frontend(
        &self,
        at: FrontendAddress,
        len_bytes: u64,
    ) -> Result<HostBuffer, AccessError> {
        let unmapped = AccessError::FrontendUnmapped { at, len_bytes };
        if len_bytes == 0 {
            return Err(unmapped);
        }
        let within = |region: &&Arc<Region>| {
            let spec = region.spec();
            let offset = at.0.checked_sub(spec.frontend.0);
            offset
                .and_then(|offset| spec.len_bytes.checked_sub(offset))
                .is_some_and(|rest| len_bytes <= rest)
        };
        let region = self.regions.iter().find(within).ok_or(unmapped)?;
        let offset = at.0 - region.spec().frontend.0;
        Ok(region.bytes().slice(offset as usize, len_bytes as usize))
    }
}

impl Span {
    fn of(region: &Region) -> Self {
        let spec = region.spec();
        Self { guest: spec.guest.0, len_bytes: spec.len_bytes, host: region.bytes() }
    }
}

fn neighbours(regions: &[Arc<Region>]) -> impl Iterator<Item = [RegionSpec; 2]> {
    regions.iter().zip(regions.iter().skip(1)).map(|(first, second)| [first.spec(), second.spec()])
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::super::guest_file;
    use super::*;

    const PAGE: u64 = 0x1000;

    fn region(guest: u64, frontend: u64, pages: u64) -> Arc<Region> {
        let file = guest_file(pages * PAGE);
        let spec = RegionSpec {
            guest: GuestAddress(guest),
            frontend: FrontendAddress(frontend),
            len_bytes: pages * PAGE,
            file_offset_bytes: 0,
        };
        Arc::new(Region::map(spec, file.as_fd()).expect("map"))
    }

    fn resolve(
        map: &MemoryMap,
        at: u64,
        len_bytes: u32,
        hint: &mut usize,
    ) -> Result<Vec<HostBuffer>, AccessError> {
        let mut buffers = Vec::new();
        map.resolve(GuestAddress(at), len_bytes, hint, |buffer| buffers.push(buffer))?;
        Ok(buffers)
    }

    #[test]
    fn regions_may_come_unsorted() {
        let map = MemoryMap::new(vec![
            region(0x30_0000, 0x1000, 1),
            region(0, 0x9000, 1),
            region(0x10_0000, 0x5000, 2),
        ])
        .expect("map");
        let starts: Vec<u64> = map.regions().iter().map(|region| region.spec().guest.0).collect();
        assert_eq!(starts, [0, 0x10_0000, 0x30_0000]);
        for (index, region) in map.regions().iter().enumerate() {
            let mut hint = 0;
            let found = resolve(&map, region.spec().guest.0 + 8, 16, &mut hint).expect("mapped");
            assert_eq!(found.len(), 1);
            assert_eq!(found[0].address(), region.bytes().address() + 8);
            assert_eq!(hint, index, "the hint remembers the region");
        }
    }

    #[test]
    fn guest_ranges_that_overlap_are_rejected() {
        let (first, second) = (region(0, 0x10_0000, 2), region(PAGE, 0x20_0000, 1));
        let error = MemoryMap::new(vec![second, first]).expect_err("overlap");
        assert!(
            matches!(error, MapError::GuestOverlap { first, .. } if first.guest == GuestAddress(0)),
            "{error}"
        );
    }

    #[test]
    fn frontend_ranges_that_overlap_are_rejected() {
        let (first, second) = (region(0, 0x10_0000, 2), region(0x10_0000, 0x10_1000, 1));
        let error = MemoryMap::new(vec![first, second]).expect_err("overlap");
        assert!(matches!(error, MapError::FrontendOverlap { .. }), "{error}");
    }

    #[test]
    fn the_same_region_twice_is_an_overlap() {
        let one = region(0, 0, 1);
        assert!(MemoryMap::new(vec![one.clone(), one]).is_err());
    }

    #[test]
    fn range_across_adjoining_regions_is_several_buffers_in_order() {
        let map = MemoryMap::new(vec![
            region(PAGE, 0x30_0000, 1),
            region(2 * PAGE, 0x20_0000, 1),
            region(3 * PAGE, 0x10_0000, 1),
        ])
        .expect("map");
        for mut hint in 0..4 {
            let parts = resolve(&map, 2 * PAGE - 4, 0x1010, &mut hint).expect("mapped");
            let lens: Vec<usize> = parts.iter().map(HostBuffer::len).collect();
            assert_eq!(lens, [4, 0x1000, 12]);
            assert_eq!(parts[1].address(), map.regions()[1].bytes().address());
            assert_eq!(hint, 2);
        }
    }

    #[test]
    fn range_that_reaches_a_hole_is_unmapped() {
        let map =
            MemoryMap::new(vec![region(PAGE, 0, 1), region(4 * PAGE, 0x10_0000, 1)]).expect("map");
        for mut hint in 0..3 {
            for (at, len_bytes) in [
                (0, 1),
                (PAGE - 1, 1),
                (PAGE - 1, 2),
                (2 * PAGE - 1, 2),
                (2 * PAGE, 1),
                (PAGE, 0x4000),
                (5 * PAGE - 1, 2),
                (5 * PAGE, 1),
                (u64::MAX, 1),
            ] {
                let expected = AccessError::Unmapped { at: GuestAddress(at), len_bytes };
                let got = resolve(&map, at, len_bytes, &mut hint).expect_err("not mapped");
                assert_eq!(got, expected);
            }
            assert!(resolve(&map, PAGE, 0x1000, &mut hint).is_ok());
            assert!(resolve(&map, 5 * PAGE - 1, 1, &mut hint).is_ok());
        }
    }

    #[test]
    fn range_that_wraps_around_is_unmapped() {
        let top = u64::MAX - PAGE;
        let map = MemoryMap::new(vec![region(top, 0, 1), region(0, 0x10_0000, 1)]).expect("map");
        for mut hint in 0..2 {
            assert!(resolve(&map, top, 0x1000, &mut hint).is_ok());
            assert!(resolve(&map, top + 0xfff, 2, &mut hint).is_err());
            assert!(resolve(&map, u64::MAX, u32::MAX, &mut hint).is_err());
        }
    }

    #[test]
    fn empty_range_and_empty_map_have_no_bytes() {
        let map = MemoryMap::new(vec![region(0, 0, 1)]).expect("map");
        let mut hint = 0;
        assert_eq!(
            resolve(&map, 16, 0, &mut hint).expect_err("empty"),
            AccessError::ZeroLength(GuestAddress(16))
        );
        assert!(resolve(&MemoryMap::empty(), 0, 1, &mut hint).is_err());
        assert!(MemoryMap::empty().resolve_frontend(FrontendAddress(0), 1).is_err());
    }

    #[test]
    fn ring_memory_must_lie_in_one_region() {
        let map = MemoryMap::new(vec![region(0, 0x7000_0000, 1), region(PAGE, 0x7000_1000, 1)])
            .expect("map");
        let ring = map.resolve_frontend(FrontendAddress(0x7000_1010), 0xff0).expect("mapped");
        assert_eq!(ring.address(), map.regions()[1].bytes().address() + 0x10);
        assert_eq!(ring.len(), 0xff0);
        for (at, len_bytes) in [
            (0x7000_0fff, 2),
            (0x7000_1010, 0xff1),
            (0x6fff_ffff, 1),
            (0x7000_2000, 1),
            (0x7000_0000, 0),
            (0x7000_0000, u64::MAX),
            (u64::MAX, u64::MAX),
        ] {
            let got = map
                .resolve_frontend(FrontendAddress(at), len_bytes)
                .expect_err("not in one region");
            assert_eq!(got, AccessError::FrontendUnmapped { at: FrontendAddress(at), len_bytes });
        }
    }
}

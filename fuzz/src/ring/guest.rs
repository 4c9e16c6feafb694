//! The memory of a guest: one file, mapped in several ways, and a copy of what ought to be in it.
//!
//! The copy is changed by every store of the driver and by every store that the device is due to make. At the end of an
//! input the two are compared: a store that nobody expected shows.

use std::cell::RefCell;
use std::os::fd::AsFd;
use std::sync::Arc;

use common::memory::{FrontendAddress, GuestAddress, HostBuffer, MemoryMap, Region, RegionSpec};
use rustix::fs::MemfdFlags;

/// What the driver writes to and the device may; everything in it is compared.
pub(super) const FILE_BYTES: usize = 0x8000;
/// Behind it lies a region so large that a chain can have more than 4 GiB. It reads as zeros, and nothing is written.
const LARGE_BYTES: u64 = 3 << 30;
/// A guest address that ends where 64 bits do, and so does its front-end address.
const HIGH: u64 = u64::MAX - 0x1000;

const fn spec(guest: u64, frontend: u64, len_bytes: u64, file_offset_bytes: u64) -> RegionSpec {
    let (guest, frontend) = (GuestAddress(guest), FrontendAddress(frontend));
    RegionSpec { guest, frontend, len_bytes, file_offset_bytes }
}

/// Where rings lie, if an input does not say otherwise.
const LOW: RegionSpec = spec(0, 0x10_0000, 0x3000, 0);
/// Adjoins `LOW` in the guest's addresses.
const NEXT: RegionSpec = spec(0x3000, 0x20_0000, 0x2000, 0x3000);
/// Adjoins `LOW` in the front end's addresses, and begins at a host address that is a multiple of 8 only.
const ODD: RegionSpec = spec(0x10_0000, 0x10_3000, 0x1ff0, 0x5008);
const END: RegionSpec = spec(HIGH, HIGH, 0x1000, 0x7000);
const LARGE: RegionSpec = spec(0x1_0000_0000, 0x1_0000_0000, LARGE_BYTES, FILE_BYTES as u64);

/// A memory table of the front end.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) map: Arc<MemoryMap>,
    /// Its regions and their host addresses.
    regions: Vec<(RegionSpec, usize)>,
}

/// Part of the guest's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) offset: usize,
    pub(super) len_bytes: usize,
}

impl Table {
    fn new(regions: &[&Arc<Region>]) -> Self {
        let map = MemoryMap::new(regions.iter().map(|region| Arc::clone(region)).collect());
        let map = map.expect("regions that do not overlap");
        let address = |spec: RegionSpec| {
            let whole = map.resolve_frontend(spec.frontend, spec.len_bytes);
            (spec, whole.expect("a region of the map").address())
        };
        let regions = regions.iter().map(|region| address(region.spec())).collect();
        Self { map: Arc::new(map), regions }
    }

    /// Which bytes of the file a buffer is, if it lies in one region.
    pub(super) fn span(&self, buffer: HostBuffer) -> Option<Span> {
        self.regions.iter().find_map(|(spec, address)| {
            let offset = buffer.address().checked_sub(*address)?;
            let fits = offset.checked_add(buffer.len())? <= spec.len_bytes as usize;
            let span = |from| Span { offset: from + offset, len_bytes: buffer.len() };
            fits.then(|| span(spec.file_offset_bytes as usize))
        })
    }

    /// The bytes of a guest range, region by region; `None` if a part of it is not mapped, or it is empty.
    pub(super) fn guest(&self, at: u64, len_bytes: u32) -> Option<Vec<Span>> {
        let mut spans = Vec::new();
        let (mut at, end) = (u128::from(at), u128::from(at) + u128::from(len_bytes));
        while at < end {
            let holds = |spec: &RegionSpec| {
                let start = u128::from(spec.guest.0);
                (start..start + u128::from(spec.len_bytes)).contains(&at)
            };
            let (spec, _) = self.regions.iter().find(|(spec, _)| holds(spec))?;
            let into = at - u128::from(spec.guest.0);
            let len = (end - at).min(u128::from(spec.len_bytes) - into);
            let offset = (u128::from(spec.file_offset_bytes) + into) as usize;
            spans.push(Span { offset, len_bytes: len as usize });
            at += len;
        }
        (!spans.is_empty()).then_some(spans)
    }

    /// Where in the file a range of front-end addresses begins, if it lies in one region, and its host address.
    pub(super) fn frontend(&self, at: u64, len_bytes: u64) -> Option<(usize, usize)> {
        self.regions.iter().find_map(|(spec, address)| {
            let into = at.checked_sub(spec.frontend.0)?;
            let fits = into.checked_add(len_bytes)? <= spec.len_bytes;
            let into = into as usize;
            fits.then(|| (spec.file_offset_bytes as usize + into, address + into))
        })
    }

    /// The host address of a byte of the file.
    pub(super) fn address(&self, span: Span) -> Option<usize> {
        self.regions.iter().find_map(|(spec, address)| {
            let into = span.offset.checked_sub(spec.file_offset_bytes as usize)?;
            (into < spec.len_bytes as usize).then(|| address + into)
        })
    }

    /// Whether all regions of this table are mapped by the other too, and not merely the same bytes again.
    pub(super) fn is_kept_by(&self, other: &Table) -> bool {
        self.regions.iter().all(|region| other.regions.contains(region))
    }
}

/// The guest's memory of one thread: mapped once, and empty at the start of each input.
pub(super) struct Guest {
    /// The whole file, through which the driver writes.
    file: HostBuffer,
    _file_map: Arc<MemoryMap>,
    tables: Vec<Table>,
    copy: RefCell<Vec<u8>>,
}

thread_local! {
    static GUEST: Guest = Guest::new();
}

impl Guest {
    fn new() -> Self {
        let file = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd");
        rustix::fs::ftruncate(&file, FILE_BYTES as u64 + LARGE_BYTES).expect("a sparse file");
        let map = |spec| Arc::new(Region::map(spec, file.as_fd()).expect("a region"));
        let whole = map(spec(0, 0, FILE_BYTES as u64, 0));
        let file_map = Arc::new(MemoryMap::new(vec![whole]).expect("one region"));
        let bytes = file_map.resolve_frontend(FrontendAddress(0), FILE_BYTES as u64);
        let [low, again, next, odd, end, large] = [LOW, LOW, NEXT, ODD, END, LARGE].map(map);
        let tables = vec![
            Table::new(&[&low, &next, &odd, &end, &large]),
            // Memory is gone,
            Table::new(&[&low, &next]),
            // and with it the ring.
            Table::new(&[&next, &odd, &end]),
            // The same memory, mapped anew.
            Table::new(&[&again, &next, &odd, &end]),
            Table::new(&[]),
        ];
        let file = bytes.expect("the whole file");
        Self { file, _file_map: file_map, tables, copy: RefCell::new(vec![0; FILE_BYTES]) }
    }

    /// Gives `run` a guest whose memory is all zeros.
    pub(super) fn with<R>(run: impl FnOnce(&Guest) -> R) -> R {
        GUEST.with(|guest| {
            guest.file.write(0, &[0; FILE_BYTES]);
            guest.copy.borrow_mut().fill(0);
            run(guest)
        })
    }

    pub(super) fn table(&self, index: usize) -> &Table {
        &self.tables[index % self.tables.len()]
    }

    /// A store of the driver.
    pub(super) fn write(&self, offset: usize, bytes: &[u8]) {
        self.file.write(offset, bytes);
        self.expect(offset, bytes);
    }

    /// A store that the device has made, or is about to.
    pub(super) fn expect(&self, offset: usize, bytes: &[u8]) {
        let mut copy = self.copy.borrow_mut();
        let room = copy.get_mut(offset..).unwrap_or_default();
        let len = bytes.len().min(room.len());
        room[..len].copy_from_slice(&bytes[..len]);
    }

    /// What ought to be in the file; behind [`FILE_BYTES`] there are zeros.
    pub(super) fn load<const LEN: usize>(&self, offset: usize) -> [u8; LEN] {
        let copy = self.copy.borrow();
        let there = copy.get(offset..).unwrap_or_default();
        let mut bytes = [0; LEN];
        let len = LEN.min(there.len());
        bytes[..len].copy_from_slice(&there[..len]);
        bytes
    }

    pub(super) fn load_u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.load(offset))
    }

    /// Compares the memory with what ought to be in it.
    pub(super) fn check(&self) {
        let mut bytes = [0; FILE_BYTES];
        self.file.read(0, &mut bytes);
        let copy = self.copy.borrow();
        if bytes[..] != copy[..] {
            let at = bytes.iter().zip(&*copy).position(|(is, due)| is != due);
            unreachable!("the device wrote to {at:x?}, or did not write there what it should");
        }
    }
}

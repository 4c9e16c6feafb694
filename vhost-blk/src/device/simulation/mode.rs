//! The kinds of disk, host and driver that there are, and what each is promised about a power cut.

use common::engine::{FileIndex, Zeroing};
use common::simulation::{Operation, Random, Work};

use super::storage::SECTOR;
use crate::config::VIRTIO_BLK_F_FLUSH;
use crate::disk::{BUFFERED, CacheMode, IMAGE, sync_file};

/// Pages of the host's cache, which direct I/O must not share with it.
pub(super) const PAGE: u64 = 4096;

/// What a run is made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mode {
    pub(super) cache: CacheMode,
    /// The driver has acknowledged FLUSH.
    pub(super) flushes: bool,
    /// What direct I/O demands of memory and of blocks, in bytes, where the mode has it.
    pub(super) direct: (u32, u32),
    /// Direct I/O is for certain.
    pub(super) tells: bool,
    /// What the host zeroes in one call is a multiple of this: more than a byte for block devices.
    pub(super) called: u64,
    /// What the host can do besides reading and writing.
    can_punch: bool,
    can_zero: bool,
    pub(super) scale: Scale,
}

/// How large everything is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scale {
    pub(super) disk_sectors: usize,
    /// Most sectors of a transfer, of which a place has room for their pieces.
    pub(super) request_sectors: usize,
    /// Memory of one request.
    pub(super) place_bytes: u64,
}

/// Few sectors, so that requests meet.
const SMALL: Scale = Scale { disk_sectors: 40, request_sectors: 20, place_bytes: 0x8000 };
/// Requests that a bounce buffer does not hold.
const LARGE: Scale = Scale { disk_sectors: 700, request_sectors: 500, place_bytes: 0x80000 };

impl Mode {
    /// Any, but each cache mode as often as the others.
    pub(super) fn any(seed: u64) -> Self {
        let caches = [
            CacheMode::None,
            CacheMode::Writeback,
            CacheMode::Writethrough,
            CacheMode::Directsync,
            CacheMode::Unsafe,
        ];
        // Its own sequence: what happens in a run does not hang on what it is made of.
        let mut random = Random::new(seed ^ 0x6d6f_6465);
        let direct = random.pick(&[(4, 512), (512, 512), (4, 4096), (512, 4096), (512, 1024)]);
        Self {
            cache: caches[seed as usize % caches.len()],
            flushes: !random.once_in(3),
            direct,
            tells: !random.once_in(4),
            // A block device's block is that of its direct I/O.
            called: if random.once_in(2) { 1 } else { u64::from(direct.1) },
            can_punch: random.once_in(2),
            can_zero: random.once_in(2),
            scale: if random.once_in(16) { LARGE } else { SMALL },
        }
    }

    /// What the driver acknowledges.
    pub(super) fn features(self) -> u64 {
        if self.flushes { VIRTIO_BLK_F_FLUSH } else { 0 }
    }

    /// Whether the driver finds a write-back cache at first.
    pub(super) fn starts_write_back(self) -> bool {
        !matches!(self.cache, CacheMode::Writethrough | CacheMode::Directsync)
    }

    /// Whether anything is promised at all.
    pub(super) fn syncs(self) -> bool {
        self.cache != CacheMode::Unsafe
    }

    fn is_direct(self) -> bool {
        matches!(self.cache, CacheMode::None | CacheMode::Directsync)
    }

    /// Whether the host zeroes a range in this way.
    pub(super) fn can(self, zeroing: Zeroing) -> bool {
        match zeroing {
            Zeroing::Deallocate => self.can_punch,
            Zeroing::Keep => self.can_zero,
            Zeroing::Write => true,
        }
    }

    /// A transfer on this file that ends short ends at a multiple of this.
    pub(super) fn granule(self, file: FileIndex) -> usize {
        if self.is_direct() && file == IMAGE { (self.direct.1 as usize).max(SECTOR) } else { 1 }
    }

    /// The host takes an operation: it is aligned as that demands.
    pub(super) fn check(self, operation: &Operation) {
        let (memory, block) = (self.direct.0 as usize, u64::from(self.direct.1).max(512));
        let unit = if block > 512 { block.max(PAGE) } else { block };
        let is_whole = |offset: u64, len_bytes: u64, of: u64| {
            offset.is_multiple_of(of) && len_bytes.is_multiple_of(of)
        };
        let len_bytes = operation.len_bytes() as u64;
        let takes = match operation.work {
            Work::Sync => operation.file == sync_file(operation.queue),
            Work::Write { durable: true, .. }
                if !(self.is_direct() && self.tells && operation.file == IMAGE) =>
            {
                false
            }
            Work::Zero { offset, len_bytes, zeroing: Zeroing::Deallocate | Zeroing::Keep } => {
                is_whole(offset, len_bytes, self.called) && operation.file == IMAGE
            }
            _ if !self.is_direct() => operation.file == IMAGE,
            // Only what a truncated file has left is read through the page cache.
            Work::Read { offset } => operation.file == IMAGE && is_whole(offset, len_bytes, block),
            Work::Write { .. } | Work::Zero { .. } if operation.file == BUFFERED => true,
            Work::Write { offset, .. } => is_whole(offset, len_bytes, unit),
            Work::Zero { offset, len_bytes, .. } => is_whole(offset, len_bytes, unit),
        };
        assert!(takes, "the host does not take {operation:?} with {self:?}");
        if self.is_direct() && operation.file == IMAGE {
            let aligned = |(address, len_bytes): (usize, usize)| {
                address.is_multiple_of(memory) && (len_bytes as u64).is_multiple_of(block)
            };
            assert!(operation.pieces().all(aligned), "{operation:?} is misaligned for {self:?}");
        }
    }
}

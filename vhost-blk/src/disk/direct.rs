//! Direct I/O: what it demands of a request, and how one that does not comply is served.
//!
//! Direct I/O moves whole blocks of the file from and to aligned memory. A guest owes us neither:
//! its drivers put data wherever they like, and a sector has 512 bytes whatever the block. So a
//! transfer may need other ways, each for those parts only that need them:
//!
//! - *Data in misaligned memory* is copied through a bounce buffer, piece by piece.
//! - *A read of parts of blocks* reads the blocks into a bounce buffer.
//! - *A write of part of a block* goes through a second description of the same file, which uses
//!   the host's page cache: the kernel does the reading, changing and writing back, and keeps both
//!   descriptions coherent.
//!
//! # Why the two descriptions do not get in each other's way
//! The kernel writes back and drops cached pages before and after a direct access to their range.
//! That is not atomic: what fills a page during a direct write may fill it with what was there
//! before. So no page may be shared by two writes that do not overlap. Hence the *unit*: where a
//! block is larger than a sector, only whole pages (whole blocks, where these are larger) are written
//! directly, what is left of a write at either end is less than a unit, and a buffered write stays
//! within one unit; reads never fill the cache. Then a page is written either directly as a whole or
//! through the cache, and both at a time only if the guest writes the same sectors twice at a time,
//! whose contents are anybody's guess in any case. Where a block is a sector, everything is a whole
//! block, and the second description is never used.
//!
//! Contract: plain arithmetic; nothing here opens, reads or allocates.

use common::engine::FileIndex;
use common::memory::{BOUNCE_ALIGNMENT, BOUNCE_BYTES};
use common::virtqueue::Buffers;

use super::SECTOR_BYTES;

/// The description that operations use, in the list that the engine is given.
pub(crate) const IMAGE: FileIndex = FileIndex(0);
/// The description for what is less than a unit; without direct I/O it is the same.
pub(crate) const BUFFERED: FileIndex = FileIndex(1);

/// The description on which a queue syncs. Its own, see `device/syncs.rs`.
pub(crate) fn sync_file(queue_index: u16) -> FileIndex {
    FileIndex(BUFFERED.0 + 1 + u32::from(queue_index))
}

/// Largest block that is served: the page size of some hosts, and the largest logical block of
/// Linux. A bounce buffer holds at least one, misaligned at both ends.
const BLOCK_BYTES_MAX: u32 = 65_536;

/// What direct I/O on a file demands, in bytes. All are powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Direct {
    /// Alignment of memory addresses.
    memory: usize,
    /// Alignment of offsets in the file and of the lengths of each piece of memory.
    block: u64,
    /// What is written directly is a multiple of this, at a multiple of it.
    unit: u64,
    /// See [`Direct::tells_failures`].
    tells: bool,
}

/// How the next part of a transfer moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// So many bytes between the guest's memory and this description.
    Straight { file: FileIndex, len_bytes: u64 },
    /// So many bytes of the file from `start` on, directly, and the bounce buffer; of these, those
    /// from `skip` on are the request's.
    Bounced { start: u64, len_bytes: u64, skip: u64 },
}

impl Way {
    /// The description on which it moves.
    pub(crate) fn file(self) -> FileIndex {
        match self {
            Self::Straight { file, .. } => file,
            Self::Bounced { .. } => IMAGE,
        }
    }

    /// How many bytes it moves on it.
    pub(crate) fn len_bytes(self) -> u64 {
        let (Self::Straight { len_bytes, .. } | Self::Bounced { len_bytes, .. }) = self;
        len_bytes
    }
}

/// A range of the disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) offset: u64,
    pub(crate) len_bytes: u64,
}

impl Range {
    /// The part of the range whose ends are multiples of `block`, if any, and the bytes before it.
    /// Where there is none, the bytes before are all up to the next such multiple.
    pub(crate) fn whole_blocks(self, block: u64) -> (u64, u64) {
        let before = self.len_bytes.min((block - self.offset % block) % block);
        let rest = self.len_bytes - before;
        (before, rest - rest % block)
    }
}

impl Direct {
    /// By the alignment in bytes of memory and of offsets; `None` where they are none that we can
    /// serve. `tells`: see [`tells_failures`](Self::tells_failures).
    pub(super) fn new(memory: u32, block: u32, page: usize, tells: bool) -> Option<Self> {
        let served = memory.is_power_of_two()
            && memory as usize <= BOUNCE_ALIGNMENT
            && block.is_power_of_two()
            && block <= BLOCK_BYTES_MAX;
        let block = u64::from(block).max(SECTOR_BYTES);
        let unit = if block > SECTOR_BYTES { block.max(page as u64) } else { block };
        served.then_some(Self { memory: memory as usize, block, unit, tells })
    }

    /// The block that requests must be made of to avoid detours.
    pub(super) fn block_bytes(self) -> u64 {
        self.block
    }

    /// Whether a durable write through [`IMAGE`] is told of its own failure, because it goes past
    /// the host's cache. Some file systems take direct I/O and yet go through the cache (btrfs, for
    /// files with checksums), where failures are told to whoever syncs first on the description.
    ///
    /// What nobody can see: a single write that the kernel sends through the cache after all, since
    /// somebody holds a page of its range or the file has a layout of old. If writing that back
    /// fails, another durable write may be told of it, and this one answered just before.
    pub(crate) fn tells_failures(self) -> bool {
        self.tells
    }

    /// What is zeroed by writing zeros directly is a multiple of this.
    pub(crate) fn unit_bytes(self) -> u64 {
        self.unit
    }

    /// Whether a read needs a bounce buffer.
    pub(crate) fn read_bounces(self, range: Range, into: Buffers<'_>) -> bool {
        !self.is_whole_blocks(range) || !self.can_take(into)
    }

    /// Whether a write needs a bounce buffer.
    pub(crate) fn write_bounces(self, range: Range, from: Buffers<'_>) -> bool {
        let (before, whole) = range.whole_blocks(self.unit);
        // What does not fit a `usize` is longer than any list of buffers.
        let at = |bytes| usize::try_from(bytes).unwrap_or(usize::MAX);
        !self.can_take(from.slice(at(before), at(whole)))
    }

    fn is_whole_blocks(self, range: Range) -> bool {
        range.offset.is_multiple_of(self.block) && range.len_bytes.is_multiple_of(self.block)
    }

    fn can_take(self, buffers: Buffers<'_>) -> bool {
        buffers.iter().all(|piece| {
            piece.address().is_multiple_of(self.memory)
                && (piece.len() as u64).is_multiple_of(self.block)
        })
    }

    /// The way of the first part of a read that has a bounce buffer, or that has none.
    pub(crate) fn read(self, range: Range, bounced: bool) -> Way {
        let Range { offset, len_bytes } = range;
        if bounced {
            let start = offset - offset % self.block;
            let end = (offset + len_bytes).next_multiple_of(self.block);
            let len_bytes = (end - start).min(BOUNCE_BYTES as u64);
            return Way::Bounced { start, len_bytes, skip: offset - start };
        }
        // What is no whole blocks without a bounce buffer is the rest of a read that the host cut
        // within a block, so that there is nothing behind: the file has been truncated.
        let file = if self.is_whole_blocks(range) { IMAGE } else { BUFFERED };
        Way::Straight { file, len_bytes }
    }

    /// The way of the first part of a write that has a bounce buffer, or that has none.
    pub(crate) fn write(self, range: Range, bounced: bool) -> Way {
        match range.whole_blocks(self.unit) {
            (0, 0) => Way::Straight { file: BUFFERED, len_bytes: range.len_bytes },
            (0, whole) if bounced => {
                let len_bytes = whole.min(BOUNCE_BYTES as u64);
                Way::Bounced { start: range.offset, len_bytes, skip: 0 }
            }
            (0, whole) => Way::Straight { file: IMAGE, len_bytes: whole },
            (before, _) => Way::Straight { file: BUFFERED, len_bytes: before },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNCE: u64 = BOUNCE_BYTES as u64;
    const OF_SECTORS: Direct = Direct { memory: 512, block: 512, unit: 512, tells: true };
    const OF_PAGES: Direct = Direct { memory: 4, block: 4096, unit: 4096, tells: true };

    fn range(offset: u64, len_bytes: u64) -> Range {
        Range { offset, len_bytes }
    }

    #[test]
    fn unit_is_a_page_where_a_block_is_more_than_a_sector() {
        let unit = |block, page| Direct::new(4, block, page, true).map(Direct::unit_bytes);
        assert_eq!(unit(1, 4096), Some(512));
        assert_eq!(unit(512, 4096), Some(512));
        assert_eq!(unit(1024, 4096), Some(4096));
        assert_eq!(unit(4096, 4096), Some(4096));
        assert_eq!(unit(4096, 65_536), Some(65_536));
        assert_eq!(unit(16_384, 4096), Some(16_384));
    }

    #[test]
    fn alignments_that_no_buffer_has_are_none() {
        for (memory, block) in [(0, 512), (3, 512), (8192, 512), (512, 0), (512, 513), (4, 131_072)]
        {
            assert_eq!(Direct::new(memory, block, 4096, true), None, "{memory} {block}");
        }
    }

    /// Follows a transfer to its end, each part as far as its way says, and checks what every part
    /// must be.
    fn follow(direct: Direct, mut left: Range, writes: bool, bounced: bool) -> Vec<Way> {
        let mut ways = Vec::new();
        while left.len_bytes > 0 {
            let way = if writes { direct.write(left, bounced) } else { direct.read(left, bounced) };
            let moved = match way {
                Way::Straight { file: BUFFERED, len_bytes } => {
                    let last = left.offset + len_bytes - 1;
                    assert_eq!(left.offset / direct.unit, last / direct.unit, "within one unit");
                    len_bytes
                }
                Way::Straight { len_bytes, .. } => {
                    let unit = if writes { direct.unit } else { direct.block };
                    let whole = len_bytes.is_multiple_of(unit) && left.offset.is_multiple_of(unit);
                    assert!(whole, "{left:?} {way:?}");
                    len_bytes
                }
                Way::Bounced { start, len_bytes, skip } => {
                    let unit = if writes { direct.unit } else { direct.block };
                    assert!(start.is_multiple_of(unit) && len_bytes.is_multiple_of(unit));
                    assert!(len_bytes <= BOUNCE);
                    assert!(start + skip == left.offset && (skip == 0 || !writes));
                    (len_bytes - skip).min(left.len_bytes)
                }
            };
            assert!(moved > 0, "{left:?} {way:?} goes nowhere");
            left = range(left.offset + moved, left.len_bytes - moved);
            ways.push(way);
        }
        ways
    }

    #[test]
    fn every_transfer_gets_to_its_end_by_ways_that_the_host_takes() {
        let small =
            [OF_SECTORS, OF_PAGES, Direct { memory: 4, block: 1024, unit: 4096, tells: true }];
        for direct in small {
            for offset in (0..16).map(|sector| sector * 512) {
                for len in (1..40).chain([255, 256, 257, 600]).map(|sectors| sectors * 512) {
                    follow(direct, range(offset, len), true, true);
                    follow(direct, range(offset, len), true, false);
                    follow(direct, range(offset, len), false, true);
                }
            }
        }
    }

    #[test]
    fn where_a_block_is_a_sector_nothing_goes_through_the_page_cache() {
        for (offset, len) in [(512, 512), (1024, 70_000 * 512), (7 * 512, 9 * 512)] {
            for (writes, bounced) in [(true, true), (true, false), (false, true), (false, false)] {
                let ways = follow(OF_SECTORS, range(offset, len), writes, bounced);
                assert!(
                    !ways.iter().any(|way| matches!(way, Way::Straight { file: BUFFERED, .. }))
                );
            }
        }
    }

    #[test]
    fn misaligned_write_has_a_buffered_head_and_tail_and_a_direct_middle() {
        let straight = |file, len_bytes| Way::Straight { file, len_bytes };
        assert_eq!(
            follow(OF_PAGES, range(3584, 512 + 8192 + 1024), true, false),
            [straight(BUFFERED, 512), straight(IMAGE, 8192), straight(BUFFERED, 1024)]
        );
        assert_eq!(
            follow(OF_PAGES, range(3584, 1024), true, false),
            [straight(BUFFERED, 512), straight(BUFFERED, 512)]
        );
        assert_eq!(
            follow(OF_PAGES, range(4096, BOUNCE + 4096), true, true),
            [
                Way::Bounced { start: 4096, len_bytes: BOUNCE, skip: 0 },
                Way::Bounced { start: 4096 + BOUNCE, len_bytes: 4096, skip: 0 }
            ]
        );
    }

    #[test]
    fn read_of_parts_of_blocks_reads_the_blocks() {
        assert_eq!(
            OF_PAGES.read(range(3584, 1024), true),
            Way::Bounced { start: 0, len_bytes: 8192, skip: 3584 }
        );
    }
}

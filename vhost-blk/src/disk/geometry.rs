//! What a driver is told of the shape of a disk, apart from its length: block sizes, alignment,
//! discard and zeroing limits.
//!
//! Contract: plain values in the units of the configuration space (VIRTIO 1.3, 5.2.4). Nothing here
//! opens or reads a file.

use super::SECTOR_BYTES;

/// Logical block size of a disk in a file.
///
/// A file takes requests of any sector, firmware such as SeaBIOS refuses to boot from anything
/// else, and an image that was partitioned with blocks of 512 bytes must keep that size wherever it
/// is served.
const FILE_LOGICAL_BYTES: u32 = 512;

/// Largest physical block size that a disk in a file claims.
///
/// Real disks stop at 4096, so that is what partitioning and file system tools were tested with
/// (`mkfs.xfs` takes its sector size from it, and has an upper limit); network file systems give
/// block sizes of a megabyte, which mean transfer sizes.
const FILE_PHYSICAL_BYTES_MAX: u64 = 4096;

/// Largest granularity of discards that a disk in a file claims.
///
/// It must not be too large: guests drop discards that are smaller than it. ZFS records (128 KiB)
/// are honoured.
const FILE_DISCARD_BYTES_MAX: u64 = 128 << 10;

/// Longest discard in one segment: 1 GiB.
///
/// One segment is one call into the file system, which cannot be interrupted once it runs, and a
/// drain waits for it. A power of two keeps the pieces into which a guest cuts a longer one
/// aligned.
const DISCARD_SECTORS_MAX: u32 = 1 << 21;

/// Most segments in one discard request: bounds what one descriptor chain may cost.
const DISCARD_SEGMENTS_MAX: u32 = 32;

/// Longest zeroing in one segment: 64 MiB.
///
/// Where neither file system nor device can zero a range by itself, the zeros are written, so this
/// bounds the time by the speed of the storage, not of its metadata.
const ZERO_SECTORS_MAX: u32 = 1 << 17;

/// Most segments in one zeroing request. Linux uses one.
const ZERO_SEGMENTS_MAX: u32 = 8;

/// The shape of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Smallest block that the disk reads and writes without a read-modify-write by whoever is
    /// below it; the unit of the fields called `_blocks`. A power of two, at least 512.
    pub(crate) logical_block_bytes: u32,
    /// Logical blocks in a physical block, as a power of two.
    pub(crate) physical_block_exp: u8,
    /// Logical blocks before the first one that is aligned to a physical block.
    pub(crate) alignment_offset: u8,
    /// Smallest transfer without a penalty; 0 where unknown.
    pub(crate) min_io_blocks: u16,
    /// Preferred transfer for streams; 0 where unknown.
    pub(crate) opt_io_blocks: u32,
    /// Present where parts of the disk can be given back.
    pub(crate) discard: Option<DiscardLimits>,
    /// Present where ranges can be zeroed without sending zeros.
    pub(crate) write_zeroes: Option<ZeroLimits>,
}

/// Bounds of a discard request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DiscardLimits {
    /// Sectors in one segment.
    pub(crate) max_sectors: u32,
    /// Segments in one request.
    pub(crate) max_segments: u32,
    /// Sectors to which a discard should be aligned in order to free anything.
    pub(crate) alignment_sectors: u32,
}

/// Bounds of a write-zeroes request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ZeroLimits {
    /// Sectors in one segment.
    pub(crate) max_sectors: u32,
    /// Segments in one request.
    pub(crate) max_segments: u32,
    /// Whether zeroing may free the range, where the driver allows it.
    pub(crate) may_unmap: bool,
}

/// Sizes in bytes as the host gives them, before they are cut to what the configuration space can
/// carry.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Shape {
    pub(super) logical_bytes: u32,
    pub(super) physical_bytes: u64,
    pub(super) alignment_offset_bytes: u64,
    pub(super) min_io_bytes: u64,
    pub(super) opt_io_bytes: u64,
}

impl Geometry {
    /// A disk with nothing special: the null disk.
    pub(super) fn plain(logical_bytes: Option<u32>) -> Geometry {
        let logical_bytes = logical_bytes.unwrap_or(FILE_LOGICAL_BYTES);
        Geometry::from(Shape { logical_bytes, ..Shape::default() })
    }

    /// A disk in a regular file, by the file system's block size (`st_blksize`) and the logical
    /// block that the operator wants, if any.
    ///
    /// The physical block is the file system's: a smaller write makes the host read the rest of the
    /// block first, which is just what the physical size of a "512e" disk means, and guests then
    /// align partitions and choose block sizes by it. (QEMU says 512 for both and leaves the matter
    /// to the operator.)
    pub(super) fn of_regular_file(
        block_bytes: u64,
        logical_bytes: Option<u32>,
        read_only: bool,
    ) -> Geometry {
        let block_bytes = if block_bytes.is_power_of_two() { block_bytes } else { SECTOR_BYTES };
        let logical_bytes = logical_bytes.unwrap_or(FILE_LOGICAL_BYTES);
        let physical_bytes =
            block_bytes.clamp(SECTOR_BYTES, FILE_PHYSICAL_BYTES_MAX).max(u64::from(logical_bytes));
        let shape = Shape {
            logical_bytes,
            physical_bytes,
            min_io_bytes: physical_bytes,
            ..Shape::default()
        };
        let granularity_bytes = block_bytes.clamp(SECTOR_BYTES, FILE_DISCARD_BYTES_MAX);
        let discards = Discards { granularity_bytes, max_bytes: u64::MAX };
        Geometry::from(shape)
            .with_discard((!read_only).then_some(discards))
            .with_write_zeroes((!read_only).then_some(u64::MAX))
    }

    /// Adds discards, where there are any.
    pub(super) fn with_discard(mut self, discards: Option<Discards>) -> Geometry {
        let block_sectors = self.block_sectors();
        self.discard = discards.map(|discards| {
            // VIRTIO 1.3, 5.2.4: a sector alignment; never below the logical block, since drivers
            // take it for the granularity.
            let granularity = in_sectors(discards.granularity_bytes).max(block_sectors);
            DiscardLimits {
                max_sectors: limit(DISCARD_SECTORS_MAX, discards.max_bytes, granularity),
                max_segments: DISCARD_SEGMENTS_MAX,
                alignment_sectors: granularity,
            }
        });
        self
    }

    /// Adds zeroing of ranges of so many bytes at most; they may be unmapped by it where they can
    /// be discarded.
    pub(super) fn with_write_zeroes(mut self, max_bytes: Option<u64>) -> Geometry {
        let block_sectors = self.block_sectors();
        self.write_zeroes = max_bytes.map(|max_bytes| ZeroLimits {
            max_sectors: limit(ZERO_SECTORS_MAX, max_bytes, block_sectors),
            max_segments: ZERO_SEGMENTS_MAX,
            may_unmap: self.discard.is_some(),
        });
        self
    }

    fn block_sectors(&self) -> u32 {
        in_sectors(u64::from(self.logical_block_bytes))
    }
}

/// What the host says of its discards, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Discards {
    /// The least that frees anything.
    pub(super) granularity_bytes: u64,
    /// The most in one operation.
    pub(super) max_bytes: u64,
}

fn in_sectors(bytes: u64) -> u32 {
    u32::try_from(bytes / SECTOR_BYTES).unwrap_or(u32::MAX)
}

/// The lesser of our limit in sectors and the host's in bytes, in whole multiples of `of_sectors`,
/// and one of these at least.
fn limit(ours: u32, host_bytes: u64, of_sectors: u32) -> u32 {
    let least = ours.min(in_sectors(host_bytes));
    (least - least.checked_rem(of_sectors).unwrap_or(0)).max(of_sectors)
}

impl From<Shape> for Geometry {
    /// Values that do not fit their field are left out (0 means no hint): a wrong hint is worse
    /// than none.
    fn from(shape: Shape) -> Geometry {
        let logical_bytes = u64::from(shape.logical_bytes);
        let in_blocks = |bytes: u64| bytes.checked_div(logical_bytes).unwrap_or(0);
        let physical_blocks = in_blocks(shape.physical_bytes);
        let physical_block_exp =
            if physical_blocks.is_power_of_two() { physical_blocks.trailing_zeros() } else { 0 };
        Geometry {
            logical_block_bytes: shape.logical_bytes,
            physical_block_exp: u8::try_from(physical_block_exp).unwrap_or(0),
            alignment_offset: u8::try_from(in_blocks(shape.alignment_offset_bytes)).unwrap_or(0),
            min_io_blocks: u16::try_from(in_blocks(shape.min_io_bytes)).unwrap_or(0),
            opt_io_blocks: u32::try_from(in_blocks(shape.opt_io_bytes)).unwrap_or(0),
            discard: None,
            write_zeroes: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_on_a_4k_file_system_is_a_512e_disk() {
        let geometry = Geometry::of_regular_file(4096, None, false);
        assert_eq!(geometry.logical_block_bytes, 512);
        assert_eq!(geometry.physical_block_exp, 3);
        assert_eq!(geometry.min_io_blocks, 8);
        assert_eq!(geometry.opt_io_blocks, 0);
        assert_eq!(geometry.discard.map(|limits| limits.alignment_sectors), Some(8));
        assert_eq!(geometry.write_zeroes.map(|limits| limits.may_unmap), Some(true));
    }

    #[test]
    fn transfer_size_of_a_network_file_system_is_no_physical_block() {
        let geometry = Geometry::of_regular_file(1 << 20, None, false);
        assert_eq!(geometry.physical_block_exp, 3);
        assert_eq!(geometry.discard.map(|limits| limits.alignment_sectors), Some(256));
    }

    #[test]
    fn odd_block_size_of_a_file_system_counts_as_a_sector() {
        for odd in [0, 1, 513, 6000] {
            let geometry = Geometry::of_regular_file(odd, None, false);
            assert_eq!((geometry.physical_block_exp, geometry.min_io_blocks), (0, 1), "{odd}");
            assert_eq!(geometry.discard.map(|limits| limits.alignment_sectors), Some(1), "{odd}");
        }
    }

    #[test]
    fn read_only_disk_offers_neither_discard_nor_zeroing() {
        let geometry = Geometry::of_regular_file(4096, None, true);
        assert_eq!((geometry.discard, geometry.write_zeroes), (None, None));
    }

    #[test]
    fn hint_that_does_not_fit_its_field_is_left_out() {
        let geometry = Geometry::from(Shape {
            logical_bytes: 512,
            physical_bytes: 3 * 512,
            alignment_offset_bytes: 256 * 512,
            min_io_bytes: 65_536 * 512,
            opt_io_bytes: u64::MAX,
        });
        assert_eq!(geometry, Geometry::plain(None));
    }

    #[test]
    fn discard_is_never_finer_than_a_block() {
        let geometry = Geometry::from(Shape { logical_bytes: 4096, ..Shape::default() })
            .with_discard(Some(Discards { granularity_bytes: 512, max_bytes: u64::MAX }));
        assert_eq!(geometry.discard.map(|limits| limits.alignment_sectors), Some(8));
    }

    #[test]
    fn limits_are_the_lesser_of_ours_and_the_host_s_in_whole_blocks() {
        let block = Geometry::from(Shape { logical_bytes: 4096, ..Shape::default() });
        let discard = |granularity_bytes, max_bytes| {
            let limits =
                block.with_discard(Some(Discards { granularity_bytes, max_bytes })).discard;
            limits.map(|limits| (limits.max_sectors, limits.alignment_sectors))
        };
        assert_eq!(discard(4096, u64::MAX), Some((DISCARD_SECTORS_MAX, 8)));
        assert_eq!(discard(65_536, (1 << 20) - 512), Some((2048 - 128, 128)));
        assert_eq!(discard(65_536, 4096), Some((128, 128)), "never less than the granularity");
        let zero = |max_bytes| {
            block.with_write_zeroes(Some(max_bytes)).write_zeroes.map(|limits| limits.max_sectors)
        };
        assert_eq!(zero(u64::MAX), Some(ZERO_SECTORS_MAX));
        assert_eq!(zero((2 << 20) + 512), Some(4096));
        assert_eq!(zero(512), Some(8));
    }

    #[test]
    fn logical_block_is_what_the_operator_wants_and_the_physical_one_no_smaller() {
        for (logical, exp) in [(512, 3), (1024, 2), (2048, 1), (4096, 0)] {
            let geometry = Geometry::of_regular_file(4096, Some(logical), false);
            assert_eq!((geometry.logical_block_bytes, geometry.physical_block_exp), (logical, exp));
        }
        let geometry = Geometry::of_regular_file(512, Some(4096), false);
        assert_eq!((geometry.physical_block_exp, geometry.min_io_blocks), (0, 1));
        assert_eq!(geometry.discard.map(|limits| limits.alignment_sectors), Some(8));
        assert_eq!(Geometry::plain(Some(4096)).logical_block_bytes, 4096);
    }
}

//! What the device says of itself: feature bits, the configuration space and the serial number.
//!
//! Contract: everything here is computed from an open disk and the options; reading it touches
//! neither. The driver can write one field, `writeback` ([`written_cache`]). CHS geometry, lifetime,
//! secure erase and zones are not offered: their fields are zero.

use std::str::FromStr;

use thiserror::Error;

use crate::disk::{Disk, Geometry};

/// Maximum size of any single segment is in `size_max`.
pub(crate) const VIRTIO_BLK_F_SIZE_MAX: u64 = 1 << 1;
/// Maximum number of segments in a request is in `seg_max`.
pub(crate) const VIRTIO_BLK_F_SEG_MAX: u64 = 1 << 2;
/// Device is read-only.
pub(crate) const VIRTIO_BLK_F_RO: u64 = 1 << 5;
/// Block size of disk is in `blk_size`.
pub(crate) const VIRTIO_BLK_F_BLK_SIZE: u64 = 1 << 6;
/// Cache flush command support.
pub(crate) const VIRTIO_BLK_F_FLUSH: u64 = 1 << 9;
/// Device exports information on optimal I/O alignment.
pub(crate) const VIRTIO_BLK_F_TOPOLOGY: u64 = 1 << 10;
/// Device can toggle its cache between writeback and writethrough modes.
pub(crate) const VIRTIO_BLK_F_CONFIG_WCE: u64 = 1 << 11;
/// Device supports multiqueue.
pub(crate) const VIRTIO_BLK_F_MQ: u64 = 1 << 12;
/// Device can support discard command.
pub(crate) const VIRTIO_BLK_F_DISCARD: u64 = 1 << 13;
/// Device can support write zeroes command.
pub(crate) const VIRTIO_BLK_F_WRITE_ZEROES: u64 = 1 << 14;

/// Bytes of the answer to `VIRTIO_BLK_T_GET_ID`.
pub(crate) const VIRTIO_BLK_ID_BYTES: usize = 20;

/// Length of `struct virtio_blk_config` up to and including the zoned part.
const CONFIG_BYTES: usize = 96;

/// Offset of the byte `writeback`.
const WRITEBACK: usize = 32;

/// Longest segment that a driver should send: 4 MiB.
///
/// Linux takes it for `max_segment_size`; with 254 segments it keeps a request below 1 GiB, within
/// what the kernel moves in one call (2 GiB less a page), and it is no limit to a segment that lies
/// in a huge page. SeaBIOS multiplies it by `seg_max` in 32 bits and sends that much in *one*
/// segment (at most 65535 sectors, whatever `size_max` says), and does 64 sectors at a time where
/// the feature is missing: so the product must not overflow, the feature makes it boot faster, and
/// a longer segment must be served all the same.
const SIZE_MAX_BYTES: u32 = 4 << 20;

/// Most data segments in a request, where the queue has room: with header and status, 256
/// descriptors.
const SEG_MAX: u32 = 254;

/// Descriptors of a request that are not data: its header and its status.
const DESCRIPTORS_BESIDE_DATA: u32 = 2;

/// How many queues the device has and how large a driver may make them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QueueLimits {
    /// Queues, from 1.
    pub(crate) count: u16,
    /// Largest queue size in descriptors, a power of two from 2.
    pub(crate) size_max: u16,
}

/// Feature bits of the block device; the transport's and the ring's are not among them.
pub(crate) fn features(disk: &Disk, queue_count: u16) -> u64 {
    // VIRTIO 1.3, 5.2.5.2: Devices SHOULD always offer VIRTIO_BLK_F_FLUSH, and MUST offer it if
    // they offer VIRTIO_BLK_F_CONFIG_WCE.
    let always = VIRTIO_BLK_F_SIZE_MAX
        | VIRTIO_BLK_F_SEG_MAX
        | VIRTIO_BLK_F_BLK_SIZE
        | VIRTIO_BLK_F_TOPOLOGY
        | VIRTIO_BLK_F_FLUSH
        | VIRTIO_BLK_F_CONFIG_WCE;
    let geometry = disk.geometry();
    let offered_if = |condition: bool, feature: u64| if condition { feature } else { 0 };
    always
        | offered_if(disk.read_only(), VIRTIO_BLK_F_RO)
        | offered_if(queue_count > 1, VIRTIO_BLK_F_MQ)
        | offered_if(geometry.discard.is_some(), VIRTIO_BLK_F_DISCARD)
        | offered_if(geometry.write_zeroes.is_some(), VIRTIO_BLK_F_WRITE_ZEROES)
}

/// Whether a driver that acknowledged `features` finds a write-back cache (0: none has
/// acknowledged any yet).
fn is_write_back(disk: &Disk, features: u64) -> bool {
    // VIRTIO 1.3, 5.2.5.2: if VIRTIO_BLK_F_CONFIG_WCE is negotiated but VIRTIO_BLK_F_FLUSH is not,
    // the device MUST initialize writeback to 0.
    disk.cache().is_write_back() && (features == 0 || features & VIRTIO_BLK_F_FLUSH != 0)
}

/// What a write of the driver does to its cache: write-back or not;
/// `None` where nothing may be written so.
///
/// Without regard to VIRTIO_BLK_F_CONFIG_WCE: a driver may write between its FEATURES_OK and
/// DRIVER_OK, and front ends tell us its features with the latter. (VIRTIO 1.3, 5.2.6.1: the driver
/// writes 0 or 1.)
pub(crate) fn written_cache(offset: u32, data: &[u8]) -> Option<bool> {
    match (usize::try_from(offset), data) {
        (Ok(WRITEBACK), [0]) => Some(false),
        (Ok(WRITEBACK), [1]) => Some(true),
        _ => None,
    }
}

/// The device's configuration space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConfigSpace([u8; CONFIG_BYTES]);

impl ConfigSpace {
    /// `struct virtio_blk_config` of a disk, for a driver that acknowledged `features` (0: none has
    /// yet).
    pub(crate) fn new(disk: &Disk, queues: QueueLimits, features: u64) -> ConfigSpace {
        let mut config = ConfigSpace::lay_out(disk.capacity_sectors(), disk.geometry(), queues);
        config.put(WRITEBACK, [u8::from(is_write_back(disk, features))]);
        config
    }

    // VIRTIO 1.3, 5.2.4: Device configuration layout. All fields are little-endian.
    fn lay_out(capacity_sectors: u64, geometry: Geometry, queues: QueueLimits) -> ConfigSpace {
        // A driver without indirect descriptors cannot send more than fits the queue, and some try
        // (Linux then hangs).
        let seg_max =
            SEG_MAX.min(u32::from(queues.size_max).saturating_sub(DESCRIPTORS_BESIDE_DATA)).max(1);
        let mut config = ConfigSpace([0; CONFIG_BYTES]);
        config.put(0, capacity_sectors.to_le_bytes());
        config.put(8, SIZE_MAX_BYTES.to_le_bytes());
        config.put(12, seg_max.to_le_bytes());
        config.put(20, geometry.logical_block_bytes.to_le_bytes());
        config.put(24, [geometry.physical_block_exp, geometry.alignment_offset]);
        config.put(26, geometry.min_io_blocks.to_le_bytes());
        config.put(28, geometry.opt_io_blocks.to_le_bytes());
        config.put(34, queues.count.to_le_bytes());
        if let Some(limits) = geometry.discard {
            config.put(36, limits.max_sectors.to_le_bytes());
            config.put(40, limits.max_segments.to_le_bytes());
            config.put(44, limits.alignment_sectors.to_le_bytes());
        }
        if let Some(limits) = geometry.write_zeroes {
            config.put(48, limits.max_sectors.to_le_bytes());
            config.put(52, limits.max_segments.to_le_bytes());
            config.put(56, [u8::from(limits.may_unmap)]);
        }
        config
    }

    /// Copies the bytes from `offset` on. Beyond the structure there are zeros: a front end may ask
    /// for more of it than we know (fields of a later version), and a feature that is not offered
    /// reads as zero.
    pub(crate) fn read(&self, offset: u32, into: &mut [u8]) {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let known = self.0.get(from..).unwrap_or_default();
        into.fill(0);
        for (byte, value) in into.iter_mut().zip(known) {
            *byte = *value;
        }
    }

    fn put<const BYTES: usize>(&mut self, offset: usize, field: [u8; BYTES]) {
        self.0[offset..offset + BYTES].copy_from_slice(&field);
    }
}

/// The serial number of a disk: the answer to `VIRTIO_BLK_T_GET_ID`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Serial([u8; VIRTIO_BLK_ID_BYTES]);

/// Why a `--serial` value is none.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum SerialError {
    /// It does not fit the answer.
    #[error("a serial number has at most 20 bytes, not {0}")]
    TooLong(usize),
    /// The specification asks for ASCII, and tools in the guest print it.
    #[error("a serial number consists of printable ASCII characters, which {0:?} is not")]
    NotPrintable(char),
}

impl Serial {
    /// As sent to the driver, padded with zeros.
    // VIRTIO 1.3, 5.2.6: VIRTIO_BLK_T_GET_ID: the device ID string is a NUL-padded ASCII string up
    // to 20 bytes long. If the string is 20 bytes long, there is no NUL terminator.
    pub(crate) fn bytes(&self) -> &[u8; VIRTIO_BLK_ID_BYTES] {
        &self.0
    }
}

impl FromStr for Serial {
    type Err = SerialError;

    fn from_str(text: &str) -> Result<Self, SerialError> {
        if let Some(bad) = text.chars().find(|c| !(' '..='~').contains(c)) {
            return Err(SerialError::NotPrintable(bad));
        }
        let mut serial = Serial::default();
        match serial.0.get_mut(..text.len()) {
            Some(start) => start.copy_from_slice(text.as_bytes()),
            None => return Err(SerialError::TooLong(text.len())),
        }
        Ok(serial)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::disk::{DiskSpec, OpenOptions};

    const QUEUES: QueueLimits = QueueLimits { count: 4, size_max: 1024 };

    fn null_disk(read_only: bool) -> Disk {
        let options = OpenOptions { read_only, ..OpenOptions::default() };
        Disk::open(&DiskSpec::Null { len_bytes: 0x1122_3344 * 512 }, options).unwrap()
    }

    fn file_disk(read_only: bool) -> Disk {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        Disk::open(&DiskSpec::File(path), OpenOptions { read_only, ..OpenOptions::default() })
            .unwrap()
    }

    fn field<const BYTES: usize>(config: &ConfigSpace, offset: u32) -> [u8; BYTES] {
        let mut bytes = [0xee; BYTES];
        config.read(offset, &mut bytes);
        bytes
    }

    fn le32(config: &ConfigSpace, offset: u32) -> u32 {
        u32::from_le_bytes(field(config, offset))
    }

    #[test]
    fn fields_lie_where_the_specification_has_them() {
        let mut geometry = file_disk(false).geometry();
        geometry.logical_block_bytes = 4096;
        (geometry.physical_block_exp, geometry.alignment_offset) = (3, 5);
        (geometry.min_io_blocks, geometry.opt_io_blocks) = (0x0607, 0x0809_0a0b);
        let discard = geometry.discard.as_mut().unwrap();
        (discard.max_sectors, discard.max_segments, discard.alignment_sectors) = (101, 102, 103);
        let zeroes = geometry.write_zeroes.as_mut().unwrap();
        (zeroes.max_sectors, zeroes.max_segments, zeroes.may_unmap) = (104, 105, true);
        let config = ConfigSpace::lay_out(0x0123_4567_89ab_cdef, geometry, QUEUES);
        assert_eq!(u64::from_le_bytes(field(&config, 0)), 0x0123_4567_89ab_cdef, "capacity");
        assert_eq!(le32(&config, 8), 4 << 20, "size_max");
        assert_eq!(le32(&config, 12), 254, "seg_max");
        assert_eq!(le32(&config, 16), 0, "geometry");
        assert_eq!(le32(&config, 20), 4096, "blk_size");
        assert_eq!(field(&config, 24), [3, 5], "physical_block_exp, alignment_offset");
        assert_eq!(u16::from_le_bytes(field(&config, 26)), 0x0607, "min_io_size");
        assert_eq!(le32(&config, 28), 0x0809_0a0b, "opt_io_size");
        assert_eq!(field(&config, 32), [0, 0], "writeback, unused0");
        assert_eq!(u16::from_le_bytes(field(&config, 34)), 4, "num_queues");
        assert_eq!(le32(&config, 36), 101, "max_discard_sectors");
        assert_eq!(le32(&config, 40), 102, "max_discard_seg");
        assert_eq!(le32(&config, 44), 103, "discard_sector_alignment");
        assert_eq!(le32(&config, 48), 104, "max_write_zeroes_sectors");
        assert_eq!(le32(&config, 52), 105, "max_write_zeroes_seg");
        assert_eq!(field(&config, 56), [1, 0, 0, 0], "write_zeroes_may_unmap, unused1");
        assert_eq!(field(&config, 60), [0; 36], "secure erase and zoned");
    }

    #[test]
    fn capacity_is_little_endian() {
        let config = ConfigSpace::new(&null_disk(false), QUEUES, 0);
        assert_eq!(field(&config, 0), [0x44, 0x33, 0x22, 0x11, 0, 0, 0, 0]);
    }

    #[test]
    fn writeback_is_the_cache_s_state_for_drivers_that_can_flush() {
        let disk = null_disk(false);
        let told =
            |features| field::<1>(&ConfigSpace::new(&disk, QUEUES, features), WRITEBACK as u32)[0];
        let version_1 = 1 << 32;
        let flush = version_1 | VIRTIO_BLK_F_FLUSH;
        let each = || {
            [0, flush, flush | VIRTIO_BLK_F_CONFIG_WCE, version_1 | VIRTIO_BLK_F_CONFIG_WCE]
                .map(told)
        };
        assert_eq!(each(), [1, 1, 1, 0]);
        disk.cache().switch(false);
        assert_eq!(each(), [0; 4]);
        disk.cache().switch(true);
        assert_eq!(each(), [1, 1, 1, 0]);
    }

    #[test]
    fn only_writeback_can_be_written_and_only_as_a_whole() {
        assert_eq!(written_cache(32, &[0]), Some(false));
        assert_eq!(written_cache(32, &[1]), Some(true));
        for (offset, data) in [
            (32, &[2][..]),
            (32, &[0xff]),
            (32, &[]),
            (32, &[1, 0]),
            (31, &[1]),
            (31, &[0, 1]),
            (33, &[0]),
            (0, &[0]),
            (u32::MAX, &[0]),
        ] {
            assert_eq!(written_cache(offset, data), None, "{data:?} at {offset}");
        }
    }

    #[test]
    fn reading_beyond_the_structure_gives_zeros() {
        let config = ConfigSpace::new(&null_disk(false), QUEUES, 0);
        let all: [u8; 256] = field(&config, 0);
        assert_eq!(all[..CONFIG_BYTES], config.0);
        assert_eq!(all[CONFIG_BYTES..], [0; 256 - CONFIG_BYTES]);
        assert_eq!(field(&config, 32), [1, 0, 4, 0, 0, 0, 0, 0]);
        for offset in [95, 96, 97, 255, 256, u32::MAX] {
            assert_eq!(field(&config, offset), [0; 16], "{offset}");
        }
    }

    #[test]
    fn segments_fit_the_queue_without_indirect_descriptors() {
        for (size_max, seg_max) in
            [(2, 1), (4, 2), (128, 126), (256, 254), (512, 254), (32_768, 254)]
        {
            let config = ConfigSpace::new(&null_disk(false), QueueLimits { count: 1, size_max }, 0);
            assert_eq!(le32(&config, 12), seg_max, "{size_max}");
        }
    }

    #[test]
    fn seabios_can_multiply_both_maxima() {
        assert!(SIZE_MAX_BYTES.checked_mul(SEG_MAX).is_some());
    }

    #[test]
    fn features_follow_the_disk_and_the_queues() {
        let always = VIRTIO_BLK_F_SIZE_MAX
            | VIRTIO_BLK_F_SEG_MAX
            | VIRTIO_BLK_F_BLK_SIZE
            | VIRTIO_BLK_F_TOPOLOGY
            | VIRTIO_BLK_F_FLUSH
            | VIRTIO_BLK_F_CONFIG_WCE;
        let ranges = VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES;
        assert_eq!(features(&null_disk(false), 1), always);
        assert_eq!(features(&null_disk(false), 2), always | VIRTIO_BLK_F_MQ);
        assert_eq!(features(&null_disk(true), 1), always | VIRTIO_BLK_F_RO);
        assert_eq!(features(&file_disk(false), 1), always | ranges);
        assert_eq!(features(&file_disk(true), 1), always | VIRTIO_BLK_F_RO);
    }

    #[test]
    fn feature_bits_are_those_of_the_specification() {
        assert_eq!(features(&file_disk(false), 2), 0b111_1110_0100_0110);
    }

    #[test]
    fn serial_of_twenty_bytes_has_no_terminator() {
        let serial: Serial = "01234567890123456789".parse().unwrap();
        assert_eq!(serial.bytes(), b"01234567890123456789");
        assert_eq!(
            "root disk".parse::<Serial>().unwrap().bytes(),
            b"root disk\0\0\0\0\0\0\0\0\0\0\0"
        );
        assert_eq!(Serial::default().bytes(), &[0; 20]);
    }

    #[test]
    fn serial_that_a_guest_could_not_print_is_refused() {
        assert_eq!("012345678901234567890".parse::<Serial>(), Err(SerialError::TooLong(21)));
        for (text, bad) in [("a\nb", '\n'), ("a\0", '\0'), ("é", 'é'), ("\x7f", '\x7f')] {
            assert_eq!(text.parse::<Serial>(), Err(SerialError::NotPrintable(bad)));
        }
    }
}

//! The properties of a block device, read from sysfs.
//!
//! sysfs and not ioctls, because two of the questions (zoned, discard limits) have an answer
//! nowhere else, and because reading a file needs no unsafe code. `/sys` is there in every
//! container that has block devices; it may be read-only.
//!
//! Contract: nothing is cached and nothing is changed. An attribute that an older kernel does not
//! have counts as absent.

use std::fs;
use std::io;
use std::num::ParseIntError;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::Dev;
use thiserror::Error;

use super::geometry::{Discards, Geometry, Shape};

/// Where the kernel shows its devices.
pub(super) const SYSFS: &str = "/sys";

/// Smallest and largest logical block that a disk is served with. Linux guests take no block beyond
/// their page size, and no device has less than a sector.
const LOGICAL_BYTES: std::ops::RangeInclusive<u32> = 512..=65_536;

/// Why a block device cannot be served.
#[derive(Debug, Error)]
pub(crate) enum DeviceError {
    /// A zoned device must be written in the order of its zones.
    #[error(
        "it is a {model} zoned device, and a guest would not know that it must write its zones in order"
    )]
    Zoned {
        /// The kernel's word: `host-managed` or `host-aware`.
        model: String,
    },
    /// The device is set read-only, which opening it for writing does not find out.
    #[error("the device is read-only: --read-only serves it so")]
    ReadOnly,
    /// A block size that no guest takes.
    #[error("its logical block size of {0} bytes is none that guests support")]
    BlockSize(u32),
    /// The attribute is there but cannot be read, or the device is not in sysfs at all.
    #[error("cannot read {path:?} (is /sys mounted?)")]
    Unreadable {
        /// The attribute.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Not the number that it should be.
    #[error("{path:?} says {value:?}")]
    Number {
        /// The attribute.
        path: PathBuf,
        /// Its text.
        value: String,
        /// What is wrong with it.
        source: ParseIntError,
    },
}

/// A block device's directory in sysfs, and that of its request queue.
#[derive(Debug)]
pub(super) struct BlockDevice {
    directory: PathBuf,
    queue: PathBuf,
}

impl BlockDevice {
    /// The device of a number (`st_rdev`) under a sysfs mount.
    pub(super) fn find(sysfs: &Path, number: Dev) -> Result<BlockDevice, DeviceError> {
        let name = format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
        let link = sysfs.join("dev/block").join(name);
        let directory = match fs::canonicalize(&link) {
            Ok(directory) => directory,
            Err(source) => return Err(DeviceError::Unreadable { path: link, source }),
        };
        // A partition has no queue of its own: it uses that of the disk, one directory up.
        let owner = if directory.join("partition").exists() { directory.parent() } else { None };
        let queue = owner.unwrap_or(&directory).join("queue");
        Ok(BlockDevice { directory, queue })
    }

    /// Its geometry, with another logical block if the operator wants one, and its own logical
    /// block in bytes; or why it cannot be served.
    ///
    /// A logical block that is smaller than the device's works: what is less than a block of the
    /// device is read, changed and written by the host.
    pub(super) fn geometry(
        &self,
        read_only: bool,
        wanted_bytes: Option<u32>,
    ) -> Result<(Geometry, u32), DeviceError> {
        match text(self.queue.join("zoned"))? {
            Some(model) if model != "none" => return Err(DeviceError::Zoned { model }),
            _ => {}
        }
        if !read_only && self.number::<u32>(&self.directory.join("ro"))? == Some(1) {
            return Err(DeviceError::ReadOnly);
        }
        let in_queue = |attribute: &str| Ok(self.number(&self.queue.join(attribute))?.unwrap_or(0));
        let own_bytes = u32::try_from(in_queue("logical_block_size")?).unwrap_or(u32::MAX);
        if !LOGICAL_BYTES.contains(&own_bytes) || !own_bytes.is_power_of_two() {
            return Err(DeviceError::BlockSize(own_bytes));
        }
        let logical_bytes = wanted_bytes.unwrap_or(own_bytes);
        let physical_bytes = in_queue("physical_block_size")?.max(u64::from(logical_bytes));
        // The kernel says -1 where nothing is aligned; then there is no offset to tell.
        let alignment_offset =
            self.number::<i64>(&self.directory.join("alignment_offset"))?.unwrap_or(0);
        let geometry = Geometry::from(Shape {
            logical_bytes,
            physical_bytes,
            alignment_offset_bytes: u64::try_from(alignment_offset).unwrap_or(0),
            min_io_bytes: in_queue("minimum_io_size")?,
            opt_io_bytes: in_queue("optimal_io_size")?,
        });
        // A discard is executed by punching a hole, which the kernel makes a zeroing that unmaps:
        // the device must be able to do both. Zeroing without unmapping always works, because there
        // the kernel writes zeros if it must.
        let zero_max_bytes = in_queue("write_zeroes_max_bytes")?;
        let max_bytes = in_queue("discard_max_bytes")?.min(zero_max_bytes);
        let granularity_bytes = in_queue("discard_granularity")?;
        let discards = Discards { granularity_bytes, max_bytes };
        let zero_max_bytes = if zero_max_bytes == 0 { u64::MAX } else { zero_max_bytes };
        let geometry = geometry
            .with_discard((!read_only && max_bytes > 0).then_some(discards))
            .with_write_zeroes((!read_only).then_some(zero_max_bytes));
        Ok((geometry, own_bytes))
    }

    fn number<T: FromStr<Err = ParseIntError>>(
        &self,
        path: &Path,
    ) -> Result<Option<T>, DeviceError> {
        let Some(value) = text(path.to_owned())? else {
            return Ok(None);
        };
        match value.parse() {
            Ok(number) => Ok(Some(number)),
            Err(source) => Err(DeviceError::Number { path: path.to_owned(), value, source }),
        }
    }
}

/// The text of an attribute without its end of line; `None` where the kernel has no such attribute.
fn text(path: PathBuf) -> Result<Option<String>, DeviceError> {
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text.trim_end().to_owned())),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(DeviceError::Unreadable { path, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sysfs with one disk (8:0, 4 KiB blocks) and one partition of it (8:1), as the kernel lays
    /// them out.
    struct Sysfs(tempfile::TempDir);

    impl Sysfs {
        fn new() -> Sysfs {
            let sysfs = Sysfs(tempfile::tempdir().unwrap());
            let links = sysfs.0.path().join("dev/block");
            fs::create_dir_all(&links).unwrap();
            fs::create_dir_all(sysfs.0.path().join("devices/sda/sda1")).unwrap();
            fs::create_dir_all(sysfs.0.path().join("devices/sda/queue")).unwrap();
            std::os::unix::fs::symlink("../../devices/sda", links.join("8:0")).unwrap();
            std::os::unix::fs::symlink("../../devices/sda/sda1", links.join("8:1")).unwrap();
            sysfs.set("sda1/partition", "1");
            for (attribute, value) in [
                ("ro", "0"),
                ("alignment_offset", "0"),
                ("queue/zoned", "none"),
                ("queue/logical_block_size", "4096"),
                ("queue/physical_block_size", "16384"),
                ("queue/minimum_io_size", "65536"),
                ("queue/optimal_io_size", "1048576"),
                ("queue/discard_max_bytes", "2147450880"),
                ("queue/write_zeroes_max_bytes", "2097152"),
                ("queue/discard_granularity", "32768"),
            ] {
                sysfs.set(&format!("sda/{attribute}"), value);
            }
            sysfs
        }

        fn set(&self, attribute: &str, value: &str) {
            let attribute = attribute.replace("sda1/", "sda/sda1/");
            fs::write(self.0.path().join("devices").join(attribute), format!("{value}\n")).unwrap();
        }

        fn geometry(&self, minor: u32, read_only: bool) -> Result<Geometry, DeviceError> {
            self.with_block(minor, read_only, None).map(|(geometry, _)| geometry)
        }

        fn with_block(
            &self,
            minor: u32,
            read_only: bool,
            wanted_bytes: Option<u32>,
        ) -> Result<(Geometry, u32), DeviceError> {
            BlockDevice::find(self.0.path(), rustix::fs::makedev(8, minor))?
                .geometry(read_only, wanted_bytes)
        }
    }

    #[test]
    fn geometry_comes_from_the_request_queue() {
        let geometry = Sysfs::new().geometry(0, false).unwrap();
        assert_eq!(geometry.logical_block_bytes, 4096);
        assert_eq!(geometry.physical_block_exp, 2);
        assert_eq!((geometry.min_io_blocks, geometry.opt_io_blocks), (16, 256));
        assert_eq!(geometry.discard.map(|limits| limits.alignment_sectors), Some(64));
        assert_eq!(geometry.write_zeroes.map(|limits| limits.may_unmap), Some(true));
    }

    #[test]
    fn partition_uses_the_queue_of_its_disk_and_an_alignment_of_its_own() {
        let sysfs = Sysfs::new();
        sysfs.set("sda1/alignment_offset", "8192");
        assert_eq!(
            sysfs.geometry(1, false).unwrap(),
            Geometry { alignment_offset: 2, ..sysfs.geometry(0, false).unwrap() }
        );
    }

    #[test]
    fn limits_are_the_device_s_where_they_are_less_than_ours() {
        let sysfs = Sysfs::new();
        let limits = |sysfs: &Sysfs| {
            let geometry = sysfs.geometry(0, false).unwrap();
            let discard = geometry.discard.map(|limits| limits.max_sectors);
            (discard, geometry.write_zeroes.map(|limits| limits.max_sectors))
        };
        // A discard is a zeroing that unmaps, so the device's limit of zeroing is one of both.
        assert_eq!(limits(&sysfs), (Some(4096), Some(4096)));
        sysfs.set("sda/queue/discard_max_bytes", "1048576");
        assert_eq!(limits(&sysfs), (Some(2048), Some(4096)));
        sysfs.set("sda/queue/write_zeroes_max_bytes", "2147450880");
        sysfs.set("sda/queue/discard_max_bytes", "2147450880");
        let ours = Geometry::of_regular_file(4096, None, false);
        let ours = (ours.discard, ours.write_zeroes);
        assert_eq!(limits(&sysfs).0, ours.0.map(|limits| limits.max_sectors));
        assert_eq!(limits(&sysfs).1, ours.1.map(|limits| limits.max_sectors));
    }

    #[test]
    fn other_logical_block_is_told_in_place_of_the_device_s() {
        for (wanted, exp) in [(512, 5), (4096, 2)] {
            let (geometry, own) = Sysfs::new().with_block(0, false, Some(wanted)).unwrap();
            assert_eq!((geometry.logical_block_bytes, own), (wanted, 4096));
            assert_eq!(geometry.physical_block_exp, exp, "the physical block stays what it is");
        }
    }

    #[test]
    fn misaligned_device_gives_no_offset() {
        let sysfs = Sysfs::new();
        sysfs.set("sda/alignment_offset", "-1");
        assert_eq!(sysfs.geometry(0, false).unwrap().alignment_offset, 0);
    }

    #[test]
    fn zoned_devices_are_refused() {
        for model in ["host-managed", "host-aware"] {
            let sysfs = Sysfs::new();
            sysfs.set("sda/queue/zoned", model);
            for minor in [0, 1] {
                let refused = sysfs.geometry(minor, true).unwrap_err();
                assert!(
                    matches!(&refused, DeviceError::Zoned { model: told } if told == model),
                    "{refused}"
                );
            }
        }
    }

    #[test]
    fn device_that_cannot_discard_or_cannot_zero_offers_no_discard() {
        for attribute in ["discard_max_bytes", "write_zeroes_max_bytes"] {
            let sysfs = Sysfs::new();
            sysfs.set(&format!("sda/queue/{attribute}"), "0");
            let geometry = sysfs.geometry(0, false).unwrap();
            assert_eq!(geometry.discard, None, "{attribute}");
            assert_eq!(
                geometry.write_zeroes.map(|limits| limits.may_unmap),
                Some(false),
                "{attribute}"
            );
        }
    }

    #[test]
    fn read_only_device_is_served_read_only_and_no_other_way() {
        let sysfs = Sysfs::new();
        sysfs.set("sda/ro", "1");
        assert!(matches!(sysfs.geometry(0, false), Err(DeviceError::ReadOnly)));
        let geometry = sysfs.geometry(0, true).unwrap();
        assert_eq!((geometry.discard, geometry.write_zeroes), (None, None));
    }

    #[test]
    fn impossible_block_size_is_refused() {
        for size in ["0", "256", "513", "131072", "99999999999"] {
            let sysfs = Sysfs::new();
            sysfs.set("sda/queue/logical_block_size", size);
            assert!(matches!(sysfs.geometry(0, false), Err(DeviceError::BlockSize(_))), "{size}");
        }
    }

    #[test]
    fn attribute_that_is_no_number_is_named() {
        let sysfs = Sysfs::new();
        sysfs.set("sda/queue/optimal_io_size", "many");
        let refused = sysfs.geometry(0, false).unwrap_err().to_string();
        assert!(refused.contains("optimal_io_size") && refused.contains("many"), "{refused}");
    }

    #[test]
    fn device_unknown_to_sysfs_is_an_error() {
        assert!(matches!(Sysfs::new().geometry(77, false), Err(DeviceError::Unreadable { .. })));
    }
}

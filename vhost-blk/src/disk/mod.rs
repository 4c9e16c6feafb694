//! The disk that a guest sees: what the operator named, opened, locked and measured.
//!
//! Contract: [`Disk::open`] makes every system call that can fail for the operator's reasons,
//! before the daemon says that it is ready, and its errors name the path, the cause and, where
//! there is one, the option that helps. Afterwards a [`Disk`] is a capacity, a [`Geometry`] and a
//! descriptor on which the engine executes requests; of these only the capacity changes, and it
//! only grows ([`Disk::measure_again`]).
//!
//! What it deliberately does not do: no I/O on the contents (request.rs names operations, the
//! engine runs them), no image formats, no growing of a file by itself, and no guess at run time whether a
//! file system can punch holes: the request layer answers for operations that a file system
//! refuses.

mod block_device;
mod geometry;
mod lock;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FileType, Mode, OFlags, SeekFrom};
use thiserror::Error;
use tracing::{info, warn};

pub(crate) use block_device::DeviceError;
use block_device::{BlockDevice, SYSFS};
pub(crate) use geometry::Geometry;
use lock::ImageLock;
pub(crate) use lock::LockError;

/// Bytes in the sector that every sector number and count of virtio-blk means, whatever the block
/// size of the device.
// VIRTIO 1.3, 5.2.4: capacity of the device (expressed in 512-byte sectors).
pub(crate) const SECTOR_BYTES: u64 = 512;

/// What the operator asked for: `file:PATH` or `null:SIZE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DiskSpec {
    /// A regular file (a raw image) or a block device.
    File(PathBuf),
    /// No storage at all: writes vanish and reads complete at once. For benches of everything but
    /// the disk.
    Null {
        /// Length in bytes, a multiple of [`SECTOR_BYTES`] and not zero.
        len_bytes: u64,
    },
}

/// Why a `--disk` value is not a disk.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum SpecError {
    /// Neither of the two kinds.
    #[error("expected file:PATH or null:SIZE, not {0:?}")]
    Kind(String),
    /// `file:` with nothing behind it.
    #[error("file: needs a path")]
    NoPath,
    /// Not a number with an optional suffix, or beyond what a file offset can hold.
    #[error(
        "{0:?} is not a size: expected a number of bytes, or of k, M, G or T (powers of 1024), below 8E"
    )]
    Size(String),
    /// A disk has at least one sector, and only whole ones.
    #[error("the size of a disk must be a multiple of 512 bytes and not zero, not {0}")]
    Sectors(u64),
}

impl FromStr for DiskSpec {
    type Err = SpecError;

    fn from_str(spec: &str) -> Result<Self, SpecError> {
        match spec.split_once(':') {
            Some(("file", "")) => Err(SpecError::NoPath),
            Some(("file", path)) => Ok(DiskSpec::File(PathBuf::from(path))),
            Some(("null", size)) => match parse_size(size)? {
                len_bytes if len_bytes == 0 || len_bytes % SECTOR_BYTES != 0 => {
                    Err(SpecError::Sectors(len_bytes))
                }
                len_bytes => Ok(DiskSpec::Null { len_bytes }),
            },
            _ => Err(SpecError::Kind(spec.to_owned())),
        }
    }
}

/// Bytes of `8G` and the like. At most `i64::MAX`, because offsets in files are signed.
fn parse_size(size: &str) -> Result<u64, SpecError> {
    let refused = || SpecError::Size(size.to_owned());
    let digits = size.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit_bytes: u64 = match size.strip_prefix(digits).unwrap_or_default() {
        "" => 1,
        "k" | "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        "T" => 1 << 40,
        _ => return Err(refused()),
    };
    // `u64::from_str` takes a leading plus sign, which no size has.
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(refused());
    }
    let units: u64 = digits.parse().ok().ok_or_else(refused)?;
    let len_bytes = units.checked_mul(unit_bytes).ok_or_else(refused)?;
    if i64::try_from(len_bytes).is_err() {
        return Err(refused());
    }
    Ok(len_bytes)
}

/// How to open a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OpenOptions {
    /// Open the file for reading only and offer the guest a read-only disk.
    pub(crate) read_only: bool,
    /// Take QEMU's image locks, so that no other process changes the image meanwhile.
    pub(crate) lock: bool,
}

/// Why a disk cannot be served. Every variant is the operator's to mend, before the daemon is
/// ready.
#[derive(Debug, Error)]
pub(crate) enum OpenError {
    /// The path leads nowhere, or not for this user.
    #[error("cannot open {path:?}")]
    Open {
        /// As the operator gave it.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Reading is allowed, writing is not.
    #[error("cannot open {path:?} for writing, though it can be read: --read-only serves it so")]
    NotWritable {
        /// As the operator gave it.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A directory, pipe, socket or character device.
    #[error("{path:?} is a {kind}: a disk is a regular file or a block device")]
    NotADisk {
        /// As the operator gave it.
        path: PathBuf,
        /// What it is instead.
        kind: &'static str,
    },
    /// Less than one sector long.
    #[error("{path:?} is {len_bytes} bytes long: a disk has at least one sector of 512 bytes")]
    TooSmall {
        /// As the operator gave it.
        path: PathBuf,
        /// Its length.
        len_bytes: u64,
    },
    /// The length or the status of the open file cannot be had.
    #[error("cannot measure {path:?}")]
    Measure {
        /// As the operator gave it.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A block device that cannot be served, or whose properties cannot be read.
    #[error("{path:?} cannot be served")]
    Device {
        /// As the operator gave it.
        path: PathBuf,
        /// Which property, and why.
        source: DeviceError,
    },
    /// Another process uses the image, or it cannot be locked.
    #[error(transparent)]
    Lock(#[from] LockError),
}

/// An open disk.
#[derive(Debug)]
pub(crate) struct Disk {
    file: Option<File>,
    /// Taken on a file description of its own: one may outlive the other, and neither is ever
    /// passed on by accident.
    #[expect(dead_code, reason = "held, not read: closing it releases the locks")]
    lock: Option<ImageLock>,
    /// Read by workers, written by the main thread; no order with other data matters.
    capacity_sectors: AtomicU64,
    read_only: bool,
    geometry: Geometry,
}

impl Disk {
    /// Opens, locks and measures what the operator named.
    pub(crate) fn open(spec: &DiskSpec, options: OpenOptions) -> Result<Disk, OpenError> {
        match spec {
            DiskSpec::File(path) => Disk::open_file(path, options),
            DiskSpec::Null { len_bytes } => Ok(Disk {
                file: None,
                lock: None,
                capacity_sectors: AtomicU64::new(len_bytes / SECTOR_BYTES),
                read_only: options.read_only,
                geometry: Geometry::plain(),
            }),
        }
    }

    fn open_file(path: &Path, options: OpenOptions) -> Result<Disk, OpenError> {
        // The kind is looked at before opening: opening a pipe blocks and opening a character
        // device may act on it.
        let before = rustix::fs::stat(path)
            .map_err(|errno| OpenError::Open { path: path.to_owned(), source: errno.into() })?;
        check_kind(path, FileType::from_raw_mode(before.st_mode))?;
        let file = open_description(path, options.read_only)?;
        let measure = |errno: rustix::io::Errno| OpenError::Measure {
            path: path.to_owned(),
            source: errno.into(),
        };
        let stat = rustix::fs::fstat(&file).map_err(measure)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        check_kind(path, kind)?;

        let lock = if options.lock {
            Some(ImageLock::take(path, file.as_fd(), options.read_only)?)
        } else {
            None
        };

        // Seeking works on block devices too, where the length in the status is zero.
        let len_bytes = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(measure)?;
        let geometry = if kind == FileType::BlockDevice {
            BlockDevice::find(Path::new(SYSFS), stat.st_rdev)
                .and_then(|device| device.geometry(options.read_only))
                .map_err(|source| OpenError::Device { path: path.to_owned(), source })?
        } else {
            Geometry::of_regular_file(
                u64::try_from(stat.st_blksize).unwrap_or(0),
                options.read_only,
            )
        };
        Ok(Disk {
            file: Some(file),
            lock,
            capacity_sectors: AtomicU64::new(whole_sectors(path, len_bytes)?),
            read_only: options.read_only,
            geometry,
        })
    }

    /// The file to execute requests on; `None` for a null disk.
    pub(crate) fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    /// Length in sectors of 512 bytes, at least 1.
    pub(crate) fn capacity_sectors(&self) -> u64 {
        self.capacity_sectors.load(Ordering::Relaxed)
    }

    /// Takes note of a file or device that has grown; true if it has. One that has shrunk keeps
    /// its capacity, since a guest cannot lose sectors that it has been promised: requests beyond
    /// the end then fail.
    pub(crate) fn measure_again(&self) -> bool {
        let Some(file) = &self.file else { return false };
        let len_bytes = match rustix::fs::seek(file, SeekFrom::End(0)) {
            Ok(len_bytes) => len_bytes,
            Err(error) => {
                warn!(%error, "the disk cannot be measured");
                return false;
            }
        };
        let (old, new) = (self.capacity_sectors(), len_bytes / SECTOR_BYTES);
        if new < old {
            warn!(old, new, "the disk has shrunk (in sectors), which its guest is not told");
        }
        if new > old {
            info!(old, new, "the disk has grown (in sectors)");
            self.capacity_sectors.store(new, Ordering::Relaxed);
        }
        new > old
    }

    /// Whether writes are refused.
    pub(crate) fn read_only(&self) -> bool {
        self.read_only
    }

    /// Block sizes, alignment and what can be discarded.
    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry
    }
}

/// Sectors of a file. Its tail, where it is not a whole sector, is not served: no request could
/// name it.
fn whole_sectors(path: &Path, len_bytes: u64) -> Result<u64, OpenError> {
    let tail_bytes = len_bytes % SECTOR_BYTES;
    if len_bytes < SECTOR_BYTES {
        return Err(OpenError::TooSmall { path: path.to_owned(), len_bytes });
    }
    if tail_bytes != 0 {
        warn!(
            "the last {tail_bytes} bytes of {path:?} are not a whole sector: the guest does not see them"
        );
    }
    Ok(len_bytes / SECTOR_BYTES)
}

fn check_kind(path: &Path, kind: FileType) -> Result<(), OpenError> {
    let kind = match kind {
        FileType::RegularFile | FileType::BlockDevice => return Ok(()),
        FileType::Directory => "directory",
        FileType::CharacterDevice => "character device",
        FileType::Fifo => "named pipe",
        FileType::Socket => "socket",
        _ => "file of unknown kind",
    };
    Err(OpenError::NotADisk { path: path.to_owned(), kind })
}

/// Opens the description that requests run on.
fn open_description(path: &Path, read_only: bool) -> Result<File, OpenError> {
    let open = |access| rustix::fs::open(path, access | OFlags::CLOEXEC, Mode::empty());
    let opened = if read_only { open(OFlags::RDONLY) } else { open(OFlags::RDWR) };
    match opened {
        Ok(fd) => Ok(File::from(fd)),
        // The hint is given only where it would help.
        Err(errno) if !read_only && open(OFlags::RDONLY).is_ok() => {
            Err(OpenError::NotWritable { path: path.to_owned(), source: errno.into() })
        }
        Err(errno) => Err(OpenError::Open { path: path.to_owned(), source: errno.into() }),
    }
}

#[cfg(test)]
mod tests;

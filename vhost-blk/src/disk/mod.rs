//! The disk that a guest sees: what the operator named, opened, locked and measured.
//!
//! Contract: [`Disk::open`] makes every system call that can fail for the operator's reasons,
//! before the daemon says that it is ready, and its errors name the path, the cause and, where
//! there is one, the option that helps. Afterwards a [`Disk`] is a capacity, a [`Geometry`], a
//! [`WriteCache`], what direct I/O demands ([`Direct`]), and the descriptors on which the engine
//! executes requests. Of these two change: the capacity, which only grows
//! ([`Disk::measure_again`]), and the cache, which the driver switches.
//!
//! What it deliberately does not do: no I/O on the contents (device.rs names operations, the
//! engine runs them) but for a sync after a switch of the cache, no image formats, no growing of a file by itself, and no guess at run time whether a
//! file system can punch holes: the request layer answers for operations that a file system
//! refuses.

mod block_device;
mod cache;
mod direct;
mod fence;
mod geometry;
mod lock;

use std::cmp::Ordering;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use common::daemon::options;
use common::device::{NotRefreshed, Refreshed};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, SeekFrom, StatxFlags};
use thiserror::Error;
use tracing::{info, warn};

use crate::zeroing::ZeroBlocks;

pub(crate) use block_device::DeviceError;
use block_device::{BlockDevice, SYSFS};
pub(crate) use cache::{CacheMode, WriteCache};
pub(crate) use direct::{BUFFERED, Direct, IMAGE, Range, Way, sync_file};
use fence::Fence;
pub(crate) use fence::FenceError;
pub(crate) use geometry::Geometry;
use lock::ImageLock;
pub(crate) use lock::LockError;

/// Bytes in the sector that every sector number and count of virtio-blk means, whatever the block
/// size of the device.
// VIRTIO 1.3, 5.2.4: capacity of the device (expressed in 512-byte sectors).
pub(crate) const SECTOR_BYTES: u64 = 512;

/// Block of direct I/O on a file, where the kernel does not tell: the page of file systems, and the
/// largest block of the disks below them.
const FILE_DIRECT_BYTES: u32 = 4096;

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
    let len_bytes = options::parse_size(size).filter(|bytes| i64::try_from(*bytes).is_ok());
    len_bytes.ok_or_else(|| SpecError::Size(size.to_owned()))
}

/// How to open a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OpenOptions {
    /// Open the file for reading only and offer the guest a read-only disk.
    pub(crate) read_only: bool,
    /// Take QEMU's image locks, so that no other process changes the image meanwhile.
    pub(crate) lock: bool,
    /// How the host's cache is used.
    pub(crate) cache: CacheMode,
    /// Queues, each of which syncs on a description of its own.
    pub(crate) queue_count: u16,
    /// The logical block that the driver is told of, in bytes: a power of two. None: that of the
    /// device, or a sector for a file.
    pub(crate) logical_block_bytes: Option<u32>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        let cache = CacheMode::default();
        Self { read_only: false, lock: true, cache, queue_count: 1, logical_block_bytes: None }
    }
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
    /// Less than one block long.
    #[error(
        "{path:?} is {len_bytes} bytes long: a disk has at least one block of {block_bytes} bytes"
    )]
    TooSmall {
        /// As the operator gave it.
        path: PathBuf,
        /// Its length.
        len_bytes: u64,
        /// The logical block.
        block_bytes: u32,
    },
    /// Its file system has no direct I/O, or not for this file.
    #[error(
        "{path:?} cannot be opened for direct I/O (--cache none, directsync), which its file system does not have: --cache writeback or writethrough go without"
    )]
    NoDirectIo {
        /// As the operator gave it.
        path: PathBuf,
    },
    /// Direct I/O wants an alignment that cannot be served.
    #[error(
        "direct I/O (--cache none, directsync) on {path:?} needs memory aligned to {memory_bytes} bytes and blocks of {block_bytes} bytes, which is not supported: --cache writeback or writethrough go without"
    )]
    Alignment {
        /// As the operator gave it.
        path: PathBuf,
        /// Alignment of memory.
        memory_bytes: u32,
        /// Alignment of offsets and lengths.
        block_bytes: u32,
    },
    /// The path leads to another file than a moment ago.
    #[error("{path:?} was replaced by another file while it was being opened")]
    Replaced {
        /// As the operator gave it.
        path: PathBuf,
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
    /// A predecessor still writes it.
    #[error(transparent)]
    Fence(#[from] FenceError),
}

/// An open disk.
#[derive(Debug)]
pub(crate) struct Disk {
    /// What requests run on: [`IMAGE`]; none for a null disk.
    file: Option<File>,
    /// With direct I/O, another description of the same file, without it: [`BUFFERED`].
    buffered: Option<File>,
    /// More descriptions, only ever synced: [`sync_file`] of each queue, and the last for who
    /// settles. Linux tells each of them of a failure, however many the others are told. None where
    /// nothing is synced.
    syncs: Vec<File>,
    direct: Option<Direct>,
    cache: WriteCache,
    /// What the host deallocates or zeroes in one call is a multiple of this, in bytes.
    zeroed_bytes: u64,
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
            DiskSpec::Null { len_bytes } => Disk::open_null(*len_bytes, options),
        }
    }

    fn open_null(len_bytes: u64, options: OpenOptions) -> Result<Disk, OpenError> {
        let geometry = Geometry::plain(options.logical_block_bytes);
        let sectors = whole_sectors(Path::new("null"), len_bytes, geometry.logical_block_bytes)?;
        Ok(Disk {
            file: None,
            buffered: None,
            syncs: Vec::new(),
            direct: None,
            cache: WriteCache::new(options.cache.caching()),
            zeroed_bytes: 1,
            lock: None,
            capacity_sectors: AtomicU64::new(sectors),
            read_only: options.read_only,
            geometry,
        })
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

        let caching = options.cache.caching();
        let again = |flags| open_again(path, &stat, options.read_only, flags);
        let unbuffered = caching.direct.then(|| open_direct(path, again)).transpose()?;
        // All from the beginning: a description is told of failures since it was opened.
        let sync_count = if caching.syncs { usize::from(options.queue_count) + 1 } else { 0 };
        let syncs: Vec<File> =
            (0..sync_count).map(|_| again(OFlags::empty())).collect::<Result<_, _>>()?;

        // Seeking works on block devices too, where the length in the status is zero.
        let len_bytes = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(measure)?;
        let (geometry, device_block) = if kind == FileType::BlockDevice {
            BlockDevice::find(Path::new(SYSFS), stat.st_rdev)
                .and_then(|device| device.geometry(options.read_only, options.logical_block_bytes))
                .map(|(geometry, own_block)| (geometry, Some(own_block)))
                .map_err(|source| OpenError::Device { path: path.to_owned(), source })?
        } else {
            let block_bytes = u64::try_from(stat.st_blksize).unwrap_or(0);
            let logical = options.logical_block_bytes;
            (Geometry::of_regular_file(block_bytes, logical, options.read_only), None)
        };
        let sectors = whole_sectors(path, len_bytes, geometry.logical_block_bytes)?;
        let (file, buffered, direct) = match unbuffered {
            Some(unbuffered) => {
                let direct = alignment(path, &unbuffered, device_block)?;
                hint_at_detours(path, direct, geometry.logical_block_bytes);
                (unbuffered, Some(file), Some(direct))
            }
            None => (file, None, None),
        };
        if lock.is_some() && !options.read_only {
            let fence = Fence::new(path);
            fence.wait(file.as_fd())?;
            [Some(&file), buffered.as_ref()]
                .into_iter()
                .flatten()
                .try_for_each(|it| fence.hold(it))?;
        }
        Ok(Disk {
            file: Some(file),
            buffered,
            syncs,
            direct,
            cache: WriteCache::new(caching),
            zeroed_bytes: device_block.map_or(1, u64::from),
            lock,
            capacity_sectors: AtomicU64::new(sectors),
            read_only: options.read_only,
            geometry,
        })
    }

    /// The file to execute requests on; `None` for a null disk.
    pub(crate) fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    /// The descriptions that operations name: [`IMAGE`], [`BUFFERED`], and [`sync_file`] of each
    /// queue.
    pub(crate) fn files(&self) -> Vec<BorrowedFd<'_>> {
        let Some(image) = &self.file else { return Vec::new() };
        let buffered = self.buffered.as_ref().unwrap_or(image);
        let queues = self.syncs.split_last().map_or(&[][..], |(_, queues)| queues);
        [image, buffered].into_iter().chain(queues).map(AsFd::as_fd).collect()
    }

    /// What direct I/O on [`IMAGE`] demands; `None` where it uses the host's cache.
    pub(crate) fn direct(&self) -> Option<Direct> {
        self.direct
    }

    /// How ranges are zeroed and discarded.
    pub(crate) fn zero_blocks(&self) -> ZeroBlocks {
        ZeroBlocks {
            called: self.zeroed_bytes,
            written: self.direct.map_or(1, Direct::unit_bytes),
            edge: if self.direct.is_some() { BUFFERED } else { IMAGE },
        }
    }

    /// Whether the driver sees a write-back cache, and what follows from that for each write.
    pub(crate) fn cache(&self) -> &WriteCache {
        &self.cache
    }

    /// The driver switches its cache.
    pub(crate) fn switch_cache(self: &Arc<Self>, to_write_back: bool) {
        if self.cache.is_write_back() != to_write_back {
            info!(write_back = to_write_back, "the guest switches its write cache");
        }
        if self.cache.switch(to_write_back) {
            self.settle();
        }
    }

    /// The driver has reset the device.
    pub(crate) fn reset(self: &Arc<Self>) {
        if self.cache.reset() {
            self.settle();
        }
    }

    /// Makes what was answered before a switch to write-through stable, since no flush will come.
    ///
    /// On a description of its own: what the host has lost, this sync is told of too, whoever else
    /// was told.
    ///
    /// On a thread of its own: a front end may stop its whole guest until its message is answered
    /// (QEMU does), which a sync of all that the host has cached must not prolong. Until it has
    /// ended, each write is followed by a sync ([`WriteCache::must_sync`]).
    fn settle(self: &Arc<Self>) {
        let disk = Arc::clone(self);
        let sync = move || {
            let own = disk.syncs.last();
            let synced = disk.cache.settle(|| own.map_or(Ok(()), File::sync_data));
            if let Err(error) = synced {
                warn!(%error, "what the guest wrote before is lost: writes fail from now on");
            }
        };
        if let Err(error) = std::thread::Builder::new().name("settle".to_owned()).spawn(sync) {
            warn!(%error, "no thread to sync the disk: each write is followed by a sync");
        }
    }

    /// Length in sectors of 512 bytes, at least 1.
    pub(crate) fn capacity_sectors(&self) -> u64 {
        self.capacity_sectors.load(Relaxed)
    }

    /// Takes note of a file or device that has grown. One that has shrunk keeps its capacity, since
    /// a guest cannot lose sectors that it has been promised: requests beyond the end then fail.
    pub(crate) fn measure_again(&self) -> Result<Refreshed, NotRefreshed> {
        let before = self.capacity_sectors();
        let capacity_bytes = before * SECTOR_BYTES;
        let Some(file) = &self.file else { return Ok(Refreshed::Unchanged { capacity_bytes }) };
        let found_bytes = rustix::fs::seek(file, SeekFrom::End(0))
            .map_err(|errno| NotRefreshed::Unmeasured(errno.into()))?;
        let block_bytes = u64::from(self.geometry.logical_block_bytes);
        let found = found_bytes / block_bytes * (block_bytes / SECTOR_BYTES);
        match found.cmp(&before) {
            Ordering::Less => Err(NotRefreshed::Shrunk { capacity_bytes, found_bytes }),
            Ordering::Equal => Ok(Refreshed::Unchanged { capacity_bytes }),
            Ordering::Greater => {
                self.capacity_sectors.store(found, Relaxed);
                let (before_bytes, capacity_bytes) = (capacity_bytes, found * SECTOR_BYTES);
                Ok(Refreshed::Grown { before_bytes, capacity_bytes })
            }
        }
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

#[cfg(test)]
impl Disk {
    /// The disk as if it had been opened in another mode, for who simulates the host. `direct`: the
    /// alignments of memory and blocks that direct I/O demands, and whether it
    /// [`tells_failures`](Direct::tells_failures); `called`: see [`ZeroBlocks`].
    pub(crate) fn simulate(self, mode: CacheMode, direct: (u32, u32, bool), called: u64) -> Disk {
        let caching = mode.caching();
        let (memory, block, tells) = direct;
        let direct = Direct::new(memory, block, 4096, tells).filter(|_| caching.direct);
        Disk { direct, zeroed_bytes: called, cache: WriteCache::new(caching), ..self }
    }
}

/// Sectors of a file. Its tail, where it is not a whole block, is not served: a driver could not
/// use it.
fn whole_sectors(path: &Path, len_bytes: u64, block_bytes: u32) -> Result<u64, OpenError> {
    let tail_bytes = len_bytes % u64::from(block_bytes);
    if len_bytes < u64::from(block_bytes) {
        return Err(OpenError::TooSmall { path: path.to_owned(), len_bytes, block_bytes });
    }
    if tail_bytes != 0 {
        warn!(
            "the last {tail_bytes} bytes of {path:?} are not a whole block of {block_bytes} bytes: the guest does not see them"
        );
    }
    Ok((len_bytes - tail_bytes) / SECTOR_BYTES)
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

/// Opens another description of the file that `stat` is of.
fn open_again(
    path: &Path,
    stat: &rustix::fs::Stat,
    read_only: bool,
    flags: OFlags,
) -> Result<File, OpenError> {
    let open =
        |errno: rustix::io::Errno| OpenError::Open { path: path.to_owned(), source: errno.into() };
    let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
    let flags = access | flags | OFlags::CLOEXEC;
    let description = rustix::fs::open(path, flags, Mode::empty()).map_err(open)?;
    let again = rustix::fs::fstat(&description)
        .map_err(|errno| OpenError::Measure { path: path.to_owned(), source: errno.into() })?;
    if (again.st_dev, again.st_ino) != (stat.st_dev, stat.st_ino) {
        return Err(OpenError::Replaced { path: path.to_owned() });
    }
    Ok(File::from(description))
}

/// Opens another description for direct I/O.
fn open_direct(
    path: &Path,
    again: impl Fn(OFlags) -> Result<File, OpenError>,
) -> Result<File, OpenError> {
    again(OFlags::DIRECT).map_err(|error| match error {
        OpenError::Open { source, .. } if source.kind() == io::ErrorKind::InvalidInput => {
            OpenError::NoDirectIo { path: path.to_owned() }
        }
        error => error,
    })
}

/// What direct I/O on a file demands. The kernel says so since 6.1; before, the logical block of a
/// device is what it demanded at most, and the largest block of the usual file systems for a file.
fn alignment(
    path: &Path,
    description: &File,
    device_block: Option<u32>,
) -> Result<Direct, OpenError> {
    let unknown = device_block.unwrap_or(FILE_DIRECT_BYTES);
    let known = rustix::fs::statx(description, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        .ok()
        .filter(|told| told.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
    let (memory_bytes, block_bytes) = known
        .map_or((unknown, unknown), |told| (told.stx_dio_mem_align, told.stx_dio_offset_align));
    if (memory_bytes, block_bytes) == (0, 0) {
        // Opening was allowed, yet the data would go through the page cache.
        return Err(OpenError::NoDirectIo { path: path.to_owned() });
    }
    // A kernel that tells tells of no file whose file system goes through the cache all the same; a
    // device's own direct I/O never does.
    let tells = known.is_some() || device_block.is_some();
    Direct::new(memory_bytes, block_bytes, rustix::param::page_size(), tells)
        .ok_or_else(|| OpenError::Alignment { path: path.to_owned(), memory_bytes, block_bytes })
}

/// Tells the operator of a disk whose guest is told of smaller blocks than direct I/O has.
fn hint_at_detours(path: &Path, direct: Direct, logical_block_bytes: u32) {
    let block_bytes = direct.block_bytes();
    if u64::from(logical_block_bytes) < block_bytes {
        warn!(
            "direct I/O on {path:?} has blocks of {block_bytes} bytes: smaller requests take a detour. \
             A disk that is not partitioned yet avoids it by --logical-block-size, if there is that size"
        );
    }
}

#[cfg(test)]
mod tests;

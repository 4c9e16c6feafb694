//! The disk behind the baseline: a file, or nothing at all.
//!
//! I/O is synchronous and goes straight between the page cache and guest memory (`preadv`, `pwritev`). A short
//! transfer is an error: requests are checked against the capacity first, so only a file that shrank gives one.
//! Direct I/O takes a guest's buffers as they lie: those that the host cannot use are an error too.

// Vectored I/O into memory that a guest writes to at the same time has no safe wrapper in any of the crates.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::str::FromStr;

use vm_memory::VolatileSlice;

/// VIRTIO 1.3, 5.2.4: capacity and sector numbers are in units of 512 bytes, whatever the block size.
pub(crate) const SECTOR_BYTES: u64 = 512;

/// What `--disk` names.
#[derive(Clone, Debug)]
pub(crate) enum DiskSource {
    /// An existing image.
    File(PathBuf),
    /// A disk of this many bytes that completes everything and moves nothing.
    Null(u64),
}

impl FromStr for DiskSource {
    type Err = DiskError;

    fn from_str(text: &str) -> Result<Self, DiskError> {
        match text.split_once(':') {
            Some(("file", path)) => Ok(Self::File(path.into())),
            Some(("null", size)) => Ok(Self::Null(size.parse()?)),
            _ => Err(DiskError::Source(text.into())),
        }
    }
}

/// How a file is written.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Caching {
    /// Move data past the host's page cache.
    #[arg(long)]
    direct: bool,
    /// Make each write stable before it completes.
    #[arg(long)]
    write_through: bool,
}

impl Caching {
    /// As flags of `open`.
    fn flags(self) -> i32 {
        let flag = |is_set, flag| if is_set { flag } else { 0 };
        flag(self.direct, libc::O_DIRECT) | flag(self.write_through, libc::O_DSYNC)
    }
}

/// Why there is no disk.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    #[error("`{0}` is neither file:PATH nor null:SIZE")]
    Source(String),
    #[error("the size is not a number of bytes")]
    Size(#[from] std::num::ParseIntError),
    #[error("cannot open {path}")]
    Open { path: PathBuf, source: io::Error },
}

/// An open disk, shared by all queues.
pub(crate) struct Disk {
    file: Option<File>,
    capacity_bytes: u64,
}

impl Disk {
    pub(crate) fn open(source: &DiskSource, caching: Caching) -> Result<Self, DiskError> {
        match source {
            DiskSource::Null(capacity_bytes) => {
                Ok(Self { file: None, capacity_bytes: *capacity_bytes })
            }
            DiskSource::File(path) => {
                let open = || {
                    let mut options = File::options();
                    options.read(true).write(true).custom_flags(caching.flags());
                    let file = options.open(path)?;
                    let capacity_bytes = file.metadata()?.len();
                    Ok(Self { file: Some(file), capacity_bytes })
                };
                open().map_err(|source| DiskError::Open { path: path.clone(), source })
            }
        }
    }

    pub(crate) fn capacity_sectors(&self) -> u64 {
        self.capacity_bytes / SECTOR_BYTES
    }

    /// Fills the guest's buffers from the disk, beginning at `sector`.
    pub(crate) fn read(&self, sector: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.transfer(sector, buffers, libc::preadv)
    }

    /// Writes the guest's buffers to the disk, beginning at `sector`.
    pub(crate) fn write(&self, sector: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.transfer(sector, buffers, libc::pwritev)
    }

    pub(crate) fn flush(&self) -> io::Result<()> {
        self.file.as_ref().map_or(Ok(()), File::sync_data)
    }

    fn transfer(
        &self,
        sector: u64,
        buffers: &[VolatileSlice<'_>],
        call: VectoredCall,
    ) -> io::Result<()> {
        let len_bytes: usize = buffers.iter().map(VolatileSlice::len).sum();
        let offset_bytes = sector
            .checked_mul(SECTOR_BYTES)
            .filter(|begin| {
                begin.checked_add(len_bytes as u64).is_some_and(|end| end <= self.capacity_bytes)
            })
            .ok_or(io::ErrorKind::InvalidInput)?;
        let Some(file) = &self.file else {
            return Ok(());
        };
        let guards: Vec<_> = buffers.iter().map(VolatileSlice::ptr_guard_mut).collect();
        let iovecs: Vec<_> = guards
            .iter()
            .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() })
            .collect();
        // SAFETY: every iovec lies in a mapping of guest memory that `buffers` borrows and `guards` pins until the
        // call returns; the kernel, not Rust, touches the bytes, so a guest that writes them meanwhile races nobody.
        let moved = unsafe {
            call(file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32, offset_bytes as i64)
        };
        match usize::try_from(moved) {
            Err(_negative) => Err(io::Error::last_os_error()),
            Ok(moved_bytes) if moved_bytes < len_bytes => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => Ok(()),
        }
    }
}

/// `preadv` or `pwritev`.
type VectoredCall =
    unsafe extern "C" fn(i32, *const libc::iovec, i32, libc::off_t) -> libc::ssize_t;

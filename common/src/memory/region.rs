//! One mapping of guest memory, from the file descriptor that the front end sent.
//!
//! Everything that can be checked is checked before the first access: `mmap` itself accepts a range beyond the end of a
//! file, and the access would raise SIGBUS. What cannot be held (a file that shrinks later) is caught by
//! [`sigbus`](super::sigbus); a front end that seals its file against shrinking never gets there.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use tracing::debug;

use super::{FrontendAddress, GuestAddress, HostBuffer, RegionSpec, sigbus};

/// `HUGETLBFS_MAGIC` of `linux/magic.h`: the file system type of hugetlbfs files and of memfds with huge pages.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// Why a region cannot be mapped, or a set of regions is no map.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The region has no bytes.
    #[error("the region at guest address {0} is empty")]
    ZeroLength(GuestAddress),
    /// The region ends beyond the last guest address.
    #[error("guest addresses {start}+{len_bytes:#x} overflow")]
    GuestOverflow {
        /// Its first address.
        start: GuestAddress,
        /// Its length.
        len_bytes: u64,
    },
    /// The region ends beyond the last address of the front end.
    #[error("front-end addresses {start}+{len_bytes:#x} overflow")]
    FrontendOverflow {
        /// Its first address.
        start: FrontendAddress,
        /// Its length.
        len_bytes: u64,
    },
    /// The part of the file cannot be mapped into this process's address space.
    #[error("file bytes {offset_bytes:#x}+{len_bytes:#x} overflow")]
    FileOverflow {
        /// Where the region begins in the file.
        offset_bytes: u64,
        /// Its length.
        len_bytes: u64,
    },
    /// The file ends before the region does.
    #[error(
        "file bytes {offset_bytes:#x}+{len_bytes:#x} lie beyond the file's end at {file_len_bytes:#x}"
    )]
    ShortFile {
        /// Where the region begins in the file.
        offset_bytes: u64,
        /// Its length.
        len_bytes: u64,
        /// The file's length.
        file_len_bytes: u64,
    },
    /// The descriptor is not one of a regular file, memfd or hugetlbfs file, so its length cannot be checked.
    #[error("guest memory must be a regular file, not {0:?}")]
    NotAFile(FileType),
    /// The file is sealed so that nobody can map it writable any more.
    #[error("guest memory must be writable, but its file is sealed against writing ({0:?})")]
    SealedAgainstWriting(SealFlags),
    /// The descriptor cannot be examined.
    #[error("cannot examine the file")]
    Examine(#[source] io::Error),
    /// The file cannot be mapped readable and writable.
    #[error("cannot map {len_bytes:#x} bytes of the file")]
    Mmap {
        /// Length of the mapping.
        len_bytes: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// As many regions are mapped as the process has room for.
    #[error("more than {} regions are mapped", sigbus::MAX_REGIONS)]
    TooManyRegions,
    /// Two regions share guest addresses.
    #[error("the regions at guest addresses {} and {} overlap", first.guest, second.guest)]
    GuestOverlap {
        /// The one that begins first.
        first: RegionSpec,
        /// The other.
        second: RegionSpec,
    },
    /// Two regions share addresses of the front end.
    #[error("the regions at front-end addresses {} and {} overlap", first.frontend, second.frontend)]
    FrontendOverlap {
        /// The one that begins first.
        first: RegionSpec,
        /// The other.
        second: RegionSpec,
    },
}

/// A mapped region. Unmapped on drop: see the contract of [`memory`](super) for what must not outlive it.
#[derive(Debug)]
pub struct Region {
    spec: RegionSpec,
    bytes: HostBuffer,
    // Fields are dropped in this order: a registration must not outlive its mapping, or a fault in whatever is mapped
    // at the same addresses next could be put down to this region.
    registration: sigbus::Registration,
    _mapping: Mapping,
}

impl Region {
    /// Maps the part of `file` that `spec` names, shared, readable and writable. The descriptor is not kept.
    ///
    /// # Errors
    /// The spec is empty or overflows, the file is too short, no regular one or sealed against writing, or the kernel
    /// refuses the mapping.
    pub fn map(spec: RegionSpec, file: BorrowedFd<'_>) -> Result<Region, MapError> {
        sigbus::install();
        check_addresses(spec)?;
        let page_bytes = check_file(spec, file)?;
        let (offset_bytes, len_bytes) = (spec.file_offset_bytes, spec.len_bytes);
        let overflow = MapError::FileOverflow { offset_bytes, len_bytes };
        // mmap wants offsets in pages, and hugetlbfs also lengths. An offset within a page is legal for the front end.
        let lead = offset_bytes % page_bytes;
        let Some(mapped) =
            len_bytes.checked_add(lead).and_then(|len| len.checked_next_multiple_of(page_bytes))
        else {
            return Err(overflow);
        };
        let (Ok(mapped), Ok(lead), Ok(len)) =
            (usize::try_from(mapped), usize::try_from(lead), usize::try_from(len_bytes))
        else {
            return Err(overflow);
        };
        let mapping = Mapping::new(file, offset_bytes - offset_bytes % page_bytes, mapped)?;
        let registration =
            sigbus::Registration::new(mapping.start.addr(), mapped, page_bytes as usize)
                .ok_or(MapError::TooManyRegions)?;
        let bytes = HostBuffer::new(mapping.start, mapped).slice(lead, len);
        Ok(Region { spec, bytes, registration, _mapping: mapping })
    }

    /// What was mapped.
    pub fn spec(&self) -> RegionSpec {
        self.spec
    }

    /// Whether an access found a page missing, which the file had when it was mapped. It stays so.
    #[inline]
    pub fn is_poisoned(&self) -> bool {
        self.registration.is_poisoned()
    }

    /// All bytes of the region.
    pub(crate) fn bytes(&self) -> HostBuffer {
        self.bytes
    }
}

fn check_addresses(spec: RegionSpec) -> Result<(), MapError> {
    let len_bytes = spec.len_bytes;
    if len_bytes == 0 {
        return Err(MapError::ZeroLength(spec.guest));
    }
    if spec.guest.0.checked_add(len_bytes).is_none() {
        return Err(MapError::GuestOverflow { start: spec.guest, len_bytes });
    }
    if spec.frontend.0.checked_add(len_bytes).is_none() {
        return Err(MapError::FrontendOverflow { start: spec.frontend, len_bytes });
    }
    Ok(())
}

/// Checks that the file holds the region and may be written, and returns the size of its pages.
fn check_file(spec: RegionSpec, file: BorrowedFd<'_>) -> Result<u64, MapError> {
    let (offset_bytes, len_bytes) = (spec.file_offset_bytes, spec.len_bytes);
    let end = offset_bytes
        .checked_add(len_bytes)
        .ok_or(MapError::FileOverflow { offset_bytes, len_bytes })?;
    let stat = rustix::fs::fstat(file).map_err(|error| MapError::Examine(error.into()))?;
    let file_type = FileType::from_raw_mode(stat.st_mode);
    if file_type != FileType::RegularFile {
        return Err(MapError::NotAFile(file_type));
    }
    let file_len_bytes = u64::try_from(stat.st_size).unwrap_or(0);
    if end > file_len_bytes {
        return Err(MapError::ShortFile { offset_bytes, len_bytes, file_len_bytes });
    }
    let seals = seals_of(file)?;
    if seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
        return Err(MapError::SealedAgainstWriting(seals));
    }
    if !seals.contains(SealFlags::SHRINK) {
        // Legal and common: User-Mode Linux shares a deleted file, which cannot be sealed at all.
        debug!(
            "the front end may truncate the region at guest address {}: its file is not sealed against shrinking",
            spec.guest
        );
    }
    let file_system = rustix::fs::fstatfs(file).map_err(|error| MapError::Examine(error.into()))?;
    if file_system.f_type as u64 == HUGETLBFS_MAGIC {
        // A power of two: hugetlbfs reports the size of its huge pages as its block size.
        return Ok(file_system.f_bsize as u64);
    }
    Ok(rustix::param::page_size() as u64)
}

/// What the kernel will not let anybody do to the file again; nothing where its file system has no seals.
fn seals_of(file: BorrowedFd<'_>) -> Result<SealFlags, MapError> {
    match rustix::fs::fcntl_get_seals(file) {
        // fcntl(2), F_GET_SEALS: EINVAL, the file does not support sealing.
        Err(Errno::INVAL) => Ok(SealFlags::empty()),
        seals => seals.map_err(|error| MapError::Examine(error.into())),
    }
}

/// Owns a range of this process's address space.
#[derive(Debug)]
struct Mapping {
    start: *mut u8,
    len_bytes: usize,
}

// SAFETY: the mapping is owned by this value alone, and unmapping it may happen on any thread.
unsafe impl Send for Mapping {}
// SAFETY: a shared reference gives no access to the mapped bytes.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: BorrowedFd<'_>, offset_bytes: u64, len_bytes: usize) -> Result<Self, MapError> {
        // Without NORESERVE a private host limit would count the guest's memory twice: the front end has reserved it.
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: with no address given the kernel picks one where nothing is mapped, so nobody's memory changes.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len_bytes, protection, flags, file, offset_bytes)
        }
        .map_err(|error| MapError::Mmap { len_bytes, source: error.into() })?;
        // A crash of this process must not write the guest's memory, and its secrets, to a core file. Where the kernel
        // does not take the advice the mapping is as good as with it.
        // SAFETY: the range has just been mapped, and the advice does not change its bytes.
        let _ = unsafe { rustix::mm::madvise(start, len_bytes, Advice::LinuxDontDump) };
        Ok(Self { start: start.cast(), len_bytes })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new` with this length, and is not used any more by the module's contract.
        let unmapped = unsafe { rustix::mm::munmap(self.start.cast(), self.len_bytes) };
        debug_assert!(unmapped.is_ok(), "a range that was mapped can be unmapped: {unmapped:?}");
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::fs::{MemfdFlags, SealFlags};

    use super::super::guest_file;
    use super::*;

    fn spec(len_bytes: u64, file_offset_bytes: u64) -> RegionSpec {
        RegionSpec {
            guest: GuestAddress(0x10_0000),
            frontend: FrontendAddress(0x7f00_0000),
            len_bytes,
            file_offset_bytes,
        }
    }

    fn map(
        len_bytes: u64,
        file_offset_bytes: u64,
        file_len_bytes: u64,
    ) -> Result<Region, MapError> {
        Region::map(spec(len_bytes, file_offset_bytes), guest_file(file_len_bytes).as_fd())
    }

    #[test]
    fn bytes_are_those_of_the_file_at_the_offset() {
        // An offset within a page, as front ends with byte-aligned regions send it.
        for offset in [0, 0x1000, 0x1234] {
            let file = guest_file(0x4000);
            let region = Region::map(spec(0x2000, offset), file.as_fd()).expect("map");
            assert_eq!(region.bytes().len(), 0x2000);
            assert_eq!(region.bytes().write(0x10, b"from here"), 9);
            let mut there = [0; 9];
            rustix::io::pread(&file, &mut there, offset + 0x10).expect("pread");
            assert_eq!(&there, b"from here");
            rustix::io::pwrite(&file, b"from there", offset + 0x1fe0).expect("pwrite");
            let mut here = [0; 10];
            assert_eq!(region.bytes().read(0x1fe0, &mut here), 10);
            assert_eq!(&here, b"from there");
            assert!(!region.is_poisoned());
        }
    }

    #[test]
    fn file_shorter_than_the_region_is_rejected() {
        for (len_bytes, offset, file) in
            [(0x2000, 0, 0x1000), (0x1000, 1, 0x1000), (1, 0x1000, 0x1000), (1, 0, 0)]
        {
            let error = map(len_bytes, offset, file).expect_err("short");
            let MapError::ShortFile { file_len_bytes, .. } = error else { unreachable!("{error}") };
            assert_eq!(file_len_bytes, file);
        }
    }

    #[test]
    fn empty_region_is_rejected() {
        assert!(matches!(map(0, 0, 0x1000), Err(MapError::ZeroLength(_))));
    }

    #[test]
    fn no_sum_may_overflow() {
        assert!(matches!(map(u64::MAX, 0, 0x1000), Err(MapError::GuestOverflow { .. })));
        assert!(matches!(map(0x1000, u64::MAX, 0x1000), Err(MapError::FileOverflow { .. })));
        let high = RegionSpec { frontend: FrontendAddress(u64::MAX - 0xfff), ..spec(0x1000, 0) };
        let mapped = Region::map(high, guest_file(0x1000).as_fd());
        assert!(matches!(mapped, Err(MapError::FrontendOverflow { .. })), "{mapped:?}");
    }

    #[test]
    fn what_is_no_regular_file_is_rejected() {
        let (reader, _writer) = rustix::pipe::pipe().expect("pipe");
        assert!(matches!(
            Region::map(spec(1, 0), reader.as_fd()),
            Err(MapError::NotAFile(FileType::Fifo))
        ));
        let device = std::fs::File::open("/dev/zero").expect("/dev/zero");
        assert!(matches!(
            Region::map(spec(1, 0), device.as_fd()),
            Err(MapError::NotAFile(FileType::CharacterDevice))
        ));
    }

    #[test]
    fn file_sealed_against_writing_is_rejected_by_name() {
        for seal in [SealFlags::WRITE, SealFlags::FUTURE_WRITE] {
            let file = guest_file(0x1000);
            rustix::fs::fcntl_add_seals(&file, seal).expect("seal");
            let error = Region::map(spec(0x1000, 0), file.as_fd()).expect_err("sealed");
            let MapError::SealedAgainstWriting(seals) = error else { unreachable!("{error}") };
            assert!(seals.contains(seal), "{seals:?}");
        }
    }

    #[test]
    fn read_only_descriptor_is_rejected() {
        let file = tempfile::NamedTempFile::new().expect("temporary file");
        file.as_file().set_len(0x1000).expect("length");
        let read_only = std::fs::File::open(file.path()).expect("it is there");
        let error = Region::map(spec(0x1000, 0), read_only.as_fd()).expect_err("read-only");
        assert!(matches!(error, MapError::Mmap { .. }), "{error}");
    }

    #[test]
    fn file_sealed_against_shrinking_is_mapped() {
        let file = guest_file(0x1000);
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .expect("seal");
        assert!(Region::map(spec(0x1000, 0), file.as_fd()).is_ok());
        assert!(seals_of(file.as_fd()).expect("a memfd has seals").contains(SealFlags::SHRINK));
    }

    #[test]
    fn file_system_without_seals_is_no_reason_to_refuse() {
        // The test's own program lies on whatever the build is on: most file systems on disks have none.
        let this = std::env::current_exe().and_then(std::fs::File::open).expect("it runs");
        let seals = seals_of(this.as_fd()).expect("no error");
        assert!(!seals.intersects(SealFlags::SHRINK | SealFlags::WRITE), "{seals:?}");
    }

    #[test]
    fn deleted_file_is_mapped() {
        let file = tempfile::tempfile().expect("temporary file");
        file.set_len(0x3000).expect("length");
        assert!(Region::map(spec(0x1000, 0x2000), file.as_fd()).is_ok());
    }

    #[test]
    fn huge_pages_are_mapped_from_an_offset_within_one() {
        const HUGE: u64 = 2 << 20;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let file = match rustix::fs::memfd_create("guest", flags) {
            Ok(file) => file,
            Err(error) => {
                println!("not run: this kernel makes no memfd of huge pages ({error})");
                return;
            }
        };
        rustix::fs::ftruncate(&file, 2 * HUGE).expect("length");
        // Mapping reserves nothing, so this works even where the host has no huge page to give.
        let region = Region::map(spec(HUGE, HUGE / 2), file.as_fd()).expect("map");
        assert_eq!(region.bytes().len() as u64, HUGE);
        assert_eq!(region.bytes().address() as u64 % HUGE, HUGE / 2);
        // An access is answered by the page itself, or, if the host has none, by a page of zeros and the poison.
        let mut first = [0xff; 1];
        assert_eq!(region.bytes().read(0, &mut first), 1);
        assert_eq!(first, [0]);
        drop(region);
    }
}

//! The guest's memory: one sealed file, mapped here, by KVM, and by each device's daemon.
//!
//! Contract: the file has the memory below the hole for devices first, then what is above 4 GiB, without a gap. Its size is
//! sealed, so no daemon can cut off pages that another has mapped. The mappings live as long as [`Memory`]: KVM is told of
//! them, and so must not outlive it.
//!
//! What it deliberately does not do: read or write what the guest has there.

use std::fs::File;
use std::io;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, memfd_create};
use vm_memory::mmap::FromRangesError;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::layout::{HIGH_MEMORY_START, LOW_MEMORY_END};

/// The least that a kernel of today boots in, with its initial RAM disk.
pub(crate) const LEN_MIN: u64 = 64 << 20;
/// More than any host has; what is beyond has no address of 46 bits left for devices.
pub(crate) const LEN_MAX: u64 = 16 << 40;
/// The unit of sizes: a huge page.
pub(crate) const LEN_UNIT: u64 = 2 << 20;

/// The guest's memory.
#[derive(Debug)]
pub(crate) struct Memory {
    guest: GuestMemoryMmap,
    file: Arc<File>,
    len: u64,
    is_huge: bool,
}

/// Why there is no memory for the guest.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot make a file in memory")]
    Create(#[source] io::Error),
    #[error(
        "cannot get {pages} huge pages of 2 MiB for the guest's memory (vm.nr_hugepages reserves them)"
    )]
    HugePages { pages: u64, source: io::Error },
    #[error("cannot make {len} bytes of memory for the guest")]
    Size { len: u64, source: io::Error },
    #[error("cannot seal the size of the guest's memory")]
    Seal(#[source] io::Error),
    #[error("cannot map the guest's memory, {len} bytes")]
    Map { len: u64, source: FromRangesError },
    #[error("KVM refuses the guest's memory at {start:#x}")]
    Register { start: u64, source: io::Error },
    #[error("cannot clear the guest's memory")]
    Clear(#[source] io::Error),
}

impl Memory {
    /// Makes `len` bytes, all zeros, a multiple of [`LEN_UNIT`].
    pub(crate) fn new(len: u64, is_huge: bool) -> Result<Self, Error> {
        let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        if is_huge {
            flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        }
        let file = memfd_create("guest-memory", flags).map_err(|e| Error::Create(e.into()))?;
        let file = Arc::new(File::from(file));
        file.set_len(len).map_err(|source| Error::Size { len, source })?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&*file, seals).map_err(|e| Error::Seal(e.into()))?;
        let mut offset = 0;
        let mut ranges = Vec::new();
        for (start, len) in ranges_of(len) {
            let part = usize::try_from(len).unwrap_or(usize::MAX);
            let file = FileOffset::from_arc(file.clone(), offset);
            ranges.push((GuestAddress(start), part, Some(file)));
            offset += len;
        }
        let guest = GuestMemoryMmap::from_ranges_with_files(ranges)
            .map_err(|source| Error::Map { len, source })?;
        let memory = Self { guest, file, len, is_huge };
        memory.reserve()?;
        Ok(memory)
    }

    /// What loaders and front ends read and write.
    pub(crate) fn guest(&self) -> &GuestMemoryMmap {
        &self.guest
    }

    /// Has `vm` show this memory to its guest. `vm` must not run any more when it is dropped.
    #[allow(unsafe_code)]
    pub(crate) fn register(&self, vm: &VmFd) -> Result<(), Error> {
        for (slot, region) in (0..).zip(self.guest.iter()) {
            let start = region.start_addr().0;
            let address = region.as_ptr() as u64;
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: start,
                memory_size: region.len(),
                userspace_addr: address,
            };
            // SAFETY: the region is a mapping of its own, of this length, that nothing else of ours but volatile accesses
            // touches; the machine keeps it until its processors' threads have ended.
            unsafe { vm.set_user_memory_region(slot) }
                .map_err(|error| Error::Register { start, source: errno(error) })?;
        }
        Ok(())
    }

    /// Makes it all zeros again, for the next start of the machine.
    pub(crate) fn clear(&self) -> Result<(), Error> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&*self.file, flags, 0, self.len).map_err(|e| Error::Clear(e.into()))?;
        self.reserve()
    }

    /// Takes the huge pages now. Later there may be none, and a guest that touches what is not there ends the VMM.
    fn reserve(&self) -> Result<(), Error> {
        if !self.is_huge {
            return Ok(());
        }
        fallocate(&*self.file, FallocateFlags::KEEP_SIZE, 0, self.len)
            .map_err(|e| Error::HugePages { pages: self.len / LEN_UNIT, source: e.into() })
    }
}

/// Where `len` bytes are, in the order of addresses.
pub(crate) fn ranges_of(len: u64) -> Vec<(u64, u64)> {
    let low = len.min(LOW_MEMORY_END);
    let mut ranges = vec![(0, low)];
    if len > low {
        ranges.push((HIGH_MEMORY_START, len - low));
    }
    ranges
}

/// The same number in the standard library's type.
pub(crate) fn errno(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

#[cfg(test)]
mod tests {
    use rustix::fs::fcntl_get_seals;
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn memory_beyond_3_gib_goes_on_at_4_gib() {
        assert_eq!(ranges_of(LEN_MIN), [(0, LEN_MIN)]);
        assert_eq!(ranges_of(3 << 30), [(0, 3 << 30)]);
        assert_eq!(ranges_of(4 << 30), [(0, 3 << 30), (4 << 30, 1 << 30)]);
    }

    #[test]
    fn both_parts_are_one_sealed_file() {
        let memory = Memory::new(4 << 30, false).unwrap();
        let offsets: Vec<_> =
            memory.guest().iter().map(|region| region.file_offset().unwrap().start()).collect();
        assert_eq!(offsets, [0, 3 << 30]);
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        assert_eq!(fcntl_get_seals(&*memory.file).unwrap(), seals);
        assert!(memory.file.set_len(0).is_err());
    }

    #[test]
    fn cleared_memory_is_all_zeros() {
        let memory = Memory::new(LEN_MIN, false).unwrap();
        memory.guest().write_obj(0x1234_u64, GuestAddress(0x5000)).unwrap();
        memory.clear().unwrap();
        assert_eq!(memory.guest().read_obj::<u64>(GuestAddress(0x5000)).unwrap(), 0);
    }

    #[test]
    fn without_huge_pages_the_error_says_how_many() {
        // More than any host of this test has reserved.
        let error = Memory::new(1 << 40, true).unwrap_err();
        assert!(error.to_string().contains("524288 huge pages"), "{error}");
    }
}

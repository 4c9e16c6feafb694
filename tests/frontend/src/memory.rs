//! Guest memory: memfds that the back end maps too.
//!
//! Addresses are guest addresses. An address outside the memory is the test's own mistake and
//! panics; what a back end writes into the memory is only ever read as plain numbers. Once
//! [`Region::truncate`] has shortened a file, whoever touches the lost part is killed by SIGBUS,
//! this process too: that is what the hostile tests are about, and they must not look there again.
//!
//! This is the only module of the package with `unsafe`: mapping, and access to bytes that another
//! process changes.
#![allow(unsafe_code)]

use crate::Error;
use crate::message::RegionDescription;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

/// User address of guest address 0. The two differ so that a back end that mixes them up is found
/// out.
pub const USER_ADDRESS_OF_GUEST_ZERO: u64 = 0x5000_0000_0000;

/// Where a region is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Guest address of its first byte.
    pub guest: u64,
    /// Its length, a multiple of the page size.
    pub size_bytes: usize,
    /// How far into its file it begins, a multiple of the page size.
    pub file_offset_bytes: u64,
}

/// One region of guest memory.
#[derive(Debug)]
pub struct Region {
    file: OwnedFd,
    mapping: NonNull<u8>,
    shape: Shape,
}

// SAFETY: the mapping belongs to the region until its drop, and is only accessed by atomics and by
// copies that other owners of the memory (the back end) may race with anyway.
unsafe impl Send for Region {}
// SAFETY: as above; `&Region` offers no reference into the mapping.
unsafe impl Sync for Region {}

impl Region {
    fn new(shape: Shape) -> Result<Self, Error> {
        let file = memfd_create("guest-memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, shape.file_offset_bytes + shape.size_bytes as u64)?;
        // SAFETY: a new mapping at an address of the kernel's choice overlays nothing.
        let mapping = unsafe {
            mmap(
                std::ptr::null_mut(),
                shape.size_bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                shape.file_offset_bytes,
            )
        }?;
        let mapping = NonNull::new(mapping.cast()).expect("the kernel maps nothing at address 0");
        Ok(Region { file, mapping, shape })
    }

    /// The file behind the region.
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The region as a message describes it.
    #[must_use]
    pub fn description(&self) -> RegionDescription {
        RegionDescription {
            guest: self.shape.guest,
            size_bytes: self.shape.size_bytes as u64,
            user: USER_ADDRESS_OF_GUEST_ZERO + self.shape.guest,
            file_offset_bytes: self.shape.file_offset_bytes,
        }
    }

    /// Changes the length of the file behind the region, under everybody's mapping.
    ///
    /// # Errors
    /// What `ftruncate` says.
    pub fn truncate(&self, file_size_bytes: u64) -> Result<(), Error> {
        Ok(ftruncate(&self.file, file_size_bytes)?)
    }

    /// Bytes from `guest` to the region's end, if it holds that address.
    fn left(&self, guest: u64) -> Option<usize> {
        let offset = usize::try_from(guest.checked_sub(self.shape.guest)?).ok()?;
        self.shape.size_bytes.checked_sub(offset).filter(|left| *left > 0)
    }

    fn pointer(&self, guest: u64, size_bytes: usize) -> *mut u8 {
        let left = self.left(guest).unwrap_or(0);
        assert!(size_bytes <= left, "{guest:#x} + {size_bytes} leaves the region {:?}", self.shape);
        // SAFETY: the assertion keeps the result inside the mapping.
        unsafe { self.mapping.as_ptr().add(self.shape.size_bytes - left) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is the region's own, and no pointer into it outlives a call.
        let unmapped = unsafe { munmap(self.mapping.as_ptr().cast(), self.shape.size_bytes) };
        unmapped.expect("a mapping of ours can be unmapped");
    }
}

/// All of a guest's memory.
#[derive(Debug)]
pub struct GuestMemory {
    regions: Vec<Region>,
}

impl GuestMemory {
    /// One region a shape.
    ///
    /// # Errors
    /// What the system says about the memfds and their mappings.
    pub fn new(shapes: &[Shape]) -> Result<Self, Error> {
        let regions = shapes.iter().map(|shape| Region::new(*shape)).collect::<Result<_, _>>()?;
        Ok(GuestMemory { regions })
    }

    /// One region from guest address 0.
    ///
    /// # Errors
    /// As [`GuestMemory::new`].
    pub fn flat(size_bytes: usize) -> Result<Self, Error> {
        GuestMemory::new(&[Shape { guest: 0, size_bytes, file_offset_bytes: 0 }])
    }

    /// The regions, in the order of their shapes.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The user address of a guest address.
    #[must_use]
    pub fn user_address(&self, guest: u64) -> u64 {
        USER_ADDRESS_OF_GUEST_ZERO.wrapping_add(guest)
    }

    fn region(&self, guest: u64) -> &Region {
        let found = self.regions.iter().find(|region| region.left(guest).is_some());
        found.unwrap_or_else(|| panic!("no region holds {guest:#x}"))
    }

    /// Copies `bytes` to `guest`, over the border of adjacent regions too.
    pub fn write(&self, guest: u64, bytes: &[u8]) {
        let mut at = guest;
        let mut rest = bytes;
        while !rest.is_empty() {
            let region = self.region(at);
            let (now, later) = rest.split_at(rest.len().min(region.left(at).unwrap_or(0)));
            let to = region.pointer(at, now.len());
            // SAFETY: `pointer` has checked the range; `now` is private memory and cannot overlap
            // the mapping.
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), to, now.len()) };
            at += now.len() as u64;
            rest = later;
        }
    }

    /// Copies `size_bytes` from `guest`, over the border of adjacent regions too.
    #[must_use]
    pub fn read(&self, guest: u64, size_bytes: usize) -> Vec<u8> {
        let mut bytes = vec![0_u8; size_bytes];
        let mut done = 0;
        while done < size_bytes {
            let at = guest + done as u64;
            let region = self.region(at);
            let now = (size_bytes - done).min(region.left(at).unwrap_or(0));
            let from = region.pointer(at, now);
            // SAFETY: `pointer` has checked the source; the target is private and `now` bytes long
            // from `done`.
            unsafe {
                std::ptr::copy_nonoverlapping(from, bytes[done..done + now].as_mut_ptr(), now)
            };
            done += now;
        }
        bytes
    }

    fn aligned<T>(&self, guest: u64) -> *mut T {
        let pointer = self.region(guest).pointer(guest, size_of::<T>()).cast::<T>();
        assert!(pointer.is_aligned(), "{guest:#x} is not aligned");
        pointer
    }

    /// Reads a little-endian 16-bit field.
    #[must_use]
    pub fn load_u16(&self, guest: u64, ordering: Ordering) -> u16 {
        // SAFETY: `aligned` has checked range and alignment; the mapping lives as long as `self`;
        // atomics may race.
        u16::from_le(unsafe { AtomicU16::from_ptr(self.aligned(guest)) }.load(ordering))
    }

    /// Writes a little-endian 16-bit field.
    pub fn store_u16(&self, guest: u64, value: u16, ordering: Ordering) {
        // SAFETY: as in `load_u16`.
        unsafe { AtomicU16::from_ptr(self.aligned(guest)) }.store(value.to_le(), ordering);
    }

    /// Reads a little-endian 32-bit field.
    #[must_use]
    pub fn load_u32(&self, guest: u64) -> u32 {
        // SAFETY: as in `load_u16`.
        u32::from_le(unsafe { AtomicU32::from_ptr(self.aligned(guest)) }.load(Ordering::Relaxed))
    }

    /// Writes a little-endian 32-bit field.
    pub fn store_u32(&self, guest: u64, value: u32) {
        // SAFETY: as in `load_u16`.
        unsafe { AtomicU32::from_ptr(self.aligned(guest)) }.store(value.to_le(), Ordering::Relaxed);
    }

    /// Writes a little-endian 64-bit field.
    pub fn store_u64(&self, guest: u64, value: u64) {
        // SAFETY: as in `load_u16`.
        unsafe { AtomicU64::from_ptr(self.aligned(guest)) }.store(value.to_le(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_cross_from_one_region_into_the_next() {
        let shapes = [(0x1000, 0x2000_u64), (0, 0)].map(|(guest, file_offset_bytes)| Shape {
            guest,
            size_bytes: 0x1000,
            file_offset_bytes,
        });
        let memory = GuestMemory::new(&shapes).expect("memfds can be made");
        memory.write(0xffe, &[1, 2, 3, 4]);
        assert_eq!(memory.read(0xffe, 4), [1, 2, 3, 4]);
        assert_eq!(memory.load_u16(0x1000, Ordering::Relaxed), 0x0403);
    }
}

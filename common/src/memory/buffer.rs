//! A piece of guest memory in this process: address and length, laid out as the kernel's `iovec`.
//!
//! All accesses of this process's CPUs to guest memory are the few functions below. Reads and writes are clamped to the
//! buffer; the accessors for ring fields check their offset, because there a wrong one is a bug of ours.

#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use std::arch::asm;
use std::fmt;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, compiler_fence};

/// The unit in which CPUs take memory from each other.
const CACHE_LINE_BYTES: usize = 64;
/// Two lines: what a device looks at first, a header and what follows it, may lie across them.
const FETCHED_BYTES: usize = 2 * CACHE_LINE_BYTES;

/// Contiguous bytes of guest memory. A `&[HostBuffer]` has the layout of an array of `iovec`.
///
/// Valid while the region that it was resolved from is mapped (see the contract of [`memory`](super)).
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct HostBuffer(libc::iovec);

// SAFETY: a buffer is an address and a length. The bytes behind it are reached with volatile-like copies and atomics
// only, as the guest writes to them at the same time anyway.
unsafe impl Send for HostBuffer {}
// SAFETY: as for `Send`; a shared buffer gives no more access than a copy of it.
unsafe impl Sync for HostBuffer {}

impl HostBuffer {
    /// The `len` bytes at `start`, which must be mapped readable and writable for as long as the buffer is used.
    pub(super) const fn new(start: *mut u8, len: usize) -> Self {
        Self(libc::iovec { iov_base: start.cast(), iov_len: len })
    }

    /// Bytes that are zero, of this process and not of the guest: something to write to a file
    /// from. Nothing may be written to it.
    pub(crate) fn of_zeros() -> Self {
        /// On a page of its own, as direct I/O wants it.
        #[repr(align(4096))]
        struct Zeros([u8; 1 << 16]);
        /// Long enough that a list of these zeroes many MiB in one operation.
        static ZEROS: Zeros = Zeros([0; 1 << 16]);
        Self::new(ZEROS.0.as_ptr().cast_mut(), ZEROS.0.len())
    }

    /// Length in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether there is no byte in it.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The address of its first byte in this process.
    ///
    /// It has the alignment of the guest's address only if the region's file offset is aligned too, so whoever uses the
    /// ring accessors checks this address and not the guest's.
    #[inline]
    pub fn address(&self) -> usize {
        self.0.iov_base.addr()
    }

    /// The part of `len` bytes that begins `offset` bytes in; both are clamped to what there is.
    #[inline]
    pub fn slice(&self, offset: usize, len: usize) -> HostBuffer {
        let offset = offset.min(self.len());
        Self::new(self.start().wrapping_add(offset), len.min(self.len() - offset))
    }

    /// Copies bytes from `offset` on to `into`, and returns how many there were to copy.
    #[inline]
    pub fn read(&self, offset: usize, into: &mut [u8]) -> usize {
        let from = self.slice(offset, into.len());
        if from.len() < into.len() {
            return self.read(offset, &mut into[..from.len()]);
        }
        // SAFETY: `from` lies within this buffer, which is mapped by the module's contract, and is as long as it says;
        // `into` is ours, as long, and no reference to guest memory exists that it could overlap with. The
        // guest may write meanwhile: no reference is made to its bytes, any mixture of old and new ones is a valid
        // `u8`, and the fence below keeps the compiler from reading them once more in place of the copy.
        unsafe {
            std::ptr::copy_nonoverlapping(from.start().cast_const(), into.as_mut_ptr(), into.len())
        };
        compiler_fence(Ordering::SeqCst);
        into.len()
    }

    /// Copies `from` to the bytes from `offset` on, as far as there are any, and returns how many were copied.
    #[inline]
    pub fn write(&self, offset: usize, from: &[u8]) -> usize {
        let into = self.slice(offset, from.len());
        if into.len() < from.len() {
            return self.write(offset, &from[..into.len()]);
        }
        #[cfg(test)]
        super::crash::store();
        // SAFETY: as in `read`, with the directions exchanged; the region is mapped writable.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into.start(), from.len()) };
        compiler_fence(Ordering::SeqCst);
        from.len()
    }

    /// Copies the bytes of `from` to the first bytes of this buffer, as far as there is room, and returns how many
    /// were copied. The two may overlap: a guest chooses where its buffers lie.
    #[inline]
    pub fn copy_from(&self, from: &HostBuffer) -> usize {
        let len = self.len().min(from.len());
        #[cfg(test)]
        super::crash::store();
        // SAFETY: both are mapped by the module's contract and have `len` bytes, and no reference to the bytes of
        // either exists. A guest may write meanwhile: any mixture of old and new bytes is as good as another.
        unsafe { std::ptr::copy(from.start().cast_const(), self.start(), len) };
        compiler_fence(Ordering::SeqCst);
        len
    }

    /// The little-endian number of 16 bits at `offset`.
    #[inline]
    pub fn load_u16(&self, offset: usize, ordering: Ordering) -> u16 {
        let field = self.field(offset, size_of::<u16>()).cast();
        // SAFETY: `field` has checked bounds and alignment; guest memory is mapped by the module's contract and is
        // only ever accessed as atomics and as raw copies, whose mixture the other side of a ring makes unavoidable.
        let field = unsafe { AtomicU16::from_ptr(field) };
        u16::from_le(field.load(ordering))
    }

    /// Stores a little-endian number of 16 bits at `offset`.
    #[inline]
    pub fn store_u16(&self, offset: usize, value: u16, ordering: Ordering) {
        #[cfg(test)]
        super::crash::store();
        let field = self.field(offset, size_of::<u16>()).cast();
        // SAFETY: as in `load_u16`.
        let field = unsafe { AtomicU16::from_ptr(field) };
        field.store(value.to_le(), ordering);
    }

    /// The little-endian number of 32 bits at `offset`, loaded relaxed.
    #[inline]
    pub fn load_u32(&self, offset: usize) -> u32 {
        let field = self.field(offset, size_of::<u32>()).cast();
        // SAFETY: as in `load_u16`.
        let field = unsafe { AtomicU32::from_ptr(field) };
        u32::from_le(field.load(Ordering::Relaxed))
    }

    /// Stores a little-endian number of 32 bits at `offset`, relaxed.
    #[inline]
    pub fn store_u32(&self, offset: usize, value: u32) {
        #[cfg(test)]
        super::crash::store();
        let field = self.field(offset, size_of::<u32>()).cast();
        // SAFETY: as in `load_u16`.
        let field = unsafe { AtomicU32::from_ptr(field) };
        field.store(value.to_le(), Ordering::Relaxed);
    }

    /// The little-endian number of 64 bits at `offset`, loaded relaxed.
    #[inline]
    pub fn load_u64(&self, offset: usize) -> u64 {
        let field = self.field(offset, size_of::<u64>()).cast();
        // SAFETY: as in `load_u16`.
        let field = unsafe { AtomicU64::from_ptr(field) };
        u64::from_le(field.load(Ordering::Relaxed))
    }

    /// Stores a little-endian number of 64 bits at `offset`, relaxed.
    #[inline]
    pub fn store_u64(&self, offset: usize, value: u64) {
        #[cfg(test)]
        super::crash::store();
        let field = self.field(offset, size_of::<u64>()).cast();
        // SAFETY: as in `load_u16`.
        let field = unsafe { AtomicU64::from_ptr(field) };
        field.store(value.to_le(), Ordering::Relaxed);
    }

    /// Has the CPU fetch the first bytes, as many as [`FETCHED_BYTES`], to read or to write them soon.
    #[inline]
    pub(crate) fn fetch(&self, to_write: bool) {
        for offset in (0..self.len().min(FETCHED_BYTES)).step_by(CACHE_LINE_BYTES) {
            fetch_line(self.start().wrapping_add(offset), to_write);
        }
    }

    #[inline]
    fn start(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// The address of a field of `size` bytes (a power of two) at `offset`.
    #[inline]
    fn field(&self, offset: usize, size: usize) -> *mut u8 {
        assert!(
            size <= self.len() && offset <= self.len() - size,
            "a field of {size} bytes at offset {offset} lies in the buffer of {} bytes",
            self.len()
        );
        let field = self.start().wrapping_add(offset);
        assert!(
            field.addr() & (size - 1) == 0,
            "a field of {size} bytes is aligned, {field:p} is not"
        );
        field
    }
}

/// Has the CPU fetch the cache line with this byte, for itself alone if it is going to write there.
#[cfg(target_arch = "x86_64")]
#[inline]
fn fetch_line(at: *const u8, to_write: bool) {
    if to_write {
        // SAFETY: a hint: it changes nothing but the caches, and faults at no address. What does not know it, ignores it.
        unsafe { asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags, readonly)) };
    } else {
        // SAFETY: as above.
        unsafe { asm!("prefetcht0 [{}]", in(reg) at, options(nostack, preserves_flags, readonly)) };
    }
}

/// Elsewhere the CPU finds out by itself.
#[cfg(not(target_arch = "x86_64"))]
#[inline]
fn fetch_line(_: *const u8, _: bool) {}

impl fmt::Debug for HostBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostBuffer({:#x}+{:#x})", self.address(), self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Aligned memory and a buffer over it; the memory stands in for a region.
    fn buffer(words: &mut [u64]) -> HostBuffer {
        HostBuffer::new(words.as_mut_ptr().cast(), size_of_val(words))
    }

    #[test]
    fn buffers_have_the_layout_of_iovecs() {
        assert_eq!(size_of::<HostBuffer>(), size_of::<libc::iovec>());
        assert_eq!(align_of::<HostBuffer>(), align_of::<libc::iovec>());
    }

    #[test]
    fn zeros_to_write_from_are_where_direct_io_takes_them() {
        let zeros = HostBuffer::of_zeros();
        assert!(zeros.address().is_multiple_of(4096) && zeros.len().is_multiple_of(4096));
    }

    #[test]
    fn copies_are_clamped_to_the_buffer() {
        let mut words = [0u64; 2];
        let buffer = buffer(&mut words);
        assert_eq!(buffer.write(12, &[1, 2, 3, 4, 5]), 4);
        assert_eq!(buffer.write(16, &[9]), 0);
        assert_eq!(buffer.write(usize::MAX, &[9]), 0);
        let mut back = [0xff; 8];
        assert_eq!(buffer.read(12, &mut back), 4);
        assert_eq!(back, [1, 2, 3, 4, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(buffer.read(usize::MAX, &mut back), 0);
    }

    #[test]
    fn copies_between_buffers_are_clamped_to_both_and_may_overlap() {
        let mut words = [0x0706_0504_0302_0100u64.to_le(), 0];
        let buffer = buffer(&mut words);
        assert_eq!(buffer.slice(4, 100).copy_from(&buffer.slice(0, 6)), 6);
        assert_eq!(buffer.slice(14, 100).copy_from(&buffer), 2);
        assert_eq!(buffer.slice(16, 1).copy_from(&buffer), 0);
        let mut bytes = [0; 16];
        buffer.read(0, &mut bytes);
        assert_eq!(bytes, [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0, 1]);
    }

    #[test]
    fn slices_are_clamped_to_the_buffer() {
        let mut words = [0u64; 2];
        let buffer = buffer(&mut words);
        let part = buffer.slice(4, 8);
        assert_eq!((part.address() - buffer.address(), part.len()), (4, 8));
        assert_eq!(buffer.slice(10, usize::MAX).len(), 6);
        assert!(buffer.slice(16, 1).is_empty());
        assert!(buffer.slice(usize::MAX, usize::MAX).is_empty());
        assert_eq!(part.slice(2, 100).len(), 6);
    }

    #[test]
    fn numbers_are_little_endian_in_memory() {
        let mut words = [0u64; 3];
        let buffer = buffer(&mut words);
        buffer.store_u16(2, 0x0102, Ordering::Release);
        buffer.store_u32(4, 0x0304_0506);
        buffer.store_u64(8, 0x0708_090a_0b0c_0d0e);
        let mut bytes = [0; 16];
        assert_eq!(buffer.read(0, &mut bytes), 16);
        assert_eq!(bytes, [0, 0, 2, 1, 6, 5, 4, 3, 0xe, 0xd, 0xc, 0xb, 0xa, 9, 8, 7]);
        assert_eq!(buffer.load_u16(2, Ordering::Acquire), 0x0102);
        assert_eq!(buffer.load_u32(4), 0x0304_0506);
        assert_eq!(buffer.load_u64(8), 0x0708_090a_0b0c_0d0e);
        assert_eq!(buffer.load_u64(16), 0);
    }

    #[test]
    fn ring_fields_outside_the_buffer_or_unaligned_are_caught() {
        let mut words = [0u64; 2];
        let buffer = buffer(&mut words);
        for (offset, size) in
            [(16, 2), (15, 2), (13, 4), (9, 8), (usize::MAX, 8), (1, 2), (2, 4), (4, 8)]
        {
            let caught = std::panic::catch_unwind(|| buffer.field(offset, size));
            assert!(caught.is_err(), "offset {offset}, size {size}");
        }
    }
}

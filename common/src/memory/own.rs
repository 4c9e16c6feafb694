//! Memory of this process, to move data through where the guest's own will not do.
//!
//! Direct I/O wants its memory aligned, and a guest may put a request's data at any address: such data makes a
//! detour through a *bounce buffer*, of [`BOUNCE_BYTES`]. A header that is to be checked and then used must not be
//! where the guest can change it in between: it is moved from or to memory of ours, beside the guest's.
//!
//! Contract: the bytes of [`OwnMemory`] stay where they are until it is dropped, and whoever lends them to the kernel
//! keeps it until the kernel is through with them. What it does not do: decide who gets some.

#![allow(unsafe_code, reason = "allocates with an alignment of its own")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

use super::HostBuffer;

/// Bytes of a bounce buffer.
///
/// Long enough that a detour costs copying and not system calls: from 64 KiB on, the time of a
/// request is that of its bytes. Data that is longer goes piece by piece.
pub const BOUNCE_BYTES: usize = 128 << 10;

/// The alignment of own memory: a page, which is as much as any host wants for direct I/O.
pub const BOUNCE_ALIGNMENT: usize = 4096;

/// Aligned bytes of this process that the kernel may be lent.
pub struct OwnMemory {
    start: NonNull<u8>,
    layout: Layout,
    bytes: HostBuffer,
}

// SAFETY: the allocation belongs to its holder, and is only reached through `HostBuffer`.
unsafe impl Send for OwnMemory {}
// SAFETY: as for `Send`; several threads may copy from and to it, as a guest's processors do with the guest's memory. Who
// shares it has to see to it that what he reads is not being written.
unsafe impl Sync for OwnMemory {}

impl OwnMemory {
    /// Allocates some. The bytes are zero, so that no error ever shows a guest what had been there.
    ///
    /// # Panics
    /// The length is 0, or no allocation has it.
    pub fn new(len_bytes: usize) -> Self {
        let layout = Layout::from_size_align(len_bytes, BOUNCE_ALIGNMENT)
            .unwrap_or_else(|error| panic!("{len_bytes} bytes: {error}"));
        assert!(len_bytes > 0, "no memory is not asked for");
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Self { start, layout, bytes: HostBuffer::new(start.as_ptr(), len_bytes) }
    }

    /// All its bytes.
    pub fn buffer(&self) -> HostBuffer {
        self.bytes
    }

    /// All its bytes, in the form of a list of buffers.
    pub(crate) fn list(&self) -> &[HostBuffer] {
        std::slice::from_ref(&self.bytes)
    }
}

impl Drop for OwnMemory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with the same layout; the contract has whoever lent the bytes
        // to the kernel keep them until they are back.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::{BOUNCE_ALIGNMENT, BOUNCE_BYTES, OwnMemory};

    #[test]
    fn bytes_are_aligned_and_zero() {
        let memory = OwnMemory::new(BOUNCE_BYTES);
        assert!(memory.buffer().address().is_multiple_of(BOUNCE_ALIGNMENT));
        let mut copy = vec![1; BOUNCE_BYTES + 1];
        assert_eq!(memory.buffer().read(0, &mut copy), BOUNCE_BYTES);
        assert!(copy[..BOUNCE_BYTES].iter().all(|byte| *byte == 0));
    }
}

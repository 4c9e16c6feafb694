//! Memory of this process, to move data through where the kernel cannot take the guest's own.
//!
//! Direct I/O wants its memory aligned, and a guest may put a request's data at any address. Such
//! data makes a detour: device and kernel agree on a bounce buffer, and a CPU copies between it and
//! the guest's bytes.
//!
//! Contract: the bytes of a [`BounceBuffer`] stay where they are until it is dropped, and whoever
//! lends them to the kernel keeps the buffer until the kernel is through with them. That is the
//! virtqueue's slot, which keeps it beside the chain's own buffers. What it does not do: decide who
//! gets one.

#![allow(unsafe_code, reason = "allocates with an alignment of its own")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

use super::HostBuffer;

/// Bytes of a bounce buffer.
///
/// Long enough that a detour costs copying and not system calls: from 64 KiB on, the time of a
/// request is that of its bytes. Data that is longer goes piece by piece.
pub const BOUNCE_BYTES: usize = 128 << 10;

/// Its alignment: a page, which is as much as any host wants for direct I/O.
pub const BOUNCE_ALIGNMENT: usize = 4096;

/// Aligned bytes of this process that the kernel may be lent.
pub(crate) struct BounceBuffer {
    start: NonNull<u8>,
    bytes: HostBuffer,
}

// SAFETY: the allocation belongs to the buffer, and is only reached through `HostBuffer`.
unsafe impl Send for BounceBuffer {}

impl BounceBuffer {
    /// Allocates one. The bytes are zero, so that no error ever shows a guest what had been there.
    pub(crate) fn new() -> Self {
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc_zeroed(Self::layout()) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(Self::layout()) };
        Self { start, bytes: HostBuffer::new(start.as_ptr(), BOUNCE_BYTES) }
    }

    /// All its bytes, in the form of a list of buffers.
    pub(crate) fn bytes(&self) -> &[HostBuffer] {
        std::slice::from_ref(&self.bytes)
    }

    fn layout() -> Layout {
        const LAYOUT: Layout = match Layout::from_size_align(BOUNCE_BYTES, BOUNCE_ALIGNMENT) {
            Ok(layout) => layout,
            Err(_) => panic!("the alignment is a power of two"),
        };
        LAYOUT
    }
}

impl Default for BounceBuffer {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for BounceBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with the same layout; the contract has whoever lent the bytes
        // to the kernel keep the buffer until they are back.
        unsafe { dealloc(self.start.as_ptr(), Self::layout()) };
    }
}

#[cfg(test)]
mod tests {
    use super::{BOUNCE_ALIGNMENT, BOUNCE_BYTES, BounceBuffer};

    #[test]
    fn bytes_are_aligned_and_zero() {
        let buffer = BounceBuffer::new();
        let [bytes] = buffer.bytes() else { unreachable!("one piece") };
        assert!(bytes.address().is_multiple_of(BOUNCE_ALIGNMENT));
        let mut copy = vec![1; BOUNCE_BYTES + 1];
        assert_eq!(bytes.read(0, &mut copy), BOUNCE_BYTES);
        assert!(copy[..BOUNCE_BYTES].iter().all(|byte| *byte == 0));
    }
}

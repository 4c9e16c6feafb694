//! Operations and what becomes of them.

use io_uring::opcode;

use crate::memory::HostBuffer;
use crate::sandbox::Call;
use crate::virtqueue::{Buffers, MAX_CHAIN_DESCRIPTORS};

/// Which of the device's files ([`Device::files`](crate::device::Device::files)) is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileIndex(pub u32);

/// What happens to the blocks behind a range that is to read as zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// They are given back to the host.
    Deallocate,
    /// They stay allocated.
    Keep,
    /// Zeros are written, for a host that can do neither; may end short.
    Write,
}

impl Zeroing {
    /// The mode of `fallocate(2)` that does it; `None` where zeros are written.
    pub(super) fn fallocate_mode(self) -> Option<i32> {
        match self {
            Self::Deallocate => Some(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE),
            Self::Keep => Some(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE),
            Self::Write => None,
        }
    }
}

/// `len_bytes` of zeros to write from, or as many as go into one operation.
pub(super) fn zeros(len_bytes: u64) -> impl Iterator<Item = HostBuffer> {
    let zeros = HostBuffer::of_zeros();
    let mut left = usize::try_from(len_bytes).unwrap_or(usize::MAX);
    let pieces = std::iter::from_fn(move || {
        let piece = zeros.slice(0, left);
        left -= piece.len();
        (!piece.is_empty()).then_some(piece)
    });
    pieces.take(usize::from(MAX_CHAIN_DESCRIPTORS))
}

/// One operation on a device's file. Offsets and lengths are in bytes.
#[derive(Clone, Copy)]
pub enum Op<'a> {
    /// `preadv`: fills `into` from `offset` on; may end short.
    Read {
        /// The file.
        file: FileIndex,
        /// Where to start.
        offset: u64,
        /// Guest memory to fill.
        into: Buffers<'a>,
    },
    /// `pwritev2`: writes `from` at `offset`; may end short.
    Write {
        /// The file.
        file: FileIndex,
        /// Where to start.
        offset: u64,
        /// Guest memory to take from.
        from: Buffers<'a>,
        /// Whether the data must be stable before the operation ends (`RWF_DSYNC`).
        durable: bool,
    },
    /// `fdatasync`.
    Sync {
        /// The file.
        file: FileIndex,
    },
    /// `fallocate`, or `pwritev` of zeros: the range reads as zeros from then on.
    Zero {
        /// The file.
        file: FileIndex,
        /// Where to start.
        offset: u64,
        /// How far.
        len_bytes: u64,
        /// What becomes of the blocks.
        zeroing: Zeroing,
    },
}

/// What an operation is to the kernel: the one table behind both engines' restrictions.
pub(super) struct Kernel {
    /// To an io_uring, with their names.
    pub(super) opcodes: &'static [(&'static str, u8)],
    /// To who makes system calls.
    pub(super) calls: &'static [Call],
}

static READ: Kernel = Kernel {
    opcodes: &[("READ", opcode::Read::CODE), ("READV", opcode::Readv::CODE)],
    calls: &[Call::any(libc::SYS_preadv)],
};
static WRITE: Kernel = Kernel {
    opcodes: &[("WRITEV", opcode::Writev::CODE)],
    calls: &[Call::any(libc::SYS_pwritev2)],
};
static SYNC: Kernel =
    Kernel { opcodes: &[("FSYNC", opcode::Fsync::CODE)], calls: &[Call::any(libc::SYS_fdatasync)] };
static ZERO: Kernel = Kernel {
    opcodes: &[("FALLOCATE", opcode::Fallocate::CODE), ("WRITEV", opcode::Writev::CODE)],
    calls: &[Call::any(libc::SYS_fallocate), Call::any(libc::SYS_pwritev)],
};

impl Op<'_> {
    /// Every kind of operation.
    pub(super) const KERNEL: [&'static Kernel; 4] = [&READ, &WRITE, &SYNC, &ZERO];

    /// What this one is to the kernel: a kind that is new has no place until it has a row.
    #[cfg(test)]
    pub(super) fn kernel(&self) -> &'static Kernel {
        match self {
            Self::Read { .. } => &READ,
            Self::Write { .. } => &WRITE,
            Self::Sync { .. } => &SYNC,
            Self::Zero { .. } => &ZERO,
        }
    }
}

/// Names an operation in flight: it comes back with the completion.
///
/// A chain may have several operations outstanding, told apart by `step`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// The slot of the chain that the operation serves.
    pub slot: u16,
    /// Which of the chain's operations.
    pub step: u16,
}

/// An operation that has ended.
#[derive(Debug)]
pub struct Completion {
    /// Which one.
    pub token: Token,
    /// Bytes moved, or the host's error.
    pub result: Result<u32, rustix::io::Errno>,
}

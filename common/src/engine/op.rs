//! Operations and what becomes of them.

use crate::virtqueue::Buffers;

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

/// Whom an event in the engine's ring is for; fits the 64 bits that the kernel carries along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    /// An operation of a queue has ended.
    Operation {
        /// The queue's place on its worker.
        queue: u16,
        /// Which of its operations.
        token: Token,
    },
    /// A queue was kicked.
    Kick {
        /// The queue's place on its worker.
        queue: u16,
    },
    /// There is mail for the worker.
    Mail,
    /// A queue's driver was called.
    Call {
        /// The queue's place on its worker.
        queue: u16,
    },
    /// The front end was told that a queue's ring is broken.
    Error {
        /// The queue's place on its worker.
        queue: u16,
    },
    /// A watch or write of a queue was called off; its own last event comes separately.
    CalledOff {
        /// The queue's place on its worker.
        queue: u16,
    },
}

impl Subject {
    /// As one number: kind, queue, slot and step, 16 bits each.
    pub(crate) fn encode(self) -> u64 {
        let (kind, queue, token) = match self {
            Self::Operation { queue, token } => (0, queue, token),
            Self::Kick { queue } => (1, queue, Token { slot: 0, step: 0 }),
            Self::Mail => (2, 0, Token { slot: 0, step: 0 }),
            Self::CalledOff { queue } => (3, queue, Token { slot: 0, step: 0 }),
            Self::Call { queue } => (4, queue, Token { slot: 0, step: 0 }),
            Self::Error { queue } => (5, queue, Token { slot: 0, step: 0 }),
        };
        kind << 48 | u64::from(queue) << 32 | u64::from(token.slot) << 16 | u64::from(token.step)
    }

    /// The place of the queue that it is for; mail is for none, and counts as the first's.
    pub(crate) fn queue(self) -> u16 {
        match self {
            Self::Operation { queue, .. }
            | Self::Kick { queue }
            | Self::Call { queue }
            | Self::Error { queue }
            | Self::CalledOff { queue } => queue,
            Self::Mail => 0,
        }
    }

    /// The inverse of [`encode`](Self::encode), for numbers that it made.
    pub(crate) fn decode(number: u64) -> Self {
        let part = |shift: u32| (number >> shift) as u16;
        let queue = part(32);
        match part(48) {
            0 => Self::Operation { queue, token: Token { slot: part(16), step: part(0) } },
            1 => Self::Kick { queue },
            2 => Self::Mail,
            3 => Self::CalledOff { queue },
            4 => Self::Call { queue },
            _ => Self::Error { queue },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Subject, Token};

    #[test]
    fn subject_survives_its_number() {
        let token = Token { slot: 0xfffe, step: 0x1234 };
        for subject in [
            Subject::Operation { queue: 0xabcd, token },
            Subject::Kick { queue: 7 },
            Subject::Mail,
            Subject::CalledOff { queue: 9 },
            Subject::Call { queue: 10 },
            Subject::Error { queue: 11 },
        ] {
            assert_eq!(Subject::decode(subject.encode()), subject);
        }
    }
}

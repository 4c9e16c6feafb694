//! What has happened: the engine's news for its worker, and whom it is for.

use std::time::Duration;

use rustix::io::Errno;

use super::op::Token;

/// How long a turn may sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Not at all.
    No,
    /// Until something completes.
    Forever,
    /// Until something completes, but no longer than this.
    AtMost(Duration),
}

/// What has happened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Event {
    /// Whom it is for.
    pub(crate) subject: Subject,
    /// Result, or a negated error number.
    pub(crate) result: i32,
    /// Further events of the same watch will come.
    pub(crate) more: bool,
}

impl Event {
    /// The result as bytes moved or error.
    pub(crate) fn outcome(&self) -> Result<u32, Errno> {
        match u32::try_from(self.result) {
            Ok(bytes) => Ok(bytes),
            Err(_negative) => Err(Errno::from_raw_os_error(self.result.saturating_neg())),
        }
    }
}

/// Whom an event is for; fits the 64 bits that the kernel carries along.
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
    /// A channel that a queue waits for is ready.
    Channel {
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
            Self::Channel { queue } => (6, queue, Token { slot: 0, step: 0 }),
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
            | Self::Channel { queue }
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
            5 => Self::Error { queue },
            _ => Self::Channel { queue },
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
            Subject::Channel { queue: 12 },
        ] {
            assert_eq!(Subject::decode(subject.encode()), subject);
        }
    }
}

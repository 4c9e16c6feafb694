//! What is given up, by the reason why.

use common::device::QueueIo;

/// A reason, in the order of [`DROPS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drop {
    /// A chain of a receive queue without room.
    NoRoom,
    /// A control message shorter than one is.
    ShortMessage,
    /// Of a kind that the driver does not send, or that there is not.
    UnknownMessage,
    /// About a port that there is not.
    UnknownPort,
    /// The driver could not start, or could not make a port.
    PortFailed,
    /// A control message to the driver that its buffer has no room for.
    SmallBuffer,
    /// A chain for a port that there is not.
    Unplugged,
}

/// The names of [`Drop`]s in metrics.
pub(crate) const DROPS: &[&str] = &[
    "no_room",
    "short_message",
    "unknown_message",
    "unknown_port",
    "port_failed",
    "small_buffer",
    "unplugged",
];

impl Drop {
    /// Counts one.
    pub(crate) fn count(self, io: &mut QueueIo<'_>) {
        io.give_up(self as usize);
    }
}

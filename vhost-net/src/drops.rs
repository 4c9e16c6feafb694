//! Why frames are dropped: each reason has a counter.

use crate::header::Malformed;

/// Why a frame is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// It is not what it says.
    Malformed(Malformed),
    /// Its source is not the guest's address (`--only-mac`).
    Spoofed,
    /// It is of another VLAN than the port's, or names one where only the port may (`--vlan`).
    Vlan,
    /// The driver does not want it.
    Filtered,
    /// It is longer than the driver's MTU, or than all buffers that the driver has given.
    TooLong,
    /// It is in more pieces than one system call takes.
    Scattered,
    /// The link is down.
    LinkDown,
    /// The host did not take it, or its memory is gone.
    Host,
    /// It was held back when its ring stopped.
    Stopped,
}

/// The reasons' names in metrics, by [`Reason::place`].
pub(crate) const DROPS: &[&str] = &[
    "no_header",
    "runt",
    "giant",
    "not_negotiated",
    "gso_type",
    "gso_size",
    "gso_checksum",
    "gso_header",
    "checksum_outside",
    "checksum_in_ethernet",
    "spoofed",
    "vlan",
    "filtered",
    "too_long",
    "scattered",
    "link_down",
    "host",
    "stopped",
];

/// Where the reasons that are not [`Malformed`] begin.
const OTHERS: usize = 10;

impl Reason {
    /// Its place in [`DROPS`].
    pub(crate) fn place(self) -> usize {
        match self {
            Self::Malformed(malformed) => malformed as usize,
            Self::Spoofed => OTHERS,
            Self::Vlan => OTHERS + 1,
            Self::Filtered => OTHERS + 2,
            Self::TooLong => OTHERS + 3,
            Self::Scattered => OTHERS + 4,
            Self::LinkDown => OTHERS + 5,
            Self::Host => OTHERS + 6,
            Self::Stopped => OTHERS + 7,
        }
    }
}

impl From<Malformed> for Reason {
    fn from(malformed: Malformed) -> Self {
        Self::Malformed(malformed)
    }
}

#[cfg(test)]
mod tests {
    use super::{DROPS, OTHERS, Reason};
    use crate::header::{MALFORMED, Malformed};

    #[test]
    fn every_reason_has_its_name() {
        assert_eq!(&DROPS[..OTHERS], MALFORMED);
        assert_eq!(DROPS[Reason::from(Malformed::Runt).place()], "runt");
        assert_eq!(DROPS[Reason::Spoofed.place()], "spoofed");
        assert_eq!(DROPS[Reason::Stopped.place()], "stopped");
        assert_eq!(Reason::Stopped.place() + 1, DROPS.len());
    }
}

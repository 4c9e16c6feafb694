//! Why frames are dropped: each reason has a counter.

use crate::filter::Unwanted;
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
    Unwanted(Unwanted),
    /// It is longer than the driver's MTU, or than all buffers that the driver has given.
    TooLong,
    /// It is in more pieces than one system call takes.
    Scattered,
    /// The link is down.
    LinkDown,
    /// The host did not take it, or its memory is gone.
    Host,
    /// The kernel refused it for what it is, whatever its header says.
    Refused,
    /// It was held back when its ring stopped, or its pair fell out of use.
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
    "unwanted_vlan",
    "unwanted_broadcast",
    "unwanted_multicast",
    "unwanted_unicast",
    "spoofed",
    "vlan",
    "too_long",
    "scattered",
    "link_down",
    "host",
    "refused",
    "stopped",
];

/// Where the reasons of the driver's filter begin.
const UNWANTED: usize = Malformed::ChecksumInEthernet as usize + 1;
/// Where the others do.
const OTHERS: usize = UNWANTED + Unwanted::Unicast as usize + 1;

impl Reason {
    /// Its place in [`DROPS`].
    pub(crate) fn place(self) -> usize {
        match self {
            Self::Malformed(malformed) => malformed as usize,
            Self::Unwanted(unwanted) => UNWANTED + unwanted as usize,
            Self::Spoofed => OTHERS,
            Self::Vlan => OTHERS + 1,
            Self::TooLong => OTHERS + 2,
            Self::Scattered => OTHERS + 3,
            Self::LinkDown => OTHERS + 4,
            Self::Host => OTHERS + 5,
            Self::Refused => OTHERS + 6,
            Self::Stopped => OTHERS + 7,
        }
    }
}

impl From<Unwanted> for Reason {
    fn from(unwanted: Unwanted) -> Self {
        Self::Unwanted(unwanted)
    }
}

impl From<Malformed> for Reason {
    fn from(malformed: Malformed) -> Self {
        Self::Malformed(malformed)
    }
}

#[cfg(test)]
mod tests {
    use super::{DROPS, Reason};
    use crate::filter::Unwanted;
    use crate::header::Malformed;

    #[test]
    fn every_reason_has_its_name() {
        for (reason, name) in [
            (Reason::from(Malformed::NoHeader), "no_header"),
            (Reason::from(Malformed::ChecksumInEthernet), "checksum_in_ethernet"),
            (Reason::from(Unwanted::Vlan), "unwanted_vlan"),
            (Reason::from(Unwanted::Unicast), "unwanted_unicast"),
            (Reason::Spoofed, "spoofed"),
            (Reason::Vlan, "vlan"),
            (Reason::TooLong, "too_long"),
            (Reason::Scattered, "scattered"),
            (Reason::LinkDown, "link_down"),
            (Reason::Host, "host"),
            (Reason::Refused, "refused"),
            (Reason::Stopped, "stopped"),
        ] {
            assert_eq!(DROPS[reason.place()], name);
        }
        assert_eq!(Reason::Stopped.place() + 1, DROPS.len());
    }
}

//! The configuration space: how large the console is, how many ports there are, and the register for emergencies.
//!
//! Contract: what the driver reads is whole: columns and rows change together. What it writes is one byte for port 0's
//! output ([`emergency_write`]); all else is refused. It is read by the main thread only.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Configuration `cols` and `rows` are valid (VIRTIO 1.3, 5.3.3).
pub(crate) const VIRTIO_CONSOLE_F_SIZE: u64 = 1 << 0;
/// There are several ports, and queues for control messages.
pub(crate) const VIRTIO_CONSOLE_F_MULTIPORT: u64 = 1 << 1;
/// The driver may write to the console before it has set up queues.
pub(crate) const VIRTIO_CONSOLE_F_EMERG_WRITE: u64 = 1 << 2;

/// The most ports that a device has. Linux takes as many as there are queues for; 31 is what QEMU's own device has,
/// and more than anybody is known to use.
pub(crate) const PORTS_MAX: u16 = 31;

/// Where `emerg_wr` lies (VIRTIO 1.3, 5.3.4).
const EMERG_WR: u32 = 8;
/// Bytes of the configuration space.
const CONFIG_BYTES: usize = 12;

/// How large a terminal is, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) columns: u16,
    pub(crate) rows: u16,
}

impl Default for Size {
    /// What a terminal has had since there were terminals.
    fn default() -> Self {
        Self { columns: 80, rows: 24 }
    }
}

/// Why a size was not accepted.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("a size is COLUMNSxROWS, each from 1 to 65535, like 80x24")]
pub(crate) struct NoSize;

impl FromStr for Size {
    type Err = NoSize;

    fn from_str(text: &str) -> Result<Self, NoSize> {
        let (columns, rows) = text.split_once('x').ok_or(NoSize)?;
        let number = |text: &str| match text.parse::<u16>() {
            Ok(number) if number > 0 => Ok(number),
            _ => Err(NoSize),
        };
        Ok(Self { columns: number(columns)?, rows: number(rows)? })
    }
}

impl fmt::Display for Size {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}x{}", self.columns, self.rows)
    }
}

/// The device's own feature bits.
pub(crate) fn features(has_several_ports: bool) -> u64 {
    let multiport = if has_several_ports { VIRTIO_CONSOLE_F_MULTIPORT } else { 0 };
    VIRTIO_CONSOLE_F_SIZE | VIRTIO_CONSOLE_F_EMERG_WRITE | multiport
}

/// Reads the configuration space from `offset` on; beyond its end there are zeros.
pub(crate) fn read(size: Size, ports_max: u16, offset: u32, into: &mut [u8]) {
    // VIRTIO 1.3, 5.3.4: cols, rows, max_nr_ports, emerg_wr.
    let mut space = [0; CONFIG_BYTES];
    let fields = size.columns.to_le_bytes().into_iter().chain(size.rows.to_le_bytes());
    let fields = fields.chain(u32::from(ports_max).to_le_bytes());
    space.iter_mut().zip(fields).for_each(|(place, byte)| *place = byte);
    let offset = usize::try_from(offset).unwrap_or(CONFIG_BYTES);
    let bytes = space.iter().skip(offset).copied().chain(std::iter::repeat(0));
    into.iter_mut().zip(bytes).for_each(|(place, byte)| *place = byte);
}

/// The byte that a write to the configuration space is to put on the console; `None` where nothing may be written there.
///
/// QEMU's generic device writes the whole space whatever part of it the driver has written. As there is only one field
/// to write, a write that covers it is meant for it.
// VIRTIO 1.3, 5.3.4: emerg_wr is the only field that the driver writes; the console gets its low byte.
pub(crate) fn emergency_write(offset: u32, data: &[u8]) -> Option<u8> {
    let place = usize::try_from(EMERG_WR.checked_sub(offset)?).ok()?;
    data.get(place).copied()
}

/// What a virtqueue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// To the driver: what was typed at this port.
    Receive(u16),
    /// From the driver: what this port puts out.
    Transmit(u16),
    /// To the driver: control messages.
    ControlReceive,
    /// From the driver: control messages.
    ControlTransmit,
    /// The driver has no use for it.
    Unused,
}

impl Role {
    /// The role of the queue at `index`, for a driver that acknowledged `features`.
    // VIRTIO 1.3, 5.3.2: 0 receiveq(port0), 1 transmitq(port0), 2 control receiveq, 3 control transmitq, 4 receiveq(port1), …
    pub(crate) fn of(index: u16, features: u64) -> Self {
        match index {
            0 => Self::Receive(0),
            1 => Self::Transmit(0),
            _ if features & VIRTIO_CONSOLE_F_MULTIPORT == 0 => Self::Unused,
            2 => Self::ControlReceive,
            3 => Self::ControlTransmit,
            _ => {
                let port = (index / 2).saturating_sub(1);
                if index.is_multiple_of(2) { Self::Receive(port) } else { Self::Transmit(port) }
            }
        }
    }
}

/// How many virtqueues a device with this many ports has.
pub(crate) fn queue_count(has_several_ports: bool, ports_max: u16) -> u16 {
    if has_several_ports { ports_max.saturating_mul(2).saturating_add(2) } else { 2 }
}

#[cfg(test)]
mod tests {
    use super::{Role, Size, VIRTIO_CONSOLE_F_MULTIPORT, emergency_write, queue_count, read};

    #[test]
    fn configuration_is_laid_out_as_the_specification_says() {
        let size = Size { columns: 0x0102, rows: 0x0304 };
        let mut space = [0xff; 14];
        read(size, 31, 0, &mut space);
        assert_eq!(space, [2, 1, 4, 3, 31, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let mut rows = [0xff; 2];
        read(size, 31, 2, &mut rows);
        assert_eq!(rows, [4, 3]);
        read(size, 31, u32::MAX, &mut rows);
        assert_eq!(rows, [0, 0]);
    }

    #[test]
    fn only_the_emergency_register_is_written() {
        assert_eq!(emergency_write(8, b"a\0\0\0"), Some(b'a'));
        assert_eq!(emergency_write(8, b"a"), Some(b'a'));
        assert_eq!(emergency_write(8, b""), None);
        assert_eq!(emergency_write(0, b"a\0\0\0"), None);
        assert_eq!(emergency_write(0, b"\0\0\0\0\0\0\0\0a\0\0\0"), Some(b'a'));
        assert_eq!(emergency_write(9, b"a"), None);
    }

    #[test]
    fn queues_have_the_roles_that_the_specification_numbers() {
        let multiport = VIRTIO_CONSOLE_F_MULTIPORT;
        let roles: Vec<_> = (0..8).map(|index| Role::of(index, multiport)).collect();
        let expected = [
            Role::Receive(0),
            Role::Transmit(0),
            Role::ControlReceive,
            Role::ControlTransmit,
            Role::Receive(1),
            Role::Transmit(1),
            Role::Receive(2),
            Role::Transmit(2),
        ];
        assert_eq!(roles, expected);
        assert_eq!(Role::of(2, 0), Role::Unused);
        assert_eq!(
            (queue_count(false, 1), queue_count(true, 1), queue_count(true, 31)),
            (2, 4, 64)
        );
    }

    #[test]
    fn sizes_are_parsed_as_they_are_shown() {
        let size: Size = "132x43".parse().expect("a size");
        assert_eq!((size.columns, size.rows, size.to_string().as_str()), (132, 43, "132x43"));
        for wrong in ["", "80", "x", "0x24", "80x0", "65536x1", "80x24x1", "-1x24"] {
            assert!(wrong.parse::<Size>().is_err(), "{wrong}");
        }
    }
}

//! Control messages as they lie in memory (VIRTIO 1.3, 5.3.6.2).

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::str::FromStr;

use thiserror::Error;

use crate::config::Size;

/// `struct virtio_console_control`: id, event, value.
pub(super) const HEAD_BYTES: usize = 8;

const VIRTIO_CONSOLE_DEVICE_READY: u16 = 0;
const VIRTIO_CONSOLE_DEVICE_ADD: u16 = 1;
const VIRTIO_CONSOLE_DEVICE_REMOVE: u16 = 2;
const VIRTIO_CONSOLE_PORT_READY: u16 = 3;
const VIRTIO_CONSOLE_CONSOLE_PORT: u16 = 4;
const VIRTIO_CONSOLE_RESIZE: u16 = 5;
const VIRTIO_CONSOLE_PORT_OPEN: u16 = 6;
const VIRTIO_CONSOLE_PORT_NAME: u16 = 7;

/// In which order a resize has its two numbers.
///
/// The specification has columns first (VIRTIO 1.3, 5.3.6.2), and so read Debian's 6.1.176, 6.12.95 and 7.2.13; its 5.10.223
/// reads rows first. A device cannot see what the driver does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// As older kernels read them.
    RowsFirst,
    /// As the specification has them.
    ColumnsFirst,
}

/// Why an order was not accepted.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "it is columns-first, as the specification has it, or rows-first, as older kernels read it"
)]
pub(crate) struct NoOrder;

impl FromStr for Order {
    type Err = NoOrder;

    fn from_str(text: &str) -> Result<Self, NoOrder> {
        match text {
            "rows-first" => Ok(Self::RowsFirst),
            "columns-first" => Ok(Self::ColumnsFirst),
            _ => Err(NoOrder),
        }
    }
}

/// What the driver is told of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// There is one.
    Add,
    /// There is none any more.
    Remove,
    /// It is a console.
    Console,
    /// It is called so.
    Name(String),
    /// It has this size.
    Resize(Size),
    /// The host has it open, or not.
    Open(bool),
}

impl Word {
    /// The message that says this of the port `id`.
    pub(super) fn encode(&self, id: u16, order: Order) -> Vec<u8> {
        let (event, value) = match self {
            Self::Add => (VIRTIO_CONSOLE_DEVICE_ADD, 1),
            Self::Remove => (VIRTIO_CONSOLE_DEVICE_REMOVE, 1),
            Self::Console => (VIRTIO_CONSOLE_CONSOLE_PORT, 1),
            Self::Name(_) => (VIRTIO_CONSOLE_PORT_NAME, 1),
            Self::Resize(_) => (VIRTIO_CONSOLE_RESIZE, 1),
            Self::Open(is_open) => (VIRTIO_CONSOLE_PORT_OPEN, u16::from(*is_open)),
        };
        let mut bytes = u32::from(id).to_le_bytes().to_vec();
        bytes.extend(event.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        match self {
            // The driver knows from the length of the buffer where the name ends.
            Self::Name(name) => bytes.extend(name.as_bytes()),
            Self::Resize(Size { columns, rows }) => {
                let [first, second] = match order {
                    Order::RowsFirst => [rows, columns],
                    Order::ColumnsFirst => [columns, rows],
                };
                bytes.extend(first.to_le_bytes());
                bytes.extend(second.to_le_bytes());
            }
            _ => {}
        }
        bytes
    }
}

/// What the driver says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// The driver is there, or could not start.
    DeviceReady(bool),
    /// It has made the port, or could not.
    PortReady { id: u32, is_ready: bool },
    /// Somebody in the guest has opened the port, or closed it.
    PortOpen { id: u32, is_open: bool },
}

/// Why a message of the driver's says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Nonsense {
    /// It is shorter than one.
    Short,
    /// No driver says this.
    Event,
}

impl Said {
    /// Reads a message; what comes after its head is nothing to us.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Nonsense> {
        let [i, j, k, l, e, f, v, w, ..] = *bytes else { return Err(Nonsense::Short) };
        let id = u32::from_le_bytes([i, j, k, l]);
        // Linux says 1 or 0; whatever is not 0 is taken for yes, as QEMU does.
        let value = u16::from_le_bytes([v, w]) != 0;
        match u16::from_le_bytes([e, f]) {
            VIRTIO_CONSOLE_DEVICE_READY => Ok(Self::DeviceReady(value)),
            VIRTIO_CONSOLE_PORT_READY => Ok(Self::PortReady { id, is_ready: value }),
            VIRTIO_CONSOLE_PORT_OPEN => Ok(Self::PortOpen { id, is_open: value }),
            _ => Err(Nonsense::Event),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Nonsense, Order, Said, Word};
    use crate::config::Size;

    #[test]
    fn messages_are_laid_out_as_the_specification_says() {
        let order = Order::RowsFirst;
        assert_eq!(Word::Add.encode(0x0102, order), [2, 1, 0, 0, 1, 0, 1, 0]);
        assert_eq!(Word::Remove.encode(1, order), [1, 0, 0, 0, 2, 0, 1, 0]);
        assert_eq!(Word::Console.encode(1, order), [1, 0, 0, 0, 4, 0, 1, 0]);
        assert_eq!(Word::Open(false).encode(1, order), [1, 0, 0, 0, 6, 0, 0, 0]);
        let name = Word::Name("abc".into()).encode(2, order);
        assert_eq!(name, [2, 0, 0, 0, 7, 0, 1, 0, b'a', b'b', b'c']);
    }

    #[test]
    fn resize_has_its_numbers_in_the_order_that_was_asked_for() {
        let resize = Word::Resize(Size { columns: 0x0102, rows: 0x0304 });
        let rows_first = resize.encode(0, Order::RowsFirst);
        assert_eq!(rows_first, [0, 0, 0, 0, 5, 0, 1, 0, 4, 3, 2, 1]);
        let columns_first = resize.encode(0, Order::ColumnsFirst);
        assert_eq!(columns_first, [0, 0, 0, 0, 5, 0, 1, 0, 2, 1, 4, 3]);
    }

    #[test]
    fn only_what_drivers_say_is_heard() {
        let message = |event: u8| [7, 0, 0, 0, event, 0, 1, 0, 99];
        assert_eq!(Said::parse(&message(0)), Ok(Said::DeviceReady(true)));
        assert_eq!(Said::parse(&message(3)), Ok(Said::PortReady { id: 7, is_ready: true }));
        assert_eq!(Said::parse(&message(6)), Ok(Said::PortOpen { id: 7, is_open: true }));
        for event in [1, 2, 4, 5, 7, 8, 255] {
            assert_eq!(Said::parse(&message(event)), Err(Nonsense::Event));
        }
        for len in 0..8 {
            assert_eq!(Said::parse(&message(0)[..len]), Err(Nonsense::Short));
        }
    }
}

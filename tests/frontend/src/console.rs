//! The queues, control messages and configuration space of a virtio console device (VIRTIO 1.3, 5.3).

use crate::Error;
use crate::guest::{Guest, Options};
use crate::virtqueue::Buffer;
use crate::wire::PATIENCE;
use std::collections::BTreeMap;
use std::path::Path;

/// Feature bit 0, as a mask: the configuration space has a size.
pub const VIRTIO_CONSOLE_F_SIZE: u64 = 1;
/// Feature bit 1, as a mask: several ports.
pub const VIRTIO_CONSOLE_F_MULTIPORT: u64 = 2;
/// Feature bit 2, as a mask: a register for emergencies.
pub const VIRTIO_CONSOLE_F_EMERG_WRITE: u64 = 4;
/// Where that register is.
pub const EMERG_WR: u32 = 8;
/// Length of the configuration space.
pub const CONFIG_BYTES: usize = 12;

/// The queue of control messages to the driver.
pub const CONTROL_RECEIVE: u16 = 2;
/// The queue of those from the driver.
pub const CONTROL_TRANSMIT: u16 = 3;
/// What a message is about that is about no port.
pub const NO_PORT: u32 = u32::MAX;

/// `DEVICE_READY` (VIRTIO 1.3, 5.3.6.2), and so on.
pub const DEVICE_READY: u16 = 0;
/// There is a port.
pub const DEVICE_ADD: u16 = 1;
/// There is no longer.
pub const DEVICE_REMOVE: u16 = 2;
/// The driver has made it.
pub const PORT_READY: u16 = 3;
/// It is a console.
pub const CONSOLE_PORT: u16 = 4;
/// It has another size.
pub const RESIZE: u16 = 5;
/// It is open at the other end, or closed.
pub const PORT_OPEN: u16 = 6;
/// It has a name.
pub const PORT_NAME: u16 = 7;

/// A control message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The port.
    pub id: u32,
    /// What about it.
    pub event: u16,
    /// How.
    pub value: u16,
    /// What follows: a name, a size.
    pub rest: Vec<u8>,
}

impl Message {
    /// A message without anything that follows.
    #[must_use]
    pub fn new(id: u32, event: u16, value: u16) -> Self {
        Self { id, event, value, rest: Vec::new() }
    }

    /// As it lies in memory.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.id.to_le_bytes().to_vec();
        bytes.extend(self.event.to_le_bytes());
        bytes.extend(self.value.to_le_bytes());
        bytes.extend(&self.rest);
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (head, rest) = bytes.split_first_chunk::<8>()?;
        let [i, j, k, l, e, f, v, w] = *head;
        Some(Self {
            id: u32::from_le_bytes([i, j, k, l]),
            event: u16::from_le_bytes([e, f]),
            value: u16::from_le_bytes([v, w]),
            rest: rest.to_vec(),
        })
    }
}

/// The driver of a virtio console device.
#[derive(Debug)]
pub struct ConsoleDriver {
    /// The guest it runs in.
    pub guest: Guest,
    /// The buffer of each chain that is to be filled, by queue and head.
    offered: BTreeMap<(u16, u16), (u64, usize)>,
}

impl ConsoleDriver {
    /// Connects to a listening back end and starts its queues.
    ///
    /// # Errors
    /// The first that any message meets.
    pub fn start(path: &Path, options: &Options) -> Result<Self, Error> {
        Ok(Self { guest: Guest::start(path, options)?, offered: BTreeMap::new() })
    }

    /// Writes to a transmit queue, in these pieces; the chain is out.
    ///
    /// # Errors
    /// What writing to the kick descriptor says.
    pub fn submit(&mut self, queue: u16, pieces: &[&[u8]]) -> Result<(), Error> {
        let mut buffers = Vec::new();
        for piece in pieces {
            let address = self.guest.carve(piece.len());
            self.guest.memory.write(address, piece);
            let len_bytes = u32::try_from(piece.len()).expect("a test's pieces are short");
            buffers.push(Buffer { address, len_bytes, writable: false });
        }
        let ring = &mut self.guest.queues[usize::from(queue)];
        ring.submit(&buffers);
        ring.kick()
    }

    /// Writes to a transmit queue, and waits for the chain: how much of it the device says that it has written to.
    ///
    /// # Errors
    /// As [`crate::virtqueue::Virtqueue::wait_used`].
    pub fn write(&mut self, queue: u16, pieces: &[&[u8]]) -> Result<u32, Error> {
        self.submit(queue, pieces)?;
        let used = self.guest.queues[usize::from(queue)].wait_used(PATIENCE)?;
        Ok(used.len_bytes)
    }

    /// Gives a receive queue a buffer with so much room.
    ///
    /// # Errors
    /// What writing to the kick descriptor says.
    pub fn offer(&mut self, queue: u16, room_bytes: usize) -> Result<(), Error> {
        let address = self.guest.carve(room_bytes);
        let len_bytes = u32::try_from(room_bytes).expect("a test's buffers are short");
        let ring = &mut self.guest.queues[usize::from(queue)];
        let head = ring.submit(&[Buffer { address, len_bytes, writable: true }]);
        ring.kick()?;
        self.offered.insert((queue, head), (address, room_bytes));
        Ok(())
    }

    /// Waits for the next buffer that the device has filled.
    ///
    /// # Errors
    /// As [`crate::virtqueue::Virtqueue::wait_used`].
    pub fn read(&mut self, queue: u16) -> Result<Vec<u8>, Error> {
        let used = self.guest.queues[usize::from(queue)].wait_used(PATIENCE)?;
        let (address, room) = self.offered.remove(&(queue, used.head)).unwrap_or_default();
        let count = usize::try_from(used.len_bytes).unwrap_or(usize::MAX);
        Ok(self.guest.memory.read(address, count.min(room)))
    }

    /// Says something to the device.
    ///
    /// # Errors
    /// As [`ConsoleDriver::write`].
    pub fn say(&mut self, message: &Message) -> Result<(), Error> {
        self.write(CONTROL_TRANSMIT, &[&message.encode()]).map(drop)
    }

    /// Waits for what the device says next; a buffer for it is given.
    ///
    /// # Errors
    /// As [`ConsoleDriver::read`]; [`Error::WrongUsed`] for less than a message.
    pub fn hear(&mut self) -> Result<Message, Error> {
        self.offer(CONTROL_RECEIVE, 256)?;
        let bytes = self.read(CONTROL_RECEIVE)?;
        let len_bytes = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        Message::decode(&bytes).ok_or(Error::WrongUsed { head: 0, len_bytes })
    }
}

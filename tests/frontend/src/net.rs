//! The frames and commands of a virtio network device (VIRTIO 1.3, 5.1.6), and its configuration space.

use crate::Error;
use crate::guest::{Guest, Options};
use crate::message::VIRTIO_F_VERSION_1;
use crate::virtqueue::Buffer;
use crate::wire::PATIENCE;
use std::collections::BTreeMap;
use std::path::Path;

macro_rules! features {
    ($($name:ident = $bit:literal,)*) => { $(
        #[doc = concat!("Network feature bit ", $bit, ", as a mask.")]
        pub const $name: u64 = 1 << $bit;
    )* };
}
features! {
    VIRTIO_NET_F_CSUM = 0,
    VIRTIO_NET_F_GUEST_CSUM = 1,
    VIRTIO_NET_F_MTU = 3,
    VIRTIO_NET_F_MAC = 5,
    VIRTIO_NET_F_HOST_TSO4 = 11,
    VIRTIO_NET_F_MRG_RXBUF = 15,
    VIRTIO_NET_F_STATUS = 16,
    VIRTIO_NET_F_CTRL_VQ = 17,
    VIRTIO_NET_F_CTRL_RX = 18,
    VIRTIO_NET_F_CTRL_VLAN = 19,
    VIRTIO_NET_F_CTRL_RX_EXTRA = 20,
    VIRTIO_NET_F_GUEST_ANNOUNCE = 21,
    VIRTIO_NET_F_MQ = 22,
    VIRTIO_NET_F_CTRL_MAC_ADDR = 23,
}

/// Answer to a command: done.
pub const VIRTIO_NET_OK: u8 = 0;
/// Answer to a command: not done.
pub const VIRTIO_NET_ERR: u8 = 1;
/// An answer that no device gives: what the byte holds before.
const ACK_UNWRITTEN: u8 = 0xa5;
/// Length of the configuration space up to and including `duplex`.
pub const CONFIG_BYTES: usize = 17;

/// The header before a frame (VIRTIO 1.3, 5.1.6), whatever it may say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// `VIRTIO_NET_HDR_F_*`.
    pub flags: u8,
    /// `VIRTIO_NET_HDR_GSO_*`.
    pub gso_type: u8,
    /// Length of all headers, a hint.
    pub hdr_len: u16,
    /// Bytes of a segment.
    pub gso_size: u16,
    /// Where the checksum begins.
    pub csum_start: u16,
    /// Where it is to be, from there.
    pub csum_offset: u16,
    /// Over how many chains the frame is spread.
    pub num_buffers: u16,
}

impl Header {
    /// The 12 bytes in guest memory; a legacy driver's are the first 10.
    #[must_use]
    pub fn encode(&self) -> [u8; 12] {
        let mut bytes = [0; 12];
        (bytes[0], bytes[1]) = (self.flags, self.gso_type);
        let fields = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset];
        for (place, field) in
            bytes[2..].chunks_exact_mut(2).zip(fields.into_iter().chain([self.num_buffers]))
        {
            place.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }
}

/// A chain that the device has filled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filled {
    /// What it holds, as far as the device says that it has written.
    pub bytes: Vec<u8>,
    /// Bytes that there was room for.
    pub room_bytes: usize,
}

/// The driver of a virtio network device.
#[derive(Debug)]
pub struct NetDriver {
    /// The guest it runs in.
    pub guest: Guest,
    /// The buffers of each chain that is out, by queue and head.
    writable: BTreeMap<(u16, u16), Vec<(u64, usize)>>,
}

impl NetDriver {
    /// Connects to a listening back end and starts its queues.
    ///
    /// # Errors
    /// The first that any message meets.
    pub fn start(path: &Path, options: &Options) -> Result<Self, Error> {
        Ok(Self::in_guest(Guest::start(path, options)?))
    }

    /// The driver for a guest whose queues run.
    #[must_use]
    pub fn in_guest(guest: Guest) -> Self {
        Self { guest, writable: BTreeMap::new() }
    }

    /// Bytes of a header before a frame.
    #[must_use]
    pub fn header_bytes(&self) -> usize {
        let with_number = VIRTIO_F_VERSION_1 | VIRTIO_NET_F_MRG_RXBUF;
        if self.guest.features & with_number == 0 { 10 } else { 12 }
    }

    /// Makes a chain available on a queue: device-readable buffers with these bytes, then device-writable ones of these
    /// lengths. The device is not notified.
    pub fn submit(&mut self, queue: u16, readable: &[&[u8]], writable: &[usize]) -> u16 {
        let (buffers, given) = self.lay_out(readable, writable);
        let head = self.guest.queues[usize::from(queue)].submit(&buffers);
        self.writable.insert((queue, head), given);
        head
    }

    /// As [`NetDriver::submit`], through an indirect table.
    pub fn submit_indirect(&mut self, queue: u16, readable: &[&[u8]], writable: &[usize]) -> u16 {
        let (buffers, given) = self.lay_out(readable, writable);
        let table = self.guest.carve(16 * buffers.len());
        let head = self.guest.queues[usize::from(queue)].submit_indirect(&buffers, table);
        self.writable.insert((queue, head), given);
        head
    }

    fn lay_out(
        &mut self,
        readable: &[&[u8]],
        writable: &[usize],
    ) -> (Vec<Buffer>, Vec<(u64, usize)>) {
        // The room of what has come back is free again.
        let _ = self.guest.allocate(0);
        let mut buffers = Vec::new();
        for bytes in readable {
            let at = self.guest.carve(bytes.len());
            self.guest.memory.write(at, bytes);
            buffers.push(buffer(at, bytes.len(), false));
        }
        let given: Vec<_> = writable.iter().map(|len| (self.guest.carve(*len), *len)).collect();
        for (at, len) in &given {
            self.guest.memory.write(*at, &vec![ACK_UNWRITTEN; *len]);
            buffers.push(buffer(*at, *len, true));
        }
        (buffers, given)
    }

    /// Notifies the device about a queue.
    ///
    /// # Errors
    /// What writing to the kick descriptor says.
    pub fn kick(&self, queue: u16) -> Result<(), Error> {
        self.guest.queues[usize::from(queue)].kick()
    }

    /// Waits for the next chain that the device returns on a queue.
    ///
    /// # Errors
    /// As [`crate::virtqueue::Virtqueue::wait_used`].
    pub fn complete(&mut self, queue: u16) -> Result<Filled, Error> {
        let used = self.guest.queues[usize::from(queue)].wait_used(PATIENCE)?;
        let given = self.writable.remove(&(queue, used.head)).unwrap_or_default();
        let room_bytes = given.iter().map(|(_, len)| len).sum();
        let mut bytes: Vec<u8> =
            given.iter().flat_map(|(at, len)| self.guest.memory.read(*at, *len)).collect();
        bytes.truncate(usize::try_from(used.len_bytes).unwrap_or(usize::MAX));
        Ok(Filled { bytes, room_bytes })
    }

    /// Sends a frame in one buffer behind its header, and waits for its chain.
    ///
    /// # Errors
    /// As [`NetDriver::complete`].
    pub fn send(&mut self, queue: u16, header: &Header, frame: &[u8]) -> Result<Filled, Error> {
        let header = header.encode();
        self.submit(queue, &[&header[..self.header_bytes()], frame], &[]);
        self.kick(queue)?;
        self.complete(queue)
    }

    /// Waits for a frame on a queue, over as many chains as its header says: what they hold.
    ///
    /// # Errors
    /// As [`NetDriver::complete`].
    pub fn receive(&mut self, queue: u16) -> Result<Vec<Filled>, Error> {
        let mut chains = vec![self.complete(queue)?];
        if self.guest.features & VIRTIO_NET_F_MRG_RXBUF != 0 {
            let mut header = chains[0].bytes.clone();
            while header.len() < 12 {
                chains.push(self.complete(queue)?);
                header = chains.iter().flat_map(|chain| chain.bytes.clone()).collect();
            }
            let count = usize::from(u16::from_le_bytes([header[10], header[11]]));
            while chains.len() < count {
                chains.push(self.complete(queue)?);
            }
        }
        Ok(chains)
    }

    /// Makes a command on a queue: class, command and data, with a byte for the answer, which is returned.
    ///
    /// # Errors
    /// As [`NetDriver::complete`]; [`Error::WrongUsed`] for an answer of another length.
    pub fn command(&mut self, queue: u16, readable: &[&[u8]]) -> Result<u8, Error> {
        let head = self.submit(queue, readable, &[1]);
        self.kick(queue)?;
        match &self.complete(queue)?.bytes[..] {
            [ack] => Ok(*ack),
            other => Err(Error::WrongUsed {
                head: u32::from(head),
                len_bytes: u32::try_from(other.len()).unwrap_or(u32::MAX),
            }),
        }
    }
}

fn buffer(address: u64, size_bytes: usize, writable: bool) -> Buffer {
    Buffer {
        address,
        len_bytes: u32::try_from(size_bytes).expect("a test's buffers are short"),
        writable,
    }
}

//! The requests of a virtio block device (VIRTIO 1.3, 5.2.6), and its configuration space.

use crate::Error;
use crate::guest::{Guest, Options};
use crate::virtqueue::Buffer;
use crate::wire::{PATIENCE, Wire};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

macro_rules! features {
    ($($name:ident = $bit:literal,)*) => { $(
        #[doc = concat!("Block feature bit ", $bit, ", as a mask.")]
        pub const $name: u64 = 1 << $bit;
    )* };
}
features! {
    VIRTIO_BLK_F_SIZE_MAX = 1,
    VIRTIO_BLK_F_SEG_MAX = 2,
    VIRTIO_BLK_F_RO = 5,
    VIRTIO_BLK_F_BLK_SIZE = 6,
    VIRTIO_BLK_F_FLUSH = 9,
    VIRTIO_BLK_F_TOPOLOGY = 10,
    VIRTIO_BLK_F_CONFIG_WCE = 11,
    VIRTIO_BLK_F_MQ = 12,
    VIRTIO_BLK_F_DISCARD = 13,
    VIRTIO_BLK_F_WRITE_ZEROES = 14,
}

macro_rules! kinds {
    ($($name:ident = $number:literal,)*) => { $(
        #[doc = concat!("Request type ", $number, ".")]
        pub const $name: u32 = $number;
    )* };
}
kinds! {
    VIRTIO_BLK_T_IN = 0,
    VIRTIO_BLK_T_OUT = 1,
    VIRTIO_BLK_T_FLUSH = 4,
    VIRTIO_BLK_T_GET_ID = 8,
    VIRTIO_BLK_T_DISCARD = 11,
    VIRTIO_BLK_T_WRITE_ZEROES = 13,
}

/// Status: done.
pub const VIRTIO_BLK_S_OK: u8 = 0;
/// Status: the device or the driver erred.
pub const VIRTIO_BLK_S_IOERR: u8 = 1;
/// Status: the device does not know the request.
pub const VIRTIO_BLK_S_UNSUPP: u8 = 2;
/// In a `WRITE_ZEROES` segment: the device may deallocate.
pub const VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP: u32 = 1;
/// Length of a sector in every field that counts sectors, whatever the block size.
pub const SECTOR_BYTES: usize = 512;
/// Length of the answer to `GET_ID`.
pub const ID_BYTES: usize = 20;
/// Length of the request's header: type, reserved, sector.
pub const HEADER_BYTES: usize = 16;
/// A status that no device writes: what the byte holds before.
const STATUS_UNWRITTEN: u8 = 0xa5;
/// Length of the configuration space up to and including the write-zeroes fields.
pub const CONFIG_BYTES: usize = 60;

/// One segment of a `DISCARD` or `WRITE_ZEROES`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First sector.
    pub sector: u64,
    /// Sectors.
    pub count: u32,
    /// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP` or 0.
    pub flags: u32,
}

/// A request as a driver would queue it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// `VIRTIO_BLK_T_*`.
    pub kind: u32,
    /// First sector.
    pub sector: u64,
    /// Device-readable buffers after the header.
    pub readable: Vec<Vec<u8>>,
    /// Lengths of the device-writable buffers before the status byte.
    pub writable_bytes: Vec<usize>,
    /// Whether the descriptors go into an indirect table.
    pub indirect: bool,
}

impl Request {
    /// Reads `size_bytes` from `sector` into one buffer.
    #[must_use]
    pub fn read(sector: u64, size_bytes: usize) -> Self {
        Request {
            kind: VIRTIO_BLK_T_IN,
            sector,
            writable_bytes: vec![size_bytes],
            ..Request::default()
        }
    }

    /// Writes `data` to `sector` from one buffer.
    #[must_use]
    pub fn write(sector: u64, data: &[u8]) -> Self {
        Request {
            kind: VIRTIO_BLK_T_OUT,
            sector,
            readable: vec![data.to_vec()],
            ..Request::default()
        }
    }

    /// Makes what was written before it stable.
    #[must_use]
    pub fn flush() -> Self {
        Request { kind: VIRTIO_BLK_T_FLUSH, ..Request::default() }
    }

    /// Asks for the serial number.
    #[must_use]
    pub fn get_id() -> Self {
        Request { kind: VIRTIO_BLK_T_GET_ID, writable_bytes: vec![ID_BYTES], ..Request::default() }
    }

    /// A `DISCARD` or `WRITE_ZEROES` of `segments`.
    #[must_use]
    pub fn over_segments(kind: u32, segments: &[Segment]) -> Self {
        let mut bytes = Vec::new();
        for segment in segments {
            bytes.extend(segment.sector.to_le_bytes());
            bytes.extend(segment.count.to_le_bytes());
            bytes.extend(segment.flags.to_le_bytes());
        }
        Request { kind, readable: vec![bytes], ..Request::default() }
    }

    /// The same request through an indirect table.
    #[must_use]
    pub fn through_indirect_table(self) -> Self {
        Request { indirect: true, ..self }
    }

    /// The request's header in guest memory.
    #[must_use]
    pub fn header(&self) -> Vec<u8> {
        let mut header = Vec::with_capacity(HEADER_BYTES);
        header.extend(self.kind.to_le_bytes());
        header.extend(0_u32.to_le_bytes());
        header.extend(self.sector.to_le_bytes());
        header
    }
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// `VIRTIO_BLK_S_*`.
    pub status: u8,
    /// Contents of the device-writable buffers, one after the other.
    pub data: Vec<u8>,
    /// Bytes that the device says it has written, the status byte included.
    pub used_bytes: u32,
}

/// Where the answer of a request will be.
#[derive(Debug)]
struct Pending {
    writable: Vec<(u64, usize)>,
    status: u64,
}

/// The driver of a virtio block device.
#[derive(Debug)]
pub struct BlockDriver {
    /// The guest it runs in.
    pub guest: Guest,
    pending: BTreeMap<(u16, u16), Pending>,
}

impl BlockDriver {
    /// Connects to a listening back end and starts its queues.
    ///
    /// # Errors
    /// The first that any message meets.
    pub fn start(path: &Path, options: &Options) -> Result<Self, Error> {
        Ok(BlockDriver::in_guest(Guest::start(path, options)?))
    }

    /// As [`BlockDriver::start`], over a connection that exists.
    ///
    /// # Errors
    /// The first that any message meets.
    pub fn start_on(wire: Wire, options: &Options) -> Result<Self, Error> {
        Ok(BlockDriver::in_guest(Guest::start_on(wire, options)?))
    }

    /// The driver for a guest whose queues run.
    #[must_use]
    pub fn in_guest(guest: Guest) -> Self {
        BlockDriver { guest, pending: BTreeMap::new() }
    }

    /// Makes a request available on queue `queue` and returns its head. The device is not notified.
    pub fn submit(&mut self, queue: u16, request: &Request) -> u16 {
        let header = self.guest.allocate(HEADER_BYTES);
        self.guest.memory.write(header, &request.header());
        let mut buffers = vec![buffer(header, HEADER_BYTES, false)];
        for data in &request.readable {
            let at = self.guest.carve(data.len());
            self.guest.memory.write(at, data);
            buffers.push(buffer(at, data.len(), false));
        }
        let writable: Vec<_> =
            request.writable_bytes.iter().map(|len| (self.guest.carve(*len), *len)).collect();
        buffers.extend(writable.iter().map(|(at, len)| buffer(*at, *len, true)));
        let status = self.guest.carve(1);
        self.guest.memory.write(status, &[STATUS_UNWRITTEN]);
        buffers.push(buffer(status, 1, true));
        let head = if request.indirect {
            let table = self.guest.carve(HEADER_BYTES * buffers.len());
            self.guest.queues[usize::from(queue)].submit_indirect(&buffers, table)
        } else {
            self.guest.queues[usize::from(queue)].submit(&buffers)
        };
        self.pending.insert((queue, head), Pending { writable, status });
        head
    }

    /// Notifies the device about queue `queue`.
    ///
    /// # Errors
    /// What writing to the kick descriptor says.
    pub fn kick(&self, queue: u16) -> Result<(), Error> {
        self.guest.queues[usize::from(queue)].kick()
    }

    /// Notifies the device about queue `queue` only if it asks for that, as drivers do.
    ///
    /// # Errors
    /// What writing to the kick descriptor says.
    pub fn kick_if_wanted(&mut self, queue: u16) -> Result<(), Error> {
        self.guest.queues[usize::from(queue)].kick_if_wanted()
    }

    /// Waits for the next request that the device returns on `queue`: its head and what became of
    /// it.
    ///
    /// # Errors
    /// As [`crate::virtqueue::Virtqueue::wait_used`].
    pub fn complete(&mut self, queue: u16) -> Result<(u16, Outcome), Error> {
        self.complete_within(queue, PATIENCE)
    }

    /// As [`BlockDriver::complete`], with another limit.
    ///
    /// # Errors
    /// As [`crate::virtqueue::Virtqueue::wait_used`].
    pub fn complete_within(
        &mut self,
        queue: u16,
        patience: Duration,
    ) -> Result<(u16, Outcome), Error> {
        let used = self.guest.queues[usize::from(queue)].wait_used(patience)?;
        Ok((used.head, self.outcome(queue, used.head, used.len_bytes)))
    }

    /// As [`BlockDriver::complete`], by looking at the used ring, whatever the call descriptor
    /// does.
    ///
    /// # Errors
    /// As [`crate::virtqueue::Virtqueue::look_for_used`].
    pub fn complete_by_looking(&mut self, queue: u16) -> Result<(u16, Outcome), Error> {
        let used = self.guest.queues[usize::from(queue)].look_for_used(PATIENCE)?;
        Ok((used.head, self.outcome(queue, used.head, used.len_bytes)))
    }

    fn outcome(&mut self, queue: u16, head: u16, used_bytes: u32) -> Outcome {
        let pending = self
            .pending
            .remove(&(queue, head))
            .expect("the queue only returns what is outstanding");
        let memory = &self.guest.memory;
        let data = pending.writable.iter().flat_map(|(at, len)| memory.read(*at, *len)).collect();
        Outcome { status: memory.read(pending.status, 1)[0], data, used_bytes }
    }

    /// One request from start to end.
    ///
    /// # Errors
    /// As [`BlockDriver::complete`].
    pub fn perform(&mut self, queue: u16, request: &Request) -> Result<Outcome, Error> {
        self.submit(queue, request);
        self.kick(queue)?;
        Ok(self.complete(queue)?.1)
    }

    /// The configuration space.
    ///
    /// # Errors
    /// As [`crate::front_end::FrontEnd::get_config`].
    pub fn config(&self) -> Result<Config, Error> {
        Ok(Config { bytes: self.guest.front_end.get_config(0, CONFIG_BYTES)? })
    }
}

fn buffer(address: u64, size_bytes: usize, writable: bool) -> Buffer {
    Buffer {
        address,
        len_bytes: u32::try_from(size_bytes).expect("a test's buffers are short"),
        writable,
    }
}

/// The configuration space (VIRTIO 1.3, 5.2.4).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    bytes: Vec<u8>,
}

macro_rules! fields {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $at:literal;)*) => { $(
        $(#[$doc])*
        #[must_use]
        pub fn $name(&self) -> $type {
            let mut bytes = [0; size_of::<$type>()];
            bytes.copy_from_slice(&self.bytes[$at..$at + size_of::<$type>()]);
            <$type>::from_le_bytes(bytes)
        }
    )* };
}

impl Config {
    fields! {
        /// Size of the disk in sectors of 512 bytes.
        capacity: u64 = 0;
        /// Largest segment in bytes.
        size_max: u32 = 8;
        /// Most segments in a request.
        seg_max: u32 = 12;
        /// Block size in bytes.
        blk_size: u32 = 20;
        /// Logical blocks per physical block, as a power of two.
        physical_block_exp: u8 = 24;
        /// Offset of the first aligned logical block.
        alignment_offset: u8 = 25;
        /// Suggested least I/O size in logical blocks.
        min_io_size: u16 = 26;
        /// Suggested best I/O size in logical blocks.
        opt_io_size: u32 = 28;
        /// 1 for a write-back cache, 0 for a write-through one.
        writeback: u8 = 32;
        /// Queues.
        num_queues: u16 = 34;
        /// Most sectors in a discard segment.
        max_discard_sectors: u32 = 36;
        /// Most segments in a discard.
        max_discard_seg: u32 = 40;
        /// Alignment of discards in sectors.
        discard_sector_alignment: u32 = 44;
        /// Most sectors in a write-zeroes segment.
        max_write_zeroes_sectors: u32 = 48;
        /// Most segments in a write-zeroes.
        max_write_zeroes_seg: u32 = 52;
        /// Whether a write-zeroes may deallocate.
        write_zeroes_may_unmap: u8 = 56;
    }
}

//! Messages: header and payload, from bytes to values and back.
//!
//! Parsing takes bytes that a front end chose: every read is checked, and nothing is believed of a length that the
//! payload itself names. Numbers are in the machine's own byte order (vhost-user, "Message Specification").

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::os::fd::OwnedFd;

use super::Request;
use super::table::{FdCount, Layout, MAX_TABLE_REGIONS, Row, UnknownRequest, row};
use crate::memory::{FrontendAddress, GuestAddress, RegionSpec};

/// Longest payload that is received or sent. The longest request in use is a memory table of 32 regions (1032 bytes);
/// configuration spaces are at most 256 bytes in QEMU, and the `vhost` package has the same limit of one page.
pub const MAX_PAYLOAD_BYTES: usize = 4096;

/// A message header: request, flags, size of the payload, 32 bits each.
pub(super) const HEADER_BYTES: usize = 12;

const VERSION_MASK: u32 = 0x3;
const VERSION: u32 = 0x1;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// `SET_VRING_KICK` and its like: the vring's index, and the flag that no descriptor comes along.
const VRING_INDEX_MASK: u64 = 0xff;
const VRING_NO_FD: u64 = 1 << 8;

/// Bytes of a memory region description, and of what stands before the regions of a table.
const REGION_BYTES: usize = 32;
const TABLE_HEAD_BYTES: usize = 8;
/// Bytes before the data of a configuration space message.
const CONFIG_HEAD_BYTES: usize = 12;

/// A request of the front end that fits its row of the table.
#[derive(Debug)]
pub struct Message {
    /// What is asked for.
    pub request: Request,
    /// Whether the front end waits for an answer even if the request has none of its own. Means something only after
    /// `REPLY_ACK` has been negotiated.
    pub need_reply: bool,
    /// The request's payload.
    pub payload: Payload,
    /// The descriptors that came with it, as many as its row and payload ask for. They are close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// A payload, by layout (vhost-user, "Payload").
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// None.
    Empty,
    /// A number: features, a status.
    U64(u64),
    /// "A vring state description".
    VringState {
        /// Index of the vring.
        index: u32,
        /// Its size, base index or state, by request.
        num: u32,
    },
    /// "A vring address description".
    VringAddress {
        /// Index of the vring.
        index: u32,
        /// Bit 0: log writes to the used ring.
        flags: u32,
        /// The descriptor table.
        descriptor: FrontendAddress,
        /// The used ring.
        used: FrontendAddress,
        /// The available ring.
        available: FrontendAddress,
        /// Where in the dirty log the used ring begins.
        log: u64,
    },
    /// The payload of `SET_VRING_KICK`, `SET_VRING_CALL`, `SET_VRING_ERR`.
    VringFd {
        /// Index of the vring.
        index: u16,
        /// Set if the message has no descriptor: poll, or do not notify.
        no_fd: bool,
    },
    /// "Multiple memory regions description", with a descriptor for each.
    MemoryTable(Vec<RegionSpec>),
    /// "Single memory region description".
    MemoryRegion(RegionSpec),
    /// "Virtio device config space".
    Config {
        /// Offset in the configuration space, in bytes.
        offset: u32,
        /// 0: a write by the driver; 1: by live migration.
        flags: u32,
        /// What to write, or in a `GET_CONFIG` as many bytes as are asked for.
        data: Vec<u8>,
    },
    /// "Inflight description".
    Inflight {
        /// Size of the area in bytes.
        mmap_size: u64,
        /// Where it begins in the file, in bytes.
        mmap_offset: u64,
        /// Number of virtqueues.
        num_queues: u16,
        /// Their size.
        queue_size: u16,
    },
    /// The payload of a request whose feature is never offered.
    Unparsed,
}

/// Why a message that was received whole does not fit its row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The request is none of the table's.
    #[error(transparent)]
    UnknownRequest(#[from] UnknownRequest),
    /// The payload has a size that the request cannot have.
    #[error("{request} with a payload of {actual} bytes instead of {min} to {max}")]
    PayloadSize {
        /// The request.
        request: Request,
        /// The payload's size.
        actual: usize,
        /// Least size.
        min: usize,
        /// Greatest size.
        max: usize,
    },
    /// The message has more or fewer descriptors than the request asks for.
    #[error("{request} with {actual} file descriptors instead of {min} to {max}")]
    FdCount {
        /// The request.
        request: Request,
        /// Descriptors that came.
        actual: usize,
        /// Fewest.
        min: usize,
        /// Most.
        max: usize,
    },
    /// A memory table has more regions than any may have.
    #[error("{request} with {count} regions, more than {MAX_TABLE_REGIONS}")]
    RegionCount {
        /// The request.
        request: Request,
        /// Number of regions that it claims to have.
        count: u32,
    },
}

/// A message header, checked for all that makes the rest of the stream readable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) request_id: u32,
    pub(super) flags: u32,
    pub(super) size: u32,
}

impl Header {
    /// A header of a reply to the request with this number, or of a request of our own.
    pub(super) fn reply(request_id: u32, size: u32) -> Self {
        Self { request_id, flags: VERSION | FLAG_REPLY, size }
    }

    pub(super) fn request(request_id: u32, size: u32) -> Self {
        Self { request_id, flags: VERSION, size }
    }

    pub(super) fn parse(bytes: [u8; HEADER_BYTES]) -> Option<Self> {
        let mut fields = Fields(&bytes);
        Some(Self { request_id: fields.u32()?, flags: fields.u32()?, size: fields.u32()? })
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let fields = [self.request_id, self.flags, self.size];
        for (to, field) in bytes.chunks_exact_mut(size_of::<u32>()).zip(fields) {
            to.copy_from_slice(&field.to_ne_bytes());
        }
        bytes
    }

    /// The version, which must be 1.
    pub(super) fn version(self) -> Result<(), u32> {
        let version = self.flags & VERSION_MASK;
        if version == VERSION { Ok(()) } else { Err(version) }
    }

    pub(super) fn is_reply(self) -> bool {
        self.flags & FLAG_REPLY != 0
    }

    pub(super) fn need_reply(self) -> bool {
        self.flags & FLAG_NEED_REPLY != 0
    }
}

impl Message {
    /// The message of these parts, if they fit the request's row.
    pub(super) fn new(header: Header, payload: &[u8], fds: Vec<OwnedFd>) -> Result<Self, Refusal> {
        let row = row(Request::try_from(header.request_id)?);
        let payload = Payload::parse(&row, payload)?;
        check_fds(&row, &payload, fds.len())?;
        Ok(Self { request: row.request, need_reply: header.need_reply(), payload, fds })
    }
}

fn check_fds(row: &Row, payload: &Payload, actual: usize) -> Result<(), Refusal> {
    let (min, max) = match (row.fds, payload) {
        (FdCount::Exactly(count), _) => (count, count),
        (FdCount::UpTo(count), _) => (0, count),
        (FdCount::OnePerRegion, Payload::MemoryTable(regions)) => (regions.len(), regions.len()),
        (FdCount::UnlessNoFd, Payload::VringFd { no_fd: false, .. }) => (1, 1),
        (FdCount::OnePerRegion | FdCount::UnlessNoFd, _) => (0, 0),
    };
    if (min..=max).contains(&actual) {
        return Ok(());
    }
    Err(Refusal::FdCount { request: row.request, actual, min, max })
}

impl Payload {
    fn parse(row: &Row, bytes: &[u8]) -> Result<Self, Refusal> {
        let sizes = row.payload.sizes();
        let wrong_size = Refusal::PayloadSize {
            request: row.request,
            actual: bytes.len(),
            min: *sizes.start(),
            max: *sizes.end(),
        };
        if !sizes.contains(&bytes.len()) {
            return Err(wrong_size);
        }
        let mut fields = Fields(bytes);
        let parsed = match row.payload {
            Layout::Empty => Some(Self::Empty),
            Layout::Unparsed(..) => Some(Self::Unparsed),
            Layout::U64 => fields.u64().map(Self::U64),
            Layout::VringFd => fields.u64().map(Self::vring_fd),
            Layout::VringState => fields.vring_state(),
            Layout::VringAddress => fields.vring_address(),
            Layout::MemoryRegion => fields.memory_region(),
            Layout::Inflight => fields.inflight(),
            Layout::MemoryTable => return parse_table(row.request, bytes),
            Layout::Config => return parse_config(row.request, bytes),
        };
        parsed.ok_or(wrong_size)
    }

    fn vring_fd(bits: u64) -> Self {
        // vhost-user, SET_VRING_KICK: bits 0 to 7 are the index, bit 8 says that there is no descriptor. The others
        // have no meaning yet.
        Self::VringFd { index: (bits & VRING_INDEX_MASK) as u16, no_fd: bits & VRING_NO_FD != 0 }
    }
}

/// A memory table: as many regions as it says; what follows them is not looked at.
fn parse_table(request: Request, bytes: &[u8]) -> Result<Payload, Refusal> {
    let mut fields = Fields(bytes);
    let count = fields.u32().unwrap_or(0);
    fields.skip(size_of::<u32>());
    let regions = usize::try_from(count).unwrap_or(usize::MAX);
    if regions > MAX_TABLE_REGIONS {
        return Err(Refusal::RegionCount { request, count });
    }
    let mut specs = Vec::with_capacity(regions);
    for _ in 0..regions {
        let Some(spec) = fields.region() else {
            let min = regions.saturating_mul(REGION_BYTES).saturating_add(TABLE_HEAD_BYTES);
            return Err(Refusal::PayloadSize {
                request,
                actual: bytes.len(),
                min,
                max: MAX_PAYLOAD_BYTES,
            });
        };
        specs.push(spec);
    }
    Ok(Payload::MemoryTable(specs))
}

/// A part of the configuration space: it must have as many bytes as it says, since a reply has the same size.
fn parse_config(request: Request, bytes: &[u8]) -> Result<Payload, Refusal> {
    let mut fields = Fields(bytes);
    let head = (fields.u32(), fields.u32(), fields.u32());
    let (Some(offset), Some(size), Some(flags)) = head else {
        let (actual, min) = (bytes.len(), CONFIG_HEAD_BYTES);
        return Err(Refusal::PayloadSize { request, actual, min, max: MAX_PAYLOAD_BYTES });
    };
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    let data = fields.0.to_vec();
    if data.len() != size {
        let expected = size.saturating_add(CONFIG_HEAD_BYTES);
        return Err(Refusal::PayloadSize {
            request,
            actual: bytes.len(),
            min: expected,
            max: expected,
        });
    }
    Ok(Payload::Config { offset, flags, data })
}

/// Fields still to be read.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn chunk<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (chunk, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*chunk)
    }

    fn skip(&mut self, count: usize) {
        self.0 = self.0.get(count..).unwrap_or_default();
    }

    fn u16(&mut self) -> Option<u16> {
        self.chunk().map(u16::from_ne_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.chunk().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.chunk().map(u64::from_ne_bytes)
    }

    fn vring_state(&mut self) -> Option<Payload> {
        Some(Payload::VringState { index: self.u32()?, num: self.u32()? })
    }

    fn vring_address(&mut self) -> Option<Payload> {
        Some(Payload::VringAddress {
            index: self.u32()?,
            flags: self.u32()?,
            descriptor: FrontendAddress(self.u64()?),
            used: FrontendAddress(self.u64()?),
            available: FrontendAddress(self.u64()?),
            log: self.u64()?,
        })
    }

    fn memory_region(&mut self) -> Option<Payload> {
        self.skip(size_of::<u64>());
        self.region().map(Payload::MemoryRegion)
    }

    fn region(&mut self) -> Option<RegionSpec> {
        let guest = GuestAddress(self.u64()?);
        let len_bytes = self.u64()?;
        let frontend = FrontendAddress(self.u64()?);
        Some(RegionSpec { guest, frontend, len_bytes, file_offset_bytes: self.u64()? })
    }

    fn inflight(&mut self) -> Option<Payload> {
        Some(Payload::Inflight {
            mmap_size: self.u64()?,
            mmap_offset: self.u64()?,
            num_queues: self.u16()?,
            queue_size: self.u16()?,
        })
    }
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]
mod tests {
    use super::*;

    fn parse(request: Request, bytes: &[u8]) -> Result<Payload, Refusal> {
        Payload::parse(&row(request), bytes)
    }

    fn u32s(numbers: &[u32]) -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
    }

    fn u64s(numbers: &[u64]) -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
    }

    fn spec(number: u64) -> RegionSpec {
        RegionSpec {
            guest: GuestAddress(number),
            frontend: FrontendAddress(number + 2),
            len_bytes: number + 1,
            file_offset_bytes: number + 3,
        }
    }

    fn region_bytes(number: u64) -> Vec<u8> {
        u64s(&[number, number + 1, number + 2, number + 3])
    }

    #[test]
    fn payloads_are_read_in_the_order_of_the_text() {
        assert_eq!(parse(Request::GetFeatures, &[]), Ok(Payload::Empty));
        assert_eq!(parse(Request::SetFeatures, &u64s(&[7 << 40])), Ok(Payload::U64(7 << 40)));
        let state = Payload::VringState { index: 3, num: 256 };
        assert_eq!(parse(Request::SetVringNum, &u32s(&[3, 256])), Ok(state));
        let address = Payload::VringAddress {
            index: 1,
            flags: 2,
            descriptor: FrontendAddress(3),
            used: FrontendAddress(4),
            available: FrontendAddress(5),
            log: 6,
        };
        let bytes = [u32s(&[1, 2]), u64s(&[3, 4, 5, 6])].concat();
        assert_eq!(parse(Request::SetVringAddr, &bytes), Ok(address));
        let bytes = [vec![0xaa; 8], region_bytes(9)].concat();
        assert_eq!(parse(Request::AddMemReg, &bytes), Ok(Payload::MemoryRegion(spec(9))));
        let inflight =
            Payload::Inflight { mmap_size: 1, mmap_offset: 2, num_queues: 3, queue_size: 4 };
        let mut bytes = [u64s(&[1, 2]), vec![3, 0, 4, 0]].concat();
        if cfg!(target_endian = "big") {
            bytes[16..].copy_from_slice(&[0, 3, 0, 4]);
        }
        assert_eq!(parse(Request::SetInflightFd, &bytes), Ok(inflight));
    }

    #[test]
    fn vring_fd_has_an_index_of_eight_bits_and_a_flag() {
        let parsed = |bits| parse(Request::SetVringKick, &u64s(&[bits])).unwrap();
        assert_eq!(parsed(0x07), Payload::VringFd { index: 7, no_fd: false });
        assert_eq!(parsed(0x1ff), Payload::VringFd { index: 0xff, no_fd: true });
        assert_eq!(parsed(0xffff_ffff_ffff_fe03), Payload::VringFd { index: 3, no_fd: false });
    }

    #[test]
    fn memory_table_has_the_regions_that_it_counts() {
        let table = |count: u32, regions: u64| {
            let bytes: Vec<u8> =
                (0..regions).flat_map(|region| region_bytes(region * 10)).collect();
            parse(Request::SetMemTable, &[u32s(&[count, 0]), bytes].concat())
        };
        assert_eq!(table(2, 2), Ok(Payload::MemoryTable(vec![spec(0), spec(10)])));
        assert_eq!(table(0, 0), Ok(Payload::MemoryTable(vec![])));
        // User-Mode Linux: an array of fixed length, of which the first part counts.
        assert_eq!(table(1, 2), Ok(Payload::MemoryTable(vec![spec(0)])));
        let request = Request::SetMemTable;
        let short = Refusal::PayloadSize { request, actual: 72, min: 104, max: MAX_PAYLOAD_BYTES };
        assert_eq!(table(3, 2), Err(short));
        assert!(table(32, 32).is_ok());
        assert_eq!(table(33, 33), Err(Refusal::RegionCount { request, count: 33 }));
        assert_eq!(table(u32::MAX, 0), Err(Refusal::RegionCount { request, count: u32::MAX }));
    }

    #[test]
    fn config_has_as_many_bytes_as_it_says() {
        let config = |size: u32, data: &[u8]| {
            parse(Request::GetConfig, &[u32s(&[4, size, 1]), data.to_vec()].concat())
        };
        assert_eq!(
            config(2, &[8, 9]),
            Ok(Payload::Config { offset: 4, flags: 1, data: vec![8, 9] })
        );
        let request = Request::GetConfig;
        for (size, data, expected) in [(3, &[8, 9][..], 15), (1, &[8, 9], 13), (4, &[], 16)] {
            let actual = 12 + data.len();
            let wrong = Refusal::PayloadSize { request, actual, min: expected, max: expected };
            assert_eq!(config(size, data), Err(wrong));
        }
        assert!(config(u32::MAX, &[]).is_err());
    }

    #[test]
    fn every_request_refuses_sizes_that_it_cannot_have() {
        for request in (1..=44).filter_map(Request::from_id) {
            let sizes = row(request).payload.sizes();
            for actual in 0..=64 {
                let parsed = parse(request, &vec![0; actual]);
                if sizes.contains(&actual) {
                    // Zeros are a table of no regions; a configuration space message says how long it is.
                    let is_config = row(request).payload == Layout::Config;
                    assert_eq!(parsed.is_ok(), !is_config || actual == 12, "{request} {actual}");
                } else {
                    let wrong = Refusal::PayloadSize {
                        request,
                        actual,
                        min: *sizes.start(),
                        max: *sizes.end(),
                    };
                    assert_eq!(parsed, Err(wrong));
                }
            }
        }
    }

    #[test]
    fn header_survives_a_round_trip() {
        let header = Header::reply(24, 68);
        assert_eq!(header.to_bytes().to_vec(), u32s(&[24, 0x5, 68]));
        assert_eq!(Header::parse(header.to_bytes()), Some(header));
        assert!(header.is_reply() && !header.need_reply() && header.version().is_ok());
        assert_eq!(Header { flags: 0xa, ..header }.version(), Err(2));
        assert!(Header { flags: 0x9, ..header }.need_reply());
    }
}

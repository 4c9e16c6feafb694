//! A block request, from a chain's bytes to operations and a status byte.
//!
//! Contract: [`Request::parse`] yields a request that cannot be wrong: known, inside the disk,
//! allowed on it, its segments copied out of guest memory. What cannot be parsed is a [`Refusal`],
//! which has a status byte. What it does not do: execute anything ([`crate::device`]).

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]
#![deny(clippy::arithmetic_side_effects)]

use common::virtqueue::Buffers;

use crate::config::VIRTIO_BLK_ID_BYTES;
use crate::disk::{Disk, SECTOR_BYTES};

// VIRTIO 1.3, 5.2.6: request types.
const VIRTIO_BLK_T_IN: u32 = 0;
const VIRTIO_BLK_T_OUT: u32 = 1;
const VIRTIO_BLK_T_FLUSH: u32 = 4;
const VIRTIO_BLK_T_GET_ID: u32 = 8;
const VIRTIO_BLK_T_DISCARD: u32 = 11;
const VIRTIO_BLK_T_WRITE_ZEROES: u32 = 13;

/// VIRTIO 1.3, 5.2.6: the range may be unmapped.
const SEGMENT_FLAG_UNMAP: u32 = 1;
/// VIRTIO 1.3, 5.2.6.2: a discard with the unmap flag MUST be answered with UNSUPP, as one with an
/// unknown flag.
const NO_FLAGS: u32 = 0;

/// Type, reserved, sector.
pub(crate) const HEADER_BYTES: usize = 16;
/// A discard or write-zeroes segment: sector, number of sectors, flags.
const SEGMENT_BYTES: usize = 16;

/// VIRTIO 1.3, 5.2.6: the last byte of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    /// `VIRTIO_BLK_S_OK`
    Ok = 0,
    /// `VIRTIO_BLK_S_IOERR`
    IoError = 1,
    /// `VIRTIO_BLK_S_UNSUPP`
    Unsupported = 2,
}

/// What a request is counted as, in the order of [`KINDS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    GetId,
    Other,
}

/// The names of [`Kind`]s in metrics and logs.
pub(crate) const KINDS: &[&str] =
    &["read", "write", "flush", "discard", "write_zeroes", "get_id", "other"];

impl Kind {
    /// As metrics and logs call it.
    pub(crate) fn name(self) -> &'static str {
        KINDS.get(self as usize).copied().unwrap_or("other")
    }
}

/// A range of the disk to discard or to zero, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) offset: u64,
    pub(crate) len_bytes: u64,
    /// The blocks may be given back to the host.
    pub(crate) unmap: bool,
}

/// A request that can be executed. Offsets are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Read {
        offset: u64,
    },
    Write {
        offset: u64,
    },
    Flush,
    GetId,
    /// The segments are in the list that [`Request::parse`] filled.
    Discard,
    /// Likewise.
    WriteZeroes,
}

impl Request {
    pub(crate) fn kind(self) -> Kind {
        match self {
            Self::Read { .. } => Kind::Read,
            Self::Write { .. } => Kind::Write,
            Self::Flush => Kind::Flush,
            Self::GetId => Kind::GetId,
            Self::Discard => Kind::Discard,
            Self::WriteZeroes => Kind::WriteZeroes,
        }
    }
}

/// Why a request is answered at once, and how it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) kind: Kind,
    pub(crate) status: Status,
}

impl Request {
    /// Parses the request whose readable bytes are `readable`, and which has room for `room_bytes`
    /// of data before its status byte; segments go to `segments`.
    pub(crate) fn parse(
        readable: Buffers<'_>,
        room_bytes: usize,
        disk: &Disk,
        segments: &mut Vec<Segment>,
    ) -> Result<Self, Refusal> {
        let mut header = [0; HEADER_BYTES];
        if readable.read(&mut header) != HEADER_BYTES {
            return Err(Refusal { kind: Kind::Other, status: Status::IoError });
        }
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let data = readable.slice(HEADER_BYTES, usize::MAX);
        let refuse = |kind, status| Err(Refusal { kind, status });
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => match range(disk, sector, room_bytes) {
                Some(offset) => Ok(Self::Read { offset }),
                None => refuse(Kind::Read, Status::IoError),
            },
            // VIRTIO 1.3, 5.2.6.2: with RO a write MUST fail with IOERR and write nothing.
            VIRTIO_BLK_T_OUT => match range(disk, sector, data.len_bytes()) {
                Some(offset) if !disk.read_only() => Ok(Self::Write { offset }),
                _ => refuse(Kind::Write, Status::IoError),
            },
            VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            VIRTIO_BLK_T_GET_ID if room_bytes >= VIRTIO_BLK_ID_BYTES => Ok(Self::GetId),
            VIRTIO_BLK_T_GET_ID => refuse(Kind::GetId, Status::IoError),
            VIRTIO_BLK_T_DISCARD => match disk.geometry().discard {
                Some(limits) => {
                    let limits = (limits.max_segments, limits.max_sectors);
                    parse_segments(data, disk, limits, NO_FLAGS, segments)
                        .map(|()| Self::Discard)
                        .or_else(|status| refuse(Kind::Discard, status))
                }
                None => refuse(Kind::Discard, Status::Unsupported),
            },
            VIRTIO_BLK_T_WRITE_ZEROES => match disk.geometry().write_zeroes {
                Some(limits) => {
                    let limits = (limits.max_segments, limits.max_sectors);
                    parse_segments(data, disk, limits, SEGMENT_FLAG_UNMAP, segments)
                        .map(|()| Self::WriteZeroes)
                        .or_else(|status| refuse(Kind::WriteZeroes, status))
                }
                None => refuse(Kind::WriteZeroes, Status::Unsupported),
            },
            // VIRTIO 1.3, 5.2.6.2: an unknown type MUST be answered with UNSUPP.
            _ => refuse(Kind::Other, Status::Unsupported),
        }
    }
}

/// Byte offset of a range that is whole sectors and inside the disk.
fn range(disk: &Disk, sector: u64, len_bytes: usize) -> Option<u64> {
    let len_bytes = u64::try_from(len_bytes).ok()?;
    let whole = len_bytes.is_multiple_of(SECTOR_BYTES);
    let end = sector.checked_add(len_bytes.checked_div(SECTOR_BYTES)?)?;
    (whole && end <= disk.capacity_sectors()).then(|| sector.checked_mul(SECTOR_BYTES)).flatten()
}

/// Copies the segments out of guest memory and checks each; (segments, sectors) are at most
/// `limits`, and flags are none but `known_flags`.
fn parse_segments(
    data: Buffers<'_>,
    disk: &Disk,
    limits: (u32, u32),
    known_flags: u32,
    segments: &mut Vec<Segment>,
) -> Result<(), Status> {
    let (max_segments, max_sectors) = limits;
    segments.clear();
    let count = data.len_bytes().checked_div(SEGMENT_BYTES).unwrap_or(0);
    let whole = data.len_bytes().is_multiple_of(SEGMENT_BYTES);
    if !whole || count == 0 || count > usize::try_from(max_segments).unwrap_or(usize::MAX) {
        return Err(Status::IoError);
    }
    let mut rest = data;
    let mut all_fit = true;
    for _ in 0..count {
        let mut bytes = [0; SEGMENT_BYTES];
        rest.read(&mut bytes);
        rest = rest.slice(SEGMENT_BYTES, usize::MAX);
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = bytes;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes(flags);
        // VIRTIO 1.3, 5.2.6.2: unknown flags MUST be answered with UNSUPP, whatever else is wrong,
        // here or in another segment.
        if flags & !known_flags != 0 {
            return Err(Status::Unsupported);
        }
        let len_bytes = u64::from(sectors).saturating_mul(SECTOR_BYTES);
        let offset = usize::try_from(len_bytes).ok().and_then(|len| range(disk, sector, len));
        match offset {
            // Nothing to do, and the host would take it for a mistake.
            Some(_) if sectors == 0 => {}
            Some(offset) if sectors <= max_sectors => {
                segments.push(Segment { offset, len_bytes, unmap: flags != 0 });
            }
            _ => all_fit = false,
        }
    }
    if all_fit { Ok(()) } else { Err(Status::IoError) }
}

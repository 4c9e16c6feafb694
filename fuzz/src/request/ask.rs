//! A block request as bytes, and what VIRTIO 1.3, 5.2.6 says of it: read from the text, not from the device.

use crate::script::Script;

pub(super) const SECTOR: usize = 512;
/// Bytes of memory for one request, its indirect table and the gaps between its pieces included.
pub(super) const PLACE_BYTES: u64 = 0x2000;
/// Most sectors of one transfer.
const SECTORS_MAX: usize = 6;
/// Most pieces of a readable or writable part.
const PIECES_MAX: usize = 4;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// What a driver knows of the disk, from the configuration space and the feature bits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts {
    pub(super) sectors: u64,
    pub(super) read_only: bool,
    /// Most segments and sectors of a segment, where it is offered.
    pub(super) discard: Option<(u32, u32)>,
    pub(super) write_zeroes: Option<(u32, u32)>,
}

/// A range of the disk, in bytes.
pub(super) type Range = std::ops::Range<u64>;

/// What must become of a request.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Due {
    /// It has no room for a status: the ring breaks.
    Broken,
    /// It is answered with this status, and nothing is done.
    Refused(u8),
    Read(Range),
    Write(Range),
    Flush,
    GetId,
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
}

/// The bytes that a driver sends, and how many it leaves room for.
#[derive(Clone, Debug)]
pub(super) struct Ask {
    pub(super) sent: Vec<u8>,
    pub(super) room_bytes: usize,
    pub(super) due: Due,
}

impl Ask {
    /// A request: mostly one that can be served, and any other.
    pub(super) fn new(script: &mut Script<'_>, facts: &Facts) -> Self {
        const TYPES: [u32; 6] = [IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES];
        let choice = script.u8();
        let kind = match TYPES.get(usize::from(choice & 7)) {
            Some(kind) => *kind,
            None => script.u32(),
        };
        let mut sent = kind.to_le_bytes().to_vec();
        sent.extend([0; 4]);
        sent.extend(sector(script).to_le_bytes());
        let count = script.below(SECTORS_MAX + 1);
        let mut room_bytes = 1;
        match kind {
            IN => room_bytes += count * SECTOR,
            OUT => sent.extend((0..count * SECTOR).map(|at| (at / 8 + at % 8) as u8)),
            GET_ID => room_bytes += 20,
            _ => (0..count).for_each(|_| sent.extend(segment(script))),
        }
        // Three bits say that something is missing, or too much.
        if choice & 0x20 != 0 {
            let len = sent.len().saturating_sub(script.below(24));
            sent.truncate(len);
        }
        if choice & 0x40 != 0 {
            sent.extend(vec![0xee; script.below(24)]);
        }
        if choice & 0x80 != 0 {
            room_bytes = (room_bytes + script.below(24)).saturating_sub(8);
        }
        let due = facts.due(&sent, room_bytes);
        Self { sent, room_bytes, due }
    }
}

/// Where a range begins: mostly on the disk.
fn sector(script: &mut Script<'_>) -> u64 {
    match script.u8() {
        0xff => script.u64(),
        0xfe => u64::MAX / SECTOR as u64,
        byte => u64::from(byte & 0x1f),
    }
}

fn segment(script: &mut Script<'_>) -> Vec<u8> {
    let first = sector(script);
    let count = match script.u8() {
        0xff => script.u32(),
        byte => u32::from(byte & 7),
    };
    let flags = match script.u8() {
        0xff => script.u32(),
        byte => u32::from(byte & 3),
    };
    let mut bytes = first.to_le_bytes().to_vec();
    bytes.extend(count.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

impl Facts {
    fn due(&self, sent: &[u8], room_bytes: usize) -> Due {
        if room_bytes == 0 {
            return Due::Broken;
        }
        let Some((header, data)) = sent.split_first_chunk::<16>() else {
            return Due::Refused(IO_ERROR);
        };
        let number = |from: usize| u32::from_le_bytes([0, 1, 2, 3].map(|at| header[from + at]));
        let sector = u64::from(number(8)) | u64::from(number(12)) << 32;
        let range = |len| self.range(sector, len).ok_or(IO_ERROR);
        let due = match number(0) {
            IN => range(room_bytes as u64 - 1).map(Due::Read),
            // 5.2.6.2: with RO, a write fails with IOERR.
            OUT if self.read_only => Err(IO_ERROR),
            OUT => range(data.len() as u64).map(Due::Write),
            FLUSH => Ok(Due::Flush),
            GET_ID if room_bytes > 20 => Ok(Due::GetId),
            GET_ID => Err(IO_ERROR),
            DISCARD => self.segments(data, self.discard, 0).map(Due::Discard),
            WRITE_ZEROES => self.segments(data, self.write_zeroes, 1).map(Due::WriteZeroes),
            // 5.2.6.2: what is not known is UNSUPP.
            _ => Err(UNSUPPORTED),
        };
        due.unwrap_or_else(Due::Refused)
    }

    /// The range of so many bytes from a sector on, if it is whole sectors of the disk.
    fn range(&self, sector: u64, len_bytes: u64) -> Option<Range> {
        let size = SECTOR as u128;
        let (first, len) = (u128::from(sector) * size, u128::from(len_bytes));
        let fits = len % size == 0 && first + len <= u128::from(self.sectors) * size;
        fits.then(|| first as u64..(first + len) as u64)
    }

    fn segments(
        &self,
        data: &[u8],
        limits: Option<(u32, u32)>,
        known_flags: u32,
    ) -> Result<Vec<Range>, u8> {
        let (segments_max, sectors_max) = limits.ok_or(UNSUPPORTED)?;
        let (segments, rest) = data.as_chunks::<16>();
        if !rest.is_empty() || segments.is_empty() || segments.len() > segments_max as usize {
            return Err(IO_ERROR);
        }
        let fields = segments.iter().map(|segment| {
            let number =
                |from: usize| u32::from_le_bytes([0, 1, 2, 3].map(|at| segment[from + at]));
            (u64::from(number(0)) | u64::from(number(4)) << 32, number(8), number(12))
        });
        let fields: Vec<(u64, u32, u32)> = fields.collect();
        // 5.2.6.2: an unknown flag is UNSUPP, whatever else is wrong.
        if fields.iter().any(|(.., flags)| flags & !known_flags != 0) {
            return Err(UNSUPPORTED);
        }
        let range = |(first, count, _): (u64, u32, u32)| {
            let range = self.range(first, u64::from(count) * SECTOR as u64);
            range.filter(|_| count <= sectors_max).ok_or(IO_ERROR)
        };
        fields.into_iter().map(range).collect()
    }
}

/// Where the pieces of so many bytes lie, from `at` on.
pub(super) fn pieces(len_bytes: usize, at: &mut u64, script: &mut Script<'_>) -> Vec<(u64, u32)> {
    let mut left = len_bytes as u64;
    let mut pieces = Vec::new();
    while left > 0 {
        let choice = u64::from(script.u8());
        let is_last = choice == 0 || pieces.len() + 1 == PIECES_MAX;
        // Gaps of a few bytes, so that nothing is aligned.
        *at += choice >> 6;
        let piece = if is_last { left } else { left.min(1 + (choice & 0x3f) * 16) };
        pieces.push((*at, piece as u32));
        *at += piece;
        left -= piece;
    }
    pieces
}

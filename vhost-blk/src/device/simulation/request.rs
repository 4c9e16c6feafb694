//! A request as a guest makes it: what it asks for, how its bytes lie in memory, and what the answer
//! must be.
//!
//! Contract: a request has a place in memory for itself, filled with a pattern, in which its buffers
//! lie cut into pieces of any length with gaps between them; an answer may change what is
//! device-writable there and nothing else.

use std::fmt;

use common::simulation::{Buffer, Guest, Random};

use super::ledger::Mark;
use super::mode::Scale;
use super::storage::SECTOR;

/// Most pieces that bytes are cut into.
const PIECES_MAX: usize = 4;
/// Longest gap between pieces, in bytes.
const GAP_MAX: u64 = 100;
/// Bytes of a request's header.
const HEADER: usize = 16;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// A range of sectors.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) first: usize,
    pub(super) count: usize,
}

impl Span {
    fn any(scale: Scale, random: &mut Random) -> Self {
        let count = match random.within(0..4) {
            0 => random.index(scale.request_sectors + 1),
            _ => random.index(9),
        };
        let first = random.index(scale.disk_sectors - count + 1);
        // What begins at a block's start is what direct I/O likes.
        Self { first: if random.once_in(2) { first / 8 * 8 } else { first }, count }
    }

    pub(super) fn sectors(self) -> std::ops::Range<usize> {
        self.first..self.first + self.count
    }
}

/// What a request asks for.
#[derive(Clone, Debug)]
pub(super) enum Ask {
    Read(Span),
    Write(Span, Mark),
    Flush,
    Discard(Vec<Span>),
    /// Each with whether it may be unmapped.
    WriteZeroes(Vec<(Span, bool)>),
    GetId,
    /// Something that is refused with this status.
    Refused(u8),
    /// No request, for it has no room for a status: it breaks the ring.
    Nothing,
}

/// The bytes of a request, before they are laid out.
struct Message {
    sent: Vec<u8>,
    room_bytes: usize,
}

/// A request in a guest's memory.
pub(super) struct GuestRequest {
    pub(super) ask: Ask,
    /// Where its memory is.
    pub(super) place: u64,
    readable: Vec<Buffer>,
    writable: Vec<Buffer>,
    /// The place's bytes as the device found them.
    before: Vec<u8>,
    /// When it was made.
    pub(super) began: u64,
    /// One of its operations failed, or a sync for it and others.
    pub(super) failed: bool,
    /// When the last of its operations has ended, syncs aside.
    pub(super) ended: Option<u64>,
    /// Bytes that its operations have read for it.
    pub(super) moved: usize,
}

/// Without the bytes, which are many.
impl fmt::Debug for GuestRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ask, readable, writable, began, failed, moved, .. } = self;
        write!(f, "{ask:?} of {began}: {readable:x?} {writable:x?}, failed {failed}, {moved} moved")
    }
}

/// An answer, taken apart.
pub(super) struct Answer {
    pub(super) status: u8,
    /// What lies before the status.
    pub(super) data: Vec<u8>,
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

fn segments(spans: impl Iterator<Item = (Span, u32)>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (span, flags) in spans {
        bytes.extend((span.first as u64).to_le_bytes());
        bytes.extend((span.count as u32).to_le_bytes());
        bytes.extend(flags.to_le_bytes());
    }
    bytes
}

impl Ask {
    /// Any request to a disk of this length; writes leave pattern `number`.
    pub(super) fn any(number: u32, scale: Scale, random: &mut Random) -> Self {
        let span = Span::any(scale, random);
        let spans = |random: &mut Random| -> Vec<Span> {
            (0..random.within(1..4)).map(|_| Span::any(scale, random)).collect()
        };
        if random.once_in(300) {
            return Self::Nothing;
        }
        match random.within(0..24) {
            0..8 => Self::Write(span, Mark::Pattern(number)),
            8..15 => Self::Read(span),
            15..19 => Self::Flush,
            19 => Self::Discard(spans(random)),
            20 | 21 => Self::WriteZeroes(
                spans(random).into_iter().map(|span| (span, random.once_in(2))).collect(),
            ),
            22 => Self::GetId,
            _ => Self::Refused(0),
        }
    }

    fn message(&mut self, scale: Scale, random: &mut Random) -> Message {
        // VIRTIO 1.3, 5.2.6: the last writable byte is the status, whatever lies before it.
        let mut room_bytes = if random.once_in(4) { random.within(1..6) as usize } else { 1 };
        let sent = match self {
            Self::Read(span) => {
                room_bytes = span.count * SECTOR + 1;
                header(0, span.first as u64)
            }
            Self::Write(span, mark) => {
                let mut bytes = header(1, span.first as u64);
                span.sectors().for_each(|sector| bytes.extend(mark.content(sector)));
                bytes
            }
            Self::Flush => header(4, random.pick(&[0, u64::MAX])),
            Self::Discard(spans) => {
                let segments = segments(spans.iter().map(|span| (*span, 0)));
                [header(11, 0), segments].concat()
            }
            Self::WriteZeroes(spans) => {
                let segments = spans.iter().map(|(span, unmap)| (*span, u32::from(*unmap)));
                [header(13, 0), self::segments(segments)].concat()
            }
            Self::GetId => {
                room_bytes = random.pick(&[21, 21, 30]);
                header(8, 0)
            }
            Self::Nothing => {
                room_bytes = 0;
                header(0, 0)
            }
            Self::Refused(status) => {
                let message = refused(scale.disk_sectors as u64, random);
                *status = message.1;
                room_bytes = message.2;
                message.0
            }
        };
        Message { sent, room_bytes }
    }
}

/// A request that cannot be served: its bytes, the status that says so, and its writable bytes.
fn refused(disk_sectors: u64, random: &mut Random) -> (Vec<u8>, u8, usize) {
    let far = random.pick(&[disk_sectors, disk_sectors + 7, u64::MAX, u64::MAX / 512]);
    let one = |first: u64, count: u32, flags: u32| {
        let mut bytes = first.to_le_bytes().to_vec();
        bytes.extend(count.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes
    };
    let data = vec![0xdd; SECTOR];
    match random.within(0..12) {
        0 => (header(0, far), IO_ERROR, SECTOR + 1),
        1 => (header(0, 0), IO_ERROR, SECTOR),
        2 => ([header(1, far), data].concat(), IO_ERROR, 1),
        3 => ([header(1, 0), data[1..].to_vec()].concat(), IO_ERROR, 1),
        4 => (header(random.pick(&[2, 3, 5, 99, 1 << 31]), 0), UNSUPPORTED, 1),
        5 => ([header(11, 0), one(0, 1, 1)].concat(), UNSUPPORTED, 1),
        6 => ([header(13, 0), one(0, 1, 2)].concat(), UNSUPPORTED, 1),
        7 => ([header(13, 0), one(0, 1, 0)[1..].to_vec()].concat(), IO_ERROR, 1),
        8 => ([header(13, 0), one(0, 1, 0), one(far, 1, 0)].concat(), IO_ERROR, 1),
        9 => (header(11, 0), IO_ERROR, 1),
        10 => (header(8, 0), IO_ERROR, 20),
        _ => (header(0, 0)[1..].to_vec(), IO_ERROR, 1),
    }
}

impl GuestRequest {
    /// Writes a request into its place.
    pub(super) fn lay_out(
        mut ask: Ask,
        place: u64,
        scale: Scale,
        (guest, random): (&Guest, &mut Random),
    ) -> Self {
        let Message { sent, room_bytes } = ask.message(scale, random);
        let alignment = random.pick(&[1, 512, 4096]);
        let mut at = place;
        let readable = pieces((HEADER, sent.len(), 0), alignment, &mut at, random);
        let writable = pieces((0, room_bytes, 1), alignment, &mut at, random);
        let len_bytes = (at + GAP_MAX - place) as usize;
        assert!(len_bytes as u64 <= scale.place_bytes, "a place has room for its pieces");
        guest.write(place, &vec![random.number() as u8 | 1; len_bytes]);
        let mut rest = sent.as_slice();
        for (at, len_bytes) in &readable {
            let (piece, later) = rest.split_at(*len_bytes as usize);
            guest.write(*at, piece);
            rest = later;
        }
        let before = guest.read(place, len_bytes);
        let (began, failed, ended, moved) = (0, false, None, 0);
        Self { ask, place, readable, writable, before, began, failed, ended, moved }
    }

    /// Whether it waited for a sync at this time, if it is answered when that has ended: nothing else
    /// that had ended by then is still to be answered.
    pub(super) fn waited_at(&self, submitted: u64) -> bool {
        match self.ended {
            Some(ended) => ended <= submitted,
            None => matches!(self.ask, Ask::Flush),
        }
    }

    /// An operation has read so many bytes of the disk from `offset` on; how many of them the
    /// request asked for and had not got.
    pub(super) fn has_read(&mut self, offset: u64, bytes: u32) -> u64 {
        let Ask::Read(span) = self.ask else { return 0 };
        let end = ((span.first + span.count) * SECTOR) as u64;
        let from = (span.first * SECTOR + self.moved) as u64;
        let got = (offset + u64::from(bytes)).min(end).saturating_sub(from);
        self.moved += got as usize;
        got
    }

    /// Its buffers, readable and writable.
    pub(super) fn buffers(&self) -> (&[Buffer], &[Buffer]) {
        (&self.readable, &self.writable)
    }

    /// Takes an answer apart: nothing but writable bytes has changed, and the status and length are
    /// what they must be.
    /// What is no request is given back without an answer: `None`.
    pub(super) fn answer(&self, written_bytes: u32, guest: &Guest) -> Option<Answer> {
        let after = guest.read(self.place, self.before.len());
        let mut data = Vec::new();
        let mut untouched = self.before.clone();
        for (at, len_bytes) in &self.writable {
            let from = (at - self.place) as usize;
            let range = from..from + *len_bytes as usize;
            data.extend_from_slice(&after[range.clone()]);
            untouched[range.clone()].copy_from_slice(&after[range]);
        }
        assert!(untouched == after, "bytes changed that are not device-writable: {self:?}");
        let Some(status) = data.pop() else {
            assert_eq!(written_bytes, 0, "the length of nothing");
            return None;
        };
        assert_eq!(status, self.status(), "the status of {self:?}");
        assert_eq!(written_bytes as usize, self.written(data.len()), "the length of {self:?}");
        Some(Answer { status, data })
    }

    fn status(&self) -> u8 {
        match self.ask {
            Ask::Refused(status) => status,
            _ if self.failed => IO_ERROR,
            _ => OK,
        }
    }

    /// Bytes that the device wrote from the first writable one on, where `room_bytes` lie before the
    /// status.
    fn written(&self, room_bytes: usize) -> usize {
        let filled = match self.ask {
            Ask::Read(_) => self.moved,
            Ask::GetId => 20,
            _ => 0,
        };
        if filled == room_bytes { room_bytes + 1 } else { filled }
    }
}

/// Cuts bytes into pieces with gaps between them, from `at` on. `lens`: the bytes in front that are a
/// piece of their own, all bytes, and those at the end, where the bytes between are whole sectors and
/// `alignment` is that of their pieces. Else the cuts are anywhere.
fn pieces(
    lens: (usize, usize, usize),
    alignment: u64,
    at: &mut u64,
    random: &mut Random,
) -> Vec<Buffer> {
    let (front, all, end) = lens;
    let middle = all.saturating_sub(front + end);
    if alignment == 1 || middle == 0 || !middle.is_multiple_of(SECTOR) {
        return cut(all as u64, 1, at, random);
    }
    let mut pieces = cut(front as u64, 1, at, random);
    let sectors = cut((middle / SECTOR) as u64, alignment, at, random);
    pieces.extend(sectors);
    pieces.extend(cut(end as u64, 1, at, random));
    pieces
}

/// Cuts so many bytes, or where there is an alignment, so many sectors.
fn cut(count: u64, alignment: u64, at: &mut u64, random: &mut Random) -> Vec<Buffer> {
    let unit = if alignment == 1 { 1 } else { SECTOR as u64 };
    let mut left = count;
    let mut pieces = Vec::new();
    while left > 0 {
        *at = (*at + random.within(1..GAP_MAX)).next_multiple_of(alignment);
        let is_last = pieces.len() + 1 == PIECES_MAX || random.once_in(3);
        let piece = if is_last { left } else { random.within(1..left + 1) };
        pieces.push((*at, (piece * unit) as u32));
        *at += piece * unit;
        left -= piece;
    }
    pieces
}

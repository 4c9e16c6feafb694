//! Discards and zeroing, from a request's segments to operations.
//!
//! Two things stand between a segment and one call into the host. A block device zeroes and
//! discards whole blocks only, and direct I/O writes whole units only: the *edges* of a segment are
//! zeroed by writing zeros through the host's page cache, and left alone by a discard, which is a
//! hint. And where the host can neither deallocate nor zero a range, zeros are written.
//!
//! Contract: [`Progress::next`] names one [`Part`] after another until the segments are through;
//! the caller says what became of each. What it does not do: make operations or decide on errors.

use common::engine::{FileIndex, Zeroing};

use crate::disk::{IMAGE, Range};
use crate::request::Segment;

/// How the disk's file is zeroed. Blocks are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ZeroBlocks {
    /// What the host deallocates or zeroes in one call is a multiple of this.
    pub(crate) called: u64,
    /// What zeros are written to through [`IMAGE`] is a multiple of this.
    pub(crate) written: u64,
    /// Where the zeros of an edge are written.
    pub(crate) edge: FileIndex,
}

/// One operation's worth of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) file: FileIndex,
    pub(crate) range: Range,
    pub(crate) zeroing: Zeroing,
}

/// How far a request is through its segments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    segment: usize,
    /// Bytes of the segment that are through.
    from: u64,
    /// The host can do it in no other way: zeros are written to the rest of the segment.
    writes: bool,
}

impl Progress {
    /// The next part; `None` when the segments are through.
    pub(crate) fn next(
        &mut self,
        blocks: ZeroBlocks,
        segments: &[Segment],
        discards: bool,
    ) -> Option<Part> {
        while let Some(segment) = segments.get(self.segment) {
            let (offset, len_bytes) = (segment.offset + self.from, segment.len_bytes - self.from);
            if len_bytes == 0 {
                *self = Self { segment: self.segment + 1, ..Self::default() };
                continue;
            }
            let part = |file, len_bytes, zeroing| {
                Some(Part { file, range: Range { offset, len_bytes }, zeroing })
            };
            let wanted = match (self.writes, discards || segment.unmap) {
                (true, _) => Zeroing::Write,
                (false, true) => Zeroing::Deallocate,
                // VIRTIO 1.3, 5.2.6.2: without the unmap flag the range MUST stay allocated.
                (false, false) => Zeroing::Keep,
            };
            let block = if self.writes { blocks.written } else { blocks.called };
            let edge = match (Range { offset, len_bytes }).whole_blocks(block) {
                (0, 0) => len_bytes,
                (0, whole) => return part(IMAGE, whole, wanted),
                (before, _) => before,
            };
            if !discards {
                return part(blocks.edge, edge, Zeroing::Write);
            }
            self.from += edge;
        }
        None
    }

    /// So many bytes more are through.
    pub(crate) fn advance(&mut self, len_bytes: u64) {
        self.from += len_bytes;
    }

    /// The host cannot do what [`next`](Self::next) named.
    pub(crate) fn fall_back_to_writing(&mut self) {
        self.writes = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::BUFFERED;

    const FILE: ZeroBlocks = ZeroBlocks { called: 1, written: 1, edge: IMAGE };
    const DEVICE: ZeroBlocks = ZeroBlocks { called: 4096, written: 4096, edge: BUFFERED };

    fn segment(offset: u64, len_bytes: u64, unmap: bool) -> Segment {
        Segment { offset, len_bytes, unmap }
    }

    fn part(file: FileIndex, offset: u64, len_bytes: u64, zeroing: Zeroing) -> Part {
        Part { file, range: Range { offset, len_bytes }, zeroing }
    }

    fn all(blocks: ZeroBlocks, segments: &[Segment], discards: bool, writes: bool) -> Vec<Part> {
        let mut progress = Progress::default();
        let mut parts = Vec::new();
        while let Some(part) = {
            if writes {
                progress.fall_back_to_writing();
            }
            progress.next(blocks, segments, discards)
        } {
            progress.advance(part.range.len_bytes);
            parts.push(part);
        }
        parts
    }

    #[test]
    fn segment_of_a_file_is_one_call() {
        let segments = [segment(512, 5 * 512, false), segment(8192, 512, true)];
        assert_eq!(
            all(FILE, &segments, false, false),
            [part(IMAGE, 512, 5 * 512, Zeroing::Keep), part(IMAGE, 8192, 512, Zeroing::Deallocate)]
        );
        assert_eq!(
            all(FILE, &segments[..1], true, false),
            [part(IMAGE, 512, 5 * 512, Zeroing::Deallocate)]
        );
        assert_eq!(
            all(FILE, &segments[..1], false, true),
            [part(IMAGE, 512, 5 * 512, Zeroing::Write)]
        );
    }

    #[test]
    fn edges_that_a_device_does_not_take_are_written() {
        let segments = [segment(3584, 512 + 8192 + 1024, true), segment(512, 1024, false)];
        assert_eq!(
            all(DEVICE, &segments, false, false),
            [
                part(BUFFERED, 3584, 512, Zeroing::Write),
                part(IMAGE, 4096, 8192, Zeroing::Deallocate),
                part(BUFFERED, 12_288, 1024, Zeroing::Write),
                part(BUFFERED, 512, 1024, Zeroing::Write),
            ]
        );
        assert_eq!(
            all(DEVICE, &segments[..1], false, true)[1],
            part(IMAGE, 4096, 8192, Zeroing::Write)
        );
    }

    #[test]
    fn edges_of_a_discard_are_left_alone() {
        let segments = [segment(512, 1024, false), segment(3584, 512 + 4096 + 512, false)];
        assert_eq!(
            all(DEVICE, &segments, true, false),
            [part(IMAGE, 4096, 4096, Zeroing::Deallocate)]
        );
    }
}

//! Frames in a stream of bytes: each behind its length, which is 32 bits, big endian (QEMU's `-netdev stream`).
//!
//! Contract: no system call, no buffer. [`Inbound`] says what the next read is to take, is told how much it took, and copes
//! with reads that end anywhere. One read takes the rest of a frame *and* the length of the next, so that a frame costs one
//! system call. What is written in part is for [`Outbox`](crate::outbox::Outbox).

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use thiserror::Error;

/// Bytes of a length.
pub(crate) const PREFIX_BYTES: usize = 4;
/// The shortest frame: an Ethernet header.
pub(crate) const FRAME_BYTES_MIN: u32 = 14;
/// The longest frame: the largest IP datagram behind an Ethernet header with a VLAN tag.
pub(crate) const FRAME_BYTES_MAX: u32 = 65535 + 18;
/// Why a connection is of no use any more. Nothing behind it can be told apart.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub(crate) enum Fault {
    #[error(
        "the peer sent a frame of {0} bytes: frames have {FRAME_BYTES_MIN} to {FRAME_BYTES_MAX}"
    )]
    Length(u32),
    #[error("the peer has closed the connection")]
    Ended,
}

/// What the next read is to take: the rest of the frame, then the next length. Neither is there without bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Want {
    /// Bytes of the frame that are there already, from earlier reads.
    pub(crate) frame_received_bytes: usize,
    /// Bytes of the frame that are to come; zero while its length is unknown.
    pub(crate) frame_rest_bytes: usize,
    /// Bytes of the length behind it.
    pub(crate) prefix_bytes: usize,
}

/// What a read has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// No frame is whole yet.
    Partial,
    /// The frame is whole, and this long.
    Frame { len_bytes: usize },
}

/// The frames of a connection that come in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Inbound {
    /// Of the frame that is being read; none while its length is not.
    frame: Option<Frame>,
    /// The first bytes of a length, the others zero.
    prefix: [u8; PREFIX_BYTES],
    prefix_received: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Frame {
    len_bytes: usize,
    received_bytes: usize,
}

impl Inbound {
    /// What the next read is to take.
    ///
    /// # Errors
    /// The length of the next frame cannot be one.
    pub(crate) fn wants(&mut self) -> Result<Want, Fault> {
        if self.frame.is_none() && self.prefix_received == PREFIX_BYTES {
            let len = u32::from_be_bytes(self.prefix);
            if !(FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&len) {
                return Err(Fault::Length(len));
            }
            let len_bytes = usize::try_from(len).unwrap_or(usize::MAX);
            self.frame = Some(Frame { len_bytes, received_bytes: 0 });
            self.prefix_received = 0;
        }
        let (received, rest) = self.frame.map_or((0, 0), |frame| {
            (frame.received_bytes, frame.len_bytes.saturating_sub(frame.received_bytes))
        });
        Ok(Want {
            frame_received_bytes: received,
            frame_rest_bytes: rest,
            prefix_bytes: PREFIX_BYTES.saturating_sub(self.prefix_received),
        })
    }

    /// A read as [wanted](Self::wants) took `len_bytes`; `prefix` is where the length was read to, from its first byte
    /// that was wanted on.
    ///
    /// # Errors
    /// It took nothing: the peer has closed the connection.
    pub(crate) fn received(&mut self, len_bytes: usize, prefix: &[u8]) -> Result<Progress, Fault> {
        if len_bytes == 0 {
            return Err(Fault::Ended);
        }
        let rest =
            self.frame.map_or(0, |frame| frame.len_bytes.saturating_sub(frame.received_bytes));
        let of_frame = len_bytes.min(rest);
        let of_prefix = len_bytes.saturating_sub(of_frame);
        for (into, from) in
            self.prefix.iter_mut().skip(self.prefix_received).zip(prefix.iter().take(of_prefix))
        {
            *into = *from;
        }
        self.prefix_received = self.prefix_received.saturating_add(of_prefix).min(PREFIX_BYTES);
        match &mut self.frame {
            None => Ok(Progress::Partial),
            Some(frame) if of_frame < rest => {
                frame.received_bytes = frame.received_bytes.saturating_add(of_frame);
                Ok(Progress::Partial)
            }
            Some(frame) => {
                let len_bytes = frame.len_bytes;
                self.frame = None;
                Ok(Progress::Frame { len_bytes })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::{Fault, Inbound, PREFIX_BYTES, Progress, Want};

    fn prefix(len_bytes: usize) -> [u8; PREFIX_BYTES] {
        u32::try_from(len_bytes).unwrap().to_be_bytes()
    }

    fn len_bytes(want: &Want) -> usize {
        want.frame_rest_bytes.saturating_add(want.prefix_bytes)
    }

    /// Reads a stream in pieces of these lengths, each at most; gives the frames that are whole, and how it ended.
    fn read(mut stream: &[u8], pieces: &[usize]) -> (Vec<Vec<u8>>, Fault) {
        let (mut inbound, mut frames, mut frame) = (Inbound::default(), Vec::new(), Vec::new());
        for piece in pieces.iter().copied().cycle() {
            let want = match inbound.wants() {
                Ok(want) => want,
                Err(fault) => return (frames, fault),
            };
            assert_eq!(want.frame_received_bytes, frame.len());
            assert_ne!(len_bytes(&want), 0);
            let (now, later) = stream.split_at(piece.min(len_bytes(&want)).min(stream.len()));
            stream = later;
            let (of_frame, of_prefix) = now.split_at(now.len().min(want.frame_rest_bytes));
            frame.extend_from_slice(of_frame);
            // As in a buffer that has been used before.
            let mut area = [0xee; PREFIX_BYTES];
            area[..of_prefix.len()].copy_from_slice(of_prefix);
            match inbound.received(now.len(), &area) {
                Ok(Progress::Partial) => {}
                Ok(Progress::Frame { len_bytes }) => {
                    assert_eq!(len_bytes, frame.len());
                    frames.push(std::mem::take(&mut frame));
                }
                Err(fault) => return (frames, fault),
            }
        }
        unreachable!("the pieces never end");
    }

    fn stream_of(frames: &[Vec<u8>]) -> Vec<u8> {
        frames.iter().flat_map(|frame| [&prefix(frame.len())[..], frame].concat()).collect()
    }

    #[test]
    fn frame_costs_one_read() {
        let mut inbound = Inbound::default();
        assert_eq!(len_bytes(&inbound.wants().unwrap()), 4);
        assert_eq!(inbound.received(4, &[0, 0, 0, 60]), Ok(Progress::Partial));
        for _ in 0..3 {
            let want = inbound.wants().unwrap();
            assert_eq!((want.frame_rest_bytes, want.prefix_bytes), (60, 4));
            let progress = inbound.received(64, &[0, 0, 0, 60]);
            assert_eq!(progress, Ok(Progress::Frame { len_bytes: 60 }));
        }
    }

    #[test]
    fn length_that_no_frame_has_ends_the_connection_behind_the_last_good_one() {
        for len in [0, 13, 65554, u32::MAX] {
            let mut stream = stream_of(&[vec![7; 14], vec![8; 65553]]);
            stream.extend(len.to_be_bytes());
            stream.extend([9; 100]);
            let (frames, fault) = read(&stream, &[100_000]);
            assert_eq!((frames.len(), fault), (2, Fault::Length(len)));
        }
    }

    #[test]
    fn frame_that_is_cut_off_is_none() {
        let stream = stream_of(&[vec![7; 14], vec![8; 20]]);
        let (frames, fault) = read(&stream[..stream.len() - 1], &[3]);
        assert_eq!((frames.len(), fault), (1, Fault::Ended));
    }

    fn frames() -> impl Strategy<Value = Vec<Vec<u8>>> {
        vec(vec(any::<u8>(), 14..200), 0..20)
    }

    proptest! {
        #[test]
        fn any_split_of_a_stream_yields_the_same_frames(
            frames in frames(),
            pieces in vec(1_usize..50, 1..20),
        ) {
            prop_assert_eq!(read(&stream_of(&frames), &pieces), (frames, Fault::Ended));
        }
    }
}

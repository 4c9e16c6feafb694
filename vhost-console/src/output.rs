//! Transmitting: what the guest writes to a port goes to its transcript.
//!
//! Contract: a chain is copied, whole, and then used, in the same turn: a driver of a console looks for the used entry and does
//! nothing else meanwhile. Where a keeper of the transcript is behind, the rest of the chain waits for it, and so do those
//! that follow, in the ring. If the ring stops in the middle of a chain, that is retracted, and the successor goes on where
//! it was.

use std::sync::Arc;

use common::device::{Account, QueueIo};
use common::virtqueue::Chain;

use crate::device::{Kind, Shared, room_channel};
use crate::drops::Drop;
use crate::port::Port;
use crate::ringer::Ringer;
use crate::transcript::{Author, ChainId};

/// What is copied in one turn, so that other rings, and the end of this one, wait no longer than a few milliseconds: all
/// chains of a turn, of a driver that fills each with the 32 KiB that Linux writes at most.
const TURN_BYTES: usize = 8 << 20;

/// The transmit queue of a port.
pub(crate) struct Transmitter {
    shared: Arc<Shared>,
    port: u16,
    ringer: Ringer,
    author: Option<Author>,
    /// A chain that is in the transcript in part.
    begun: Option<Chain>,
}

impl Transmitter {
    pub(crate) fn new(shared: Arc<Shared>, port: u16) -> Self {
        let author = shared.ports().get(usize::from(port)).map(Port::take_author);
        Self { shared, port, ringer: Ringer::new(), author, begun: None }
    }

    pub(crate) fn process(&mut self, io: &mut QueueIo<'_>) {
        let Self { shared, port: index, ringer, author, begun } = self;
        let (Some(port), Some(author)) = (shared.ports().get(usize::from(*index)), author) else {
            return;
        };
        let mut has_news = false;
        for byte in port.take_emergency() {
            has_news |= author.append_byte(port.transcript(), byte);
        }
        let mut left = TURN_BYTES;
        loop {
            if left == 0 {
                io.again();
                break;
            }
            if !port.has_room() {
                let (bell, channel) = (port.room_bell(), room_channel(*index));
                // Those who are to make room must hear of what there is first.
                if std::mem::take(&mut has_news) {
                    ringer.ring_main(shared.main_bell(), io);
                }
                if ringer.await_bell(bell, channel, io, || port.has_room()) {
                    break;
                }
            }
            let Some(chain) = begun.take().or_else(|| io.pop()) else { break };
            has_news = true;
            *begun = take_over(port, author, chain, (&mut left, &mut *io));
        }
        if has_news {
            ringer.ring_main(shared.main_bell(), io);
        }
    }

    pub(crate) fn stop(&mut self, io: &mut QueueIo<'_>) {
        if let Some(chain) = self.begun.take() {
            io.retract(chain);
        }
    }
}

impl std::ops::Drop for Transmitter {
    fn drop(&mut self) {
        let port = self.shared.ports().get(usize::from(self.port));
        if let (Some(port), Some(author)) = (port, self.author.take())
            && port.leave_author(author)
        {
            self.shared.main_bell().ring_if_armed();
        }
    }
}

/// Copies what a chain has to the transcript, and ends it; gives it back if there was no room for all, or nothing `left` of
/// what one turn may copy.
fn take_over(
    port: &Port,
    author: &mut Author,
    chain: Chain,
    (left, io): (&mut usize, &mut QueueIo<'_>),
) -> Option<Chain> {
    let readable = io.readable(&chain);
    let len_bytes = readable.len_bytes();
    let of = ChainId { slot: chain.slot(), len_bytes };
    let mut taken_bytes = author.taken_bytes(of);
    let is_discarded = port.discards_output();
    while !is_discarded && taken_bytes < len_bytes {
        let count = author.append(port.transcript(), readable.slice(taken_bytes, *left));
        if count == 0 {
            author.remember_chain(of, taken_bytes);
            return Some(chain);
        }
        taken_bytes += count;
        *left -= count;
    }
    author.forget_chain();
    if is_discarded {
        Drop::Unplugged.count(io);
    }
    let bytes = if is_discarded { 0 } else { len_bytes as u64 };
    let account = Account { kind: Kind::Transmit as usize, bytes, failed: is_discarded };
    // VIRTIO 1.3, 5.3.6: nothing is written to a buffer of the transmit queue.
    io.finish(chain, 0, account);
    None
}

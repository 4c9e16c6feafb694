//! Control messages: what driver and device tell each other of ports.
//!
//! Contract: what the driver is to know of each port, and what it has been told, are *states* ([`Conversation`]), and the next message
//! follows from their difference. So what waits for a driver that takes no messages is bounded, and nothing is told that is
//! no longer true. Messages of the driver in any order, about ports that there are not, too short, or of unknown kinds are
//! counted, and change nothing.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

mod conversation;
mod message;

use std::sync::Arc;

use common::device::{Account, QueueIo};
use common::virtqueue::Chain;

pub(crate) use self::conversation::{Conversation, Stance};
use self::message::HEAD_BYTES;
pub(crate) use self::message::Order;
use crate::device::{CONTROL_CHANNEL, Kind, Shared};
use crate::drops::Drop;
use crate::ringer::Ringer;

/// The queue of messages to the driver.
pub(crate) struct ToDriver {
    shared: Arc<Shared>,
    ringer: Ringer,
}

impl ToDriver {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, ringer: Ringer::new() }
    }

    pub(crate) fn process(&mut self, io: &mut QueueIo<'_>) {
        let Self { shared, ringer } = self;
        let has_message = || shared.conversation().next_message().is_some();
        loop {
            if !has_message()
                && ringer.await_bell(shared.control_bell(), CONTROL_CHANNEL, io, has_message)
            {
                return;
            }
            let Some(chain) = io.pop() else { return };
            hand_over(shared, chain, io);
        }
    }
}

/// Gives the driver the next message, if its buffer has room for it; else that comes back empty, and the message goes
/// into the next one.
fn hand_over(shared: &Shared, chain: Chain, io: &mut QueueIo<'_>) {
    // The message is told while the lock is held: what the driver answers finds it so.
    let mut conversation = shared.conversation();
    let Some(message) = conversation.next_message() else {
        // The main thread has taken back what there was to tell.
        return io.retract(chain);
    };
    let bytes = conversation.encode(&message);
    let fits = io.writable(&chain).len_bytes() >= bytes.len();
    if fits {
        io.writable(&chain).write(&bytes);
        conversation.told(&message);
    } else {
        Drop::SmallBuffer.count(io);
    }
    let count = if fits { bytes.len() } else { 0 };
    let account = Account { kind: Kind::Control as usize, bytes: count as u64, failed: !fits };
    // A name is far shorter than 4 GiB.
    io.finish(chain, count as u32, account);
}

/// The queue of messages from the driver.
pub(crate) struct FromDriver {
    shared: Arc<Shared>,
    ringer: Ringer,
}

impl FromDriver {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, ringer: Ringer::new() }
    }

    pub(crate) fn process(&mut self, io: &mut QueueIo<'_>) {
        let mut has_news = false;
        while let Some(chain) = io.pop() {
            let mut bytes = [0; HEAD_BYTES];
            let count = io.readable(&chain).read(&mut bytes);
            let message = bytes.get(..count).unwrap_or_default();
            let heard = self.shared.converse(|conversation| conversation.hear(message));
            match heard {
                Ok(()) => has_news = true,
                Err(reason) => {
                    // A driver that could not do something has told news, too.
                    has_news |= reason == Drop::PortFailed;
                    reason.count(io);
                }
            }
            let (kind, failed) = (Kind::Control as usize, heard.is_err());
            // VIRTIO 1.3, 5.3.6.2: a message is not answered in its buffer.
            io.finish(chain, 0, Account { kind, bytes: count as u64, failed });
        }
        if has_news {
            self.ringer.ring_main(self.shared.main_bell(), io);
        }
    }
}

//! The queues of control messages: what driver and device tell each other of ports.
//!
//! Contract: what there is to tell follows from states ([`Conversation`]), so nothing waits for a driver that takes no messages, and
//! nothing is told that is no longer true. Messages of the driver in any order, about ports that there are not, too short,
//! or of unknown kinds are counted, and change nothing.

mod conversation;
mod message;

use std::sync::Arc;

use common::device::{Account, QueueIo};

pub(crate) use self::conversation::Conversation;
use self::conversation::Heard;
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
        loop {
            let has_message = || shared.conversation().next_message().is_some();
            if !has_message() {
                let (bell, channel) = (shared.control_bell(), CONTROL_CHANNEL);
                if ringer.await_bell(bell, channel, io, has_message) {
                    return;
                }
            }
            let Some(chain) = io.pop() else { return };
            let mut conversation = shared.conversation();
            let message = conversation.next_message();
            let bytes = message.as_ref().map(|message| conversation.encode(message));
            let bytes = bytes.unwrap_or_default();
            let writable = io.writable(&chain);
            let fits = bytes.len() <= writable.len_bytes();
            let written = if fits { writable.write(&bytes) } else { 0 };
            if let (Some(message), true) = (&message, fits) {
                conversation.told(message);
            }
            drop(conversation);
            if !fits {
                Drop::SmallBuffer.count(io);
            }
            let kind = Kind::Control as usize;
            // A message has a few dozen bytes.
            io.finish(
                chain,
                written as u32,
                Account { kind, bytes: written as u64, failed: !fits },
            );
        }
    }
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
        let mut has_heard = false;
        while let Some(chain) = io.pop() {
            let mut head = [0; HEAD_BYTES];
            let readable = io.readable(&chain);
            let count = readable.read(&mut head);
            let heard = self.hear(&head[..count]);
            if let Err(reason) = &heard {
                reason.count(io);
            }
            has_heard |= heard.is_ok();
            let (kind, failed) = (Kind::Control as usize, heard.is_err());
            io.finish(chain, 0, Account { kind, bytes: count as u64, failed });
        }
        if has_heard {
            self.ringer.ring_main(self.shared.main_bell(), io);
        }
    }

    fn hear(&self, message: &[u8]) -> Result<(), Drop> {
        let heard = self.shared.converse(|conversation| conversation.hear(message))?;
        let ports = self.shared.ports();
        match heard {
            Heard::Started => ports.iter().for_each(|port| port.set_guest_open(false)),
            Heard::Open { id, is_open } => {
                if let Some(port) = ports.get(usize::from(id)) {
                    port.set_guest_open(is_open);
                }
            }
            Heard::Noted => {}
        }
        Ok(())
    }
}

//! Receiving: what was typed at a port goes to the guest.
//!
//! Contract: a buffer of the driver's is popped when there is something to put into it, and is used at once. While the guest
//! has not opened the port nothing is: Linux throws away what it has not asked for. What finds no buffer waits in the
//! [inbox](crate::inbox), and whoever types waits with it.

use std::sync::Arc;

use common::device::{Account, QueueIo};
use common::virtqueue::Chain;

use crate::device::{Kind, Shared, input_channel};
use crate::drops::Drop;
use crate::port::Port;
use crate::ringer::Ringer;

/// The receive queue of a port.
pub(crate) struct Receiver {
    shared: Arc<Shared>,
    port: u16,
    ringer: Ringer,
}

impl Receiver {
    pub(crate) fn new(shared: Arc<Shared>, port: u16) -> Self {
        Self { shared, port, ringer: Ringer::new() }
    }

    pub(crate) fn process(&mut self, io: &mut QueueIo<'_>) {
        let Self { shared, port: index, ringer } = self;
        let Some(port) = shared.ports().get(usize::from(*index)) else { return };
        let mut has_taken = false;
        loop {
            has_taken |= port.inbox().settle();
            if !port.has_input() {
                let (bell, channel) = (port.input_bell(), input_channel(*index));
                let is_there = || port.has_input() || port.inbox().is_stale();
                if ringer.await_bell(bell, channel, io, is_there) {
                    break;
                }
                continue;
            }
            let Some(chain) = io.pop() else { break };
            has_taken |= hand_over(port, chain, io);
        }
        if has_taken {
            ringer.ring_main(shared.main_bell(), io);
        }
    }
}

/// Fills a chain; whether anything was taken.
fn hand_over(port: &Port, chain: Chain, io: &mut QueueIo<'_>) -> bool {
    let count = port.inbox().take(io.writable(&chain));
    if count == 0 && io.writable(&chain).len_bytes() > 0 {
        // Another port has just begun, and what there was is not for it.
        io.retract(chain);
        return false;
    }
    if count == 0 {
        Drop::NoRoom.count(io);
    }
    let account = Account { kind: Kind::Receive as usize, bytes: count as u64, failed: count == 0 };
    // What the inbox holds is far less than 4 GiB.
    io.finish(chain, count as u32, account);
    count > 0
}

//! The control queue: a command of the driver's, and an answer of one byte.
//!
//! Contract: commands are carried out one after the other, in the order in which they come, and each is in force
//! before it is answered. What may not be is answered with an error and changes nothing. Commands are rare, and two of
//! them ([`Command::QueuePairs`], [`Command::GuestOffloads`]) have the back end changed by system calls, which a
//! device's queue makes nowhere else. For a tap they wait for the lock of the host's network configuration. So a turn
//! has one command: a driver that makes many holds neither other queues nor the end of its ring up for long.

use std::sync::Arc;

use common::device::{Account, HostFault, QueueIo};
use common::virtqueue::Chain;

use crate::command::{Ack, COMMAND_BYTES_MAX, Command};
use crate::device::{Kind, Shared};

/// The control queue of a device.
pub(crate) struct Control {
    shared: Arc<Shared>,
    features: u64,
    /// A command, copied out of guest memory; kept for its capacity.
    bytes: Vec<u8>,
}

impl Control {
    pub(crate) fn new(shared: Arc<Shared>, features: u64) -> Self {
        Self { shared, features, bytes: Vec::new() }
    }

    pub(crate) fn process(&mut self, io: &mut QueueIo<'_>) {
        let Some(chain) = io.pop() else { return };
        if io.writable(&chain).len_bytes() == 0 {
            return io.reject(chain, "it has no room for an answer");
        }
        let ack = self.carry_out(&chain, io);
        // VIRTIO 1.3, 5.1.6.5: ack is the first device-writable byte.
        io.writable(&chain).write(&[ack as u8]);
        let (kind, failed) = (Kind::Control as usize, ack != Ack::Ok);
        io.finish(chain, 1, Account { kind, bytes: 0, failed });
        io.again();
    }

    fn carry_out(&mut self, chain: &Chain, io: &mut QueueIo<'_>) -> Ack {
        let readable = io.readable(chain);
        // One byte more than any command has: what is longer is seen to be.
        self.bytes.resize(readable.len_bytes().min(COMMAND_BYTES_MAX + 1), 0);
        readable.read(&mut self.bytes);
        let pairs = self.shared.state().queue_pairs();
        match Command::parse(&self.bytes, self.features, pairs) {
            Ok(command) => match self.shared.obey(&command) {
                Ok(()) => Ack::Ok,
                Err(errno) => {
                    io.report(HostFault { what: "a command of the driver's", offset: 0, errno });
                    Ack::Error
                }
            },
            Err(_refused) => Ack::Error,
        }
    }
}

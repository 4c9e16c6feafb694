//! The control queue: a command of the driver's, and an answer of one byte.
//!
//! Contract: commands are carried out one after the other, in the order in which they come, and each is in force
//! before it is answered. What may not be is answered with an error and changes nothing. Commands are rare, and two of
//! them ([`Command::QueuePairs`], [`Command::GuestOffloads`]) have the back end changed by system calls. For a tap they
//! hold the lock of the host's network configuration, which all guests share. So a driver gets [`CHANGES_AT_ONCE`] of
//! them, and thereafter one each [`CHANGE_NS`]: what is more waits, as a chain over a limit does. A turn has one command:
//! a driver that makes many holds neither other queues nor the end of its ring up for long.

use std::sync::Arc;

use common::device::{Account, HostFault, QueueIo};
use common::virtqueue::Chain;

use crate::command::{Ack, COMMAND_BYTES_MAX, Command, Refused};
use crate::device::{Kind, Shared};

/// Changes of the back end that a driver may make in a row: a few times all that one does as it starts.
const CHANGES_AT_ONCE: u64 = 32;
/// How long another one takes to be had: ten a second are more than an administrator makes.
const CHANGE_NS: u64 = 100_000_000;

/// The control queue of a device.
pub(crate) struct Control {
    shared: Arc<Shared>,
    features: u64,
    /// A command, copied out of guest memory; kept for its capacity.
    bytes: Vec<u8>,
    /// The time up to which changes of the back end are paid for.
    paid_until_ns: u64,
}

impl Control {
    pub(crate) fn new(shared: Arc<Shared>, features: u64) -> Self {
        Self { shared, features, bytes: Vec::new(), paid_until_ns: 0 }
    }

    pub(crate) fn process(&mut self, io: &mut QueueIo<'_>) {
        let Some(chain) = io.pop() else { return };
        if io.writable(&chain).len_bytes() == 0 {
            return io.reject(chain, "it has no room for an answer");
        }
        let command = self.parse(&chain, io);
        let changes_back_end =
            matches!(command, Ok(Command::QueuePairs(_) | Command::GuestOffloads(_)));
        if changes_back_end && let Err(until_ns) = self.pay(io.now_ns()) {
            io.postpone(until_ns);
            return io.retract(chain);
        }
        let ack = self.carry_out(command, io);
        // VIRTIO 1.3, 5.1.6.5: ack is the first device-writable byte.
        io.writable(&chain).write(&[ack as u8]);
        let (kind, failed) = (Kind::Control as usize, ack != Ack::Ok);
        io.finish(chain, 1, Account { kind, bytes: 0, failed });
        io.again();
    }

    fn parse(&mut self, chain: &Chain, io: &QueueIo<'_>) -> Result<Command, Refused> {
        let readable = io.readable(chain);
        // One byte more than any command has: what is longer is seen to be.
        self.bytes.resize(readable.len_bytes().min(COMMAND_BYTES_MAX + 1), 0);
        readable.read(&mut self.bytes);
        let pairs = self.shared.state().queue_pairs();
        Command::parse(&self.bytes, self.features, pairs)
    }

    /// Pays for a change of the back end, or says when it can be paid for.
    fn pay(&mut self, now_ns: u64) -> Result<(), u64> {
        let paid_until_ns = self.paid_until_ns.max(now_ns);
        let ready_ns = paid_until_ns.saturating_sub((CHANGES_AT_ONCE - 1) * CHANGE_NS);
        if ready_ns > now_ns {
            return Err(ready_ns);
        }
        self.paid_until_ns = paid_until_ns.saturating_add(CHANGE_NS);
        Ok(())
    }

    fn carry_out(&self, command: Result<Command, Refused>, io: &mut QueueIo<'_>) -> Ack {
        match command {
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

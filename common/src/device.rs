//! The contract that a device implements.
//!
//! A [`Device`] is shared, and what changes of it while rings run (a disk's size, its cache) is read
//! without waiting; for each ring it opens a [`DeviceQueue`], which one worker
//! owns. The runtime calls a queue when the driver has kicked it, when an operation has ended, and
//! at the end of each turn; the queue answers through [`QueueIo`]: it *pops* chains, *submits* operations, and *finishes*
//! chains. For a chain it makes no system call but by that, takes no lock and waits for nothing; what is rare may: a
//! network's queue that takes up a new connection, or carries out a command which changes the network.
//!
//! A queue pops for itself, because only it knows when a buffer is of use: a disk takes what there
//! is, a network receives nothing until a frame has come, a console keeps a buffer until somebody
//! types. What it popped ends in exactly one way ([`Chain`]): finished, or retracted as if it had
//! never been popped.
//!
//! This is a whole device, a disk-less one that answers each request with nothing:
//!
//! ```
//! use common::device::{Account, Device, DeviceQueue, QueueIo};
//! use common::engine::Completion;
//! use std::os::fd::BorrowedFd;
//!
//! struct Null;
//!
//! impl Device for Null {
//!     type Queue = NullQueue;
//!     const NAME: &'static str = "null";
//!     const KINDS: &'static [&'static str] = &["request"];
//!
//!     fn queue_count(&self) -> u16 { 1 }
//!     fn max_queue_size(&self) -> u16 { 256 }
//!     fn features(&self) -> u64 { 0 }
//!     fn read_config(&self, _: u64, _: u32, into: &mut [u8]) { into.fill(0) }
//!     fn files(&self) -> Vec<BorrowedFd<'_>> { Vec::new() }
//!     fn open_queue(&self, _: u16, _: u64, _: u16) -> NullQueue { NullQueue }
//! }
//!
//! struct NullQueue;
//!
//! impl DeviceQueue for NullQueue {
//!     fn process(&mut self, io: &mut QueueIo<'_>) {
//!         while let Some(chain) = io.pop() {
//!             io.finish(chain, 0, Account { kind: 0, bytes: 0, failed: false });
//!         }
//!     }
//!
//!     fn complete(&mut self, done: Completion, _: &mut QueueIo<'_>) {
//!         unreachable!("no operation was submitted, yet {done:?} ended");
//!     }
//! }
//! ```

use std::convert::Infallible;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use serde_json::Value;

use crate::engine::{ChannelIndex, Completion, Engine, Op, Readiness, Token};
use crate::memory::HostBuffer;
use crate::metrics::QueueMetrics;
use crate::rate_limit::{Cost, Direction, Place, RateLimits, Topic};
use crate::sandbox::{Call, Needs};
use crate::virtqueue::{Buffers, Chain, RingError, Virtqueue};

/// Chains that a ring may pop in one turn of its worker's loop, so that no ring starves another.
pub const MAX_CHAINS_PER_TURN: u32 = 256;

/// A virtio device: what it is, shared by all its queues.
pub trait Device: Send + Sync + 'static {
    /// One ring's half of the device.
    type Queue: DeviceQueue;
    /// The device's name in metrics and in `--print-capabilities` (`block`, `net`, `console`).
    const NAME: &'static str;
    /// What its requests are counted as; [`Account::kind`] is an index into it.
    const KINDS: &'static [&'static str];
    /// Why it gives work up; [`QueueIo::give_up`] takes an index into it.
    const DROPS: &'static [&'static str] = &[];
    /// What its limits of rate are about.
    const LIMITS: &'static [Topic] = &[];

    /// Number of virtqueues.
    fn queue_count(&self) -> u16;
    /// The largest size that a driver may give a virtqueue.
    fn max_queue_size(&self) -> u16;
    /// The device's own feature bits; the runtime adds those of the rings.
    fn features(&self) -> u64;
    /// Reads the configuration space from `offset` on, as a driver that acknowledged `features` sees
    /// it (0: none has yet); beyond its end there are zeros.
    fn read_config(&self, features: u64, offset: u32, into: &mut [u8]);
    /// A write to the configuration space; false when nothing may be written there.
    fn write_config(&self, _offset: u32, _data: &[u8]) -> bool {
        false
    }
    /// The driver has reset the device: no ring runs, and no feature is acknowledged any more.
    fn reset(&self) {}
    /// Looks again at how large the device is (a grown disk), and takes what it has found for its
    /// size from then on; on the main thread, at any time.
    ///
    /// # Errors
    /// The size stays as it was: there is none, or it cannot be what was found.
    fn refresh(&self) -> Result<Refreshed, NotRefreshed> {
        Err(NotRefreshed::NoSize)
    }
    /// How often to [refresh](Self::refresh) without being asked; `None`: never.
    fn refresh_interval(&self) -> Option<Duration> {
        None
    }
    /// Opens anew what the device has opened by name and writes to, since something else may have renamed it (SIGHUP); on
    /// the main thread.
    fn reopen(&self) {}
    /// The commands of the control socket that are the device's own, for the error that lists them.
    fn commands(&self) -> &'static [&'static str] {
        &[]
    }
    /// Answers such a command: the value of `ok` or the text of `error`, at once. `None`: it is none of the device's.
    fn command(&self, _command: &Value) -> Option<Result<Value, String>> {
        None
    }
    /// Work that the host has given up before it came to a queue, where it tells; on the main thread.
    fn host_drops(&self) -> Option<u64> {
        None
    }
    /// A front end has connected: it is another guest's, unless it says otherwise.
    fn new_session(&self) {}
    /// What this session has changed of the device, for a successor of this process that goes on with it; on the main thread,
    /// after each message. `None`: the device has more than that, and nobody can go on.
    fn save(&self) -> Option<Value> {
        None
    }
    /// What drivers tell the device by its queues is to be written down here, before it is answered: whatever a session can
    /// change by other means than messages. Before any session.
    fn keep_with(&self, _keeper: Arc<dyn Keeper>) {}
    /// Goes on with what a predecessor has [saved](Self::save), and [kept](Self::keep_with), if it has; in place of
    /// [`new_session`](Self::new_session), before any ring runs.
    ///
    /// # Errors
    /// It cannot be what this device has saved.
    fn restore(&self, saved: &Value, _kept: Option<&Value>) -> Result<(), NotRestored> {
        Err(NotRestored { saved: saved.clone() })
    }
    /// The files that operations name by their place here.
    fn files(&self) -> Vec<BorrowedFd<'_>>;
    /// The channels that queues receive and send through, named by their place here. They do not block.
    fn channels(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }
    /// Opens the queue at `index` with `queue_size` entries for a driver that acknowledged
    /// `features`; on the main thread, before the ring runs.
    fn open_queue(&self, index: u16, features: u64, queue_size: u16) -> Self::Queue;
    /// The queue at `index` is gone: its ring has stopped. On the main thread.
    fn close_queue(&self, _index: u16) {}
    /// What vhost-user has for network devices alone, for a device that is one.
    fn network(&self) -> Option<&dyn Network> {
        None
    }
    /// What is done for the device on the main thread once it is open, and on threads that this starts: by its errands, by
    /// [`reopen`](Self::reopen) and the like. `is_commanded`: there is a control socket.
    fn needs(&self, _is_commanded: bool) -> Needs {
        Needs::default()
    }
    /// The system calls of its queues, on worker threads.
    fn queue_calls(&self) -> &'static [Call] {
        &[]
    }
    /// What the device does on the main thread while it is served, without end: watching what it is
    /// made of, say.
    fn errands(&self, _runtime: &impl Runtime) -> impl Future<Output = Infallible> {
        std::future::pending()
    }
    /// Waits until all is where it belongs that came by rings which have stopped. The daemon is about to end, and the errands
    /// are still done; not for ever.
    fn settle(&self) -> impl Future<Output = ()> {
        std::future::ready(())
    }
}

/// What the device's errands can have done.
pub trait Runtime {
    /// The configuration space has changed, and the front end is to be told; `news` is for the log.
    fn config_changed(&self, news: &str);
    /// Has every queue look at its ring and its channel.
    fn look(&self);
}

/// What vhost-user has for network devices alone; called on the main thread.
pub trait Network {
    /// vhost-user, "VHOST_USER_SEND_RARP": the guest is to be announced on the network, since its driver
    /// cannot do so itself.
    ///
    /// # Errors
    /// It is not, for the log.
    fn announce(&self, mac: [u8; 6]) -> Result<(), NotAnnounced>;
    /// vhost-user, "VHOST_USER_NET_SET_MTU": the guest has this MTU; false when it may not.
    fn set_mtu(&self, mtu_bytes: u64) -> bool;
}

/// Why a guest is not announced.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what they are about")]
pub enum NotAnnounced {
    #[error("it may not have this address")]
    OtherAddress,
    #[error("there is no switch that would learn from it")]
    NoSwitch,
    #[error("the network does not take it")]
    Unsent(#[source] std::io::Error),
}

/// Where a device writes down what outlives the process.
pub trait Keeper: Send + Sync {
    /// Replaces what was kept before. From any thread, by one at a time; a few microseconds.
    fn keep(&self, state: &Value);
}

/// Why a device does not go on where a predecessor was.
#[derive(Debug, thiserror::Error)]
#[error("the device cannot be in the state {saved}")]
pub struct NotRestored {
    /// What the predecessor is to have saved.
    pub saved: Value,
}

/// What [`Device::refresh`] has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refreshed {
    /// The size of before.
    Unchanged {
        /// Which is this.
        capacity_bytes: u64,
    },
    /// More: the configuration space says so by now, and the driver is to be told.
    Grown {
        /// What it was.
        before_bytes: u64,
        /// What it is.
        capacity_bytes: u64,
    },
}

/// Why a device keeps its size.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum NotRefreshed {
    #[error(
        "it has shrunk from {capacity_bytes} to {found_bytes} bytes, and a driver cannot lose what \
         it was promised: requests beyond the end will fail"
    )]
    Shrunk { capacity_bytes: u64, found_bytes: u64 },
    #[error("it cannot be measured")]
    Unmeasured(#[source] std::io::Error),
    #[error("it has no size")]
    NoSize,
}

/// One ring's half of a device, owned by one worker.
pub trait DeviceQueue: Send + 'static {
    /// The driver may have made chains available: pops what is of use.
    fn process(&mut self, io: &mut QueueIo<'_>);
    /// An operation has ended.
    fn complete(&mut self, done: Completion, io: &mut QueueIo<'_>);
    /// The queue has been given all that this turn brings it: what it gathered meanwhile can be
    /// submitted as one. Called in every turn, whether anything has happened or not.
    fn close_turn(&mut self, _io: &mut QueueIo<'_>) {}
    /// The ring is to stop: finishes or retracts the chains that wait for no operation.
    fn stop(&mut self, _io: &mut QueueIo<'_>) {}
}

/// How a finished chain is counted.
#[derive(Clone, Copy, Debug)]
pub struct Account {
    /// Index into [`Device::KINDS`].
    pub kind: usize,
    /// Bytes of data moved.
    pub bytes: u64,
    /// Whether the driver was told of an error.
    pub failed: bool,
}

/// A fault of the host that an operation met, for the log.
#[derive(Clone, Copy, Debug)]
pub struct HostFault {
    /// What was being done, in the words of [`Device::KINDS`].
    pub what: &'static str,
    /// Byte offset at which.
    pub offset: u64,
    /// What the kernel said.
    pub errno: Errno,
}

/// What an operation may move data through: the parts of one chain.
#[derive(Clone, Copy)]
pub struct ChainBuffers<'a> {
    /// What the driver sent.
    pub readable: Buffers<'a>,
    /// The room for an answer.
    pub writable: Buffers<'a>,
    /// The bounce buffer, if the chain was given one.
    pub bounce: Buffers<'a>,
}

/// What a queue works with during one call: its ring, its engine, its counters.
pub struct QueueIo<'a> {
    pub(crate) ring: &'a mut Virtqueue,
    pub(crate) engine: &'a mut dyn Engine,
    pub(crate) metrics: &'a QueueMetrics,
    pub(crate) limits: &'a RateLimits,
    pub(crate) state: &'a mut Turn,
    /// The queue's place on its worker, which the engine gives back with a completion.
    pub(crate) queue: u16,
}

/// What a ring has going on, from turn to turn.
#[derive(Default)]
pub(crate) struct Turn {
    /// The time of this turn: one clock reading serves all its requests.
    pub(crate) now_ns: u64,
    /// Chains that may still be popped in this turn.
    pub(crate) budget: u32,
    /// The budget ended before the chains did, or the device asked for it: come back without a
    /// kick.
    pub(crate) more: bool,
    /// A request was over its limit: come back at this time, without a kick.
    pub(crate) throttled_until_ns: Option<u64>,
    /// The line in which that request stands.
    pub(crate) place: Option<Place>,
    /// The device wants a chain and there is none: a kick is wanted.
    pub(crate) dry: bool,
    /// Chains that the device has put back into the ring: it waits for others.
    pub(crate) put_back: u16,
    /// The driver was asked for a kick, and no chain has been popped since.
    pub(crate) armed: bool,
    /// Operations that have not ended.
    pub(crate) operations: u32,
    /// The engine tells when the queue's channel is ready.
    pub(crate) awaits_channel: bool,
    /// The ring takes no more chains: it is being stopped.
    pub(crate) stopping: bool,
    /// Why the ring broke in this turn.
    pub(crate) fault: Option<RingError>,
    /// A fault of the host in this turn; of several the last is told.
    pub(crate) host_fault: Option<HostFault>,
    /// The engine could not take an operation: the worker cannot go on.
    pub(crate) engine_fault: Option<std::io::Error>,
}

impl QueueIo<'_> {
    /// The next chain that the driver made available, or `None`: there is none, it is another
    /// ring's turn, or the one before was over its limit. In each case the runtime calls
    /// [`DeviceQueue::process`] again in time.
    pub fn pop(&mut self) -> Option<Chain> {
        if self.state.stopping || self.state.throttled_until_ns.is_some() {
            return None;
        }
        if self.state.budget == 0 {
            self.state.more = true;
            return None;
        }
        match self.ring.pop(self.state.now_ns) {
            Ok(Some(chain)) => {
                self.state.budget -= 1;
                // The driver's next kick may be behind us: it is asked for anew before a sleep.
                self.state.armed = false;
                self.state.put_back = self.state.put_back.saturating_sub(1);
                return Some(chain);
            }
            Ok(None) => self.state.dry = true,
            Err(fault) => self.break_off(fault),
        }
        None
    }

    /// Whether the device's limits let a request go now; it counts as one operation, and as `bytes`
    /// of data. Where they do not, the chain that was popped last is that request: it is to be
    /// retracted at once, and is popped again when its time has come.
    pub fn admit(&mut self, direction: Direction, bytes: u64) -> bool {
        let cost = Cost { direction, bytes };
        match self.limits.admit(&mut self.state.place, cost, self.state.now_ns) {
            Ok(()) => true,
            Err(wait) => {
                self.metrics.throttled.add(u64::from(wait.is_first));
                self.state.throttled_until_ns = Some(wait.until_ns);
                false
            }
        }
    }

    /// Has no chain popped before this time: the one that was popped last is to be retracted at once, and is popped
    /// again then. For work that a device limits by itself.
    pub fn postpone(&mut self, until_ns: u64) {
        self.state.throttled_until_ns = Some(until_ns);
    }

    /// The driver broke the ring's rules: it gives no more chains.
    fn break_off(&mut self, fault: RingError) {
        self.ring.break_off();
        self.metrics.broken.add(1);
        self.state.fault = Some(fault);
    }

    /// The bytes that the driver sent with the chain.
    pub fn readable(&self, chain: &Chain) -> Buffers<'_> {
        self.ring.readable(chain)
    }

    /// The room that the chain has for an answer.
    pub fn writable(&self, chain: &Chain) -> Buffers<'_> {
        self.ring.writable(chain)
    }

    /// Gives `chain` a bounce buffer of [`BOUNCE_BYTES`](crate::memory::BOUNCE_BYTES), in which
    /// data makes a detour that the engine cannot move from or to where the driver has it. It is the
    /// chain's until that ends.
    ///
    /// False where all of the ring are out: then some chain has an operation under way, and when it
    /// ends there is one. Until then the queue [retracts](Self::retract) what it has popped.
    pub fn give_bounce(&mut self, chain: &Chain) -> bool {
        self.ring.give_bounce(chain)
    }

    /// The chain's bounce buffer; no bytes where it has none.
    pub fn bounce(&self, chain: &Chain) -> Buffers<'_> {
        self.ring.bounce(chain)
    }

    /// Has the runtime call [`DeviceQueue::process`] in the next turn, for chains that were
    /// retracted for want of something that is there now.
    pub fn again(&mut self) {
        self.state.more = true;
    }

    /// Starts an operation on behalf of `chain`; its completion carries the chain's slot and
    /// `step`. The closure picks the operation's buffers from the chain's.
    pub fn submit<'s>(
        &'s mut self,
        chain: &Chain,
        step: u16,
        op: impl FnOnce(ChainBuffers<'s>) -> Op<'s>,
    ) {
        let slot = chain.slot();
        self.ring.operation(slot, true);
        self.state.operations += 1;
        let buffers = ChainBuffers {
            readable: self.ring.readable(chain),
            writable: self.ring.writable(chain),
            bounce: self.ring.bounce(chain),
        };
        if let Err(fault) = self.engine.submit(self.queue, Token { slot, step }, op(buffers)) {
            self.state.engine_fault = Some(fault);
        }
    }

    /// Receives from a channel what is there, into `into` from its first byte on. Buffers of chains
    /// that are out, and of own memory.
    ///
    /// # Errors
    /// The kernel's: `AGAIN` where there is nothing ([`await_channel`](Self::await_channel)).
    pub fn receive(&mut self, from: ChannelIndex, into: &[HostBuffer]) -> Result<usize, Errno> {
        self.engine.receive(from, into)
    }

    /// Sends over a channel what finds room.
    ///
    /// # Errors
    /// The kernel's: `AGAIN` where there is no room ([`await_channel`](Self::await_channel)).
    pub fn send(&mut self, over: ChannelIndex, from: &[HostBuffer]) -> Result<usize, Errno> {
        self.engine.send_to(over, from)
    }

    /// Has the runtime call [`DeviceQueue::process`] when the channel is ready, for this or for its
    /// end. A queue waits for one channel at a time.
    pub fn await_channel(&mut self, channel: ChannelIndex, readiness: Readiness) {
        if std::mem::replace(&mut self.state.awaits_channel, true) {
            return;
        }
        if let Err(fault) = self.engine.await_channel(self.queue, channel, readiness) {
            self.state.engine_fault = Some(fault);
        }
    }

    /// Counts work that the device gives up; `reason` is an index into [`Device::DROPS`].
    pub fn give_up(&mut self, reason: usize) {
        self.metrics.drops[reason].add(1);
    }

    /// The time of this turn, in nanoseconds since the workers began.
    pub fn now_ns(&self) -> u64 {
        self.state.now_ns
    }

    /// Ends a chain: the driver gets it back with `written_bytes` of its writable part filled.
    pub fn finish(&mut self, chain: Chain, written_bytes: u32, account: Account) {
        let bounced = self.ring.bounce(&chain).len_bytes() > 0;
        self.metrics.bounced.add(u64::from(bounced));
        let popped_ns = self.ring.used(chain, written_bytes);
        let kind = &self.metrics.kinds[account.kind];
        kind.requests.add(1);
        kind.bytes.add(account.bytes);
        kind.errors.add(u64::from(account.failed));
        kind.latency.record(self.state.now_ns.saturating_sub(popped_ns));
    }

    /// Ends a chain that carries more of what another one was counted for.
    pub fn finish_more(&mut self, chain: Chain, written_bytes: u32) {
        self.ring.used(chain, written_bytes);
    }

    /// Ends a chain that has no room for an answer: the driver broke the device's rules, and the
    /// ring is broken.
    pub fn reject(&mut self, chain: Chain, why: &'static str) {
        let fault = RingError::Request { head: chain.slot(), why };
        self.ring.used(chain, 0);
        self.break_off(fault);
    }

    /// Ends a chain as if it had never been popped; of several, the newest first. What the queue
    /// waits for then is something else than chains, unless it says so ([`want_more`](Self::want_more)).
    pub fn retract(&mut self, chain: Chain) {
        self.state.budget += 1;
        self.state.dry = false;
        self.state.put_back += 1;
        self.ring.retract(chain);
    }

    /// Has the runtime call [`DeviceQueue::process`] when the driver has made more chains available
    /// than there were, because those do not suffice. To be said after they were retracted.
    pub fn want_more(&mut self) {
        self.state.dry = true;
    }

    /// Tells the log of a fault of the host. The data path itself never logs.
    pub fn report(&mut self, fault: HostFault) {
        self.state.host_fault = Some(fault);
    }
}

//! The network device: frames in and out, and what its queues share.
//!
//! What a driver has told the device ([`State`], [`Filter`]) is in atomics, which every queue reads without waiting. The
//! two locks here are taken by the main thread and by the control queue, where a ring starts or stops or a command
//! comes, and never for a frame.

use std::convert::Infallible;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use common::device::{
    Device, DeviceQueue, Keeper, Network, NotAnnounced, NotRestored, QueueIo, Runtime,
};
use common::engine::{ChannelIndex, Completion};
use common::rate_limit::Topic;
use common::sandbox::{Call, Needs};
use rustix::io::Errno;
use serde_json::Value;
use tokio::sync::Notify;
use tracing::warn;

use crate::announcement::announcement;
use crate::backend::{Backend, Link};
use crate::capture::{Capture, Recorder};
use crate::command::Command;
use crate::config::{GUEST_OFFLOADS, Mac, Role, State, VIRTIO_NET_F_MTU, VlanId, wanted_offloads};
use crate::control::Control;
use crate::drops::DROPS;
use crate::filter::{Filter, Unwanted};
use crate::header::{HEADER_BYTES, Head};
use crate::kept::Kept;
use crate::outbox::Outbox;
use crate::rx::Receiver;
use crate::source::{Flood, Inlet, Source, StreamSource};
use crate::tx::{Framing, Transmitter};

/// What a chain is counted as, in the order of [`KINDS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Receive,
    Transmit,
    Control,
}

/// How long after the link has come up the guest is asked to announce itself, and how long after that again. Linux's driver
/// that is told of both at once sends its announcement first, over an interface without a carrier, which drops it; so does one
/// that is late for a first time.
const ANNOUNCEMENT_PAUSES: [Duration; 3] =
    [Duration::from_millis(50), Duration::from_millis(200), Duration::from_secs(1)];

/// The names of [`Kind`]s in metrics.
const KINDS: &[&str] = &["receive", "transmit", "control"];

/// The port that the guest is connected to, as the operator has it.
#[derive(Debug)]
pub(crate) struct Port {
    /// Its VLAN: frames are tagged on the way out, and no others come in.
    pub(crate) vlan: Option<VlanId>,
    /// The guest may send from its own address only.
    pub(crate) only_mac: bool,
    /// Who records its frames.
    pub(crate) capture: Option<Capture>,
    /// How large a ring may be.
    pub(crate) queue_size_max: u16,
}

/// What all queues share.
pub(crate) struct Shared {
    backend: Backend,
    state: State,
    filter: Filter,
    port: Port,
    pairs: Mutex<Pairs>,
    /// Pairs have been attached to the back end, or may have been: their queues are to look at it.
    attached: Notify,
    /// What the driver has acknowledged, as the rings that were started last have it.
    acknowledged: AtomicU64,
    /// Who writes down what the driver has said.
    keeper: OnceLock<Arc<dyn Keeper>>,
}

/// What is known of queue pairs while their rings are not running, too.
struct Pairs {
    /// Whose receive ring runs.
    receiving: Vec<bool>,
    outboxes: Vec<Outbox>,
    /// Of a stream, which is one pair's.
    inlet: Inlet,
}

impl Shared {
    pub(crate) fn backend(&self) -> &Backend {
        &self.backend
    }

    pub(crate) fn link(&self) -> &Link {
        self.backend.link()
    }

    pub(crate) fn state(&self) -> &State {
        &self.state
    }

    pub(crate) fn vlan(&self) -> Option<VlanId> {
        self.port.vlan
    }

    /// Whether the guest may send a frame with this source.
    pub(crate) fn may_send_from(&self, source: Mac) -> bool {
        !self.port.only_mac || self.state.mac() == Some(source)
    }

    /// A queue's way into the capture, where there is one.
    pub(crate) fn recorder(&self) -> Option<Recorder> {
        self.port.capture.as_ref().map(Capture::recorder)
    }

    /// Whether the driver wants a frame.
    pub(crate) fn wants(&self, head: &Head) -> Result<(), Unwanted> {
        self.filter.wants(head, self.state.mac())
    }

    /// The features of a driver, less the offloads that it has switched off.
    pub(crate) fn features_in_force(&self, features: u64) -> u64 {
        features & !GUEST_OFFLOADS | self.state.offloads()
    }

    /// What a driver takes a frame's MTU to be.
    pub(crate) fn mtu_in_force(&self, features: u64) -> Option<u16> {
        self.state.mtu().filter(|_| features & VIRTIO_NET_F_MTU != 0)
    }

    /// Where the frames of a pair come from.
    pub(crate) fn source(&self, pair: u16) -> Source {
        let channel = ChannelIndex(pair * 2);
        match &self.backend {
            Backend::Tap(_) => Source::Tap(channel),
            Backend::Stream(_) => self.stream_source(channel),
            Backend::Null(null) => Source::Null { flood: null.frame_bytes().map(Flood::new) },
            #[cfg(test)]
            Backend::Simulated(simulated) if simulated.is_stream() => self.stream_source(channel),
            #[cfg(test)]
            Backend::Simulated(_) => Source::Tap(channel),
        }
    }

    fn stream_source(&self, channel: ChannelIndex) -> Source {
        let inlet = std::mem::take(&mut self.pairs().inlet);
        Source::Stream(StreamSource::new(channel, inlet))
    }

    pub(crate) fn transmit_channel(&self, pair: u16) -> ChannelIndex {
        ChannelIndex(pair * 2 + 1)
    }

    /// What stands before a frame on the back end.
    pub(crate) fn framing(&self) -> Framing {
        match &self.backend {
            Backend::Tap(_) => Framing::Header,
            Backend::Stream(_) => Framing::Length,
            Backend::Null(_) => Framing::Nobody,
            #[cfg(test)]
            Backend::Simulated(_) => Framing::Header,
        }
    }

    /// What the transmitting queue before has left.
    pub(crate) fn take_outbox(&self, pair: u16) -> Outbox {
        self.pairs().outboxes.get_mut(usize::from(pair)).map(std::mem::take).unwrap_or_default()
    }

    /// Leaves where a stream has got to for the next queue.
    pub(crate) fn leave_inlet(&self, inlet: Inlet) {
        self.pairs().inlet = inlet;
    }

    /// Leaves what did not go out for the next queue.
    pub(crate) fn leave_outbox(&self, pair: u16, outbox: Outbox) {
        if let Some(place) = self.pairs().outboxes.get_mut(usize::from(pair)) {
            *place = outbox;
        }
    }

    /// Sends a frame of our own from the main thread, which announces the guest. A tap takes it whole, beside those
    /// that queues send; who is behind a stream socket is no switch.
    fn send_announcement(&self, mac: Mac) -> Result<(), NotAnnounced> {
        // Nobody is to send from another address than the guest's: the front end neither.
        if !self.may_send_from(mac) {
            return Err(NotAnnounced::OtherAddress);
        }
        let frame = [&[0; HEADER_BYTES][..], &announcement(mac.bytes(), self.vlan())].concat();
        let files = self.backend.files();
        let (Framing::Header, [_, over, ..]) = (self.framing(), &files[..]) else {
            return Err(NotAnnounced::NoSwitch);
        };
        let sent = rustix::io::write(over, &frame);
        sent.map(drop).map_err(|errno| NotAnnounced::Unsent(errno.into()))
    }

    /// Carries a command out, and has a successor of this process know of it.
    pub(crate) fn obey(&self, command: &Command) -> Result<(), Errno> {
        self.change(command)?;
        self.keep();
        Ok(())
    }

    /// Has what the driver has said written down.
    fn keep(&self) {
        if let Some(keeper) = self.keeper.get() {
            let features = self.acknowledged.load(Ordering::Relaxed);
            keeper.keep(&Kept::new(features, &self.state, &self.filter).to_value());
        }
    }

    fn change(&self, command: &Command) -> Result<(), Errno> {
        match command {
            Command::RxMode { mode, is_on } => self.filter.set_mode(*mode, *is_on),
            Command::MacTable { unicast, multicast } => {
                self.filter.set_addresses(unicast, multicast);
            }
            Command::MacAddress(mac) => self.state.set_mac(*mac),
            Command::VlanAdd(vlan) => self.filter.add_vlan(*vlan),
            Command::VlanDelete(vlan) => self.filter.delete_vlan(*vlan),
            Command::AnnounceAck => self.state.announced(),
            Command::QueuePairs(pairs) => self.use_pairs(*pairs)?,
            Command::GuestOffloads(bits) => {
                self.backend.apply(wanted_offloads(*bits), HEADER_BYTES)?;
                self.state.set_offloads(*bits);
            }
        }
        Ok(())
    }

    /// Receives on this many pairs from now on; on as many as before where the back end refuses.
    fn use_pairs(&self, count: u16) -> Result<(), Errno> {
        let pairs = self.pairs();
        let before = self.state.active_pairs();
        // A queue does not look at a pair that is not attached, which would fail it: those that go are left alone
        // before, and those that come are looked at after.
        self.state.set_active_pairs(before.min(count));
        let attached = self.attach_queues(&pairs, count);
        if attached.is_err() {
            // Who is told of the first refusal need not hear of a second one.
            let _ = self.attach_queues(&pairs, before);
        }
        self.state.set_active_pairs(if attached.is_ok() { count } else { before });
        // In either case: a queue that was detached for a moment may have looked just then.
        self.attached.notify_one();
        attached
    }

    /// Has the back end give frames to those pairs only whose receive ring runs, and of which the driver has `used`.
    // VIRTIO 1.3, 5.1.6.5.6.2: The device MUST NOT queue packets on receive queues greater than virtqueue_pairs once it
    // has placed the VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET command in a used buffer.
    fn attach_queues(&self, pairs: &Pairs, used: u16) -> Result<(), Errno> {
        for (pair, receives) in (0..).zip(&pairs.receiving) {
            self.backend.attach_queue(pair, *receives && pair < used)?;
        }
        Ok(())
    }

    fn pairs(&self) -> MutexGuard<'_, Pairs> {
        // A panic elsewhere leaves flags and frames as whole as they were.
        self.pairs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A network as a virtio device.
pub(crate) struct NetDevice {
    shared: Arc<Shared>,
    offered: u64,
}

impl NetDevice {
    /// A device that offers these features.
    pub(crate) fn new(backend: Backend, state: State, port: Port, offered: u64) -> Self {
        let count = usize::from(state.queue_pairs());
        state.set_link(backend.link().is_up());
        let pairs = Pairs {
            receiving: vec![false; count],
            outboxes: (0..count).map(|_| Outbox::default()).collect(),
            inlet: Inlet::default(),
        };
        let filter = Filter::new();
        let pairs = Mutex::new(pairs);
        let (attached, acknowledged) = (Notify::new(), AtomicU64::new(0));
        let keeper = OnceLock::new();
        let shared = Shared { backend, state, filter, port, pairs, attached, acknowledged, keeper };
        Self { shared: Arc::new(shared), offered }
    }

    /// A driver has acknowledged `features`: what is in force follows from them, until it says otherwise.
    fn negotiated(&self, features: u64) {
        if self.shared.acknowledged.swap(features, Ordering::Relaxed) == features {
            return;
        }
        let Shared { state, filter, .. } = &*self.shared;
        state.negotiated(features);
        filter.negotiated(features);
        self.apply_offloads();
        self.shared.keep();
    }

    /// Has the guest say where it is, since nobody knows it yet where it is plugged in now.
    async fn have_guest_announced(&self, runtime: &impl Runtime) {
        let Shared { state, backend, .. } = &*self.shared;
        for pause in ANNOUNCEMENT_PAUSES {
            tokio::time::sleep(pause).await;
            let features = self.shared.acknowledged.load(Ordering::Relaxed);
            if backend.link().is_up() && state.announce(features) {
                runtime.config_changed("the guest is to announce itself");
            }
        }
    }

    fn forget_driver(&self) {
        self.shared.acknowledged.store(0, Ordering::Relaxed);
        let Shared { state, filter, .. } = &*self.shared;
        state.reset();
        filter.reset();
        self.apply_offloads();
        self.shared.keep();
    }

    /// Has the back end hand frames over as the driver takes them.
    fn apply_offloads(&self) {
        let Shared { state, backend, .. } = &*self.shared;
        if let Err(errno) = backend.apply(wanted_offloads(state.offloads()), HEADER_BYTES) {
            warn!(%errno, "the back end does not hand frames over as the driver takes them");
        }
    }

    /// The receive ring of a pair runs, or no longer does.
    fn set_receiving(&self, pair: u16, receives: bool) {
        let mut pairs = self.shared.pairs();
        if let Some(place) = pairs.receiving.get_mut(usize::from(pair)) {
            *place = receives;
        }
        if let Err(errno) = self.shared.attach_queues(&pairs, self.shared.state.active_pairs()) {
            warn!(pair, %errno, "the back end's queue cannot be attached or detached");
        }
    }
}

impl Device for NetDevice {
    type Queue = NetQueue;
    const NAME: &'static str = "net";
    const KINDS: &'static [&'static str] = KINDS;
    const DROPS: &'static [&'static str] = DROPS;
    const LIMITS: &'static [Topic] = &[Topic::Rx, Topic::Tx];

    fn queue_count(&self) -> u16 {
        // VIRTIO 1.3, 5.1.2: N pairs, and the control queue.
        self.shared.state.queue_pairs() * 2 + 1
    }

    fn max_queue_size(&self) -> u16 {
        self.shared.port.queue_size_max
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn read_config(&self, _features: u64, offset: u32, into: &mut [u8]) {
        self.shared.state.read(offset, into);
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> bool {
        let features = self.shared.acknowledged.load(Ordering::Relaxed);
        let written = self.shared.state.write(features, offset, data, self.shared.port.only_mac);
        self.shared.keep();
        written
    }

    fn reset(&self) {
        self.forget_driver();
    }

    fn new_session(&self) {
        self.forget_driver();
    }

    // All of it is kept, because most of it comes by a queue.
    fn save(&self) -> Option<Value> {
        Some(Value::Null)
    }

    fn keep_with(&self, keeper: Arc<dyn Keeper>) {
        // There is one for the whole life of a process.
        let _ = self.shared.keeper.set(keeper);
    }

    fn restore(&self, saved: &Value, kept: Option<&Value>) -> Result<(), NotRestored> {
        let kept = kept.unwrap_or(saved);
        let no = || NotRestored { saved: kept.clone() };
        let Shared { state, filter, acknowledged, .. } = &*self.shared;
        let features = Kept::parse(kept).and_then(|kept| kept.restore(self.offered, state, filter));
        acknowledged.store(features.ok_or_else(no)?, Ordering::Relaxed);
        self.apply_offloads();
        self.shared.keep();
        Ok(())
    }

    fn host_drops(&self) -> Option<u64> {
        self.shared.backend.host_drops()
    }

    fn files(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    fn channels(&self) -> Vec<BorrowedFd<'_>> {
        self.shared.backend.files()
    }

    fn needs(&self, _is_commanded: bool) -> Needs {
        self.shared.backend.needs()
    }

    fn queue_calls(&self) -> &'static [Call] {
        self.shared.backend.queue_calls()
    }

    fn open_queue(&self, index: u16, features: u64, queue_size: u16) -> NetQueue {
        self.negotiated(features);
        let shared = Arc::clone(&self.shared);
        match Role::of(index, features, self.shared.state.queue_pairs()) {
            Role::Receive(pair) => {
                self.set_receiving(pair, true);
                NetQueue::Receive(Box::new(Receiver::new(shared, pair, features, queue_size)))
            }
            Role::Transmit(pair) => NetQueue::Transmit(Transmitter::new(shared, pair, features)),
            Role::Control => NetQueue::Control(Control::new(shared, features)),
            Role::Unused => NetQueue::Unused,
        }
    }

    fn close_queue(&self, index: u16) {
        let features = self.shared.acknowledged.load(Ordering::Relaxed);
        if let Role::Receive(pair) = Role::of(index, features, self.shared.state.queue_pairs()) {
            self.set_receiving(pair, false);
        }
    }

    fn network(&self) -> Option<&dyn Network> {
        Some(self)
    }

    async fn errands(&self, runtime: &impl Runtime) -> Infallible {
        let shared = &self.shared;
        let plugged_in = Notify::new();
        let watched = shared.backend.watch(|event| {
            if shared.state.set_link(event.up) {
                let news = if event.up { "the link is up" } else { "the link is down" };
                runtime.config_changed(news);
                if event.up {
                    plugged_in.notify_one();
                }
            }
            runtime.look();
        });
        let announced = async {
            loop {
                plugged_in.notified().await;
                self.have_guest_announced(runtime).await;
            }
        };
        let attached = async {
            loop {
                shared.attached.notified().await;
                runtime.look();
            }
        };
        tokio::select! {
            never = watched => never,
            never = announced => never,
            never = attached => never,
        }
    }
}

impl Network for NetDevice {
    fn announce(&self, mac: [u8; 6]) -> Result<(), NotAnnounced> {
        self.shared.send_announcement(Mac::new(mac))
    }

    fn set_mtu(&self, mtu_bytes: u64) -> bool {
        let most = self.shared.backend.mtu().unwrap_or(u16::MAX);
        (u64::from(crate::config::MTU_MIN)..=u64::from(most)).contains(&mtu_bytes)
    }
}

/// A virtqueue of the device, by its role.
pub(crate) enum NetQueue {
    Receive(Box<Receiver>),
    Transmit(Transmitter),
    Control(Control),
    /// The driver has no use for it.
    Unused,
}

impl DeviceQueue for NetQueue {
    fn process(&mut self, io: &mut QueueIo<'_>) {
        match self {
            Self::Receive(receiver) => receiver.process(io),
            Self::Transmit(transmitter) => transmitter.process(io),
            Self::Control(control) => control.process(io),
            Self::Unused => {}
        }
    }

    fn complete(&mut self, done: Completion, _: &mut QueueIo<'_>) {
        unreachable!("no operation was submitted, yet {done:?} ended");
    }

    fn stop(&mut self, io: &mut QueueIo<'_>) {
        if let Self::Receive(receiver) = self {
            receiver.stop(io);
        }
    }
}

#[cfg(test)]
mod simulation;

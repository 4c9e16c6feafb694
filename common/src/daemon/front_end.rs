//! One front end, from its connection to the drain after its hang-up.
//!
//! [`Session`] says what each message means; here it is done: memory mapped, rings started and
//! stopped, answers sent. A message in the wrong is refused where the front end asked for an
//! acknowledgement, and ends the session where it did not.
//!
//! Where the service manager keeps descriptors, a successor can go on with the session ([`succession`]).

mod succession;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;
use tracing::{debug, info, warn};

use super::log::{RateLimit, with_sources};
use super::refresh::{Attendance, Refresher};
use super::store::{KeptInflight, Store};
use crate::device::{Device, Network};
use crate::memory::{MapError, MemoryMap, Region};
use crate::metrics::Metrics;
use crate::protocol::{
    Answer, BackendChannel, Connection, Message, ReceiveError, Refusal, Request, table,
};
use crate::session::{Action, Fault, InflightSlot, MemorySlot, Offer, Ring, Session};
use crate::virtqueue::{InflightRegion, InflightShape, RingError, RingSetup, Virtqueue};
use crate::worker::{Kick, NoEventfd, RingStart, WorkerEvent, Workers};

pub(super) use self::succession::connection_of;

/// How long a front end may leave a reply unread.
const REPLY_MAX: Duration = Duration::from_secs(10);
/// How long the front end may be kept waiting before the log says for what.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often the guest may be announced in a second: a front end does it a few times after a migration.
const ANNOUNCEMENTS_MAX: u32 = 10;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    /// The front end closed its connection, as it should.
    #[error("the front end hung up")]
    HangUp,
    /// What it sent could not be received.
    #[error("the front end sent what it may not")]
    Receive(#[source] ReceiveError),
    /// It may not ask for that, and did not want to hear so.
    #[error("the front end asked for what it may not")]
    Refused(#[source] Refused),
    /// It does not read.
    #[error("the front end left a reply unread for {} s", REPLY_MAX.as_secs())]
    Unread,
    /// The socket failed.
    #[error("cannot answer the front end")]
    Send(#[source] std::io::Error),
    /// Memory that it had shared is gone.
    #[error("the front end truncated the guest's memory while it was shared")]
    MemoryLost,
    /// A worker cannot go on.
    #[error("the I/O engine failed")]
    Engine(#[source] std::io::Error),
    /// This process is to end, and a successor can go on.
    #[error("told to end")]
    Told,
}

/// Why a message was refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    #[error(transparent)]
    Message(#[from] Refusal),
    #[error(transparent)]
    Session(#[from] Fault),
    #[error("the guest's memory cannot be mapped")]
    Memory(#[from] MapError),
    #[error("requests in flight cannot be recorded")]
    Inflight(#[source] MapError),
    #[error("there can be no region for requests in flight")]
    CreateInflight(#[source] std::io::Error),
    #[error("ring {index} cannot be started")]
    Ring { index: u16, source: RingError },
    #[error("ring {index} cannot be started")]
    Kick { index: u16, source: NoEventfd },
    #[error("nothing may be written at {offset} of the configuration space")]
    Config { offset: u32 },
    #[error("an MTU of {mtu_bytes} bytes cannot be had")]
    Mtu { mtu_bytes: u64 },
    #[error("the back-end channel cannot be used")]
    Channel(#[source] std::io::Error),
}

/// What goes back to the front end.
enum Answered {
    /// Success, to who wants to know.
    Ack,
    /// A value.
    Body(Vec<u8>),
    /// A value, and a descriptor with it.
    Shared(Vec<u8>, OwnedFd),
}

/// What front ends are served with.
pub(super) struct Means<'a, D: Device> {
    pub(super) refresher: &'a Refresher<D>,
    pub(super) workers: &'a mut Workers<D>,
    pub(super) metrics: &'a Metrics,
    pub(super) gate: &'a mut RateLimit,
    pub(super) store: Option<&'a mut Store>,
}

/// A front end being served.
pub(super) struct FrontEnd<'a, D: Device> {
    connection: Connection,
    session: Session,
    device: &'a D,
    workers: &'a mut Workers<D>,
    metrics: &'a Metrics,
    memory: Arc<MemoryMap>,
    /// Where requests in flight are recorded, if the front end keeps that, or the service manager.
    inflight: Option<(InflightRegion, KeptInflight<Arc<OwnedFd>>)>,
    /// How it hears of changes.
    attendance: Attendance<'a, D>,
    refresher: &'a Refresher<D>,
    gate: &'a mut RateLimit,
    announcements: RateLimit,
    /// The rings of which the log has said that they wait for memory.
    waiting: Vec<u16>,
    /// Where a successor finds all this.
    store: Option<&'a mut Store>,
    /// The connection and the back-end channel once more, to be stored.
    socket: Arc<OwnedFd>,
    channel: Option<Arc<OwnedFd>>,
    /// The rings that a predecessor has left running, while they are taken up.
    taken_up: Vec<u16>,
}

impl<'a, D: Device> FrontEnd<'a, D> {
    /// One who has said nothing, to a device that has been told of a [new session](Device::new_session), or is as it was opened.
    pub(super) fn new(
        stream: std::os::unix::net::UnixStream,
        means: Means<'a, D>,
    ) -> std::io::Result<Self> {
        let Means { refresher, workers, metrics, gate, store } = means;
        let device = refresher.device();
        let session = Session::new(offer(device));
        let socket = Arc::new(OwnedFd::from(stream.try_clone()?));
        Ok(Self {
            connection: Connection::new(stream)?,
            session,
            device,
            workers,
            metrics,
            memory: Arc::new(MemoryMap::empty()),
            inflight: None,
            attendance: refresher.attend(),
            refresher,
            gate,
            announcements: RateLimit::new(ANNOUNCEMENTS_MAX, Duration::from_secs(1)),
            waiting: Vec::new(),
            store,
            socket,
            channel: None,
            taken_up: Vec::new(),
        })
    }

    /// Serves until the session ends, or between two messages, when `leave` says so. The rings may still run then:
    /// [`drain`](Self::drain), or [`hand_over`](Self::hand_over).
    pub(super) async fn serve(
        &mut self,
        events: &mut mpsc::Receiver<WorkerEvent>,
        leave: &Notify,
    ) -> End {
        loop {
            let store = self.store.as_deref();
            let mark = |busy| store.iter().for_each(|store| store.set_busy(busy));
            let served = tokio::select! {
                biased;
                () = leave.notified() => return End::Told,
                Some(event) = events.recv() => self.hear(event),
                message = self.connection.receive_marked(mark) => self.receive(message).await,
            };
            if let Err(end) = served {
                return end;
            }
        }
    }

    /// Stops all rings: returns when nothing is in flight. The session has ended then, and nothing of it is left.
    pub(super) async fn drain(self) {
        patiently("the requests in flight", self.workers.stop_rings()).await;
        if let Some(store) = self.store {
            store.end_session(&self.socket);
        }
    }

    /// Tells the log why the session ended.
    pub(super) fn say_farewell(&mut self, end: &End) {
        if matches!(end, End::HangUp) {
            self.gate.log(Instant::now(), || info!("front end hung up"));
        } else {
            self.metrics.daemon.broken_sessions.add(1);
            self.gate.log(Instant::now(), || {
                warn!("session ended: {}", with_sources(end));
            });
        }
    }

    fn hear(&mut self, event: WorkerEvent) -> Result<(), End> {
        match event {
            WorkerEvent::MemoryLost => return Err(End::MemoryLost),
            WorkerEvent::EngineFailed(error) => return Err(End::Engine(error)),
            WorkerEvent::RingBroken { index, fault } => self.gate.log(Instant::now(), || {
                warn!(ring = index, "ring is broken: {}", with_sources(&fault));
            }),
            WorkerEvent::KickLost { index } => self.gate.log(Instant::now(), || {
                warn!(ring = index, "the kick descriptor cannot be watched, or was closed");
            }),
            WorkerEvent::HostFault { index, fault } => self.gate.log(Instant::now(), || {
                let (offset, error) = (fault.offset, fault.errno);
                warn!(ring = index, offset, %error, "{} failed", fault.what);
            }),
        }
        Ok(())
    }

    async fn receive(&mut self, message: Result<Option<Message>, ReceiveError>) -> Result<(), End> {
        let message = match message {
            Ok(Some(message)) => message,
            Ok(None) => return Err(End::HangUp),
            Err(ReceiveError::Refused { request_id, need_reply, reason }) => {
                let refused = self.refuse(request_id, need_reply, reason.into()).await;
                self.is_between_messages(refused.is_ok());
                return refused;
            }
            Err(error) => {
                self.metrics.daemon.protocol_errors.add(1);
                return Err(End::Receive(error));
            }
        };
        debug!(request = %message.request, payload = ?message.payload, "received");
        let (request, need_reply) = (message.request, message.need_reply);
        let acted = self.act(message).await;
        self.note_attendance();
        self.commit();
        let answered = match acted {
            Ok(Answered::Body(body)) => send(self.connection.reply(request, &body)).await,
            Ok(Answered::Shared(body, fd)) => {
                send(self.connection.reply_with(request, &body, fd.as_fd())).await
            }
            Ok(Answered::Ack) if need_reply && self.session.acknowledges() => {
                send(self.connection.acknowledge(request, true)).await
            }
            Ok(Answered::Ack) => Ok(()),
            Err(refused) => self.refuse(request.into(), need_reply, refused).await,
        };
        self.is_between_messages(answered.is_ok());
        answered
    }

    /// Whether a ring runs, and the front end reads the configuration space, may be another by now.
    fn note_attendance(&self) {
        let runs = (0..self.session.ring_count()).any(|index| self.is_running(index));
        self.attendance.is_now(self.session.reads_config(), runs);
    }

    /// Says no to a request, where there is a way to say it.
    async fn refuse(
        &mut self,
        request_id: u32,
        need_reply: bool,
        refused: Refused,
    ) -> Result<(), End> {
        let request = Request::try_from(request_id);
        // vhost-user, "VHOST_USER_GET_CONFIG": a payload of no length says that it failed.
        if request == Ok(Request::GetConfig) {
            self.count_refusal(&refused);
            return send(self.connection.reply(request_id, &[])).await;
        }
        // vhost-user, "VHOST_USER_PROTOCOL_F_REPLY_ACK": need_reply changes nothing for a request
        // that has a reply of its own; an acknowledgement would be taken for that.
        let has_reply = request.is_ok_and(|request| table::row(request).answer == Answer::Value);
        if !has_reply && need_reply && self.session.acknowledges() {
            self.count_refusal(&refused);
            return send(self.connection.acknowledge(request_id, false)).await;
        }
        self.metrics.daemon.protocol_errors.add(1);
        Err(End::Refused(refused))
    }

    fn count_refusal(&mut self, refused: &dyn std::error::Error) {
        self.metrics.daemon.protocol_errors.add(1);
        self.gate.log(Instant::now(), || warn!("refused: {}", with_sources(refused)));
    }

    /// Does what a message asks for.
    async fn act(&mut self, message: Message) -> Result<Answered, Refused> {
        let request = message.request;
        match self.session.handle(message)? {
            Action::Done => {}
            Action::Answer(value) => return Ok(Answered::Body(value.to_ne_bytes().to_vec())),
            Action::Ring(index) => self.settle(index).await?,
            Action::Rings => self.settle_all().await?,
            Action::Reset => {
                self.settle_all().await?;
                self.device.reset();
            }
            Action::RingBase(index) => {
                self.settle(index).await?;
                let base = u32::from(self.session.ring_base(index));
                let state = [u32::from(index).to_ne_bytes(), base.to_ne_bytes()];
                return Ok(Answered::Body(state.concat()));
            }
            Action::Call(index) => {
                if let (true, Some(ring)) = (self.is_running(index), self.session.ring(index)) {
                    self.workers.set_call(index, ring.call);
                }
            }
            Action::Error(index) => {
                if let (true, Some(ring)) = (self.is_running(index), self.session.ring(index)) {
                    self.workers.set_error(index, ring.error);
                }
            }
            Action::Memory(slots) => self.replace_memory(slots).await?,
            Action::CreateInflight(shape) => {
                let file = shape.create().map_err(Refused::CreateInflight)?;
                return Ok(Answered::Shared(describe_inflight(shape), file));
            }
            Action::Inflight(slot) => self.record_inflight(slot)?,
            Action::ReadConfig { offset, len_bytes } => {
                return Ok(Answered::Body(self.read_config(offset, len_bytes)));
            }
            Action::WriteConfig { offset, data } => {
                if !self.device.write_config(offset, &data) {
                    return Err(Refused::Config { offset });
                }
            }
            Action::Announce(mac) => {
                if let Some(network) = self.device.network() {
                    self.announce(network, mac);
                }
            }
            Action::SetMtu(mtu_bytes) => {
                if !self.device.network().is_some_and(|network| network.set_mtu(mtu_bytes)) {
                    return Err(Refused::Mtu { mtu_bytes });
                }
            }
            Action::BackendChannel(socket) => self.speak_over(socket)?,
        }
        debug!(%request, "done");
        Ok(Answered::Ack)
    }

    /// Announces the guest, unless that was done too often lately.
    fn announce(&mut self, network: &dyn Network, mac: [u8; 6]) {
        let now = Instant::now();
        if !self.announcements.passes(now) {
            return;
        }
        let announced = network.announce(mac);
        let address = mac.map(|byte| format!("{byte:02x}")).join(":");
        self.gate.log(now, || match &announced {
            Ok(()) => info!(mac = %address, "the guest was announced"),
            Err(why) => {
                warn!(mac = %address, "the guest is not announced: {}", with_sources(why));
            }
        });
    }

    fn is_running(&self, index: u16) -> bool {
        self.workers.is_running(index)
    }

    async fn settle_all(&mut self) -> Result<(), Refused> {
        for index in 0..self.session.ring_count() {
            self.settle(index).await?;
        }
        Ok(())
    }

    /// Brings a ring to where the session says that it should be.
    async fn settle(&mut self, index: u16) -> Result<(), Refused> {
        let wanted = self.session.ring(index).is_some() && !self.session.ring_is_outdated(index);
        if self.is_running(index)
            && !wanted
            && let Some(base) = self.stop(index).await
        {
            debug!(ring = index, base, "stopped");
        }
        match self.session.ring(index) {
            Some(ring) if !self.is_running(index) => self.start(index, ring),
            _ => Ok(()),
        }
    }

    /// Takes a ring off its worker; its base.
    async fn stop(&mut self, index: u16) -> Option<u16> {
        let stopped = patiently("a ring to stop", self.workers.stop_ring(index)).await;
        if let Some(base) = stopped {
            self.session.ring_stopped(index, base);
        }
        stopped
    }

    fn start(&mut self, index: u16, ring: Ring) -> Result<(), Refused> {
        let (size, base) = (ring.size, ring.base);
        let features = self.session.features();
        let record = self.record_of(index, size)?;
        let setup = RingSetup {
            addresses: ring.addresses,
            size,
            base,
            features,
            memory: Arc::clone(&self.memory),
            record,
        };
        let kick = match Kick::new(ring.kick) {
            Ok(kick) => kick,
            Err(source) => {
                self.session.kick_refused(index);
                return Err(Refused::Kick { index, source });
            }
        };
        match Virtqueue::new(setup) {
            Ok(virtqueue) => {
                let (call, error) = (ring.call, ring.error);
                let ring = virtqueue;
                let left = ring.left();
                if left > 0 {
                    info!(ring = index, requests = left, "a predecessor's requests come first");
                }
                self.workers.start_ring(RingStart { index, ring, kick, call, error, features });
                self.session.ring_started(index);
                self.waiting.retain(|waiting| *waiting != index);
                debug!(ring = index, size, base, "started");
                Ok(())
            }
            // Some front ends describe rings before the memory that they lie in.
            Err(error @ RingError::Unmapped { .. }) => {
                if !self.waiting.contains(&index) {
                    self.waiting.push(index);
                    info!(ring = index, "ring waits for memory: {}", with_sources(&error));
                }
                Ok(())
            }
            Err(source) => Err(Refused::Ring { index, source }),
        }
    }

    /// Maps a memory table, reusing what is mapped already, and gives it to the rings.
    async fn replace_memory(&mut self, slots: Vec<MemorySlot>) -> Result<(), Refused> {
        let regions = slots.iter().map(|slot| self.region(slot)).collect::<Result<_, _>>()?;
        let memory = Arc::new(MemoryMap::new(regions)?);
        // A ring whose own memory goes must not be touched any more; it goes on from where it was
        // when its memory comes back, in this message or in a later one.
        for index in 0..self.session.ring_count() {
            let homeless = self
                .session
                .ring(index)
                .is_some_and(|ring| !ring.addresses.lie_in(ring.size, &memory));
            if homeless && self.is_running(index) {
                self.stop(index).await;
            }
        }
        patiently("requests that use the old memory", self.workers.set_memory(&memory)).await;
        self.memory = memory;
        self.session.commit_memory(slots);
        self.settle_all().await
    }

    /// Has rings that start from here on record what is in flight.
    fn record_inflight(&mut self, slot: InflightSlot) -> Result<(), Refused> {
        let InflightSlot { shape, file_offset_bytes, file } = slot;
        let file = Arc::new(file);
        let InflightShape { queue_count, queue_size } = shape;
        let is_ours = false;
        self.record_at(KeptInflight { queue_count, queue_size, file_offset_bytes, file, is_ours })
    }

    fn record_at(&mut self, kept: KeptInflight<Arc<OwnedFd>>) -> Result<(), Refused> {
        let (shape, offset_bytes) = (kept.shape(), kept.file_offset_bytes);
        let region = InflightRegion::map(shape, offset_bytes, kept.file.as_fd());
        self.inflight = Some((region.map_err(Refused::Inflight)?, kept));
        Ok(())
    }

    /// Speaks to the front end over this socket.
    fn speak_over(&mut self, socket: OwnedFd) -> Result<(), Refused> {
        let kept = socket.try_clone().map_err(Refused::Channel)?;
        let channel = BackendChannel::new(socket).map_err(Refused::Channel)?;
        self.attendance.set_channel(channel);
        self.channel = Some(Arc::new(kept));
        Ok(())
    }

    fn region(&self, slot: &MemorySlot) -> Result<Arc<Region>, MapError> {
        let known = self.session.memory().iter();
        let mut kept =
            known.filter(|old| old.spec == slot.spec && Arc::ptr_eq(&old.file, &slot.file));
        let mapped = || self.memory.regions().iter().find(|region| region.spec() == slot.spec);
        match kept.next().and_then(|_| mapped()) {
            Some(region) => Ok(Arc::clone(region)),
            None => Region::map(slot.spec, slot.file.as_fd()).map(Arc::new),
        }
    }

    /// The reply to `GET_CONFIG`: the request's offset and size again, no flags, then the bytes.
    fn read_config(&self, offset: u32, len_bytes: u32) -> Vec<u8> {
        let mut body = [offset.to_ne_bytes(), len_bytes.to_ne_bytes(), [0; 4]].concat();
        let head = body.len();
        body.resize(head + len_bytes as usize, 0);
        self.device.read_config(self.session.features(), offset, &mut body[head..]);
        body
    }
}

/// What a device has for a front end.
fn offer(device: &impl Device) -> Offer {
    Offer {
        features: device.features(),
        queue_count: device.queue_count(),
        max_queue_size: device.max_queue_size(),
        is_network: device.network().is_some(),
    }
}

/// The reply to `GET_INFLIGHT_FD`: the region's size, where it begins in the file, and what it is for. The text has 20 bytes;
/// all front ends have the C structure, which ends in padding, and want exactly that.
fn describe_inflight(shape: InflightShape) -> Vec<u8> {
    let place = [shape.len_bytes().to_ne_bytes(), 0u64.to_ne_bytes()].concat();
    let counts = [shape.queue_count, shape.queue_size, 0, 0].map(u16::to_ne_bytes).concat();
    [place, counts].concat()
}

/// Waits, and tells the log every so often for what.
async fn patiently<T>(what: &str, done: impl Future<Output = T>) -> T {
    tokio::pin!(done);
    let began = Instant::now();
    loop {
        match timeout(PATIENCE, &mut done).await {
            Ok(done) => return done,
            Err(_elapsed) => {
                warn!("waiting for {what}, {} s so far", began.elapsed().as_secs());
            }
        }
    }
}

async fn send(sent: impl Future<Output = std::io::Result<()>>) -> Result<(), End> {
    match timeout(REPLY_MAX, sent).await {
        Ok(sent) => sent.map_err(End::Send),
        Err(_elapsed) => Err(End::Unread),
    }
}

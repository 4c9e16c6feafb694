//! A worker that whoever holds it turns by hand: for simulations, which have neither thread nor
//! clock.
//!
//! Contract: a turn is the very turn of a worker's thread; only what happens between two of them,
//! the decision between looking and sleeping, is the holder's. Commands go through the mailbox as
//! they do from the control plane. What it does not do: wait.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{mpsc, oneshot};

use super::mailbox::Mailbox;
use super::ring::ActiveRing;
use super::{Command, EVENT_BACKLOG, RingStart, Worker, WorkerEvent};
use crate::device::Device;
use crate::engine::{Engine, Event, Subject, Wait};
use crate::memory::MemoryMap;
use crate::metrics::{Identity, Metrics, Vocabulary};

/// What a worker does after a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rest {
    /// It turns again at once.
    None,
    /// It sleeps until something happens, at most this long.
    Sleep(Option<Duration>),
}

/// See the module's head.
pub(crate) struct ManualWorker<D: Device> {
    worker: Worker<D>,
    device: Arc<D>,
    metrics: Metrics,
    told: mpsc::Receiver<WorkerEvent>,
    /// What the last turn brought for the next one.
    arrived: Vec<Event>,
}

impl<D: Device> ManualWorker<D> {
    pub(crate) fn new(device: Arc<D>, engine: Box<dyn Engine>) -> io::Result<Self> {
        let (events, told) = mpsc::channel(EVENT_BACKLOG);
        let mailbox = Arc::new(Mailbox::new()?);
        let mut worker = Worker::new(engine, device.queue_count(), mailbox, events, Instant::now());
        worker.engine.watch(Subject::Mail, worker.mailbox.bell())?;
        let identity = Identity { device: D::NAME, engine: "simulated" };
        let vocabulary = Vocabulary { kinds: D::KINDS, drops: D::DROPS, limits: D::LIMITS };
        let metrics = Metrics::new(identity, vocabulary, device.queue_count());
        Ok(Self { worker, device, metrics, told, arrived: Vec::new() })
    }

    /// Posts a ring, as [`Workers::start_ring`](super::Workers::start_ring) does.
    pub(crate) fn start(&mut self, start: RingStart) {
        let queue = self.device.open_queue(start.index, start.features, start.ring.size());
        let metrics = Arc::clone(&self.metrics.queues[usize::from(start.index)]);
        let limits = Arc::clone(&self.metrics.limits);
        let active = Box::new(ActiveRing::new(start, queue, metrics, limits));
        self.worker.mailbox.send(Command::Start(active));
    }

    /// Asks a ring to stop; the base comes out of what is returned.
    pub(crate) fn stop(&mut self, index: u16) -> oneshot::Receiver<u16> {
        let (base, stopped) = oneshot::channel();
        self.worker.mailbox.send(Command::Stop { index, base });
        stopped
    }

    /// Gives a ring another memory map; an answer comes when no chain refers to an older one.
    pub(crate) fn set_memory(
        &mut self,
        index: u16,
        memory: Arc<MemoryMap>,
    ) -> oneshot::Receiver<()> {
        let (settled, wait) = oneshot::channel();
        self.worker.mailbox.send(Command::SetMemory { index, memory, settled });
        wait
    }

    /// Posts that there are other limits, as a [`Throttle`](super::Throttle) does.
    pub(crate) fn limits_changed(&mut self) {
        self.worker.mailbox.send(Command::LimitsChanged);
    }

    /// Posts that rings are to look at their channels, as a [`Nudge`](super::Nudge) does.
    pub(crate) fn nudge(&mut self) {
        self.worker.mailbox.send(Command::Look);
    }

    /// One turn at `now_ns`. `looks`: before it sleeps, the worker looks for work, at this moment.
    /// `meanwhile`: what happens between that and the worker's asking for kicks.
    pub(crate) fn turn(
        &mut self,
        now_ns: u64,
        looks: bool,
        meanwhile: impl FnOnce(),
    ) -> io::Result<Rest> {
        let Some(wait) = self.worker.turn(now_ns, &mut self.arrived)? else {
            unreachable!("nobody told the worker to quit");
        };
        let found = looks && wait != Wait::No && self.look()?;
        meanwhile();
        let sleeps = wait != Wait::No && !found && self.worker.arm();
        self.worker.engine.turn(if sleeps { wait } else { Wait::No }, &mut self.arrived)?;
        Ok(match wait {
            _ if !sleeps || !self.arrived.is_empty() => Rest::None,
            Wait::AtMost(limit) => Rest::Sleep(Some(limit)),
            Wait::No | Wait::Forever => Rest::Sleep(None),
        })
    }

    fn look(&mut self) -> io::Result<bool> {
        let Worker { engine, rings, .. } = &mut self.worker;
        engine.send()?;
        let found = rings.iter().flatten().any(ActiveRing::has_chains) || engine.has_events();
        self.worker.look_for_chains();
        Ok(found)
    }

    /// Ends a sleep with what has happened meanwhile; false when nothing has.
    pub(crate) fn wake(&mut self) -> io::Result<bool> {
        if self.arrived.is_empty() {
            self.worker.engine.turn(Wait::No, &mut self.arrived)?;
        }
        Ok(!self.arrived.is_empty())
    }

    /// What the worker tells the control plane next.
    pub(crate) fn told(&mut self) -> Result<WorkerEvent, TryRecvError> {
        self.told.try_recv()
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.metrics
    }
}

//! The loop: kick → pop → submit → engine → complete → used → call.
//!
//! A worker is a thread that owns some rings and one engine outright. A turn of its loop lets each
//! ring that has work pop and submit, publishes what was used with one store and at most one call
//! per ring, and then makes one system call that submits everything and waits for whatever comes
//! next: a completion, a kick, or mail. [`Workers`] is the control plane's handle: it posts
//! commands and awaits their answers; a running ring is never touched from outside.

mod bell;
mod kick;
mod mailbox;
#[cfg(any(test, feature = "simulation"))]
pub(crate) mod manual;
mod ring;
mod roll_call;
mod spin;

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

pub use self::kick::{Kick, NoEventfd};
use self::mailbox::Mailbox;
use self::ring::{ActiveRing, Notice};
pub use self::roll_call::RollCall;
use self::spin::{LOOK_MAX, Spin};
use crate::device::{Device, HostFault};
use crate::engine::{Channels, Completion, Engine, EngineError, EngineKind, Event, Subject, Wait};
use crate::memory::MemoryMap;
use crate::metrics::{Metrics, QueueMetrics};
use crate::rate_limit::{Change, RateLimits};
use crate::sandbox::{self, Call, Needs};
use crate::virtqueue::{RingError, Virtqueue};

/// The longest sleep between two looks at a ring that has no kick.
const POLL_MAX: Duration = Duration::from_millis(1);
/// The first sleep after a look at such a ring that found nothing.
const POLL_MIN: Duration = Duration::from_micros(10);
/// Events that wait for the control plane. Host faults, which it only logs, take half of it at
/// most; the others come at most a few times per start of a ring.
const EVENT_BACKLOG: usize = 1024;

/// What a worker tells the control plane.
#[derive(Debug)]
pub enum WorkerEvent {
    /// The driver broke a ring's rules; the ring is idle until it is stopped and started.
    RingBroken {
        /// Which ring.
        index: u16,
        /// How.
        fault: RingError,
    },
    /// The front end took mapped memory away: the session must end.
    MemoryLost,
    /// The host failed a request.
    HostFault {
        /// The ring it came from.
        index: u16,
        /// What and where.
        fault: HostFault,
    },
    /// A ring's kick descriptor cannot be watched, or hung up: the ring gets no kicks.
    KickLost {
        /// Which ring.
        index: u16,
    },
    /// The worker's engine failed: the process cannot go on.
    EngineFailed(std::io::Error),
}

/// How a ring is started on its worker.
pub struct RingStart {
    /// Its place in the device.
    pub index: u16,
    /// The ring, resolved.
    pub ring: Virtqueue,
    /// How it is kicked.
    pub kick: Kick,
    /// What wakes the driver when buffers were used; `None`: it polls.
    pub call: Option<Arc<OwnedFd>>,
    /// What tells the front end that the ring is broken.
    pub error: Option<Arc<OwnedFd>>,
    /// The feature bits that the driver acknowledged.
    pub features: u64,
}

enum Command<Q> {
    Start(Box<ActiveRing<Q>>),
    Stop { index: u16, base: oneshot::Sender<u16> },
    SetCall { index: u16, call: Option<Arc<OwnedFd>> },
    SetError { index: u16, error: Option<Arc<OwnedFd>> },
    SetMemory { index: u16, memory: Arc<MemoryMap>, settled: oneshot::Sender<()> },
    LimitsChanged,
    Look,
    Answer(oneshot::Sender<()>),
    Quit,
}

/// A worker's thread and how to reach it.
struct Thread<Q> {
    mailbox: Arc<Mailbox<Command<Q>>>,
    handle: JoinHandle<()>,
}

/// Changes the limits of rings that run.
pub struct Throttle<Q> {
    limits: Arc<RateLimits>,
    mailboxes: Vec<Arc<Mailbox<Command<Q>>>>,
}

impl<Q> Throttle<Q> {
    /// Changes limits at once, also for requests that wait. From one thread at a time.
    pub fn change(&self, change: &Change) {
        self.limits.change(change);
        self.mailboxes.iter().for_each(|mailbox| mailbox.send(Command::LimitsChanged));
    }
}

/// Has the rings that run look at their channels.
pub struct Nudge<Q>(Vec<Arc<Mailbox<Command<Q>>>>);

impl<Q> Nudge<Q> {
    /// Has every queue look at its ring and at its channel, which may be another one by now.
    pub fn look(&self) {
        self.0.iter().for_each(|mailbox| mailbox.send(Command::Look));
    }
}

/// The worker threads of a device.
pub struct Workers<D: Device> {
    device: Arc<D>,
    threads: Vec<Thread<D::Queue>>,
    queues: Vec<Arc<QueueMetrics>>,
    limits: Arc<RateLimits>,
    running: Vec<bool>,
}

impl<D: Device> Workers<D> {
    /// Starts `count` workers with an engine of this kind each, which count into `metrics` and keep
    /// the limits that it shows; their events come out of the second value.
    ///
    /// # Errors
    /// A thread or its engine could not be set up.
    pub fn start(
        device: Arc<D>,
        engine: EngineKind,
        count: u16,
        metrics: &Metrics,
    ) -> Result<(Self, mpsc::Receiver<WorkerEvent>), EngineError> {
        let (events, receiver) = mpsc::channel(EVENT_BACKLOG);
        let mut threads = Vec::new();
        // One clock for all: they share limits.
        let began = Instant::now();
        for number in 0..count.max(1) {
            threads.push(spawn(number, Arc::clone(&device), engine, events.clone(), began)?);
        }
        let queues = metrics.queues.clone();
        let limits = Arc::clone(&metrics.limits);
        let running = vec![false; queues.len()];
        Ok((Self { device, threads, queues, limits, running }, receiver))
    }

    /// What changes the limits of all rings.
    pub fn throttle(&self) -> Throttle<D::Queue> {
        Throttle { limits: Arc::clone(&self.limits), mailboxes: self.mailboxes() }
    }

    /// What has all rings look at their channels.
    pub fn nudge(&self) -> Nudge<D::Queue> {
        Nudge(self.mailboxes())
    }

    /// What finds out whether all workers still turn.
    pub fn roll_call(&self) -> RollCall<D::Queue> {
        RollCall::of(self.mailboxes())
    }

    fn mailboxes(&self) -> Vec<Arc<Mailbox<Command<D::Queue>>>> {
        self.threads.iter().map(|thread| Arc::clone(&thread.mailbox)).collect()
    }

    /// Gives a ring to its worker. It must not be running.
    pub fn start_ring(&mut self, start: RingStart) {
        let index = start.index;
        assert!(!self.running[usize::from(index)], "ring {index} is started once");
        let queue = self.device.open_queue(index, start.features, start.ring.size());
        let metrics = Arc::clone(&self.queues[usize::from(index)]);
        let limits = Arc::clone(&self.limits);
        let active = Box::new(ActiveRing::new(start, queue, metrics, limits));
        self.running[usize::from(index)] = true;
        self.post(index, Command::Start(active));
    }

    /// Whether a ring is on its worker.
    pub fn is_running(&self, index: u16) -> bool {
        self.running.get(usize::from(index)).is_some_and(|running| *running)
    }

    /// Takes a ring back once its last chain has ended: the next available index, which is what
    /// `GET_VRING_BASE` answers. `None` if it was not running.
    pub async fn stop_ring(&mut self, index: u16) -> Option<u16> {
        let stopped = self.ask_to_stop(index)?;
        let base = stopped.await.ok();
        self.ended(index);
        base
    }

    fn ended(&mut self, index: u16) {
        if std::mem::replace(&mut self.running[usize::from(index)], false) {
            self.device.close_queue(index);
        }
    }

    /// Takes all rings back, side by side.
    pub async fn stop_rings(&mut self) {
        let indexes = (0..).take(self.running.len());
        let waiting: Vec<_> = indexes.filter_map(|index| self.ask_to_stop(index)).collect();
        for stopped in waiting {
            // A ring that a dropped call had asked to stop may be gone already.
            let _ = stopped.await;
        }
        (0..).take(self.running.len()).for_each(|index| self.ended(index));
    }

    fn ask_to_stop(&self, index: u16) -> Option<oneshot::Receiver<u16>> {
        self.is_running(index).then(|| {
            let (base, stopped) = oneshot::channel();
            self.post(index, Command::Stop { index, base });
            stopped
        })
    }

    /// Replaces a running ring's call descriptor.
    pub fn set_call(&self, index: u16, call: Option<Arc<OwnedFd>>) {
        self.post(index, Command::SetCall { index, call });
    }

    /// Replaces a running ring's error descriptor.
    pub fn set_error(&self, index: u16, error: Option<Arc<OwnedFd>>) {
        self.post(index, Command::SetError { index, error });
    }

    /// Gives all running rings another memory map, and returns once no chain refers to an older
    /// one: memory that left the map is then out of reach.
    pub async fn set_memory(&self, memory: &Arc<MemoryMap>) {
        let mut waiting = Vec::new();
        for index in (0..).zip(&self.running).filter_map(|(index, run)| run.then_some(index)) {
            let (settled, wait) = oneshot::channel();
            let memory = Arc::clone(memory);
            self.post(index, Command::SetMemory { index, memory, settled });
            waiting.push(wait);
        }
        for wait in waiting {
            // A worker that is gone refers to nothing.
            let _ = wait.await;
        }
    }

    fn post(&self, index: u16, command: Command<D::Queue>) {
        self.threads[usize::from(index) % self.threads.len()].mailbox.send(command);
    }
}

impl<D: Device> Drop for Workers<D> {
    fn drop(&mut self) {
        for thread in &self.threads {
            thread.mailbox.send(Command::Quit);
        }
        for thread in self.threads.drain(..) {
            // A worker that panicked has said so on the log.
            let _ = thread.handle.join();
        }
    }
}

/// Starts one worker, and waits until its engine is set up.
fn spawn<D: Device>(
    number: u16,
    device: Arc<D>,
    engine: EngineKind,
    events: mpsc::Sender<WorkerEvent>,
    began: Instant,
) -> Result<Thread<D::Queue>, EngineError> {
    let mailbox = Mailbox::new().map_err(|error| EngineError::Worker(error.into()))?;
    let mailbox = Arc::new(mailbox);
    let (ready, is_ready) = std::sync::mpsc::channel();
    let handle = std::thread::Builder::new().name(format!("worker-{number}")).spawn({
        let mailbox = Arc::clone(&mailbox);
        move || {
            let numbers =
                |of: Vec<BorrowedFd<'_>>| of.iter().map(AsRawFd::as_raw_fd).collect::<Vec<_>>();
            let channels = Channels::new(numbers(device.channels()));
            let needs = needs(engine, device.queue_calls());
            // What this host lacks is for the main thread to tell, which enters as well.
            let enter = || drop(sandbox::enter(&needs));
            // The engine belongs to the thread that made it.
            let open = || engine.open(numbers(device.files()), channels);
            let opened = if engine.opens_in_sandbox() {
                enter();
                open()
            } else {
                open().inspect(|_| enter())
            };
            match opened {
                Ok(engine) => {
                    let _ = ready.send(Ok(()));
                    Worker::<D>::new(engine, device.queue_count(), mailbox, events, began).run();
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        }
    });
    let handle = handle.map_err(EngineError::Worker)?;
    match is_ready.recv() {
        Ok(Ok(())) => Ok(Thread { mailbox, handle }),
        Ok(Err(error)) => Err(error),
        Err(gone) => Err(EngineError::Worker(std::io::Error::other(gone))),
    }
}

/// What a worker does to the system: no file has a name for it.
fn needs(engine: EngineKind, calls_of_device: &[Call]) -> Needs {
    let calls = [engine.calls(), calls_of_device.to_vec()].concat();
    Needs { calls, ..Needs::default() }
}

struct Worker<D: Device> {
    engine: Box<dyn Engine>,
    rings: Vec<Option<ActiveRing<D::Queue>>>,
    mailbox: Arc<Mailbox<Command<D::Queue>>>,
    events: mpsc::Sender<WorkerEvent>,
    began: Instant,
    /// The last sleep between two looks at rings that have no kick.
    idle: Duration,
    /// The ring that the next turn begins with.
    first: usize,
}

impl<D: Device> Worker<D> {
    fn new(
        engine: Box<dyn Engine>,
        queue_count: u16,
        mailbox: Arc<Mailbox<Command<D::Queue>>>,
        events: mpsc::Sender<WorkerEvent>,
        began: Instant,
    ) -> Self {
        let rings = (0..queue_count).map(|_| None).collect();
        Self { engine, rings, mailbox, events, began, idle: Duration::ZERO, first: 0 }
    }

    fn run(mut self) {
        let ended = self.turns();
        self.mailbox.close();
        // A ring that is still here, as when another worker's engine has failed, was not drained:
        // the kernel may reach its buffers.
        for ring in self.rings.drain(..).flatten() {
            ring.abandon();
        }
        if let Err(fault) = ended {
            tell(&self.events, WorkerEvent::EngineFailed(fault));
        }
    }

    /// Turns until told to quit.
    fn turns(&mut self) -> std::io::Result<()> {
        self.engine.watch(Subject::Mail, self.mailbox.bell())?;
        let mut events = Vec::with_capacity(256);
        let mut spin = Spin::default();
        loop {
            let now_ns = self.now_ns();
            match self.turn(now_ns, &mut events)? {
                None => return Ok(()),
                Some(Wait::No) => self.engine.turn(Wait::No, &mut events)?,
                Some(wait) => self.rest(wait, &mut spin, &mut events)?,
            }
        }
    }

    /// Serves what has happened, lets rings pop and publishes what was used; how long the worker
    /// may wait then, or `None` when it is told to quit.
    fn turn(&mut self, now_ns: u64, events: &mut Vec<Event>) -> std::io::Result<Option<Wait>> {
        for event in events.drain(..) {
            if !self.dispatch(event, now_ns)? {
                return Ok(None);
            }
        }
        let popped = self.process(now_ns);
        self.close_turn()?;
        // Kicks are not asked for while a turn does not sleep, so look: another ring's work must
        // not starve this one.
        self.look_for_chains();
        Ok(Some(self.how_long(now_ns, popped)))
    }

    /// Lets rings pop; true when one did. Who was the first is the last the next time, because the
    /// first finds most room in limits that they share.
    fn process(&mut self, now_ns: u64) -> bool {
        let (before, from) = self.rings.split_at_mut(self.first);
        let mut popped = false;
        let mut first = None;
        for ring in from.iter_mut().chain(before).flatten() {
            ring.tick(now_ns);
            if ring.is_runnable() {
                first = first.or(Some(usize::from(ring.index())));
                popped |= ring.process(now_ns, &mut *self.engine);
            }
        }
        self.first = first.map_or(self.first, |first| (first + 1) % self.rings.len());
        popped
    }

    /// Waits for the next thing to happen: looks for it while that is likely to pay, then sleeps.
    fn rest(
        &mut self,
        wait: Wait,
        spin: &mut Spin,
        events: &mut Vec<Event>,
    ) -> std::io::Result<()> {
        // Who has to be up soon, looks at the clock only.
        let is_short = matches!(wait, Wait::AtMost(limit) if limit <= LOOK_MAX);
        if spin.is_worth_it() && !is_short {
            self.engine.send()?;
            let Self { engine, rings, .. } = self;
            let found = spin
                .look(|| rings.iter().flatten().any(ActiveRing::has_chains) || engine.has_events());
            if found {
                self.look_for_chains();
                let events_wait = self.engine.has_events();
                return if events_wait { self.engine.turn(Wait::No, events) } else { Ok(()) };
            }
        }
        if !self.arm() {
            return self.engine.turn(Wait::No, events);
        }
        let asleep = Instant::now();
        self.engine.turn(wait, events)?;
        // What only the clock has ended tells nothing of how soon work comes.
        if !events.is_empty() {
            spin.slept(asleep.elapsed());
        }
        Ok(())
    }

    /// Finds rings whose driver has made chains available that the device waits for.
    fn look_for_chains(&mut self) {
        for ring in self.rings.iter_mut().flatten().filter(|ring| ring.has_chains()) {
            ring.look();
        }
    }

    /// Before a sleep: asks for kicks; false when there is work already.
    fn arm(&mut self) -> bool {
        self.rings.iter_mut().flatten().for_each(ActiveRing::arm);
        !self.rings.iter().flatten().any(ActiveRing::is_runnable)
    }

    fn now_ns(&self) -> u64 {
        nanoseconds(self.began.elapsed())
    }

    /// Serves one event; false when it is time to quit.
    fn dispatch(&mut self, event: Event, now_ns: u64) -> std::io::Result<bool> {
        match event.subject {
            Subject::Operation { queue, token } => {
                if let Some(ring) = &mut self.rings[usize::from(queue)] {
                    let done = Completion { token, result: event.outcome() };
                    ring.complete(now_ns, done, &mut *self.engine);
                }
            }
            Subject::Kick { queue } => {
                if let Some(ring) = &mut self.rings[usize::from(queue)] {
                    let notice = ring.kicked(event.outcome(), event.more, &mut *self.engine)?;
                    if let Some(notice) = notice {
                        tell(&self.events, notice.of(queue));
                    }
                }
            }
            Subject::Mail => {
                event.outcome()?;
                if !event.more {
                    self.engine.watch(Subject::Mail, self.mailbox.bell())?;
                }
                return self.read_mail();
            }
            Subject::Call { queue } => {
                if let Some(ring) = &mut self.rings[usize::from(queue)] {
                    ring.called(event.outcome(), &mut *self.engine)?;
                }
            }
            Subject::Error { queue } => {
                if let Some(ring) = &mut self.rings[usize::from(queue)] {
                    ring.told_error(event.outcome(), &mut *self.engine)?;
                }
            }
            Subject::Channel { queue } => {
                if let Some(ring) = &mut self.rings[usize::from(queue)] {
                    ring.channel_ready();
                }
            }
            Subject::CalledOff { queue } => {
                let missed = event.outcome() == Err(rustix::io::Errno::ALREADY);
                if let (true, Some(ring)) = (missed, &mut self.rings[usize::from(queue)]) {
                    ring.unwatch(&mut *self.engine)?;
                }
            }
        }
        Ok(true)
    }

    fn read_mail(&mut self) -> std::io::Result<bool> {
        while let Some(command) = self.mailbox.take() {
            let (index, command) = match command {
                Command::Quit => return Ok(false),
                Command::LimitsChanged => {
                    self.rings.iter_mut().flatten().for_each(ActiveRing::limits_changed);
                    continue;
                }
                Command::Look => {
                    for ring in self.rings.iter_mut().flatten() {
                        ring.look_anew(&mut *self.engine)?;
                    }
                    continue;
                }
                Command::Answer(present) => {
                    // Who asked may have given up.
                    let _ = present.send(());
                    continue;
                }
                Command::Start(mut ring) => {
                    ring.start(&mut *self.engine)?;
                    let index = usize::from(ring.index());
                    self.rings[index] = Some(*ring);
                    continue;
                }
                Command::Stop { index, .. }
                | Command::SetCall { index, .. }
                | Command::SetError { index, .. }
                | Command::SetMemory { index, .. } => (index, command),
            };
            if let Some(ring) = &mut self.rings[usize::from(index)] {
                match command {
                    Command::Stop { base, .. } => ring.stop(base, &mut *self.engine)?,
                    Command::SetCall { call, .. } => ring.set_call(call, &mut *self.engine)?,
                    Command::SetError { error, .. } => ring.set_error(error, &mut *self.engine)?,
                    Command::SetMemory { memory, settled, .. } => ring.set_memory(memory, settled),
                    Command::Start(_)
                    | Command::LimitsChanged
                    | Command::Look
                    | Command::Answer(_)
                    | Command::Quit => {}
                }
            }
        }
        Ok(true)
    }

    /// Lets queues submit what they gathered, publishes, tells, answers, and lets go of rings that
    /// have stopped.
    fn close_turn(&mut self) -> std::io::Result<()> {
        for index in 0..self.rings.len() {
            let Some(ring) = &mut self.rings[index] else { continue };
            ring.close_turn(&mut *self.engine);
            ring.publish(&mut *self.engine)?;
            if let Some(fault) = ring.engine_fault() {
                return Err(fault);
            }
            ring.settle();
            while let Some(notice) = ring.notice() {
                tell(&self.events, notice.of(ring.index()));
            }
            if ring.is_drained(&mut *self.engine)?
                && ring.is_let_go()
                && let Some(ring) = self.rings[index].take()
            {
                ring.end();
            }
        }
        Ok(())
    }

    /// How long the next turn may sleep. Rings without a kick are looked at again at once while
    /// they bring work, then ever more rarely; those that wait for a limit when they may go on.
    fn how_long(&mut self, now_ns: u64, popped: bool) -> Wait {
        for ring in self.rings.iter_mut().flatten().filter(|ring| ring.is_polled()) {
            if popped {
                self.idle = Duration::ZERO;
                ring.look();
            } else if ring.due_ns().is_none() {
                self.idle = (self.idle * 2).clamp(POLL_MIN, POLL_MAX);
                ring.look_at(now_ns.saturating_add(nanoseconds(self.idle)));
            }
        }
        if self.rings.iter().flatten().any(ActiveRing::is_runnable) {
            return Wait::No;
        }
        match self.rings.iter().flatten().filter_map(ActiveRing::due_ns).min() {
            Some(due_ns) => Wait::AtMost(Duration::from_nanos(due_ns.saturating_sub(now_ns))),
            None => Wait::Forever,
        }
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Never waits: the control plane may itself be waiting for this worker.
fn tell(events: &mpsc::Sender<WorkerEvent>, event: WorkerEvent) {
    let only_logged = matches!(event, WorkerEvent::HostFault { .. });
    if !only_logged || events.capacity() > EVENT_BACKLOG / 2 {
        // Where the backlog is full the event is lost, the counters are not.
        let _ = events.try_send(event);
    }
}

impl Notice {
    fn of(self, index: u16) -> WorkerEvent {
        match self {
            Self::Broken(fault) => WorkerEvent::RingBroken { index, fault },
            Self::Poisoned => WorkerEvent::MemoryLost,
            Self::Host(fault) => WorkerEvent::HostFault { index, fault },
            Self::NoKick => WorkerEvent::KickLost { index },
        }
    }
}

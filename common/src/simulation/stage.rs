//! A device on its worker, turned by hand.
//!
//! Contract: a turn happens only when a worker's thread would make one. Who finds the stage asleep
//! with work undone has found a lost wake-up.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;

use super::kernel::Kernel;
use super::random::Random;
use crate::device::Device;
use crate::memory::MemoryMap;
use crate::metrics::Metrics;
use crate::rate_limit::Change;
use crate::virtqueue::{RingError, RingSetup, Virtqueue};
use crate::worker::manual::{ManualWorker, Rest};
use crate::worker::{Kick, RingStart, WorkerEvent};

/// The most that the clock moves on in a turn: tens of microseconds.
const TURN_MAX_NS: u64 = 50_000;

/// See the module's head.
pub struct Stage<D: Device> {
    worker: ManualWorker<D>,
    kernel: Kernel,
    random: Random,
    now_ns: u64,
    /// Asleep, until this moment if there is one.
    asleep: Option<Option<u64>>,
    /// By queue: where its base comes from once it has stopped.
    stopping: Vec<Option<oneshot::Receiver<u16>>>,
    settling: Vec<oneshot::Receiver<()>>,
}

impl<D: Device> Stage<D> {
    /// A worker for `device`; what is left to chance follows from `seed`.
    ///
    /// # Panics
    /// The process can have no more descriptors.
    pub fn new(device: Arc<D>, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let (kernel, engine) = Kernel::new(random.number());
        let stopping = (0..device.queue_count()).map(|_| None).collect();
        let worker = ManualWorker::new(device, Box::new(engine)).expect("a worker");
        Self { worker, kernel, random, now_ns: 0, asleep: None, stopping, settling: Vec::new() }
    }

    /// What becomes of operations.
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// Starts a ring.
    ///
    /// # Errors
    /// It is none.
    ///
    /// # Panics
    /// The process can have no more descriptors.
    pub fn start(&mut self, index: u16, setup: RingSetup) -> Result<(), RingError> {
        let features = setup.features;
        let kick = Kick::new(Some(Arc::new(event()))).expect("an eventfd");
        self.worker.start(RingStart {
            index,
            ring: Virtqueue::new(setup)?,
            kick,
            call: Some(Arc::new(event())),
            error: Some(Arc::new(event())),
            features,
        });
        self.kernel.replace_kick(index);
        self.kernel.mail();
        Ok(())
    }

    /// Asks a ring to stop: [`stopped`](Self::stopped) tells when it has.
    pub fn stop(&mut self, index: u16) {
        self.stopping[usize::from(index)] = Some(self.worker.stop(index));
        self.kernel.mail();
    }

    /// The base of a ring that was asked to stop, once it has.
    pub fn stopped(&mut self, index: u16) -> Option<u16> {
        let stopping = &mut self.stopping[usize::from(index)];
        let base = stopping.as_mut()?.try_recv().ok()?;
        *stopping = None;
        Some(base)
    }

    /// Gives a ring another memory map; [`is_settled`](Self::is_settled) tells when nothing refers
    /// to an older one.
    pub fn set_memory(&mut self, index: u16, memory: Arc<MemoryMap>) {
        let settling = self.worker.set_memory(index, memory);
        self.settling.push(settling);
        self.kernel.mail();
    }

    /// Whether all replaced memory is out of use.
    pub fn is_settled(&mut self) -> bool {
        // A ring that is gone refers to nothing.
        self.settling.retain_mut(|wait| wait.try_recv() == Err(TryRecvError::Empty));
        self.settling.is_empty()
    }

    /// Changes limits, also for requests that wait.
    pub fn limit(&mut self, change: &Change) {
        self.metrics().limits.change(change);
        self.worker.limits_changed();
        self.kernel.mail();
    }

    /// Has all rings look at their channels.
    pub fn look(&mut self) {
        self.worker.nudge();
        self.kernel.mail();
    }

    /// Turns once, unless the worker sleeps and nothing has happened: false then.
    ///
    /// # Panics
    /// The worker gave up.
    pub fn turn(&mut self) -> bool {
        self.turn_with(|_kernel| {})
    }

    /// Turns once; `meanwhile` happens after the worker has looked for chains for the last time, and
    /// before it asks for kicks.
    ///
    /// # Panics
    /// As [`turn`](Self::turn).
    pub fn turn_with(&mut self, meanwhile: impl FnOnce(&Kernel)) -> bool {
        self.now_ns += self.random.within(1..TURN_MAX_NS);
        if let Some(until_ns) = self.asleep {
            let is_over = until_ns.is_some_and(|until_ns| until_ns <= self.now_ns);
            if !self.worker.wake().expect("an engine that never fails") && !is_over {
                return false;
            }
        }
        let looks = self.random.once_in(2);
        let Self { worker, kernel, .. } = self;
        let rest = worker.turn(self.now_ns, looks, || meanwhile(kernel));
        let rest = rest.expect("an engine that never fails");
        self.asleep = match rest {
            Rest::None => None,
            Rest::Sleep(limit) => Some(limit.map(|limit| self.now_ns + limit.as_nanos() as u64)),
        };
        true
    }

    /// Moves the clock on.
    pub fn advance(&mut self, by_ns: u64) {
        self.now_ns += by_ns;
    }

    /// Moves the clock on to this moment, if it is yet to come.
    pub fn advance_to(&mut self, then_ns: u64) {
        self.now_ns = self.now_ns.max(then_ns);
    }

    /// The clock.
    pub fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// When a sleeping worker wakes by itself.
    pub fn wakes_at_ns(&self) -> Option<u64> {
        self.asleep.flatten()
    }

    /// What the worker tells the control plane next.
    pub fn told(&mut self) -> Option<WorkerEvent> {
        self.worker.told().ok()
    }

    /// What was counted.
    pub fn metrics(&self) -> &Metrics {
        self.worker.metrics()
    }
}

/// A descriptor to stand for a kick or a call; the kernel's part is played by [`Kernel`].
fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("a descriptor")
}

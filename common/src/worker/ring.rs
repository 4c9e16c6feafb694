//! One ring on its worker: what happens to it in a turn, and how it ends.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;
use tokio::sync::oneshot;

use super::RingStart;
use super::bell::{Bell, Rung};
use super::kick::Kick;
use crate::device::{DeviceQueue, HostFault, MAX_CHAINS_PER_TURN, QueueIo, Turn};
use crate::engine::{Completion, Engine, Subject};
use crate::memory::MemoryMap;
use crate::metrics::QueueMetrics;
use crate::rate_limit::RateLimits;
use crate::virtqueue::{RingError, Virtqueue};

/// A ring, the device's half for it, and where they stand.
pub(super) struct ActiveRing<Q> {
    ring: Virtqueue,
    queue: Q,
    metrics: Arc<QueueMetrics>,
    limits: Arc<RateLimits>,
    kick: Kick,
    call: Bell,
    error: Bell,
    /// The front end was told that the ring is broken.
    error_told: bool,
    /// No more calls: the ring has stopped.
    silenced: bool,
    turn: Turn,
    index: u16,
    /// The engine watches the kick.
    watched: bool,
    /// There may be chains to pop.
    runnable: bool,
    /// When a ring without a kick is to be looked at again.
    look_ns: Option<u64>,
    /// Somebody waits for the ring to have stopped, and for its base.
    stopped: Option<oneshot::Sender<u16>>,
    /// Somebody waits until no chain refers to a replaced memory map.
    settled: Vec<oneshot::Sender<()>>,
    /// The loss of the front end's memory was told.
    poison_told: bool,
}

/// What the rest of the process is to know of a turn.
pub(super) enum Notice {
    /// The driver broke the ring's rules.
    Broken(RingError),
    /// The front end took mapped memory away.
    Poisoned,
    /// The host failed a request.
    Host(HostFault),
    /// The kick descriptor is none, or is gone.
    NoKick,
}

impl<Q: DeviceQueue> ActiveRing<Q> {
    pub(super) fn new(
        start: RingStart,
        queue: Q,
        metrics: Arc<QueueMetrics>,
        limits: Arc<RateLimits>,
    ) -> Self {
        let index = start.index;
        Self {
            ring: start.ring,
            queue,
            metrics,
            limits,
            kick: start.kick,
            call: Bell::new(Subject::Call { queue: index }, start.call),
            error: Bell::new(Subject::Error { queue: index }, start.error),
            error_told: false,
            silenced: false,
            turn: Turn::default(),
            index,
            watched: false,
            runnable: true,
            look_ns: None,
            stopped: None,
            settled: Vec::new(),
            poison_told: false,
        }
    }

    /// Arrives on its worker.
    pub(super) fn start(&mut self, engine: &mut dyn Engine) -> std::io::Result<()> {
        if self.ring.has_used() {
            self.call(engine)?;
        }
        self.watch(engine)
    }

    /// Has the engine watch the kick, where there is one.
    fn watch(&mut self, engine: &mut dyn Engine) -> std::io::Result<()> {
        if let Some(fd) = self.kick.descriptor() {
            engine.watch(Subject::Kick { queue: self.index }, fd)?;
            self.watched = true;
        }
        Ok(())
    }

    /// The engine's watch fired with these poll bits, or failed; `more` says that it goes on.
    pub(super) fn kicked(
        &mut self,
        bits: Result<u32, Errno>,
        more: bool,
        engine: &mut dyn Engine,
    ) -> std::io::Result<Option<Notice>> {
        self.watched = more;
        if self.stopped.is_some() {
            return Ok(None);
        }
        // Who waits for a limit has chains already.
        self.runnable |= !self.is_throttled();
        let readable = bits.is_ok_and(|bits| bits & libc::POLLIN as u32 != 0);
        if readable {
            self.metrics.kicks.add(1);
        }
        match (readable, more) {
            (_, true) => Ok(None),
            (true, false) => self.watch(engine).map(|()| None),
            (false, false) => {
                // Whatever it is, it will not wake us: look at the ring from time to time.
                self.kick = Kick::Polled;
                Ok(Some(Notice::NoKick))
            }
        }
    }

    pub(super) fn index(&self) -> u16 {
        self.index
    }

    /// The channel that the queue waited for is ready, or is waited for no more.
    pub(super) fn channel_ready(&mut self) {
        self.turn.awaits_channel = false;
        self.runnable |= self.stopped.is_none() && !self.is_throttled();
    }

    /// Looks at the ring and at the channel, which may be another one by now.
    pub(super) fn look_anew(&mut self, engine: &mut dyn Engine) -> std::io::Result<()> {
        if self.stopped.is_none() {
            self.look();
        }
        self.forget_channel(engine)
    }

    fn forget_channel(&self, engine: &mut dyn Engine) -> std::io::Result<()> {
        let what = Subject::Channel { queue: self.index };
        if self.turn.awaits_channel { engine.call_off(what) } else { Ok(()) }
    }

    /// Whether the ring has no kick and must be looked at from time to time.
    pub(super) fn is_polled(&self) -> bool {
        matches!(self.kick, Kick::Polled) && self.stopped.is_none() && !self.is_throttled()
    }

    /// Whether the next request waits for a limit.
    fn is_throttled(&self) -> bool {
        self.turn.throttled_until_ns.is_some()
    }

    pub(super) fn look(&mut self) {
        self.runnable = true;
    }

    /// Looks at that time, if nothing happens before.
    pub(super) fn look_at(&mut self, look_ns: u64) {
        self.look_ns = Some(look_ns);
    }

    /// When the ring is to be looked at though nothing has happened.
    pub(super) fn due_ns(&self) -> Option<u64> {
        self.turn.throttled_until_ns.or(self.look_ns)
    }

    /// Notices that it is time.
    pub(super) fn tick(&mut self, now_ns: u64) {
        if self.due_ns().is_some_and(|due_ns| due_ns <= now_ns) {
            self.look_ns = None;
            self.runnable = true;
        }
    }

    /// Gives back the place of a request that waits no more.
    fn leave_line(&mut self) {
        if let Some(place) = self.turn.place.take() {
            self.limits.give_back(place);
        }
    }

    /// There are other limits: who waits asks again.
    pub(super) fn limits_changed(&mut self) {
        self.runnable |= self.is_throttled();
    }

    pub(super) fn is_runnable(&self) -> bool {
        self.runnable
    }

    /// Lets the device pop; true when it popped anything and kept it.
    pub(super) fn process(&mut self, now_ns: u64, engine: &mut dyn Engine) -> bool {
        self.runnable = false;
        self.turn.now_ns = now_ns;
        self.turn.budget = MAX_CHAINS_PER_TURN;
        (self.turn.more, self.turn.dry, self.turn.armed) = (false, false, false);
        (self.turn.throttled_until_ns, self.look_ns) = (None, None);
        self.turn.put_back = 0;
        self.ring.suppress_kicks();
        self.with_queue(engine, |queue, io| queue.process(io));
        self.runnable = self.turn.more;
        let kept = self.turn.budget != MAX_CHAINS_PER_TURN;
        // The request that waited is gone, unless the queue put it back for want of something else.
        let is_gone = kept || self.turn.dry || self.ring.is_broken();
        if !self.is_throttled() && is_gone {
            self.leave_line();
        }
        kept
    }

    /// Whether the driver seems to have made a chain available that the device waits for.
    pub(super) fn has_chains(&self) -> bool {
        self.turn.dry && self.stopped.is_none() && self.ring.has_available(self.turn.put_back)
    }

    /// Before the worker sleeps: asks the driver for a kick if the device waits for a chain. The
    /// ring is runnable when one has come meanwhile, or when it turned out to be broken.
    pub(super) fn arm(&mut self) {
        if !self.turn.dry || self.turn.armed || self.stopped.is_some() {
            return;
        }
        match self.ring.request_kick(self.turn.put_back) {
            Ok(waiting) => (self.turn.armed, self.runnable) = (!waiting, waiting),
            Err(fault) => {
                self.break_off(fault);
                self.runnable = true;
            }
        }
    }

    fn break_off(&mut self, fault: RingError) {
        self.ring.break_off();
        self.metrics.broken.add(1);
        self.turn.fault = Some(fault);
    }

    /// Gives the device a completion.
    pub(super) fn complete(&mut self, now_ns: u64, done: Completion, engine: &mut dyn Engine) {
        self.turn.now_ns = now_ns;
        self.turn.operations -= 1;
        self.ring.operation(done.token.slot, false);
        self.with_queue(engine, |queue, io| queue.complete(done, io));
        self.runnable |= self.turn.more && self.stopped.is_none();
    }

    /// Lets the device submit what it has gathered in this turn.
    pub(super) fn close_turn(&mut self, engine: &mut dyn Engine) {
        self.with_queue(engine, DeviceQueue::close_turn);
    }

    fn with_queue(&mut self, engine: &mut dyn Engine, run: impl FnOnce(&mut Q, &mut QueueIo<'_>)) {
        let mut io = QueueIo {
            ring: &mut self.ring,
            engine,
            metrics: &self.metrics,
            limits: &self.limits,
            state: &mut self.turn,
            queue: self.index,
        };
        run(&mut self.queue, &mut io);
    }

    /// Shows the driver this turn's used entries, and tells both sides what they are to be told.
    pub(super) fn publish(&mut self, engine: &mut dyn Engine) -> std::io::Result<()> {
        if self.ring.is_broken() && !std::mem::replace(&mut self.error_told, true) {
            self.error.ring(engine)?;
            // Who sees the rejected chain come back is to know why.
            engine.send()?;
        }
        if self.ring.publish() { self.call(engine) } else { Ok(()) }
    }

    fn call(&mut self, engine: &mut dyn Engine) -> std::io::Result<()> {
        let rung = self.call.ring(engine)?;
        self.count_call(rung);
        Ok(())
    }

    /// The engine has called the driver, or could not.
    pub(super) fn called(
        &mut self,
        result: Result<u32, Errno>,
        engine: &mut dyn Engine,
    ) -> std::io::Result<()> {
        let rung = self.call.written(result, engine)?;
        self.count_call(rung);
        Ok(())
    }

    fn count_call(&self, rung: Rung) {
        match rung {
            Rung::Written => self.metrics.calls.add(1),
            Rung::Underway | Rung::Nobody => {}
            Rung::Dropped => self.metrics.dropped_calls.add(1),
        }
    }

    /// The engine has told the front end of an error, or could not.
    pub(super) fn told_error(
        &mut self,
        result: Result<u32, Errno>,
        engine: &mut dyn Engine,
    ) -> std::io::Result<()> {
        self.error.written(result, engine).map(drop)
    }

    /// What went wrong in this turn, one thing after another.
    pub(super) fn notice(&mut self) -> Option<Notice> {
        if let Some(fault) = self.turn.fault.take() {
            return Some(Notice::Broken(fault));
        }
        if let Some(fault) = self.turn.host_fault.take() {
            return Some(Notice::Host(fault));
        }
        if !self.poison_told && self.ring.is_poisoned() {
            self.poison_told = true;
            return Some(Notice::Poisoned);
        }
        None
    }

    /// The engine's refusal of an operation, if there was one.
    pub(super) fn engine_fault(&mut self) -> Option<std::io::Error> {
        self.turn.engine_fault.take()
    }

    /// Stops popping; `base` is told once the last chain has ended.
    pub(super) fn stop(
        &mut self,
        base: oneshot::Sender<u16>,
        engine: &mut dyn Engine,
    ) -> std::io::Result<()> {
        self.stopped = Some(base);
        self.turn.stopping = true;
        self.turn.throttled_until_ns = None;
        (self.runnable, self.look_ns) = (false, None);
        self.leave_line();
        self.with_queue(engine, |queue, io| queue.stop(io));
        // Whoever serves the ring next may rely on a kick.
        if let Err(fault) = self.ring.request_kick(0) {
            self.break_off(fault);
        }
        self.forget_channel(engine)?;
        self.unwatch(engine)
    }

    /// Calls the watch off, if it still goes on. Again and again where the kernel says that it was
    /// just firing.
    pub(super) fn unwatch(&mut self, engine: &mut dyn Engine) -> std::io::Result<()> {
        let goes_on = self.watched && self.stopped.is_some();
        if goes_on { engine.call_off(Subject::Kick { queue: self.index }) } else { Ok(()) }
    }

    /// Whether the ring was asked to stop and no chain is out any more. The last calls are on their
    /// way then; those that find no room are called off.
    pub(super) fn is_drained(&mut self, engine: &mut dyn Engine) -> std::io::Result<bool> {
        let drained =
            self.stopped.is_some() && self.turn.operations == 0 && self.ring.chains_out() == 0;
        if drained && !std::mem::replace(&mut self.silenced, true) {
            self.call.silence(engine)?;
            self.error.silence(engine)?;
        }
        Ok(drained)
    }

    /// Whether the kernel holds nothing of the ring's descriptors.
    pub(super) fn is_let_go(&self) -> bool {
        let awaits_nothing = !self.watched && !self.turn.awaits_channel;
        awaits_nothing && self.call.is_idle() && self.error.is_idle()
    }

    /// Gives the base to whoever asked for the stop.
    pub(super) fn end(self) {
        let Self { ring, queue, kick, call, error, stopped, .. } = self;
        let base = ring.next_available();
        // Who hears of the stop may count on the ring's memory and descriptors being let go.
        drop((ring, queue, kick, call, error));
        if let Some(stopped) = stopped {
            // Nobody waits any more when the process is ending.
            let _ = stopped.send(base);
        }
    }

    /// The engine is gone, and may still hold the ring's buffers: nobody is to wait for the ring
    /// any more, and its memory stays mapped until the process ends.
    pub(super) fn abandon(mut self) {
        self.stopped = None;
        self.settled.clear();
        std::mem::forget(self);
    }

    /// Calls another descriptor from now on, and at once: a call may have been lost with the old one.
    /// A driver bears a spurious one.
    pub(super) fn set_call(
        &mut self,
        call: Option<Arc<OwnedFd>>,
        engine: &mut dyn Engine,
    ) -> std::io::Result<()> {
        self.call.set_target(call, engine)?;
        self.call(engine)
    }

    pub(super) fn set_error(
        &mut self,
        error: Option<Arc<OwnedFd>>,
        engine: &mut dyn Engine,
    ) -> std::io::Result<()> {
        self.error.set_target(error, engine)?;
        // Who gives a new descriptor has not heard at the old one, for all we know.
        self.error_told = false;
        Ok(())
    }

    /// Uses another memory map; `settled` is told once no chain refers to an older one.
    pub(super) fn set_memory(&mut self, memory: Arc<MemoryMap>, settled: oneshot::Sender<()>) {
        if let Err(fault) = self.ring.set_memory(memory) {
            self.break_off(fault);
        }
        self.poison_told = false;
        self.runnable = self.stopped.is_none();
        self.settled.push(settled);
    }

    /// Answers those who wait for replaced memory.
    pub(super) fn settle(&mut self) {
        if !self.settled.is_empty() && self.ring.is_settled() {
            for settled in self.settled.drain(..) {
                // Nobody waits any more when the process is ending.
                let _ = settled.send(());
            }
        }
    }
}

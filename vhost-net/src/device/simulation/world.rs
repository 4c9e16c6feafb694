//! A guest with its driver, a device, and a network that does what networks do, in one thread and by one seed.
//!
//! Contract: [`World::step`] lets one thing happen: frames come or are sent, buffers are given, a command is made, the
//! link falls, the worker turns. What can be seen of that is checked at once. [`World::rest`] lets the worker go to sleep,
//! which it must, and checks that nothing waits then that could go on; [`World::settle`] takes all obstacles away first.

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Waker};

use common::device::{Device, Runtime};
use common::engine::ChannelIndex;
use common::rate_limit::{Change, Topic};
use common::simulation::{Guest, Random, Ring, RingSpec, Stage};
use common::worker::WorkerEvent;
use rustix::io::Errno;

use super::frame::{Inbound, Outbound};
use super::listening::{Command, Listening, Said};
use super::mode::{Buffers, Mode};
use super::receiving::Receiving;
use super::transmitting::{Transmitting, Weather};
use crate::backend::{Backend, Simulated};
use crate::config::VIRTIO_NET_F_CTRL_VQ;
use crate::device::NetDevice;

/// More turns than any work takes that a step makes.
const TURNS_MAX: u32 = 3000;

/// The control queue.
struct Commanding {
    ring: Ring,
    made: Vec<Command>,
}

/// See the module's head.
pub(super) struct World {
    pub(super) random: Random,
    mode: Mode,
    device: Arc<NetDevice>,
    stage: Stage<NetDevice>,
    /// By which errands wait: it stands still.
    clock: tokio::runtime::Runtime,
    guest: Arc<Guest>,
    pub(super) receiving: Vec<Receiving>,
    pub(super) transmitting: Vec<Transmitting>,
    control: Option<Commanding>,
    listening: Listening,
    /// The back end is gone.
    is_gone: bool,
    /// By pair: its channels fail.
    fails: Vec<bool>,
    link_is_up: bool,
    /// How often the back end was opened anew.
    generation: u32,
    refuses: bool,
    number: u32,
    pub(super) commands: u64,
    pub(super) restarts: u64,
}

/// The main thread.
#[derive(Default)]
struct MainThread {
    looks: std::cell::Cell<bool>,
}

impl Runtime for MainThread {
    fn config_changed(&self, _news: &str) {}

    fn look(&self) {
        self.looks.set(true);
    }
}

impl World {
    pub(super) fn new(seed: u64, mode: Mode) -> Self {
        let mut random = Random::new(seed);
        let device = Arc::new(mode.device());
        let mut stage = Stage::new(Arc::clone(&device), random.number());
        let pairs = mode.used_pairs();
        let ring_bytes = RingSpec::bytes(mode.ring_size);
        let memory: Vec<_> =
            (0..pairs * 2 + 1).map(|index| (mode.ring(index).at, ring_bytes)).collect();
        let guest = Arc::new(Guest::new(&memory));
        let mut start =
            |index, random: &mut Random| Ring::start(mode.ring(index), &guest, &mut stage, random);
        let mut receiving = Vec::new();
        let mut transmitting = Vec::new();
        for index in (0..pairs * 2).step_by(2) {
            let (from, to) = (ChannelIndex(index), ChannelIndex(index + 1));
            receiving.push(Receiving::new(start(index, &mut random), from));
            transmitting.push(Transmitting::new(start(index + 1, &mut random), to));
        }
        let has_control = mode.has(VIRTIO_NET_F_CTRL_VQ);
        let control = has_control
            .then(|| Commanding { ring: start(pairs * 2, &mut random), made: Vec::new() });
        let clock = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a clock needs nothing of the kernel's");
        let mut world = Self {
            clock,
            random,
            mode,
            device,
            stage,
            guest,
            receiving,
            transmitting,
            control,
            listening: Listening::new(&mode),
            is_gone: false,
            fails: vec![false; usize::from(pairs)],
            link_is_up: true,
            generation: 0,
            refuses: false,
            number: 0,
            commands: 0,
            restarts: 0,
        };
        world.spread_faults();
        if mode.is_limited {
            world.limit();
        }
        world
    }

    fn network(&self) -> &Simulated {
        match self.device.shared.backend() {
            Backend::Simulated(simulated) => simulated,
            other => unreachable!("{other:?} is no simulation"),
        }
    }

    /// One thing happens.
    pub(super) fn step(&mut self) {
        let pair = self.random.index(self.receiving.len());
        match self.random.within(0..32) {
            0..5 => self.come(pair),
            5..9 => self.post(pair),
            9..13 => self.send(pair),
            13..15 => self.command(),
            15..24 => drop(self.turn()),
            24 | 25 => self.set_room(pair),
            26 => self.main_thread(),
            27 => self.rest(),
            _ if self.random.once_in(3) => self.plug(),
            _ if self.random.once_in(3) => self.limit(),
            _ if self.random.once_in(3) => self.stop(),
            _ if self.random.once_in(3) => self.refuse(),
            _ => drop(self.restart()),
        }
    }

    /// Frames come for a pair.
    fn come(&mut self, pair: usize) {
        for _ in 0..self.random.within(1..6) {
            self.number += 1;
            let frame = Inbound::any(self.number, &mut self.random);
            self.receiving[pair].deliver(frame, &self.stage);
        }
    }

    fn post(&mut self, pair: usize) {
        let kind = (self.mode.buffers, self.mode.is_scattered);
        self.receiving[pair].post(kind, &self.stage, &mut self.random);
    }

    fn send(&mut self, pair: usize) {
        let Self { random, mode, transmitting, listening, .. } = self;
        let sender = &mut transmitting[pair];
        for _ in 0..random.within(1..8) {
            self.number += 1;
            let frame = Outbound::any(self.number, mode, listening.own, random);
            if !sender.send(frame, random) {
                break;
            }
        }
        sender.ring.publish(&self.stage, random);
    }

    fn command(&mut self) {
        let Some(control) = &mut self.control else { return };
        let command = Command::any(&self.mode, &mut self.random);
        let indirect = control.ring.has_indirect && self.random.once_in(2);
        let room = self.random.pick(&[1, 1, 1, 7]);
        if control.ring.give(&command.bytes, &[room], indirect, &mut self.random) {
            control.made.push(command);
        }
        control.ring.publish(&self.stage, &mut self.random);
    }

    /// The worker turns; false if it sleeps.
    fn turn(&mut self) -> bool {
        if !self.stage.turn() {
            return false;
        }
        let mut states = vec![self.listening.clone()];
        self.observe_commands(&mut states);
        let (link_is_up, generation) = (self.link_is_up, self.generation);
        for (sender, fails) in self.transmitting.iter_mut().zip(&self.fails) {
            sender.observe(&self.stage, Weather { link_is_up, generation, fails: *fails });
        }
        for receiver in &mut self.receiving {
            receiver.observe(&self.stage, &self.guest, &self.mode, &states);
        }
        while let Some(event) = self.stage.told() {
            assert!(matches!(event, WorkerEvent::HostFault { .. }), "{event:?}");
        }
        self.check_network();
        self.spread_faults();
        true
    }

    /// Commands are answered in their order; `states` gets what has become of each.
    fn observe_commands(&mut self, states: &mut Vec<Listening>) {
        let Some(control) = &mut self.control else { return };
        for (given, written) in control.ring.take_used() {
            let command = control.made.remove(0);
            assert_eq!(written, 1, "an answer is a byte");
            let is_host_s = matches!(command.said, Some(Said::Pairs(_) | Said::Offloads(_)));
            match (given.bytes(1, &self.guest)[0], command.said) {
                (0, Some(said)) => {
                    self.listening.obey(said);
                    states.push(self.listening.clone());
                }
                (1, None) => {}
                (1, Some(_)) if is_host_s && self.refuses => {}
                (answer, said) => panic!("{:x?}, which is {said:?}: {answer}", command.bytes),
            }
            self.commands += 1;
        }
    }

    /// The back end has been told what the driver has told the device.
    fn check_network(&self) {
        let allowed = self.listening.allowed();
        let applied = self.network().applied();
        assert_eq!((applied.csum, applied.tso4), (allowed.csum, allowed.tso4), "offloads");
        for pair in 0..self.receiving.len() as u16 {
            let receives = pair < self.listening.pairs;
            assert_eq!(self.network().is_attached(pair), receives, "pair {pair} gets frames");
        }
    }

    /// The channels of pairs that are not attached fail, as all do while the back end is gone.
    fn spread_faults(&mut self) {
        for pair in 0..self.receiving.len() {
            let fails = self.is_gone || !self.network().is_attached(pair as u16);
            if std::mem::replace(&mut self.fails[pair], fails) != fails {
                let fault = fails.then_some(Errno::BADFD);
                self.stage.kernel().set_fault(self.receiving[pair].channel, fault);
                self.stage.kernel().set_fault(self.transmitting[pair].channel, fault);
            }
        }
    }

    /// A pair's wire takes so many frames.
    fn set_room(&mut self, pair: usize) {
        let room = self.random.pick(&[None, None, Some(0), Some(1), Some(5)]);
        self.transmitting[pair].set_room(room, &self.stage);
    }

    /// The main thread does what there is to do.
    fn main_thread(&mut self) {
        let _inside = self.clock.enter();
        let main_thread = MainThread::default();
        let errands = pin!(self.device.errands(&main_thread));
        let polled = errands.poll(&mut Context::from_waker(Waker::noop()));
        assert!(polled.is_pending(), "errands do not end");
        if main_thread.looks.get() {
            self.stage.look();
        }
    }

    /// The back end goes, and the link falls; the other way round when it comes back.
    fn plug(&mut self) {
        if self.link_is_up && !self.is_gone && self.random.once_in(2) {
            self.is_gone = true;
        } else if self.link_is_up {
            self.set_link(false);
        } else {
            self.set_link(true);
        }
        self.spread_faults();
        if self.random.once_in(2) {
            self.main_thread();
        }
    }

    fn set_link(&mut self, up: bool) {
        // It tells of one change before it makes the next.
        self.main_thread();
        let anew = up && (std::mem::take(&mut self.is_gone) || self.random.once_in(2));
        self.generation += u32::from(anew);
        self.link_is_up = up;
        self.network().set_link(up, anew);
        self.spread_faults();
    }

    fn limit(&mut self) {
        let limits =
            ["none", "bytes=none", "frames=none", "frames=1k", "bytes=1M/100k", "bytes=20k"];
        let (topic, limit) = (self.random.pick(&[Topic::Rx, Topic::Tx]), self.random.pick(&limits));
        self.stage.limit(&Change::parse(limit, topic).expect("a limit"));
    }

    /// The host refuses what it is asked for, or no longer.
    fn refuse(&mut self) {
        self.refuses = !self.refuses;
        self.network().refuse(self.refuses.then_some(Errno::NOMEM));
    }

    fn stop(&mut self) {
        let Self { random, receiving, transmitting, stage, .. } = self;
        let pair = random.index(receiving.len());
        match random.within(0..5) {
            0 | 1 => receiving[pair].ring.stop(stage),
            2 | 3 => transmitting[pair].ring.stop(stage),
            _ => {
                if let Some(control) = &mut self.control {
                    control.ring.stop(stage);
                }
            }
        }
    }

    /// Rings that have stopped go on; true when one does.
    fn restart(&mut self) -> bool {
        self.network().refuse(None);
        self.refuses = false;
        let Self { receiving, transmitting, control, stage, device, .. } = self;
        let pairs = receiving.iter_mut().zip(transmitting);
        let pairs = pairs.flat_map(|(from, to)| [&mut from.ring, &mut to.ring]);
        let rings = pairs.chain(control.iter_mut().map(|control| &mut control.ring));
        let mut restarted = 0;
        for ring in rings {
            let Some(base) = ring.base(stage) else { continue };
            device.close_queue(ring.index());
            ring.go_on(base, stage);
            restarted += 1;
        }
        self.restarts += restarted;
        self.spread_faults();
        restarted > 0
    }

    /// Lets the worker go to sleep.
    pub(super) fn rest(&mut self) {
        let mut turns = 0;
        loop {
            self.main_thread();
            if self.turn() {
                turns += 1;
                assert!(turns < TURNS_MAX, "the worker spins");
                continue;
            }
            match self.stage.wakes_at_ns() {
                Some(then_ns) => self.stage.advance_to(then_ns),
                None => break,
            }
        }
        for (receiver, fails) in self.receiving.iter().zip(&self.fails) {
            if receiver.ring.is_running() && self.link_is_up && !fails {
                receiver.must_rest(&self.mode);
            }
        }
        for sender in self.transmitting.iter().filter(|sender| sender.ring.is_running()) {
            sender.must_rest();
        }
        if let Some(control) = self.control.as_ref().filter(|control| control.ring.is_running()) {
            assert!(control.made.is_empty(), "{:?} is not answered", control.made);
        }
    }

    /// Lets everything end.
    pub(super) fn settle(&mut self) {
        self.rest();
        self.restart();
        self.set_link(true);
        for pair in 0..self.transmitting.len() {
            self.transmitting[pair].set_room(None, &self.stage);
        }
        loop {
            self.rest();
            let mut goes_on = false;
            for (receiver, fails) in self.receiving.iter_mut().zip(&self.fails) {
                if !fails && receiver.has_undelivered() {
                    goes_on |= receiver.post((Buffers::Big, false), &self.stage, &mut self.random);
                }
            }
            if !goes_on {
                break;
            }
        }
        let unsent = self.transmitting.iter().any(Transmitting::has_unsent);
        assert!(!unsent, "all frames are sent in the end");
    }

    pub(super) fn limit_receiving(&mut self, limit: &str) {
        self.stage.limit(&Change::parse(limit, Topic::Rx).expect("a limit"));
    }

    /// The driver gives a pair a buffer.
    pub(super) fn give_room(&mut self, pair: usize, len_bytes: u32) {
        let ring = &mut self.receiving[pair].ring;
        assert!(ring.give(&[], &[len_bytes], false, &mut self.random));
        ring.publish(&self.stage, &mut self.random);
    }

    /// A frame comes for the guest, which wants it.
    pub(super) fn deliver_plain(&mut self, pair: usize, frame_bytes: usize) {
        self.number += 1;
        let frame = Inbound::plain(self.number, frame_bytes);
        self.receiving[pair].deliver(frame, &self.stage);
    }

    pub(super) fn now_ns(&self) -> u64 {
        self.stage.now_ns()
    }

    /// Chains that had to wait for a limit.
    pub(super) fn throttled(&self) -> u64 {
        self.stage.metrics().queues.iter().map(|queue| queue.throttled.get()).sum()
    }
}

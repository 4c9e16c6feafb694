//! A worker's wake-ups and its drain, with a device that keeps each chain for one operation and
//! holds it to limits.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::{Driver, Guest, Kernel, Layout, Random, Stage, each_seed};
use crate::device::{Account, Device, DeviceQueue, QueueIo};
use crate::engine::{Completion, FileIndex, Op};
use crate::rate_limit::{Change, Direction, Topic};
use crate::virtqueue::{Chain, VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC};
use crate::worker::WorkerEvent;

const QUEUES: u16 = 2;
const SIZE: u16 = 8;

/// Every chain costs one operation, and is used with its writable bytes.
struct Echo;

struct EchoQueue {
    out: Vec<Option<Chain>>,
    /// It also pops when an operation has ended, and uses at the end of a turn what ended in it.
    eager: bool,
    ended: Vec<Chain>,
}

impl Device for Echo {
    type Queue = EchoQueue;
    const NAME: &'static str = "echo";
    const KINDS: &'static [&'static str] = &["request"];

    fn queue_count(&self) -> u16 {
        QUEUES
    }
    fn max_queue_size(&self) -> u16 {
        SIZE
    }
    fn features(&self) -> u64 {
        0
    }
    fn read_config(&self, _features: u64, _offset: u32, into: &mut [u8]) {
        into.fill(0);
    }
    fn files(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }
    fn open_queue(&self, index: u16, _features: u64, size: u16) -> EchoQueue {
        let out = (0..size).map(|_| None).collect();
        EchoQueue { out, eager: index > 0, ended: Vec::new() }
    }
}

impl DeviceQueue for EchoQueue {
    fn process(&mut self, io: &mut QueueIo<'_>) {
        while let Some(chain) = io.pop() {
            if !io.admit(Direction::ToDriver, 65) {
                return io.retract(chain);
            }
            io.submit(&chain, 0, |parts| Op::Read {
                file: FileIndex(0),
                offset: 0,
                into: parts.writable,
            });
            let slot = usize::from(chain.slot());
            self.out[slot] = Some(chain);
        }
    }

    fn complete(&mut self, done: Completion, io: &mut QueueIo<'_>) {
        let chain = self.out[usize::from(done.token.slot)].take().expect("a chain that is out");
        self.ended.push(chain);
        if self.eager {
            self.process(io);
        } else {
            self.close_turn(io);
        }
    }

    fn close_turn(&mut self, io: &mut QueueIo<'_>) {
        for chain in self.ended.drain(..) {
            let written = io.writable(&chain).len_bytes() as u32;
            io.finish(chain, written, Account { kind: 0, bytes: 0, failed: false });
        }
    }
}

/// A driver that sleeps until it is called, and what it waits for.
struct Sleeper {
    driver: Driver,
    /// Calls that it has heard.
    heard: u64,
    asleep: bool,
    waits_for: u64,
    got: u64,
    running: bool,
    /// Turns since it was asked to stop.
    turns: u64,
    /// Operations that had been submitted when the worker had heard of that.
    submitted: u64,
}

struct Play {
    stage: Stage<Echo>,
    sleepers: Vec<Sleeper>,
    random: Random,
}

impl Play {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let guest = Arc::new(Guest::new(&[(0, 0x10000)]));
        let mut stage = Stage::new(Arc::new(Echo), random.number());
        let mut sleepers = Vec::new();
        for index in 0..QUEUES {
            let at = 0x4000 * u64::from(index);
            let layout =
                Layout { size: SIZE, descriptors: at, available: at + 0x400, used: at + 0x800 };
            let features = random.pick(&[0, VIRTIO_F_EVENT_IDX]) | VIRTIO_F_INDIRECT_DESC;
            let mut driver = Driver::new(Arc::clone(&guest), layout, features);
            let base = random.number() as u16;
            driver.start_at(base);
            stage.start(index, driver.setup(base)).expect("a ring");
            sleepers.push(Sleeper {
                driver,
                heard: 0,
                asleep: false,
                waits_for: 0,
                got: 0,
                running: true,
                turns: 0,
                submitted: 0,
            });
        }
        Self { stage, sleepers, random }
    }

    /// Something happens.
    fn step(&mut self) {
        let Self { stage, sleepers, random } = self;
        let index = random.index(sleepers.len());
        let queue = index as u16;
        let sleeper = &mut sleepers[index];
        match random.within(0..8) {
            0 if random.once_in(8) => {
                let (topic, spec) = random.pick(&[
                    (Topic::Iops, "none"),
                    (Topic::Iops, "1"),
                    (Topic::Iops, "20k/3"),
                    (Topic::Iops, "total=5,read=100k"),
                    (Topic::Bps, "none"),
                    (Topic::Bps, "read=512"),
                    (Topic::Bps, "1M/4k"),
                ]);
                stage.limit(&Change::parse(spec, topic).expect(spec));
            }
            0 | 1 => sleeper.send(queue, stage.kernel(), random),
            2 => self.turn(|_kernel, _play| {}),
            // The driver is quicker than the worker's last look.
            3 => self.turn(|kernel, (sleepers, random)| {
                sleepers[index].send(queue, kernel, random);
            }),
            4 | 5 => {
                let held = stage.kernel().held();
                if !held.is_empty() {
                    stage.kernel().end(held[random.index(held.len())].number, Ok(0));
                }
            }
            6 => drop(sleeper.wake(queue, stage)),
            _ if random.once_in(4) && sleeper.running => {
                stage.stop(queue);
                (sleeper.running, sleeper.turns) = (false, 0);
            }
            _ => drop(sleeper.restart(queue, stage)),
        }
    }

    fn turn(&mut self, meanwhile: impl FnOnce(&Kernel, (&mut [Sleeper], &mut Random))) {
        let Self { stage, sleepers, random } = self;
        if !stage.turn_with(|kernel| meanwhile(kernel, (sleepers, random))) {
            return;
        }
        let kernel = stage.kernel();
        for (queue, sleeper) in (0..).zip(sleepers).filter(|(_, sleeper)| !sleeper.running) {
            sleeper.turns += 1;
            // The first turn may have brought the mail that the second has read.
            if sleeper.turns == 2 {
                sleeper.submitted = kernel.submitted();
            }
            let before = |number| sleeper.turns < 2 || number < sleeper.submitted;
            let held = kernel.held();
            let mut held = held.iter().filter(|operation| operation.queue == queue);
            assert!(held.all(|operation| before(operation.number)), "a ring that stops pops");
        }
    }

    /// Everything that is under way ends; nothing new begins but what that calls for.
    fn settle(&mut self) {
        loop {
            let mut goes_on = self.stage.turn();
            for operation in self.stage.kernel().held() {
                self.stage.kernel().end(operation.number, Ok(0));
                goes_on = true;
            }
            for (queue, sleeper) in (0..).zip(self.sleepers.iter_mut()) {
                goes_on |= sleeper.wake(queue, &self.stage);
                goes_on |= sleeper.restart(queue, &mut self.stage);
            }
            match self.stage.wakes_at_ns() {
                Some(wakes_at_ns) if !goes_on => self.stage.advance_to(wakes_at_ns),
                None if !goes_on => break,
                _ => {}
            }
        }
        for sleeper in &self.sleepers {
            assert_eq!(sleeper.got, sleeper.waits_for, "the driver sleeps, and so does the worker");
        }
        while let Some(told) = self.stage.told() {
            assert!(matches!(told, WorkerEvent::KickLost { .. }), "{told:?}");
        }
    }

    /// One request at a time, so that nothing but itself wakes the worker for it.
    fn wake_by_each(&mut self) {
        for _ in 0..8 {
            let index = self.random.index(self.sleepers.len());
            let queue = index as u16;
            if self.random.once_in(2) {
                self.sleepers[index].send(queue, self.stage.kernel(), &mut self.random);
            } else {
                // A kick for nothing, and then the driver is quicker than the worker's last look.
                self.stage.kernel().kick(queue);
                self.turn(|kernel, (sleepers, random)| sleepers[index].send(queue, kernel, random));
            }
            self.settle();
        }
    }
}

impl Sleeper {
    fn send(&mut self, queue: u16, kernel: &Kernel, random: &mut Random) {
        let at = 0x4000 * u64::from(queue) + 0x1000;
        for _ in 0..random.within(1..4) {
            let table = random.once_in(2).then_some(at + 0x1000 + 0x100 * (self.waits_for % 16));
            let buffers: (&[_], &[_]) = (&[(at, 16)], &[(at, 64), (at + 64, 1)]);
            if self.driver.add(buffers, table, random).is_some() {
                self.waits_for += 1;
            }
        }
        if self.driver.publish() {
            kernel.kick(queue);
        }
    }

    /// Takes what has come, if it is awake or was called, and goes to sleep; true when there was
    /// anything.
    fn wake(&mut self, queue: u16, stage: &Stage<Echo>) -> bool {
        let calls = stage.kernel().calls(queue);
        if self.asleep && calls == self.heard {
            return false;
        }
        self.heard = calls;
        let mut took = false;
        loop {
            for used in self.driver.take_used() {
                assert_eq!(used.written_bytes, 65);
                self.got += 1;
                took = true;
            }
            self.asleep = self.driver.want_call();
            if self.asleep {
                return took;
            }
        }
    }

    /// Once the ring has stopped, it goes on from its base; true when it does.
    fn restart(&mut self, queue: u16, stage: &mut Stage<Echo>) -> bool {
        let Some(base) = stage.stopped(queue) else { return false };
        let waiting = self.driver.next_available().wrapping_sub(base);
        self.got += self.driver.take_used().len() as u64;
        assert_eq!(self.waits_for - self.got, u64::from(waiting), "what is after the base waits");
        stage.start(queue, self.driver.setup(base)).expect("a ring");
        self.running = true;
        true
    }
}

#[test]
fn nobody_sleeps_while_work_waits_and_a_drained_ring_goes_on_at_its_base() {
    each_seed(400, |seed| {
        let mut play = Play::new(seed);
        for _ in 0..play.random.within(10..300) {
            play.step();
        }
        play.settle();
        play.wake_by_each();
        let counted: u64 =
            play.stage.metrics().queues.iter().map(|queue| queue.kinds[0].requests.get()).sum();
        let sent: u64 = play.sleepers.iter().map(|sleeper| sleeper.waits_for).sum();
        assert_eq!(counted, sent);
    });
}

#[test]
fn ring_that_is_stopping_is_left_alone_when_its_limit_would_let_it_go_on() {
    let guest = Arc::new(Guest::new(&[(0, 0x10000)]));
    let mut stage = Stage::new(Arc::new(Echo), 1);
    let layout = Layout { size: SIZE, descriptors: 0, available: 0x400, used: 0x800 };
    let mut driver = Driver::new(guest, layout, 0);
    stage.start(0, driver.setup(0)).expect("a ring");
    stage.limit(&Change::parse("1", Topic::Iops).expect("a limit"));
    let mut random = Random::new(1);
    for _ in 0..2 {
        driver.add((&[], &[(0x1000, 65)]), None, &mut random).expect("there is room");
    }
    driver.publish();
    while stage.turn() {}
    assert_eq!(stage.kernel().held().len(), 1, "one goes, the other waits");
    stage.stop(0);
    while stage.turn() {}
    stage.advance(2_000_000_000);
    while stage.turn() {}
    assert_eq!(driver.used_flags(), 0, "who serves it next relies on a kick");
    stage.kernel().end(stage.kernel().held()[0].number, Ok(0));
    while stage.turn() {}
    assert_eq!(stage.stopped(0), Some(1));
}

#[test]
fn seed_determines_the_play() {
    let run = |seed| {
        let mut play = Play::new(seed);
        (0..200).for_each(|_| play.step());
        play.settle();
        let calls = play.stage.kernel().calls(0);
        (play.stage.now_ns(), play.stage.kernel().submitted(), calls)
    };
    assert_eq!(run(3), run(3));
    assert_ne!(run(3), run(4));
}

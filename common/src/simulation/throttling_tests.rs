//! A worker whose rings are over their limits: it sleeps until the moment of the next request, and
//! leaves all else alone.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::{Driver, Guest, Layout, Random, Stage};
use crate::device::{Account, Device, DeviceQueue, QueueIo};
use crate::engine::Completion;
use crate::rate_limit::{Change, Direction, TOLERANCE_NS, Topic};
use crate::virtqueue::VIRTIO_F_EVENT_IDX;

const QUEUES: u16 = 2;
const SIZE: u16 = 16;
const SECOND_NS: u64 = 1_000_000_000;
/// Turns after which a worker that has nothing to do must have gone to sleep.
const TURNS_TO_SLEEP: u32 = 20;

/// What a queue does with a request.
#[derive(Clone, Copy, Default)]
enum Mood {
    /// Answers it, if it is admitted.
    #[default]
    Limited,
    /// Puts it back before it asks, as one that lacks something else.
    Starved,
    /// Answers it without asking, as one that is free.
    Free,
}

/// Answers at once. Queue 0 counts as reads, queue 1 as writes.
#[derive(Default)]
struct Limited {
    mood: Arc<Mutex<Mood>>,
    /// How often it was asked to look for chains.
    looks: Arc<AtomicU64>,
}

struct LimitedQueue {
    mood: Arc<Mutex<Mood>>,
    direction: Direction,
    looks: Arc<AtomicU64>,
}

impl Device for Limited {
    type Queue = LimitedQueue;
    const NAME: &'static str = "limited";
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
    fn open_queue(&self, index: u16, _features: u64, _size: u16) -> LimitedQueue {
        let direction = if index == 0 { Direction::ToDriver } else { Direction::FromDriver };
        LimitedQueue { mood: Arc::clone(&self.mood), direction, looks: Arc::clone(&self.looks) }
    }
}

impl DeviceQueue for LimitedQueue {
    fn process(&mut self, io: &mut QueueIo<'_>) {
        self.looks.fetch_add(1, Ordering::Relaxed);
        let mood = *self.mood.lock().expect("nobody panics with it");
        while let Some(chain) = io.pop() {
            if matches!(mood, Mood::Starved) {
                return io.retract(chain);
            }
            if matches!(mood, Mood::Free) || io.admit(self.direction, 512) {
                io.finish(chain, 0, Account { kind: 0, bytes: 512, failed: false });
            } else {
                // The runtime ends the loop: there is no next chain then.
                io.retract(chain);
            }
        }
    }

    fn complete(&mut self, done: Completion, _: &mut QueueIo<'_>) {
        unreachable!("no operation was submitted, yet {done:?} ended");
    }
}

/// Two rings on one worker, and their drivers.
struct Rings {
    stage: Stage<Limited>,
    mood: Arc<Mutex<Mood>>,
    looks: Arc<AtomicU64>,
    drivers: Vec<Driver>,
    random: Random,
    served: [u64; QUEUES as usize],
}

impl Rings {
    fn start(features: u64) -> Self {
        let guest = Arc::new(Guest::new(&[(0, 0x10000)]));
        let device = Limited::default();
        let (mood, looks) = (Arc::clone(&device.mood), Arc::clone(&device.looks));
        let mut stage = Stage::new(Arc::new(device), 1);
        let drivers = (0..QUEUES).map(|index| {
            let at = 0x4000 * u64::from(index);
            let (size, descriptors, available, used) = (SIZE, at, at + 0x400, at + 0x800);
            let layout = Layout { size, descriptors, available, used };
            let driver = Driver::new(Arc::clone(&guest), layout, features);
            stage.start(index, driver.setup(0)).expect("a ring");
            driver
        });
        let drivers = drivers.collect();
        let mut rings =
            Self { stage, mood, looks, drivers, random: Random::new(1), served: [0; 2] };
        rings.rest();
        rings
    }

    fn limit(&mut self, spec: &str) {
        let change = Change::parse(spec, Topic::Iops).expect(spec);
        self.stage.limit(&change);
        self.rest();
    }

    fn feel(&self, mood: Mood) {
        *self.mood.lock().expect("nobody panics with it") = mood;
    }

    /// Lets the worker sleep until it wakes by itself.
    fn sleep(&mut self) {
        let wakes_at_ns = self.stage.wakes_at_ns().expect("it waits");
        self.stage.advance_to(wakes_at_ns);
        self.rest();
    }

    /// Fills a ring with requests; whether the device wants a kick for them.
    fn fill(&mut self, queue: u16) -> bool {
        let driver = &mut self.drivers[usize::from(queue)];
        while driver.add((&[(0x1000, 16)], &[]), None, &mut self.random).is_some() {}
        driver.publish()
    }

    fn kick(&mut self, queue: u16) {
        self.stage.kernel().kick(queue);
        self.rest();
    }

    /// Turns until the worker sleeps.
    fn rest(&mut self) {
        let turns = (0..TURNS_TO_SLEEP).take_while(|_| self.stage.turn()).count();
        assert!(turns < TURNS_TO_SLEEP as usize, "the worker does not go to sleep");
        self.take_used();
    }

    fn take_used(&mut self) {
        for (served, driver) in self.served.iter_mut().zip(&mut self.drivers) {
            *served += driver.take_used().len() as u64;
        }
    }

    /// Lets the worker sleep until it wakes by itself, again and again, while these rings are kept
    /// full.
    fn run_until(&mut self, end_ns: u64, queues: &[u16]) {
        while self.stage.now_ns() < end_ns {
            for queue in queues {
                if self.fill(*queue) {
                    self.kick(*queue);
                }
            }
            if let Some(wakes_at_ns) = self.stage.wakes_at_ns() {
                self.stage.advance_to(wakes_at_ns);
            }
            self.rest();
        }
    }

    fn throttled(&self, queue: usize) -> u64 {
        self.stage.metrics().queues[queue].throttled.get()
    }
}

#[test]
fn ring_over_its_limit_is_served_by_the_timer_and_not_otherwise() {
    for features in [0, VIRTIO_F_EVENT_IDX] {
        let mut rings = Rings::start(features);
        rings.limit("read=1000");
        let before_ns = rings.stage.now_ns();
        rings.run_until(before_ns + SECOND_NS, &[0]);
        let most = 1000 + 1 + 1000 * TOLERANCE_NS / SECOND_NS;
        assert!((990..=most).contains(&rings.served[0]), "{}", rings.served[0]);
        // Each had to wait, but for those that went at once; and was counted once.
        assert!(rings.throttled(0).abs_diff(rings.served[0]) <= 7, "{}", rings.throttled(0));
    }
}

#[test]
fn kicks_of_a_throttled_ring_neither_serve_it_nor_cost_a_look() {
    let mut rings = Rings::start(0);
    rings.limit("read=10");
    assert!(rings.fill(0), "an idle ring wants a kick");
    rings.kick(0);
    assert!(!rings.fill(0), "a ring that waits for its limit wants none");
    let (wakes_at_ns, served) = (rings.stage.wakes_at_ns(), rings.served[0]);
    assert_eq!((served, rings.throttled(0)), (1, 1));
    let looks = rings.looks.load(Ordering::Relaxed);
    for _ in 0..100 {
        rings.kick(0);
    }
    assert_eq!(rings.looks.load(Ordering::Relaxed), looks);
    assert_eq!(rings.stage.wakes_at_ns(), wakes_at_ns);
    assert_eq!((rings.served[0], rings.throttled(0)), (1, 1));
}

#[test]
fn throttled_ring_leaves_its_neighbour_alone() {
    let mut rings = Rings::start(0);
    rings.limit("read=1");
    rings.fill(0);
    rings.kick(0);
    for round in 1..=100 {
        assert!(rings.fill(1), "the neighbour waits for a kick");
        rings.kick(1);
        assert_eq!(rings.served, [1, round * u64::from(SIZE)]);
    }
}

#[test]
fn rings_that_share_a_limit_are_served_in_turns() {
    let mut rings = Rings::start(0);
    for rate in [100, 5000] {
        rings.limit(&format!("total={rate}"));
        rings.served = [0; 2];
        let end_ns = rings.stage.now_ns() + 5 * SECOND_NS;
        rings.run_until(end_ns, &[0, 1]);
        let [first, second] = rings.served;
        assert!(first + second >= 5 * rate * 95 / 100, "{rate}: {first} and {second}");
        assert!(first.abs_diff(second) <= rate / 10, "{rate}: {first} and {second}");
    }
}

#[test]
fn rings_of_one_worker_share_what_comes_between_two_of_its_turns() {
    let mut rings = Rings::start(0);
    rings.limit("total=200k");
    while rings.stage.now_ns() < SECOND_NS {
        for queue in [0, 1] {
            if rings.fill(queue) {
                rings.stage.kernel().kick(queue);
            }
        }
        rings.stage.turn();
        rings.take_used();
    }
    let [first, second] = rings.served;
    assert!(first + second >= 190_000, "{first} and {second}");
    assert!(first.abs_diff(second) <= 20_000, "{first} and {second}");
}

#[test]
fn throttled_ring_stops_at_once_before_the_first_request_that_waits() {
    let mut rings = Rings::start(0);
    rings.limit("total=2");
    rings.fill(0);
    rings.kick(0);
    let now_ns = rings.stage.now_ns();
    rings.stage.stop(0);
    rings.rest();
    assert_eq!(rings.stage.stopped(0), Some(1));
    assert_eq!(rings.stage.wakes_at_ns(), None, "nothing is left to wake for");
    assert!(rings.stage.now_ns() < now_ns + SECOND_NS / 100);
    // The place in the line went with it: another ring need not wait behind it.
    rings.fill(1);
    rings.kick(1);
    let wakes_at_ns = rings.stage.wakes_at_ns().expect("it waits");
    assert!(wakes_at_ns < now_ns + SECOND_NS / 2, "{wakes_at_ns}");
}

#[test]
fn stopped_ring_goes_on_with_the_request_that_waited() {
    let mut rings = Rings::start(0);
    rings.limit("read=1000");
    rings.fill(0);
    rings.kick(0);
    let served = rings.served[0];
    rings.stage.stop(0);
    rings.rest();
    let base = rings.stage.stopped(0).expect("it has stopped");
    assert_eq!(u64::from(base), served);
    rings.limit("none");
    let setup = rings.drivers[0].setup(base);
    rings.stage.start(0, setup).expect("a ring");
    rings.rest();
    assert_eq!(rings.served[0], u64::from(SIZE));
}

#[test]
fn other_limits_count_at_once_also_for_who_waits() {
    let mut rings = Rings::start(0);
    rings.limit("read=1");
    rings.fill(0);
    rings.kick(0);
    assert_eq!(rings.served[0], 1);
    rings.limit("write=500");
    assert_eq!(rings.served[0], 1, "it was not about reads");
    rings.limit("read=1/5");
    assert_eq!(rings.served[0], 1 + 5);
    rings.limit("read=none");
    assert_eq!(rings.served[0], u64::from(SIZE));
    assert!(rings.fill(0), "a ring that waits for nothing wants a kick again");
}

#[test]
fn memory_is_replaced_at_once_under_a_throttled_ring() {
    let mut rings = Rings::start(0);
    rings.limit("read=1");
    rings.fill(0);
    rings.kick(0);
    let wakes_at_ns = rings.stage.wakes_at_ns();
    let memory = rings.drivers[0].setup(0).memory;
    rings.stage.set_memory(0, memory);
    rings.rest();
    assert!(rings.stage.is_settled());
    assert_eq!((rings.stage.wakes_at_ns(), rings.served[0]), (wakes_at_ns, 1));
    assert_eq!(rings.throttled(0), 1, "it asked again, and is still the same request");
}

#[test]
fn request_that_lacks_something_else_when_its_time_comes_keeps_its_place() {
    let mut rings = Rings::start(0);
    rings.limit("total=2");
    rings.fill(0);
    rings.kick(0);
    rings.feel(Mood::Starved);
    rings.sleep();
    assert_eq!(rings.served, [1, 0]);
    rings.feel(Mood::Limited);
    rings.fill(1);
    rings.kick(1);
    assert_eq!(rings.served, [1, 0], "another ring was let past it");
    rings.kick(0);
    assert_eq!(rings.served, [2, 0]);
}

#[test]
fn place_of_a_request_that_is_gone_is_free() {
    let mut rings = Rings::start(0);
    rings.limit("total=2");
    rings.fill(0);
    rings.kick(0);
    rings.feel(Mood::Free);
    rings.sleep();
    assert_eq!(rings.served, [u64::from(SIZE), 0]);
    rings.feel(Mood::Limited);
    rings.fill(1);
    rings.kick(1);
    assert_eq!(rings.served[1], 1, "it waits behind nobody");
}

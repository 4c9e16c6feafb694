//! A guest with some rings, a device, and a disk below it, all in one thread and by one seed.
//!
//! Contract: [`World::step`] lets one thing happen: requests are sent, the worker turns, an operation
//! reaches the disk or ends, a ring stops or goes on, the guest looks. What the guest sees is checked
//! against its [`Ledger`] as soon as it can see it, and so is what a power cut would leave.
//! [`World::settle`] lets everything end: who is not answered then never will be.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Weak};

use common::memory::MemoryMap;
use common::rate_limit::{Change, Topic};
use common::simulation::{Driver, Guest, Layout, Random, Stage, chosen_seed};
use common::virtqueue::{VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC};

use super::host::{Luck, Progress, Synced};
use super::ledger::{Ledger, Mark};
use super::mode::Mode;
use super::request::{Answer, Ask, GuestRequest};
use super::storage::{Content, Description, SECTOR, Storage};
use super::{RING_SIZE_MAX, device};
use crate::device::BlockDevice;

/// Sizes of the rings.
const RINGS: [u16; 3] = [4, 8, RING_SIZE_MAX];
/// Most requests of a ring at a time: more than it has bounce buffers.
const REQUESTS_MAX: u64 = 40;
/// Where the indirect tables of a ring begin, its requests' places after them.
const TABLES: u64 = 0x4000;
const TABLE_BYTES: u64 = 0x200;
const PLACES: u64 = 0x10000;

pub(super) struct Ring {
    driver: Driver,
    running: bool,
    /// The driver has broken it.
    broken: bool,
    /// Times that it did.
    errors: u64,
    /// The available index at which the device began.
    first: u16,
    answered: u16,
    /// By head.
    pub(super) requests: BTreeMap<u16, GuestRequest>,
    /// The sync that ended last, until the device has answered whom it served.
    pub(super) synced: Option<Synced>,
    /// Places in memory that no request has.
    places: Vec<u64>,
    /// The calls that the driver has heard.
    heard: u64,
    /// The driver looks only when it is called.
    asleep: bool,
}

/// See the module's head.
pub(super) struct World {
    pub(super) random: Random,
    device: Arc<BlockDevice>,
    pub(super) stage: Stage<BlockDevice>,
    guest: Arc<Guest>,
    pub(super) rings: Vec<Ring>,
    pub(super) storage: Storage,
    ledger: Ledger,
    pub(super) operations: BTreeMap<u64, Progress>,
    pub(super) mode: Mode,
    pub(super) luck: Luck,
    /// The driver has left its cache write-back.
    write_back: bool,
    /// When it last switched.
    switched: u64,
    pub(super) now: u64,
    /// The number of the next pattern.
    patterns: u32,
    pub(super) answers: Answers,
    /// Maps of the guest's memory that the device was given.
    maps: Vec<Weak<MemoryMap>>,
    /// Rings that went on after they had stopped.
    pub(super) restarts: u64,
    /// A sync has failed, so that nothing may be called stable any more.
    pub(super) lost: bool,
    is_told: bool,
}

/// What has been answered so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Answers {
    pub(super) all: u64,
    pub(super) failed: u64,
    /// By the device itself, without an operation that failed.
    pub(super) refused: u64,
}

impl World {
    pub(super) fn new(seed: u64, mode: Mode, luck: Luck) -> Self {
        let blank = (0..mode.scale.disk_sectors).map(|sector| Mark::Pattern(0).content(sector));
        Self::over(Random::new(seed), mode, luck, blank.collect())
    }

    /// A machine that starts with this on its disk.
    fn over(mut random: Random, mode: Mode, luck: Luck, contents: Vec<Content>) -> Self {
        let ring_bytes = ring_bytes(mode);
        let ring_memory: Vec<(u64, u64)> =
            (0..RINGS.len() as u64).map(|index| (index * ring_bytes, ring_bytes)).collect();
        let guest = Arc::new(Guest::new(&ring_memory));
        let device = Arc::new(device(mode, RINGS.len() as u16));
        let mut stage = Stage::new(Arc::clone(&device), random.number());
        let mut rings = Vec::new();
        for (index, size) in (0..).zip(RINGS) {
            let at = u64::from(index) * ring_bytes;
            let layout =
                Layout { size, descriptors: at, available: at + 0x1000, used: at + 0x2000 };
            let event_idx = random.pick(&[0, VIRTIO_F_EVENT_IDX]);
            let features = mode.features() | VIRTIO_F_INDIRECT_DESC | event_idx;
            let mut driver = Driver::new(Arc::clone(&guest), layout, features);
            let first = random.pick(&[0, u16::MAX - 5]);
            driver.start_at(first);
            stage.start(index, driver.setup(first)).expect("a ring");
            rings.push(Ring {
                driver,
                running: true,
                broken: false,
                errors: 0,
                first,
                answered: 0,
                requests: BTreeMap::new(),
                synced: None,
                places: (0..REQUESTS_MAX.min(size.into()))
                    .map(|n| at + PLACES + n * mode.scale.place_bytes)
                    .collect(),
                heard: 0,
                asleep: false,
            });
        }
        let (storage, ledger) =
            (Storage::new(contents.iter().copied()), Ledger::new(contents.into_iter()));
        let mut world = Self {
            random,
            device,
            stage,
            guest,
            rings,
            storage,
            ledger,
            operations: BTreeMap::new(),
            mode,
            luck,
            write_back: mode.starts_write_back(),
            switched: 0,
            lost: false,
            now: 1,
            patterns: 1,
            answers: Answers::default(),
            maps: Vec::new(),
            restarts: 0,
            is_told: chosen_seed().is_some(),
        };
        if world.random.once_in(3) {
            world.limit();
        }
        world
    }

    pub(super) fn tell(&self, what: &str, of: &dyn Debug) {
        if self.is_told {
            eprintln!("{:6} {what} {of:?}", self.now);
        }
    }

    /// One thing happens.
    pub(super) fn step(&mut self) {
        self.now += 1;
        let index = self.random.index(self.rings.len());
        match self.random.within(0..20) {
            0..4 => self.send(index),
            4..9 => drop(self.turn()),
            9..13 => drop(self.reach_disk()),
            13..17 => drop(self.end_one()),
            17 | 18 => drop(self.look(index)),
            _ if self.random.once_in(4) => self.switch_cache(),
            _ if self.random.once_in(4) => self.limit(),
            _ if self.random.once_in(4) => self.stop(index),
            _ if self.random.once_in(4) => self.replace_memory(),
            _ => drop(self.restart(index)),
        }
    }

    /// The driver of a ring makes requests, and kicks if it is to.
    fn send(&mut self, index: usize) {
        let ring = &mut self.rings[index];
        let scale = self.mode.scale;
        let most = if self.random.once_in(8) { REQUESTS_MAX } else { 4 };
        for _ in 0..self.random.within(1..most) {
            let Some(place) = ring.places.pop() else { break };
            let ask = Ask::any(self.patterns, scale, &mut self.random);
            self.patterns += 1;
            let parts = (&*self.guest, &mut self.random);
            let mut request = GuestRequest::lay_out(ask, place, scale, parts);
            request.began = self.now;
            let ring_at = index as u64 * ring_bytes(self.mode);
            let number = (place - ring_at - PLACES) / scale.place_bytes;
            let table = ring_at + TABLES + TABLE_BYTES * number;
            let table = self.random.once_in(2).then_some(table);
            let head = ring.driver.add(request.buffers(), table, &mut self.random);
            let Some(head) = head else {
                ring.places.push(place);
                break;
            };
            let id = request_id(&request);
            for (sectors, mark) in writes(&request.ask) {
                self.ledger.begin(id, mark, sectors, self.now);
            }
            ring.requests.insert(head, request);
        }
        let kick = ring.driver.publish();
        if kick || self.random.once_in(16) {
            self.stage.kernel().kick(index as u16);
        }
        self.tell("sent", &(index, kick, &self.rings[index].requests.keys()));
    }

    /// The worker turns; false if it sleeps.
    pub(super) fn turn(&mut self) -> bool {
        if !self.stage.turn() {
            return false;
        }
        self.now += 1;
        let held = self.stage.kernel().held();
        for operation in &held {
            let submitted = self.now;
            let mut is_new = false;
            self.operations.entry(operation.number).or_insert_with(|| {
                is_new = true;
                Progress { submitted, done: None }
            });
            if is_new {
                self.mode.check(operation);
                held.iter().for_each(|other| self.check_pages(operation, other));
            }
        }
        (0..self.rings.len()).for_each(|index| self.observe(index));
        self.check_maps();
        true
    }

    /// What the guest can see of a ring is checked, whether it looks or not.
    fn observe(&mut self, index: usize) {
        let ring = &mut self.rings[index];
        let all_used = ring.driver.take_used();
        let is_answered =
            |synced: &mut Synced| all_used.iter().any(|used| used.head == synced.carrier);
        let synced = ring.synced.take_if(is_answered);
        for used in all_used {
            let ring = &mut self.rings[index];
            let mut request = ring.requests.remove(&used.head).expect("the driver's books");
            if let Some(synced) = &synced {
                request.failed |= synced.failed && request.waited_at(synced.submitted);
            }
            ring.answered = ring.answered.wrapping_add(1);
            ring.places.push(request.place);
            self.tell("answered", &(index, used, request.failed, &request.ask));
            let answer = request.answer(used.written_bytes, &self.guest);
            match answer {
                Some(answer) => self.judge(&request, answer),
                None => self.break_ring(index),
            }
            self.now += 1;
        }
    }

    /// The device found what is no request: the ring is broken, and the front end knows before the
    /// driver can.
    fn break_ring(&mut self, index: usize) {
        let ring = &mut self.rings[index];
        ring.broken = true;
        ring.errors += 1;
        assert_eq!(self.stage.kernel().errors(index as u16), ring.errors, "the error is told");
    }

    fn judge(&mut self, request: &GuestRequest, answer: Answer) {
        let done = answer.status == 0;
        self.answers.all += 1;
        self.answers.failed += u64::from(request.failed);
        self.answers.refused += u64::from(!done && !request.failed);
        match &request.ask {
            Ask::Read(span) if done => {
                for (sector, found) in span.sectors().zip(answer.data.chunks(SECTOR)) {
                    let may = self.ledger.may_read(sector, found, request.began);
                    assert!(may, "sector {sector} reads as {:x?}: {request:?}", &found[..16]);
                }
            }
            Ask::GetId => assert_eq!(&answer.data[..20], b"simulated disk\0\0\0\0\0\0"),
            Ask::Flush if done && self.mode.syncs() => self.ledger.promise(request.began),
            _ => {}
        }
        let is_hint = matches!(request.ask, Ask::Discard(_));
        let flushes = self.mode.flushes && self.write_back;
        let promised = self.mode.syncs() && !flushes;
        self.ledger.answer(request_id(request), done && !is_hint, promised, self.now);
        let wrote = matches!(request.ask, Ask::Write(span, _) if span.count > 0);
        if wrote && done && promised && request.began > self.switched {
            // A driver that sends no flushes takes older writes for stable before newer ones.
            self.ledger.promise(request.began);
        }
        if done && !matches!(request.ask, Ask::Read(_)) {
            self.check_power_cut();
        }
    }

    /// The operator changes limits: to what lets a request through every few turns, or to none.
    fn limit(&mut self) {
        let topic = self.random.pick(&[Topic::Iops, Topic::Bps]);
        let limits = match topic {
            Topic::Iops => ["none", "4k", "read=1k/9", "write=3k,total=5k", "write=none"],
            _ => ["none", "20M", "read=9M/1M", "write=8M,total=30M", "write=none"],
        };
        let change = Change::parse(self.random.pick(&limits), topic).expect("limits");
        self.tell("limits", &change);
        self.stage.limit(&change);
    }

    /// The driver switches its cache; what was answered before is made stable in the background.
    fn switch_cache(&mut self) {
        self.write_back = !self.write_back;
        self.switched = self.now;
        self.now += 1;
        self.tell("write-back", &self.write_back);
        let device = Arc::clone(&self.device);
        if !device.disk.cache().switch(self.write_back) {
            return;
        }
        // Anything may happen until the sync has ended, another switch too.
        let settled = device.disk.cache().settle(|| {
            let submitted = self.now;
            for _ in 0..self.random.within(0..40) {
                self.step();
            }
            if matches!(self.luck, Luck::Any(_)) && self.random.once_in(16) {
                self.storage.fail();
            }
            if !self.storage.tells(Description::Settling) {
                self.storage.synced(submitted);
                return Ok(());
            }
            // The worker has heard of all that ended before: what comes later finds it lost.
            while self.turn() {}
            self.lose();
            Err(std::io::Error::other("the host's sync failed"))
        });
        self.tell("settled", &settled);
    }

    /// Whatever a power cut at this moment left would be what was promised.
    pub(super) fn check_power_cut(&self) {
        for sector in 0..self.storage.len() {
            for content in self.storage.survivors(sector) {
                assert!(
                    self.ledger.may_survive(sector, content),
                    "a power cut would leave sector {sector} as {:x?}",
                    &content[..16]
                );
            }
        }
    }

    /// The driver of a ring looks what has come, if it is awake or was called, and goes to sleep;
    /// true when it was called.
    fn look(&mut self, index: usize) -> bool {
        let calls = self.stage.kernel().calls(index as u16);
        let ring = &mut self.rings[index];
        let called = calls != ring.heard;
        if ring.asleep && !called {
            return false;
        }
        ring.heard = calls;
        ring.asleep = ring.driver.want_call();
        assert!(ring.asleep, "what was used has been taken");
        if self.random.once_in(4) {
            ring.driver.want_no_call();
            ring.asleep = false;
        }
        called
    }

    /// The front end stops a ring.
    fn stop(&mut self, index: usize) {
        if std::mem::take(&mut self.rings[index].running) {
            self.tell("stop", &index);
            self.stage.stop(index as u16);
        }
    }

    /// The front end sends its memory anew.
    fn replace_memory(&mut self) {
        let map = self.guest.map_again();
        for index in 0..self.rings.len() {
            self.stage.set_memory(index as u16, Arc::clone(&map));
        }
        self.maps.push(Arc::downgrade(&map));
    }

    /// A ring that has stopped goes on from its base; true when it does.
    fn restart(&mut self, index: usize) -> bool {
        let Some(base) = self.stage.stopped(index as u16) else { return false };
        self.observe(index);
        let ring = &mut self.rings[index];
        let taken = base.wrapping_sub(ring.first);
        assert_eq!(taken, ring.answered, "what lies before the base {base} was answered, no more");
        let held = self.stage.kernel().held();
        let none = held.iter().all(|operation| usize::from(operation.queue) != index);
        assert!(none, "a ring that has stopped has no operations");
        self.tell("restart", &(index, base));
        let ring = &mut self.rings[index];
        self.stage.start(index as u16, ring.driver.setup(base)).expect("a ring");
        (ring.running, ring.broken) = (true, false);
        self.restarts += 1;
        true
    }

    /// Lets everything that is under way end. Nobody kicks: what was made available is served.
    pub(super) fn settle(&mut self) {
        loop {
            let mut goes_on = self.turn();
            while self.reach_disk() || self.end_one() {
                goes_on = true;
            }
            for index in 0..self.rings.len() {
                goes_on |= self.look(index) || self.restart(index);
                // A front end that hears of a broken ring starts it anew.
                if self.rings[index].broken && self.rings[index].running {
                    self.stop(index);
                    goes_on = true;
                }
            }
            match self.stage.wakes_at_ns() {
                Some(wakes_at_ns) if !goes_on => self.stage.advance_to(wakes_at_ns),
                None if !goes_on => break,
                _ => {}
            }
        }
        for (index, ring) in self.rings.iter().enumerate() {
            let asleep = ring.requests.values().next();
            assert!(asleep.is_none(), "ring {index} sleeps over {asleep:?}");
        }
        assert_eq!(self.counted(), self.answers);
        assert!(self.stage.is_settled(), "replaced memory stays in use");
        self.check_maps();
        self.check_power_cut();
    }

    /// Memory of which the device says that it is out of use is not mapped any more.
    fn check_maps(&mut self) {
        if self.stage.is_settled() {
            let replaced = self.maps.len().saturating_sub(1);
            let kept = self.maps.drain(..replaced).filter(|map| map.strong_count() > 0).count();
            assert_eq!(kept, 0, "replaced memory stays mapped");
        }
    }

    /// What the metrics say.
    fn counted(&self) -> Answers {
        let kinds = || self.stage.metrics().queues.iter().flat_map(|queue| &queue.kinds);
        let all = kinds().map(|kind| kind.requests.get()).sum();
        let errors: u64 = kinds().map(|kind| kind.errors.get()).sum();
        let failed = self.answers.failed;
        Answers { all, failed, refused: errors - failed }
    }

    /// Requests that took a detour through a bounce buffer.
    pub(super) fn bounced(&self) -> u64 {
        self.stage.metrics().queues.iter().map(|queue| queue.bounced.get()).sum()
    }

    /// Requests that had to wait for a limit.
    pub(super) fn throttled(&self) -> u64 {
        self.stage.metrics().queues.iter().map(|queue| queue.throttled.get()).sum()
    }

    /// The operations that have been submitted.
    pub(super) fn submitted(&self) -> u64 {
        self.stage.kernel().submitted()
    }

    /// The power fails; the machine starts again with what the disk has kept.
    pub(super) fn cut_power(mut self) -> Self {
        self.tell("power cut", &self.answers);
        self.check_power_cut();
        let mut contents = Vec::new();
        for sector in 0..self.storage.len() {
            let left: Vec<Content> = self.storage.survivors(sector).copied().collect();
            contents.push(left[self.random.index(left.len())]);
        }
        let (random, mode, luck) = (self.random.clone(), self.mode, self.luck);
        // What the old machine would still do is done for nobody.
        self.settle();
        Self::over(random, mode, luck, contents)
    }
}

/// Memory that a ring has for itself, with its requests.
fn ring_bytes(mode: Mode) -> u64 {
    (PLACES + REQUESTS_MAX * mode.scale.place_bytes).next_multiple_of(0x10_0000)
}

/// A number that no two requests of a run have: their places and their times differ.
fn request_id(request: &GuestRequest) -> u64 {
    request.began << 32 | request.place
}

/// What a request writes, if it is done.
pub(super) fn writes(ask: &Ask) -> Vec<(std::ops::Range<usize>, Mark)> {
    match ask {
        Ask::Write(span, mark) => vec![(span.sectors(), *mark)],
        Ask::Discard(spans) => spans.iter().map(|span| (span.sectors(), Mark::Zeros)).collect(),
        Ask::WriteZeroes(spans) => {
            spans.iter().map(|(span, _)| (span.sectors(), Mark::Zeros)).collect()
        }
        _ => Vec::new(),
    }
}

//! Memory that changes while the device uses it: a second thread scribbles over rings, tables,
//! headers and data, or cuts memory off and gives it back, while requests run.
//!
//! What is scribbled is drawn from a seed, which a failure names. It is such that a device which
//! reads each field once can go wrong only on queue 0: no address, length or sector that it can
//! make sense of leads to what the neighbour owns.

use crate::aftermath::{Attacker, Session};
use crate::ring_attack::{SIZE, small_rings};
use crate::subject::{Subject, is_ours_to_promise, is_peer, must_work};
use frontend::Error;
use frontend::block::{
    Request, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use frontend::guest::{MemoryBy, Options};
use frontend::memory::{GuestMemory, Shape};
use frontend::ring::{
    DESCRIPTOR_BYTES, Descriptor, SplitRing, VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT as NEXT,
    VIRTQ_DESC_F_WRITE as WRITE,
};
use load::Random;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Seeds of each kind of scribbling, and rounds of requests under each.
const SEEDS: u64 = 8;
const ROUNDS: usize = 25;
/// Requests of a round.
const BURST: u16 = 4;
/// Descriptors of each request.
const PARTS: u16 = 3;
/// Guest address of the memory. None of what is scribbled looks like it: a ring's fields that are
/// taken for a descriptor lead nowhere.
const MEMORY_BASE: u64 = 0x5a_0000_0000;
/// Room that no sensible length leaves.
const ARENA_BYTES: usize = 1 << 16;
/// Sectors that the attack may write to, far from the neighbour's.
const SECTORS: u64 = 1000;
/// What the device is asked for.
const KINDS: [u32; 6] = [
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_WRITE_ZEROES,
];

/// What is scribbled over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Descriptors,
    Available,
    Used,
    IndirectTable,
    Headers,
    Data,
    Status,
    /// Each of the others now and then.
    Everything,
}

const TARGETS: [Target; 7] = [
    Target::Descriptors,
    Target::Available,
    Target::Used,
    Target::IndirectTable,
    Target::Headers,
    Target::Data,
    Target::Status,
];

/// The memory of the attacked queue: its ring, and what its requests are made of.
#[derive(Clone)]
struct Arena {
    ring: SplitRing,
    header: u64,
    data: u64,
    status: u64,
    table: u64,
}

impl Arena {
    fn reserve(attacker: &mut Attacker) -> Self {
        let guest = &mut attacker.driver.guest;
        let [header, data, status, table] =
            [ARENA_BYTES; 4].map(|size_bytes| guest.reserve(size_bytes));
        Arena { ring: guest.queues[0].ring().clone(), header, data, status, table }
    }

    fn memory(&self) -> &GuestMemory {
        self.ring.memory()
    }

    /// An address that leads into the arena, to the ring, or nowhere.
    fn address(&self, random: &mut Random) -> u64 {
        let ring = &self.ring;
        let places = [
            self.header,
            self.data,
            self.status,
            self.table,
            ring.descriptors_address(),
            ring.available_address(),
            ring.used_address(),
            1 << 40,
            u64::MAX - 15,
            u64::MAX,
        ];
        places[random.below(places.len() as u64) as usize]
    }

    /// Length, flags and next of a descriptor.
    fn rest(&self, random: &mut Random) -> (u32, u16, u16) {
        // No more than the ring's own page has room for, or more than the guest has memory.
        let lengths = [0, 1, 15, 16, 20, 48, 512, 512, 1 << 25, 1 << 31, u32::MAX - 15, u32::MAX];
        let len_bytes = lengths[random.below(lengths.len() as u64) as usize];
        (len_bytes, random.below(8) as u16, random.below(u64::from(SIZE) + 2) as u16)
    }

    /// Half a descriptor of the table at `table` anew: the address, or all else.
    fn scribble_descriptor(&self, table: u64, random: &mut Random) {
        let at = table + DESCRIPTOR_BYTES * random.below(u64::from(SIZE));
        if random.below(2) == 0 {
            self.memory().store_u64(at, self.address(random));
        } else {
            let (len_bytes, flags, next) = self.rest(random);
            let rest = u64::from(len_bytes) | u64::from(flags) << 32 | u64::from(next) << 48;
            self.memory().store_u64(at + 8, rest);
        }
    }

    /// A word that makes sense as a sector, as a request type, and as the rest of a segment; or as
    /// none of them.
    fn word(random: &mut Random) -> u64 {
        match random.below(4) {
            0 => u64::from(KINDS[random.below(KINDS.len() as u64) as usize]),
            1 => random.below(SECTORS),
            2 => random.below(64) | random.below(4) << 32,
            _ => [1 << 40, 1 << 63, u64::MAX - 7, u64::MAX][random.below(4) as usize],
        }
    }

    fn scribble(&self, target: Target, random: &mut Random) {
        let ring = &self.ring;
        let half = random.bits() as u16;
        match target {
            Target::Descriptors => self.scribble_descriptor(ring.descriptors_address(), random),
            Target::IndirectTable => self.scribble_descriptor(self.table, random),
            Target::Available => match random.below(8) {
                0 => ring.set_available_index(half),
                1 => ring.set_available_flags(half),
                2 => ring.set_used_event(half),
                _ => ring.write_available(half, random.below(u64::from(SIZE) + 2) as u16),
            },
            Target::Used => {
                let halves = (4 + 8 * u64::from(SIZE) + 2) / 2;
                let at = ring.used_address() + 2 * random.below(halves);
                self.memory().store_u16(at, half, Ordering::Relaxed);
            }
            Target::Headers => {
                self.memory().store_u64(self.header + 8 * random.below(8), Self::word(random));
            }
            Target::Data => {
                self.memory().store_u64(self.data + 8 * random.below(64), Self::word(random));
            }
            Target::Status => self.memory().write(self.status + random.below(16), &[half as u8]),
            Target::Everything => {
                self.scribble(TARGETS[random.below(TARGETS.len() as u64) as usize], random);
            }
        }
    }

    /// Requests of every kind, half of them through an indirect table, as good as they can be while
    /// somebody writes over them.
    fn offer(&self, round: usize) {
        for at in 0..BURST {
            let place = u64::from(at);
            let kind = KINDS[(round + usize::from(at)) % KINDS.len()];
            let request = Request { kind, sector: place * 8, ..Request::default() };
            self.memory().write(self.header + 16 * place, &request.header());
            let is_to_driver = matches!(kind, VIRTIO_BLK_T_IN | VIRTIO_BLK_T_GET_ID);
            let flags = if is_to_driver { WRITE | NEXT } else { NEXT };
            let len_bytes =
                if kind == VIRTIO_BLK_T_IN || kind == VIRTIO_BLK_T_OUT { 512 } else { 32 };
            let first = if at % 2 == 0 { PARTS * at } else { 0 };
            let chain = [
                (self.header + 16 * place, 16, NEXT, first + 1),
                (self.data, len_bytes, flags, first + 2),
                (self.status + place, 1, WRITE, 0),
            ]
            .map(|(address, len_bytes, flags, next)| Descriptor {
                address,
                len_bytes,
                flags,
                next,
            });
            let head = PARTS * at;
            if at % 2 == 0 {
                for (index, part) in (head..).zip(chain) {
                    self.ring.write_descriptor(index, &part);
                }
            } else {
                for (index, part) in (0..).zip(chain) {
                    self.memory().write(self.table + index * DESCRIPTOR_BYTES, &part.encode());
                }
                let (address, flags) = (self.table, VIRTQ_DESC_F_INDIRECT);
                let all = Descriptor { address, len_bytes: 48, flags, next: 0 };
                self.ring.write_descriptor(head, &all);
            }
            let index = self.ring.available_index();
            self.ring.write_available(index, head);
            self.ring.set_available_index(index.wrapping_add(1));
        }
    }
}

/// A guest whose memory is where no number leads that was not meant to be an address.
fn far_memory() -> Options {
    let memory = Shape { guest: MEMORY_BASE, size_bytes: 16 << 20, file_offset_bytes: 0 };
    Options { memory: vec![memory], ..small_rings() }
}

/// Ring 0 from its beginning, whatever it has come to.
fn start_over(attacker: &Attacker) -> Result<(), Error> {
    let guest = &attacker.driver.guest;
    guest.front_end.get_vring_base(0)?;
    let ring = guest.queues[0].ring();
    ring.memory().write(ring.available_address(), &[0; 4]);
    ring.memory().write(ring.used_address(), &[0; 4]);
    guest.start_queue(0, 0)?;
    guest.enable(0)
}

/// Requests on ring 0 and on its neighbour, while `meanwhile` runs in a thread until told to stop.
fn rounds(
    attacker: &mut Attacker,
    arena: &Arena,
    what: &str,
    meanwhile: impl FnOnce(&AtomicBool) + Send,
) {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| meanwhile(&over));
        for round in 0..ROUNDS {
            arena.offer(round);
            attacker.driver.kick(0).expect("the device can be kicked");
            attacker.neighbour_must_work(what);
            let broken = attacker.driver.guest.errs[0].wait(Duration::ZERO);
            if broken.expect("the err descriptor can be read") > 0 && !is_peer() {
                let started = start_over(attacker);
                started.unwrap_or_else(|error| panic!("{what}: ring 0 does not start: {error}"));
            }
        }
        over.store(true, Ordering::Relaxed);
    });
}

fn scribbled(target: Target) {
    let mut subject = Subject::start();
    for seed in 0..SEEDS {
        let what = format!("{target:?}, seed {seed}");
        let mut attacker = Attacker::begin(&subject, &far_memory());
        let arena = Arena::reserve(&mut attacker);
        let theirs = arena.clone();
        rounds(&mut attacker, &arena, &what, |over| {
            let mut random = Random::new(seed);
            while !over.load(Ordering::Relaxed) {
                theirs.scribble(target, &mut random);
            }
        });
        // Another program's device may have stopped altogether.
        if !is_peer() {
            let started = start_over(&attacker);
            started.unwrap_or_else(|error| panic!("{what}: ring 0 does not start: {error}"));
            must_work(&mut attacker.driver, 0);
        }
        let session = if is_peer() { Session::Either } else { Session::Lives };
        attacker.after(&mut subject, session, &what);
    }
}

#[test]
fn descriptors_change_while_they_are_used() {
    scribbled(Target::Descriptors);
}

#[test]
fn available_ring_changes_while_it_is_used() {
    scribbled(Target::Available);
}

#[test]
fn used_ring_changes_while_it_is_used() {
    scribbled(Target::Used);
}

#[test]
fn indirect_tables_change_while_they_are_used() {
    scribbled(Target::IndirectTable);
}

#[test]
fn headers_change_while_they_are_used() {
    scribbled(Target::Headers);
}

#[test]
fn data_and_segments_change_while_they_are_used() {
    scribbled(Target::Data);
}

#[test]
fn status_bytes_change_while_they_are_used() {
    scribbled(Target::Status);
}

#[test]
fn everything_changes_while_it_is_used() {
    scribbled(Target::Everything);
}

/// Regions: the rings' and the neighbour's buffers, and that of the attack's data.
fn two_regions(memory_by: MemoryBy) -> Options {
    let memory = [(0, 16 << 20), (1 << 30, ARENA_BYTES)].map(|(guest, size_bytes)| Shape {
        guest,
        size_bytes,
        file_offset_bytes: 0,
    });
    Options { memory: memory.to_vec(), memory_by, ..small_rings() }
}

#[test]
fn data_is_cut_off_and_given_back_while_it_is_used() {
    // The kernel copies it, which fails by itself, or we do, which ends the session.
    let mut subject = Subject::start();
    for seed in 0..SEEDS {
        let what = format!("seed {seed}");
        let mut attacker = Attacker::begin(&subject, &two_regions(MemoryBy::Table));
        let mut arena = Arena::reserve(&mut attacker);
        arena.data = attacker.driver.guest.memory.regions()[1].description().guest;
        let memory = Arc::clone(&attacker.driver.guest.memory);
        let kinds = seed as usize;
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut random = Random::new(seed);
                while !over.load(Ordering::Relaxed) {
                    let size_bytes = random.below(ARENA_BYTES as u64 + 1);
                    memory.regions()[1].truncate(size_bytes).expect("a memfd can be truncated");
                }
            });
            for round in 0..ROUNDS {
                arena.offer(round + kinds);
                attacker.driver.kick(0).expect("the device can be kicked");
                if attacker.driver.guest.front_end.barrier().is_err() {
                    break;
                }
            }
            over.store(true, Ordering::Relaxed);
        });
        attacker.after(&mut subject, Session::Either, &what);
    }
}

#[test]
fn rings_are_cut_off_while_they_are_used() {
    let mut subject = Subject::start();
    for rounds in 0..SEEDS {
        // No neighbour: its ring is gone as well.
        let mut driver = subject.driver(&Options::default());
        for at in 0..32 {
            driver.submit(0, &Request::write(at * 64, &[0x77; 32 << 10]));
        }
        driver.kick(0).expect("the device can be kicked");
        for _ in 0..rounds {
            driver.complete(0).expect("a write ends");
        }
        driver.guest.memory.regions()[0].truncate(0).expect("a memfd can be truncated");
        drop(driver);
        subject.must_serve_the_next();
    }
}

#[test]
fn regions_come_and_go_under_their_requests() {
    if !is_ours_to_promise() {
        return;
    }
    let mut subject = Subject::start();
    let mut attacker = Attacker::begin(&subject, &two_regions(MemoryBy::Regions));
    let mut arena = Arena::reserve(&mut attacker);
    let region = attacker.driver.guest.memory.regions()[1].description();
    arena.data = region.guest;
    for round in 0..ROUNDS {
        let guest = &attacker.driver.guest;
        arena.offer(round);
        attacker.driver.kick(0).expect("the device can be kicked");
        guest.front_end.rem_mem_reg(&region).expect("a region can be removed");
        arena.offer(round + 1);
        attacker.driver.kick(0).expect("the device can be kicked");
        attacker.neighbour_must_work("a region has gone");
        let guest = &attacker.driver.guest;
        let file = guest.memory.regions()[1].file();
        guest.front_end.add_mem_reg(&region, file).expect("a region can be added");
        start_over(&attacker).expect("ring 0 starts over");
    }
    must_work(&mut attacker.driver, 0);
    attacker.after(&mut subject, Session::Lives, "regions come and go");
}

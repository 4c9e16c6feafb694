//! A back end that ends at any store, and its successor: each chain is used once, in the order in which the driver made them
//! available where nobody saw another.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::super::{Chain, InflightRegion, InflightShape, RingError, RingSetup, Virtqueue};
use super::{DATA, LAYOUT, MEMORY_BYTES, SIZE};
use crate::memory::crash;
use crate::simulation::{Driver, Guest, Random};

const SHAPE: InflightShape = InflightShape { queue_count: 2, queue_size: SIZE };
/// Chains that a driver makes in a life.
const CHAIN_COUNT: usize = 14;

/// A guest with a driver that keeps books, and the region that outlives back ends.
struct Machine {
    driver: Driver,
    random: Random,
    file: File,
    region: InflightRegion,
    /// Heads that were made available and not seen used, oldest first.
    offered: VecDeque<u16>,
    added: usize,
    used: usize,
}

impl Machine {
    /// Both rings begin near their indexes' end.
    fn new(seed: u64) -> Self {
        let guest = Arc::new(Guest::new(&[(0, MEMORY_BYTES)]));
        let mut driver = Driver::new(guest, LAYOUT, 0);
        driver.start_at(0xfffa);
        let file = File::from(SHAPE.create().expect("a memfd"));
        let region = InflightRegion::map(SHAPE, 0, file.as_fd()).expect("a region");
        let (random, offered) = (Random::new(seed), VecDeque::new());
        Self { driver, random, file, region, offered, added: 0, used: 0 }
    }

    fn back_end(&self) -> Result<Virtqueue, RingError> {
        let record = self.region.record(1);
        Virtqueue::new(RingSetup { record, ..self.driver.setup(0xfffa) })
    }

    /// Makes chains available while there is room, and there are any.
    fn offer(&mut self, up_to: usize) {
        while self.added < up_to {
            let chain: (&[_], &[_]) = (&[(DATA, 16)], &[]);
            let Some(head) = self.driver.add(chain, None, &mut self.random) else { break };
            self.offered.push_back(head);
            self.added += 1;
        }
        self.driver.publish();
    }

    /// Takes what was used. The driver's books fail for what was used twice.
    fn take_used(&mut self) {
        for used in self.driver.take_used() {
            self.offered.retain(|head| *head != used.head);
            self.used += 1;
        }
    }
}

/// Serves until no chain is left: in turns, in any order, some chains twice put back before they are taken.
fn serve(queue: &mut Virtqueue, random: &mut Random) {
    let mut out: Vec<Chain> = Vec::new();
    loop {
        for _ in 0..random.within(1..5) {
            out.extend(queue.pop(0).expect("a good chain"));
        }
        if random.once_in(2)
            && let Some(newest) = out.pop()
        {
            queue.retract(newest);
            out.extend(queue.pop(0).expect("a good chain"));
        }
        if out.is_empty() {
            return;
        }
        for _ in 0..random.within(1..4) {
            // The newest stays the last: only that can be put back.
            if out.len() > 1 {
                let chain = out.remove(random.index(out.len() - 1));
                queue.used(chain, 0);
            } else if let Some(chain) = out.pop() {
                queue.used(chain, 0);
            }
        }
        queue.publish();
    }
}

/// Serves with a back end that ends after so many stores; whether it came to its own end.
fn live(machine: &mut Machine, stores: u64, seed: u64) -> bool {
    let mut random = Random::new(seed);
    let ended = crash::after(stores, || {
        let mut queue = machine.back_end().expect("a ring");
        serve(&mut queue, &mut random);
    });
    machine.take_used();
    ended.is_some()
}

/// The last back end finds what is left in its order, and leaves nothing.
fn finish(machine: &mut Machine) {
    let mut queue = machine.back_end().expect("a ring");
    let mut chains = Vec::new();
    while let Some(chain) = queue.pop(0).expect("a good chain") {
        chains.push(chain);
    }
    let heads: Vec<_> = chains.iter().map(Chain::slot).collect();
    assert_eq!(VecDeque::from(heads), machine.offered, "what is left, in its order");
    chains.into_iter().for_each(|chain| {
        queue.used(chain, 0);
    });
    queue.publish();
    machine.take_used();
    machine.offer(CHAIN_COUNT);
    let mut random = Random::new(0);
    serve(&mut queue, &mut random);
    machine.take_used();
    assert_eq!((machine.used, machine.added), (CHAIN_COUNT, CHAIN_COUNT));
}

#[test]
fn successor_uses_each_chain_once_whatever_store_the_others_ended_at() {
    for seed in 0..20 {
        let mut first = 0;
        loop {
            let mut second = 0;
            let mut was_whole;
            loop {
                let mut machine = Machine::new(seed);
                machine.offer(CHAIN_COUNT / 2);
                was_whole = live(&mut machine, first, seed);
                machine.offer(CHAIN_COUNT);
                let was_second_whole = live(&mut machine, second, seed + 1);
                finish(&mut machine);
                if was_second_whole {
                    break;
                }
                // Every store of the first life, and of the second each by some seed.
                second += 1 + seed;
            }
            if was_whole {
                break;
            }
            first += 1;
        }
        assert!(first > 50, "only {first} stores");
    }
}

#[test]
fn ring_without_a_past_begins_where_the_front_end_says() {
    let mut machine = Machine::new(1);
    let queue = machine.back_end().expect("a ring");
    assert_eq!(queue.next_available(), 0xfffa);
    machine.offer(3);
    drop(queue);
    let mut queue = machine.back_end().expect("a ring");
    let heads: VecDeque<_> = std::iter::from_fn(|| queue.pop(0).expect("a good chain"))
        .map(|chain| chain.end())
        .collect();
    assert_eq!(heads, machine.offered);
}

#[test]
fn driver_that_starts_anew_is_not_given_what_was_another_one_s() {
    let mut machine = Machine::new(2);
    machine.offer(SIZE.into());
    assert!(live(&mut machine, u64::MAX, 2));
    // All was used, and the next driver's ring begins at nothing.
    machine.driver.start_at(0);
    let mut queue = machine.back_end().expect("a ring");
    assert_eq!(queue.next_available(), 0);
    assert!(queue.pop(0).expect("no fault").is_none());
}

#[test]
fn region_is_for_so_many_queues_of_such_a_size() {
    let machine = Machine::new(3);
    assert!(machine.region.record(2).is_none());
    assert_eq!(SHAPE.len_bytes(), 2 * 192);
    let file = SHAPE.create().expect("a memfd");
    assert!(InflightRegion::map(SHAPE, 8, file.as_fd()).is_err(), "it ends before");
    let small = InflightShape { queue_size: SIZE / 2, ..SHAPE };
    let region = InflightRegion::map(small, 0, file.as_fd()).expect("a region");
    let refused = Virtqueue::new(RingSetup { record: region.record(0), ..machine.driver.setup(0) });
    assert!(matches!(refused.err(), Some(RingError::InflightSize { size: 8, recorded: 4 })));
}

#[test]
fn whatever_is_in_the_region_a_ring_is_refused_or_served_without_a_head_twice() {
    for seed in 0..2000 {
        let mut machine = Machine::new(seed);
        machine.offer(6);
        for at in (0..192).step_by(2) {
            let noise = machine.random.number() as u16;
            let value = match at {
                // Mostly a region that might be ours.
                8 => u16::from(machine.random.once_in(20)) * noise + 1,
                10 => SIZE + u16::from(machine.random.once_in(20)),
                14 => machine.random.pick(&[0xfffa, 0xfff0, noise]),
                _ => machine.random.pick(&[0, 1, 7, noise]),
            };
            // The second queue's.
            machine.file.write_all_at(&value.to_le_bytes(), 192 + at).expect("it is as long");
        }
        let Ok(mut queue) = machine.back_end() else { continue };
        let mut seen = [false; SIZE as usize];
        // A head that is taken twice ends the ring.
        while let Ok(Some(chain)) = queue.pop(0) {
            assert!(!std::mem::replace(&mut seen[usize::from(chain.slot())], true));
            chain.end();
        }
    }
}

//! The device side of a ring against a driver that does what a test says.

mod oracle;
mod recovery;

use std::sync::Arc;

use super::{
    Buffers, Chain, RingError, RingSetup, VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, Virtqueue,
};
use crate::memory::MemoryMap;
use crate::simulation::{Driver, Guest, Layout};

const SIZE: u16 = 8;
const MEMORY_BYTES: u64 = 0x10000;
const LAYOUT: Layout = Layout { size: SIZE, descriptors: 0, available: 0x1000, used: 0x2000 };
const DATA: u64 = 0x4000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A guest of one region, and its driver.
fn machine() -> (Arc<Guest>, Driver) {
    let guest = Arc::new(Guest::new(&[(0, MEMORY_BYTES)]));
    (Arc::clone(&guest), Driver::new(guest, LAYOUT, 0))
}

fn queue(driver: &Driver, features: u64) -> Virtqueue {
    Virtqueue::new(RingSetup { features, ..driver.setup(0) }).expect("a ring in memory")
}

/// Offers one chain and gives what the device makes of it.
fn pop(driver: &mut Driver, queue: &mut Virtqueue, head: u16) -> Result<Option<Chain>, RingError> {
    driver.offer(head);
    queue.pop(0)
}

#[test]
fn chain_becomes_readable_then_writable_buffers() {
    let (guest, mut driver) = machine();
    let mut queue = queue(&driver, 0);
    driver.describe(2, (DATA, 16), NEXT, 5);
    driver.describe(5, (DATA + 0x100, 512), NEXT | WRITE, 3);
    driver.describe(3, (DATA + 0x400, 1), WRITE, 0);
    let chain = pop(&mut driver, &mut queue, 2).expect("a good chain").expect("a chain");
    assert_eq!(chain.slot(), 2);
    assert_eq!(queue.readable(&chain).len_bytes(), 16);
    assert_eq!(queue.writable(&chain).len_bytes(), 513);
    assert_eq!(queue.writable(&chain).slice(512, 9).write(&[7, 8]), 1);
    assert_eq!(guest.read(DATA + 0x400, 1), [7]);
    queue.used(chain, 513);
    assert_eq!(driver.used_index(), 0, "nothing is seen before it is published");
    assert!(queue.publish());
    assert_eq!((driver.used_index(), driver.used(0)), (1, (2, 513)));
}

#[test]
fn indirect_table_is_walked_only_where_negotiated() {
    for (features, good) in [(VIRTIO_F_INDIRECT_DESC, true), (0, false)] {
        let (_, mut driver) = machine();
        let mut queue = queue(&driver, features);
        driver.describe(0, (0x3000, 32), INDIRECT, 0);
        driver.describe_at(0x3000, (DATA, 16), NEXT, 1);
        driver.describe_at(0x3010, (DATA + 16, 1), WRITE, 0);
        match pop(&mut driver, &mut queue, 0) {
            Ok(Some(chain)) if good => {
                assert_eq!(queue.readable(&chain).len_bytes(), 16);
                queue.used(chain, 1);
            }
            Err(RingError::Indirect { head: 0 }) if !good => {}
            other => panic!("{features:#x}: {other:?}"),
        }
    }
}

/// A chain that a driver may not make: its name, how it is made, and how it is refused.
type BadChain = (&'static str, fn(&Driver), fn(&RingError) -> bool);

fn assert_refused(chains: &[BadChain]) {
    for (name, describe, refused) in chains {
        let (_, mut driver) = machine();
        let mut queue = queue(&driver, VIRTIO_F_INDIRECT_DESC);
        describe(&driver);
        let error = pop(&mut driver, &mut queue, 0).expect_err(name);
        assert!(refused(&error), "{name}: {error:?}");
        assert_eq!(queue.chains_out(), 0, "{name}");
    }
}

#[test]
fn indirect_tables_that_may_not_be_are_refused_by_name() {
    assert_refused(&[
        (
            "indirect with next",
            |driver| driver.describe(0, (0x3000, 16), INDIRECT | NEXT, 1),
            |error| matches!(error, RingError::Indirect { .. }),
        ),
        (
            "indirect in indirect",
            |driver| {
                driver.describe(0, (0x3000, 16), INDIRECT, 0);
                driver.describe_at(0x3000, (0x3000, 16), INDIRECT, 0);
            },
            |error| matches!(error, RingError::Indirect { .. }),
        ),
        (
            "indirect table of a descriptor and a half",
            |driver| driver.describe(0, (0x3000, 24), INDIRECT, 0),
            |error| matches!(error, RingError::IndirectLength { len_bytes: 24, .. }),
        ),
        (
            "empty indirect table",
            |driver| driver.describe(0, (0x3000, 0), INDIRECT, 0),
            |error| matches!(error, RingError::IndirectLength { len_bytes: 0, .. }),
        ),
    ]);
}

#[test]
fn chains_that_may_not_be_are_refused_by_name() {
    assert_refused(&[
        (
            "loop",
            |driver| {
                driver.describe(0, (DATA, 1), NEXT, 1);
                driver.describe(1, (DATA, 1), NEXT, 0);
            },
            |error| matches!(error, RingError::ChainTooLong { head: 0, limit: SIZE }),
        ),
        (
            "next outside the table",
            |driver| driver.describe(0, (DATA, 1), NEXT, SIZE),
            |error| matches!(error, RingError::Next { next: SIZE, .. }),
        ),
        (
            "buffer outside memory",
            |driver| driver.describe(0, (MEMORY_BYTES - 1, 2), 0, 0),
            |error| matches!(error, RingError::Buffer { .. }),
        ),
        (
            "buffer that wraps",
            |driver| driver.describe(0, (u64::MAX, 2), 0, 0),
            |error| matches!(error, RingError::Buffer { .. }),
        ),
        (
            "empty buffer",
            |driver| driver.describe(0, (DATA, 0), 0, 0),
            |error| matches!(error, RingError::Buffer { .. }),
        ),
        (
            "readable after writable",
            |driver| {
                driver.describe(0, (DATA, 1), NEXT | WRITE, 1);
                driver.describe(1, (DATA, 1), 0, 0);
            },
            |error| matches!(error, RingError::ReadableAfterWritable { .. }),
        ),
    ]);
}

#[test]
fn available_index_that_jumps_is_refused() {
    let (_, mut driver) = machine();
    let mut queue = queue(&driver, 0);
    driver.show(SIZE + 1);
    assert!(matches!(queue.pop(0), Err(RingError::IndexJump { index: 9, next: 0, size: 8 })));
}

#[test]
fn head_outside_the_table_or_offered_twice_is_refused() {
    for (second, refused) in [
        (1, (|error| matches!(error, RingError::HeadInUse { head: 1 })) as fn(&RingError) -> bool),
        (SIZE, |error| matches!(error, RingError::Head { head: SIZE, .. })),
    ] {
        let (_guest, mut driver) = machine();
        let mut queue = queue(&driver, 0);
        driver.describe(1, (DATA, 1), 0, 0);
        let chain = pop(&mut driver, &mut queue, 1).expect("good").expect("a chain");
        let error = pop(&mut driver, &mut queue, second).expect_err("a wrong head");
        assert!(refused(&error), "{error:?}");
        queue.used(chain, 0);
    }
}

#[test]
fn broken_ring_gives_no_chains_and_ends_those_that_are_out() {
    let (_, mut driver) = machine();
    let mut queue = queue(&driver, 0);
    driver.describe(1, (DATA, 1), 0, 0);
    let chain = pop(&mut driver, &mut queue, 1).expect("good").expect("a chain");
    queue.break_off();
    driver.offer(1);
    assert!(matches!(queue.pop(0), Ok(None)));
    queue.used(chain, 0);
    queue.publish();
    assert_eq!(driver.used_index(), 1);
}

#[test]
fn retracted_chains_are_popped_again_in_their_order() {
    let (_, mut driver) = machine();
    let mut queue = queue(&driver, 0);
    for head in 0..3 {
        driver.describe(head, (DATA, 1), 0, 0);
        driver.offer(head);
    }
    let mut chains: Vec<Chain> = std::iter::from_fn(|| queue.pop(0).expect("good")).collect();
    assert_eq!(queue.next_available(), 3);
    while chains.len() > 1 {
        queue.retract(chains.pop().expect("the newest"));
    }
    assert_eq!((queue.next_available(), queue.chains_out()), (1, 1));
    queue.used(chains.remove(0), 0);
    for expected in [1, 2] {
        let chain = queue.pop(0).expect("good").expect("a chain");
        assert_eq!(chain.slot(), expected);
        queue.used(chain, 0);
    }
}

#[test]
fn chain_before_one_that_is_wrong_can_be_retracted() {
    // The same head again; a buffer of no bytes; a head outside the table.
    for wrong in [0, 1, SIZE] {
        let (_guest, mut driver) = machine();
        let mut queue = queue(&driver, 0);
        driver.describe(0, (DATA, 1), 0, 0);
        let chain = pop(&mut driver, &mut queue, 0).expect("good").expect("a chain");
        pop(&mut driver, &mut queue, wrong).expect_err("wrong");
        queue.break_off();
        assert_eq!((queue.next_available(), queue.chains_out()), (1, 1));
        queue.retract(chain);
        assert_eq!((queue.next_available(), queue.chains_out()), (0, 0));
    }
}

#[test]
fn driver_is_called_past_its_event_index_only() {
    let (_, mut driver) = machine();
    let mut queue = queue(&driver, VIRTIO_F_EVENT_IDX);
    driver.set_used_event(1);
    driver.describe(0, (DATA, 1), 0, 0);
    let mut calls = Vec::new();
    for _ in 0..3 {
        let chain = pop(&mut driver, &mut queue, 0).expect("good").expect("a chain");
        queue.used(chain, 0);
        calls.push(queue.publish());
    }
    assert_eq!(calls, [false, true, false]);
    assert!(!queue.publish(), "nothing new is nothing to tell");
}

#[test]
fn driver_that_wants_no_interrupts_gets_none() {
    let (_, mut driver) = machine();
    let mut queue = queue(&driver, 0);
    driver.set_flags(1);
    driver.describe(0, (DATA, 1), 0, 0);
    let chain = pop(&mut driver, &mut queue, 0).expect("good").expect("a chain");
    queue.used(chain, 0);
    assert!(!queue.publish());
    assert_eq!(driver.used_index(), 1);
}

#[test]
fn kick_is_asked_for_where_the_driver_looks() {
    let (_, mut driver) = machine();
    let mut with_index = queue(&driver, VIRTIO_F_EVENT_IDX);
    driver.describe(0, (DATA, 1), 0, 0);
    let chain = pop(&mut driver, &mut with_index, 0).expect("good").expect("a chain");
    assert!(!with_index.request_kick(0).expect("good"));
    assert_eq!(driver.available_event(), 1);
    driver.offer(0);
    assert!(with_index.request_kick(0).expect("good"), "a chain came in between");
    with_index.used(chain, 0);

    let (_, driver) = machine();
    let mut with_flag = queue(&driver, 0);
    with_flag.suppress_kicks();
    assert_eq!(driver.used_flags(), 1);
    assert!(!with_flag.request_kick(0).expect("good"));
    assert_eq!(driver.used_flags(), 0);
}

#[test]
fn kick_is_asked_for_beyond_chains_that_were_put_back() {
    for features in [VIRTIO_F_EVENT_IDX, 0] {
        let (_, mut driver) = machine();
        let mut queue = queue(&driver, features);
        for head in 0..3 {
            driver.describe(head, (DATA, 1), 0, 0);
        }
        let first = pop(&mut driver, &mut queue, 0).expect("good").expect("a chain");
        let second = pop(&mut driver, &mut queue, 1).expect("good").expect("a chain");
        queue.retract(second);
        queue.retract(first);
        assert!(queue.has_available(0) && queue.request_kick(0).expect("good"));
        assert!(!queue.has_available(2) && !queue.request_kick(2).expect("good"));
        if features != 0 {
            assert_eq!(driver.available_event(), 2);
        }
        driver.offer(2);
        assert!(queue.has_available(2) && queue.request_kick(2).expect("good"));
    }
}

#[test]
fn chain_keeps_its_memory_when_the_map_is_replaced() {
    let (guest, mut driver) = machine();
    let mut queue = queue(&driver, 0);
    driver.describe(0, (DATA, 8), WRITE, 0);
    let chain = pop(&mut driver, &mut queue, 0).expect("good").expect("a chain");
    let old = Arc::downgrade(&guest.map());
    let (new_guest, new) = machine();
    queue.set_memory(new_guest.map()).expect("the ring is there as well");
    drop((guest, driver));
    assert!(old.upgrade().is_some() && !queue.is_settled());
    assert_eq!(queue.writable(&chain).write(&[1; 8]), 8);
    queue.used(chain, 8);
    queue.publish();
    assert!(queue.is_settled() && old.upgrade().is_none());
    assert_eq!(new.used_index(), 1);
}

#[test]
fn ring_that_a_new_map_lacks_writes_to_the_old_one() {
    let (_, mut driver) = machine();
    let mut queue = queue(&driver, 0);
    driver.describe(0, (DATA, 8), WRITE, 0);
    let chain = pop(&mut driver, &mut queue, 0).expect("good").expect("a chain");
    let moved = queue.set_memory(Arc::new(MemoryMap::empty()));
    assert!(matches!(moved, Err(RingError::Unmapped { area: "descriptor table", .. })));
    queue.used(chain, 8);
    queue.publish();
    assert_eq!(driver.used_index(), 1);
}

#[test]
fn ring_goes_on_from_its_base() {
    let (_, mut driver) = machine();
    driver.start_at(u16::MAX);
    let mut queue = Virtqueue::new(driver.setup(u16::MAX)).expect("a ring");
    driver.describe(4, (DATA, 1), 0, 0);
    let chain = pop(&mut driver, &mut queue, 4).expect("good").expect("a chain");
    queue.used(chain, 3);
    queue.publish();
    assert_eq!((driver.used_index(), driver.used(u16::MAX)), (0, (4, 3)));
    assert_eq!(queue.next_available(), 0);
}

#[test]
fn lists_of_buffers_are_copied_whatever_their_pieces() {
    let guest = Guest::new(&[(0, MEMORY_BYTES)]);
    let bytes: Vec<u8> = (0..=250).collect();
    guest.write(0, &bytes);
    let pieces = |at: u64, lens: &[usize]| {
        let mut at = at;
        let piece = |len: &usize| {
            let piece = guest.buffers(at, *len)[0];
            at += *len as u64;
            piece
        };
        lens.iter().map(piece).collect::<Vec<_>>()
    };
    let from = pieces(0, &[1, 7, 100, 2]);
    for (at, lens) in [(0x1000, &[3, 1, 1, 60, 45][..]), (0x2001, &[110]), (0x3000, &[5, 50])] {
        let into = pieces(at, lens);
        let copied = Buffers::new(&into).copy_from(Buffers::new(&from).slice(3, usize::MAX));
        let len = lens.iter().sum::<usize>().min(107);
        assert_eq!(copied, len);
        let found = guest.read(at, len + 1);
        assert_eq!((&found[..len], found[len]), (&bytes[3..3 + len], 0), "{lens:?}");
    }
}

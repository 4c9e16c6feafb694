//! A driver that breaks the rules of the rings around the descriptors: what is the device's in them
//! overwritten, areas that lie in each other, bases and events that make no sense.

use crate::aftermath::{Attacker, Session};
use crate::ring_attack::{SIZE, small_rings};
use crate::subject::{Subject, is_peer, must_work, promise};
use frontend::Error;
use frontend::block::{BlockDriver, Request, SECTOR_BYTES, VIRTIO_BLK_S_OK};
use frontend::guest::Options;
use frontend::message::{RingAddresses, VHOST_USER_SET_VRING_KICK, VIRTIO_F_EVENT_IDX};
use frontend::notifier::Notifier;
use frontend::ring::{
    Descriptor, SplitRing, VIRTQ_DESC_F_NEXT as NEXT, VIRTQ_DESC_F_WRITE as WRITE,
};
use frontend::wire::PATIENCE;
use std::time::Instant;

/// Numbers at and around the edges of 16 bits.
const NUMBERS: [u16; 10] = [0, 1, 2, 15, 16, 17, 0x7fff, 0x8000, 0xfffe, 0xffff];
/// Turns of the neighbour while something has its effect that no event tells of.
const TURNS: usize = 20;

fn both_notifications() -> [Options; 2] {
    [VIRTIO_F_EVENT_IDX, 0].map(|event_idx| {
        let features = Options::default().features & !VIRTIO_F_EVENT_IDX | event_idx;
        Options { features, ..small_rings() }
    })
}

/// One request on ring 0, whose used index ends at `expected` whatever it was before.
fn must_use_one(driver: &mut BlockDriver, expected: u16, what: &str) {
    let ring = driver.guest.queues[0].ring().clone();
    driver.submit(0, &Request::read(0, SECTOR_BYTES));
    driver.kick(0).expect("the device can be kicked");
    let deadline = Instant::now() + PATIENCE;
    while ring.used_index() != expected {
        assert!(Instant::now() < deadline, "{what}: the used index is {}", ring.used_index());
        std::thread::yield_now();
    }
    let outcome = driver.complete_by_looking(0).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(outcome.1.status, VIRTIO_BLK_S_OK, "{what}");
}

#[test]
fn used_ring_that_the_driver_overwrites() {
    // The device writes there and has no need to read it back.
    let mut subject = Subject::start();
    for options in both_notifications() {
        let mut attacker = Attacker::begin(&subject, &options);
        let ring = attacker.driver.guest.queues[0].ring().clone();
        let mut expected = ring.used_index();
        let used_bytes = 4 + 8 * usize::from(SIZE) + 2;
        for number in NUMBERS {
            let fill = number.to_le_bytes()[0];
            ring.memory().write(ring.used_address(), &vec![fill; used_bytes]);
            ring.set_used_index(number);
            expected = expected.wrapping_add(1);
            // Nothing says that a device must not read it back: of another program only the
            // neighbour is asked.
            if !is_peer() {
                must_use_one(&mut attacker.driver, expected, &format!("used index {number}"));
            }
            attacker.neighbour_must_work("the used ring was overwritten");
        }
        attacker.after(&mut subject, Session::Either, "the used ring was overwritten");
    }
}

#[test]
fn available_flags_and_events_of_every_kind() {
    // What is reserved is ignored; events may be anywhere. The request ends in any case.
    let mut subject = Subject::start();
    for options in both_notifications() {
        let mut attacker = Attacker::begin(&subject, &options);
        let numbers = NUMBERS.into_iter().chain((0..16).map(|bit| 1 << bit));
        for number in numbers {
            let ring = attacker.driver.guest.queues[0].ring().clone();
            ring.set_available_flags(number);
            ring.set_used_event(number);
            let expected = ring.used_index().wrapping_add(1);
            must_use_one(&mut attacker.driver, expected, &format!("flags and event {number:#x}"));
        }
        attacker.after(&mut subject, Session::Lives, "flags and events");
    }
}

/// Ring 0 stopped and set up anew with other addresses or another base, and kicked.
fn restart(driver: &BlockDriver, addresses: &RingAddresses, base: u32) -> Result<(), Error> {
    let front_end = &driver.guest.front_end;
    front_end.get_vring_base(0)?;
    front_end.set_vring_addr(addresses)?;
    front_end.set_vring_base(0, base)?;
    let kick = driver.guest.queues[0].kick_notifier().map(Notifier::back_end_fd);
    front_end.set_vring_fd(VHOST_USER_SET_VRING_KICK, 0, kick)?;
    driver.kick(0)
}

/// What a ring that makes no sense may lead to: its front end is refused, or the ring breaks, or it
/// goes on without end. Its neighbour has its turn, and it can be stopped.
fn must_be_bearable(
    subject: &mut Subject,
    options: &Options,
    what: &str,
    (addresses, base): (impl Fn(&RingAddresses, u64) -> RingAddresses, u32),
) {
    let mut attacker = Attacker::begin(subject, options);
    must_work(&mut attacker.driver, 0);
    let free = attacker.driver.guest.reserve(1 << 16);
    let ring = attacker.driver.guest.queues[0].ring().clone();
    good_requests(&ring, free);
    let guest = &attacker.driver.guest;
    let changed = addresses(&guest.ring_addresses(0), guest.memory.user_address(free + (1 << 15)));
    let restarted = restart(&attacker.driver, &changed, base);
    if !matches!(restarted, Err(Error::HangUp)) {
        for _ in 0..TURNS {
            attacker.neighbour_must_work(what);
        }
        let stopped = attacker.driver.guest.front_end.get_vring_base(0);
        promise(stopped.is_ok(), || format!("{what}: the ring cannot be stopped: {stopped:?}"));
    }
    attacker.after(subject, Session::Either, what);
}

/// Every descriptor is the head of a good request, so that whichever is read leads somewhere.
fn good_requests(ring: &SplitRing, free: u64) {
    let (header, status) = (free, free + 512);
    ring.memory().write(header, &Request::get_id().header());
    let part = |address, len_bytes, flags, next| Descriptor { address, len_bytes, flags, next };
    for index in 0..SIZE / 4 {
        let first = 4 * index;
        let chain = [
            part(header, 16, NEXT, first + 1),
            part(free + 1024, 20, WRITE | NEXT, first + 2),
            part(status, 1, WRITE, 0),
        ];
        for (at, descriptor) in (first..).zip(chain) {
            ring.write_descriptor(at, &descriptor);
        }
        for at in 0..4 {
            ring.write_available(4 * index + at, first);
        }
    }
}

#[test]
fn areas_that_lie_in_each_other() {
    let mut subject = Subject::start();
    /// One way in which the areas lie.
    type Layout = fn(&RingAddresses, u64) -> RingAddresses;
    let layouts: [(&str, Layout); 9] = [
        ("used is available", |is, _| RingAddresses { used: is.available & !3, ..*is }),
        ("available is used", |is, _| RingAddresses { available: is.used, ..*is }),
        ("used is the table", |is, _| RingAddresses { used: is.descriptors, ..*is }),
        ("available is the table", |is, _| RingAddresses { available: is.descriptors, ..*is }),
        ("the table is used", |is, _| RingAddresses { descriptors: is.used & !15, ..*is }),
        ("all are one", |is, _| RingAddresses {
            used: is.descriptors,
            available: is.descriptors,
            ..*is
        }),
        ("used is four bytes into available", |is, _| RingAddresses {
            used: (is.available & !3) + 4,
            ..*is
        }),
        ("available is four bytes into used", |is, _| RingAddresses {
            available: is.used + 4,
            ..*is
        }),
        ("all in other memory", |_, free| RingAddresses {
            index: 0,
            flags: 0,
            descriptors: free,
            used: free,
            available: free,
            log: 0,
        }),
    ];
    for options in both_notifications() {
        for (what, layout) in layouts {
            must_be_bearable(&mut subject, &options, what, (layout, 0));
        }
    }
}

#[test]
fn bases_that_are_not_where_the_ring_is() {
    let mut subject = Subject::start();
    for options in both_notifications() {
        for base in NUMBERS {
            let what = format!("base {base}");
            must_be_bearable(&mut subject, &options, &what, (|is, _| *is, u32::from(base)));
        }
    }
}

#[test]
fn log_address_and_flags_mean_nothing_without_a_log() {
    let mut subject = Subject::start();
    for (flags, log) in [(1, 0), (1, u64::MAX), (2, 0), (u32::MAX, u64::MAX)] {
        let what = format!("flags {flags:#x}, log {log:#x}");
        let changed = |is: &RingAddresses, _| RingAddresses { flags, log, ..*is };
        must_be_bearable(&mut subject, &small_rings(), &what, (changed, 0));
    }
}

#[test]
fn kick_descriptor_that_is_always_full() {
    // Who waits for it to be empty, or reads what never ends, does nothing else.
    let mut subject = Subject::start();
    let mut attacker = Attacker::begin(&subject, &small_rings());
    let full = Notifier::full_blocking_eventfd().expect("eventfds");
    let front_end = &attacker.driver.guest.front_end;
    let set = front_end.set_vring_fd(VHOST_USER_SET_VRING_KICK, 0, Some(full.back_end_fd()));
    promise(set.is_ok(), || format!("an eventfd that is full: {set:?}"));
    for _ in 0..TURNS {
        attacker.neighbour_must_work("a full kick descriptor");
    }
    attacker.after(&mut subject, Session::Either, "a full kick descriptor");
}

//! Requests in flight, recorded for a successor (vhost-user, "Inflight I/O tracking"): what a daemon finds in the region, and
//! what it leaves there when it is killed.

use std::os::unix::fs::FileExt;

use frontend::Error;
use frontend::block::{BlockDriver, Request};
use frontend::guest::Options;
use frontend::inflight::{Description, Inflight};
use frontend::message::VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD;
use frontend::wire::Wire;

use crate::rounds;
use crate::subject::{QUEUE_COUNT, Subject, is_another_program, lacks, must_work};

const QUEUE_SIZE: u16 = 128;
const KILL_COUNT: u64 = 30;

fn options() -> Options {
    Options { queue_size: QUEUE_SIZE, queue_count: QUEUE_COUNT, ..Options::default() }
}

/// A driver whose rings are stopped, and a region that the back end has made for them.
fn stopped(subject: &Subject) -> Option<(BlockDriver, Inflight)> {
    let driver = subject.driver(&options());
    if lacks(&driver, VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD) {
        return None;
    }
    stop(&driver);
    let front_end = &driver.guest.front_end;
    let inflight = front_end.get_inflight_fd(QUEUE_COUNT, QUEUE_SIZE).expect("a region is made");
    Some((driver, inflight))
}

fn stop(driver: &BlockDriver) {
    for queue in 0..QUEUE_COUNT {
        driver.guest.front_end.get_vring_base(queue.into()).expect("a ring can be stopped");
    }
}

/// Starts all queues, which go on from `base`, or from what the region says.
fn start(driver: &BlockDriver, inflight: &Inflight, base: u32) {
    let guest = &driver.guest;
    guest.front_end.set_inflight_fd(inflight).expect("the region is taken");
    for queue in 0..QUEUE_COUNT {
        guest.start_queue(queue, base).expect("a ring can be described");
        guest.enable(queue).expect("a ring can be enabled");
    }
}

#[test]
fn region_is_as_large_as_it_must_be_and_empty() {
    let subject = Subject::start();
    let Some((driver, inflight)) = stopped(&subject) else { return };
    let Description { mmap_size, mmap_offset, num_queues, queue_size } = inflight.description;
    assert_eq!((num_queues, queue_size), (QUEUE_COUNT, QUEUE_SIZE));
    assert!(mmap_size >= u64::from(QUEUE_COUNT) * (16 + 16 * u64::from(QUEUE_SIZE)), "{mmap_size}");
    let file_bytes = inflight.file.metadata().expect("a file").len();
    assert!(file_bytes >= mmap_offset + mmap_size, "{file_bytes} bytes");
    assert!(inflight.heads(0).is_empty());
    start(&driver, &inflight, 0);
    let mut driver = driver;
    for queue in 0..QUEUE_COUNT {
        must_work(&mut driver, queue);
    }
    assert!(inflight.heads(0).is_empty(), "what was used is in flight no more");
}

#[test]
fn regions_that_cannot_be_are_refused() {
    if is_another_program() {
        return;
    }
    let mut subject = Subject::start();
    for (count, size) in [(0, QUEUE_SIZE), (QUEUE_COUNT + 1, QUEUE_SIZE), (QUEUE_COUNT, 0)] {
        let driver = subject.driver(&options());
        let refused = driver.guest.front_end.get_inflight_fd(count, size);
        // Its answer has no form that says no.
        assert!(matches!(refused, Err(Error::HangUp)), "{count} of {size}: {refused:?}");
    }
    let (driver, inflight) = stopped(&subject).expect("ours has regions");
    let good = inflight.description;
    let file = || inflight.file.try_clone().expect("descriptors");
    let bad = [
        Description { mmap_size: good.mmap_size - 1, ..good },
        Description { mmap_size: u64::MAX, mmap_offset: 64, ..good },
        Description { mmap_offset: 4, ..good },
        Description { mmap_offset: u64::MAX - 7, ..good },
        Description { num_queues: QUEUE_COUNT + 1, ..good },
        Description { queue_size: 0, ..good },
    ];
    for description in bad {
        let refused =
            driver.guest.front_end.set_inflight_fd(&Inflight { description, file: file() });
        assert!(matches!(refused, Err(Error::Refused { .. })), "{description:?}: {refused:?}");
    }
    start(&driver, &inflight, 0);
    let refused = driver.guest.front_end.set_inflight_fd(&inflight);
    assert!(matches!(refused, Err(Error::Refused { .. })), "rings run: {refused:?}");
    drop(driver);
    subject.must_serve_the_next();
}

#[test]
fn region_of_another_version_starts_no_ring() {
    if is_another_program() {
        return;
    }
    let mut subject = Subject::start();
    let (driver, inflight) = stopped(&subject).expect("ours has regions");
    inflight.file.write_all_at(&2_u16.to_ne_bytes(), 8).expect("it can be written");
    driver.guest.front_end.set_inflight_fd(&inflight).expect("the region is taken");
    // It is enabled: its kick starts it.
    let refused = driver.guest.start_queue(0, 0);
    assert!(matches!(refused, Err(Error::Refused { .. })), "{refused:?}");
    drop(driver);
    subject.must_serve_the_next();
}

#[test]
fn predecessor_s_requests_are_finished_and_those_that_it_finished_are_not_done_again() {
    let subject = Subject::start();
    let Some((mut driver, inflight)) = stopped(&subject) else { return };
    start(&driver, &inflight, 0);
    must_work(&mut driver, 0);
    stop(&driver);
    let done = driver.guest.queues[0].ring().used_index();
    // Three that the predecessor has popped, in another order, and one that it has not.
    let write = |sector, byte| Request::write(sector, &[byte; 512]);
    let heads: Vec<_> = (0..4).map(|at| driver.submit(0, &write(at, at as u8 + 1))).collect();
    inflight.set(0, heads[1], true, 7);
    inflight.set(0, heads[0], true, 8);
    inflight.set(0, heads[2], true, 9);
    // It has shown the driver that one is used, and died before it wrote that down.
    inflight.set_batch(0, &[heads[1]], done);
    let ring = driver.guest.queues[0].ring();
    let (element, index) = (ring.used_address() + 4 + 8 * u64::from(done % QUEUE_SIZE), done + 1);
    driver.guest.memory.store_u32(element, heads[1].into());
    driver.guest.memory.store_u32(element + 4, 1);
    ring.set_used_index(index);
    // Where the front end thinks that the ring is does not count.
    start(&driver, &inflight, 77);
    let mut seen: Vec<_> =
        (0..4).map(|_| driver.complete_by_looking(0).expect("it ends").0).collect();
    assert_eq!(seen.remove(0), heads[1]);
    seen.sort_unstable();
    let mut rest = vec![heads[0], heads[2], heads[3]];
    rest.sort_unstable();
    assert_eq!(seen, rest);
    assert!(inflight.heads(0).is_empty());
    must_work(&mut driver, 0);
    assert_eq!(subject.image_bytes(512, 1), [0], "what was done is not done again");
    assert_eq!(subject.image_bytes(1024, 1), [3]);
}

#[test]
fn killed_daemon_s_requests_are_finished_by_the_next_one() {
    if is_another_program() {
        return;
    }
    let mut subject = Subject::start();
    let (mut driver, inflight) = stopped(&subject).expect("ours has regions");
    start(&driver, &inflight, 0);
    let mut in_flight = 0;
    for round in 1..=KILL_COUNT {
        rounds::begin(&mut driver, round);
        subject.kill_and_replace();
        in_flight += (0..QUEUE_COUNT).map(|queue| inflight.heads(queue).len()).sum::<usize>();
        let wire = Wire::connect(subject.socket()).expect("the next daemon listens");
        driver.guest.resume(wire, &options(), &inflight).expect("the next daemon takes over");
        for queue in 0..QUEUE_COUNT {
            while driver.guest.queues[usize::from(queue)].outstanding_count() > 0 {
                let (_, outcome) = driver.complete(queue).expect("it ends");
                assert_eq!(outcome.status, 0);
            }
            assert!(inflight.heads(queue).is_empty());
        }
        rounds::expect_contents(&subject.image(), round);
    }
    eprintln!("{KILL_COUNT} daemons were killed over {in_flight} requests");
    assert!(in_flight > 0, "no daemon had anything in flight");
}

//! Rings: their sizes, how they start and stop, and what a stopped one leaves.

use crate::subject::{QUEUE_COUNT, Subject, is_ours_to_promise, must_work, promise};
use frontend::Error;
use frontend::block::{BlockDriver, Request, VIRTIO_BLK_S_OK};
use frontend::guest::Options;
use frontend::message::VIRTIO_F_EVENT_IDX;
use frontend::ring::VIRTQ_DESC_F_WRITE;
use frontend::virtqueue::Buffer;
use frontend::wire::PATIENCE;
use std::time::Duration;

/// Enough requests that a back end is in the middle of them when it is told to stop.
const MANY: u16 = 100;

#[test]
fn rings_of_every_size_work() {
    let subject = Subject::start();
    for queue_size in [4, 8, 256, 1024] {
        let mut driver = subject.driver(&Options { queue_size, ..Options::default() });
        // More requests than entries: the ring must wrap.
        for _ in 0..10 {
            must_work(&mut driver, 0);
        }
    }
}

#[test]
fn largest_ring_works_or_is_refused() {
    let mut subject = Subject::start();
    let options = Options { queue_size: 32_768, ..Options::default() };
    match BlockDriver::start(subject.socket(), &options) {
        Ok(mut driver) => must_work(&mut driver, 0),
        Err(Error::Refused { .. } | Error::HangUp) => {}
        Err(error) => panic!("neither served nor refused: {error}"),
    }
    subject.must_serve_the_next();
}

#[test]
fn indexes_wrap() {
    let subject = Subject::start();
    for event_idx in [VIRTIO_F_EVENT_IDX, 0] {
        let features = Options::default().features & !VIRTIO_F_EVENT_IDX | event_idx;
        let mut driver = subject.driver(&Options {
            base: u16::MAX - 5,
            queue_size: 16,
            features,
            ..Options::default()
        });
        for _ in 0..20 {
            must_work(&mut driver, 0);
        }
    }
}

#[test]
fn four_queues_on_two_threads_do_not_mix_their_data() {
    if crate::subject::is_another_program() {
        return;
    }
    const QUEUES: u16 = 4;
    let subject = Subject::with_options(&["--num-queues", "4", "--threads", "2"]);
    let mut driver = subject.driver(&Options { queue_count: QUEUES, ..Options::default() });
    for round in 0..20_u8 {
        for queue in 0..QUEUES {
            for at in 0..8 {
                let fill = round ^ u8::try_from(queue * 8 + at).unwrap_or(0);
                driver
                    .submit(queue, &Request::write(u64::from(queue * 64 + at * 8), &[fill; 4096]));
            }
            driver.kick(queue).expect("the device can be kicked");
        }
        for queue in 0..QUEUES {
            for _ in 0..8 {
                assert_eq!(driver.complete(queue).expect("a write ends").1.status, VIRTIO_BLK_S_OK);
            }
        }
        for queue in 0..QUEUES {
            for at in 0..8 {
                // Each queue reads what its neighbour has written.
                let from = (queue + 1) % QUEUES;
                let fill = round ^ u8::try_from(from * 8 + at).unwrap_or(0);
                let read = Request::read(u64::from(from * 64 + at * 8), 4096);
                let outcome = driver.perform(queue, &read).expect("a read ends");
                assert!(
                    outcome.data == [fill; 4096],
                    "queue {queue} reads the data of queue {from}"
                );
            }
        }
    }
}

#[test]
fn indirect_descriptor_may_follow_others_and_carry_the_write_flag() {
    // VIRTIO 1.3, 2.7.5.3.2: the device MUST ignore the flag there, and MUST handle zero or more
    // normal descriptors before the one that refers to a table.
    let subject = Subject::start();
    let mut driver = subject.driver(&Options { queue_size: 16, ..Options::default() });
    must_work(&mut driver, 0);
    let data: Vec<u8> = (0..1024_usize).map(|at| u8::try_from(at % 253).unwrap_or(0)).collect();
    let [header, first, second, status, table] =
        [16, 512, 512, 1, 64].map(|size_bytes| driver.guest.reserve(size_bytes));
    for (direct, flags) in (0..4).flat_map(|direct| [(direct, 0), (direct, VIRTQ_DESC_F_WRITE)]) {
        for (request, writable) in [(Request::write(8, &[]), false), (Request::read(8, 0), true)] {
            let memory = &driver.guest.memory;
            memory.write(header, &request.header());
            memory.write(status, &[0xff]);
            let (one, two) =
                if writable { (&[0; 512][..], &[0; 512][..]) } else { data.split_at(512) };
            memory.write(first, one);
            memory.write(second, two);
            let buffers = [
                (header, 16, false),
                (first, 512, writable),
                (second, 512, writable),
                (status, 1, true),
            ]
            .map(|(address, len_bytes, writable)| Buffer {
                address,
                len_bytes,
                writable,
            });
            let (before, in_table) = buffers.split_at(direct);
            let queue = &mut driver.guest.queues[0];
            queue.submit_partly_indirect(before, in_table, (table, flags));
            queue.kick().expect("the device can be kicked");
            queue
                .wait_used(PATIENCE)
                .unwrap_or_else(|error| panic!("{direct} direct, flags {flags}: {error}"));
            let memory = &driver.guest.memory;
            let what = format!("{direct} direct, flags {flags}, request type {}", request.kind);
            assert_eq!(memory.read(status, 1), [VIRTIO_BLK_S_OK], "{what}");
            let held = [memory.read(first, 512), memory.read(second, 512)].concat();
            assert!(held == data, "{what}");
        }
    }
    assert_eq!(subject.image_bytes(8 * 512, data.len()), data);
}

#[test]
fn stopping_a_ring_drains_it_and_it_goes_on_from_where_it_was() {
    let subject = Subject::start();
    let mut driver = subject.driver(&Options {
        queue_size: 512,
        queue_count: QUEUE_COUNT,
        ..Options::default()
    });
    for round in 0..5_u8 {
        for at in 0..MANY {
            driver.submit(0, &Request::write(u64::from(at) * 8, &[round + 1; 512]));
        }
        driver.kick(0).expect("the device can be kicked");
        let base = driver.guest.front_end.get_vring_base(0).expect("the ring can be stopped");
        let base = u16::try_from(base).expect("an index of a split ring has 16 bits");
        // What was taken has come back, what was not is still to be had; nothing comes back later.
        assert_eq!(
            driver.guest.queues[0].ring().used_index(),
            base,
            "the base is where the used index is"
        );
        must_work(&mut driver, 1);
        assert_eq!(driver.guest.queues[0].ring().used_index(), base, "a stopped ring went on");
        driver.guest.start_queue(0, u32::from(base)).expect("the ring can be started");
        driver.guest.enable(0).expect("the ring can be enabled");
        driver.kick(0).expect("the device can be kicked");
        for _ in 0..MANY {
            assert_eq!(driver.complete(0).expect("a write ends").1.status, VIRTIO_BLK_S_OK);
        }
        must_work(&mut driver, 0);
    }
}

#[test]
fn ring_that_never_started_can_be_stopped() {
    let subject = Subject::start();
    let driver = subject.driver(&Options { queue_count: 1, base: 0, ..Options::default() });
    driver.guest.front_end.set_vring_base(1, 77).expect("a base can be set");
    assert_eq!(driver.guest.front_end.get_vring_base(1).expect("the ring can be stopped"), 77);
    assert_eq!(driver.guest.front_end.get_vring_base(0).expect("the ring can be stopped"), 0);
}

#[test]
fn disabled_ring_waits() {
    let subject = Subject::start();
    let mut driver = subject.driver(&Options { queue_count: QUEUE_COUNT, ..Options::default() });
    must_work(&mut driver, 0);
    driver.guest.front_end.set_vring_enable(0, false).expect("a ring can be disabled");
    driver.submit(0, &Request::read(0, 512));
    driver.kick(0).expect("the device can be kicked");
    must_work(&mut driver, 1);
    let waits = matches!(driver.complete_within(0, Duration::ZERO), Err(Error::Silence(_)));
    // vhost-user, "Ring states": without side effects. What that means for a disk it does not say.
    promise(waits, || "a disabled ring was processed".into());
    if !waits {
        return;
    }
    driver.guest.enable(0).expect("a ring can be enabled");
    assert_eq!(driver.complete(0).expect("the request ends").1.status, VIRTIO_BLK_S_OK);
}

#[test]
fn requests_made_before_the_ring_starts_are_found() {
    // A guest whose VMM reconnects has kicked already, and does not do it again.
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    driver.guest.front_end.get_vring_base(0).expect("the ring can be stopped");
    driver.submit(0, &Request::read(0, 512));
    driver.kick(0).expect("the device can be kicked");
    driver.guest.start_queue(0, 0).expect("the ring can be started");
    driver.guest.enable(0).expect("the ring can be enabled");
    assert_eq!(driver.complete(0).expect("the request ends").1.status, VIRTIO_BLK_S_OK);
}

#[test]
fn ring_without_kick_descriptor_is_polled() {
    // vhost-user, "SET_VRING_KICK": bit 8 says that polling should be used. It need not.
    if !is_ours_to_promise() {
        return;
    }
    let subject = Subject::start();
    let mut driver = subject.driver(&Options { kick: None, ..Options::default() });
    for _ in 0..20 {
        must_work(&mut driver, 0);
    }
    driver.guest.front_end.get_vring_base(0).expect("a polled ring can be stopped");
}

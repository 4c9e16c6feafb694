//! Rings that share a worker: a busy one does not keep its neighbour waiting.
//!
//! The driver here notifies only when it is asked to, as real ones do: a device that neither asks
//! nor looks is found out.

use crate::subject::{QUEUE_COUNT, Subject, is_another_program, must_work};
use frontend::Error;
use frontend::block::{BlockDriver, HEADER_BYTES, ID_BYTES, Request, VIRTIO_BLK_S_OK};
use frontend::guest::Options;
use frontend::message::{VHOST_USER_SET_VRING_KICK, VIRTIO_F_EVENT_IDX};
use frontend::ring::{
    DESCRIPTOR_BYTES, Descriptor, SplitRing, VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT as NEXT,
    VIRTQ_DESC_F_WRITE as WRITE,
};
use frontend::wire::PATIENCE;
use std::time::{Duration, Instant};

/// The ring that is busy.
const BUSY: u16 = 0;
/// The ring beside it.
const NEIGHBOUR: u16 = 1;
/// Requests of the neighbour, each of which must have its turn.
const ROUNDS: usize = 300;
/// Entries of each ring: several times what a device may take from one before it looks at the
/// other.
const QUEUE_SIZE: u16 = 1024;
/// Chains that the busy ring may have served while the neighbour waits for one: several turns of
/// the worker that serves both, whatever else the machine does.
const FAIR_CHAINS: u32 = 8 * QUEUE_SIZE as u32;

fn both_notifications() -> [Options; 2] {
    [VIRTIO_F_EVENT_IDX, 0].map(|event_idx| Options {
        features: Options::default().features & !VIRTIO_F_EVENT_IDX | event_idx,
        queue_count: QUEUE_COUNT,
        queue_size: QUEUE_SIZE,
        ..Options::default()
    })
}

#[test]
fn polled_ring_leaves_its_kicked_neighbour_its_turn() {
    if is_another_program() {
        return;
    }
    let subject = Subject::with_options(&["--threads", "1"]);
    for options in both_notifications() {
        let mut driver = subject.driver(&options);
        driver
            .guest
            .front_end
            .set_vring_fd(VHOST_USER_SET_VRING_KICK, u32::from(BUSY), None)
            .expect("a ring can be polled from now on");
        for round in 0..ROUNDS {
            // In turns busy and idle, so that the worker waits in every way that it has.
            let burst = if round % 30 < 10 { round % 3 } else { 0 };
            for _ in 0..burst {
                driver.submit(BUSY, &Request::read(0, 4096));
            }
            driver.submit(NEIGHBOUR, &Request::read(8, 512));
            driver.kick_if_wanted(NEIGHBOUR).expect("the device can be kicked");
            for queue in [NEIGHBOUR].into_iter().chain(std::iter::repeat_n(BUSY, burst)) {
                let outcome = driver
                    .complete(queue)
                    .unwrap_or_else(|error| panic!("round {round}, queue {queue}: {error}"));
                assert_eq!(outcome.1.status, VIRTIO_BLK_S_OK);
            }
        }
    }
}

/// A ring whose driver never lets it run dry.
struct Flood {
    ring: SplitRing,
    event_idx: bool,
    /// The used index when it was last refilled.
    used: u16,
}

impl Flood {
    /// Every entry of the busy ring asks for the serial number, which costs the device no wait;
    /// all of them share their buffers.
    fn begin(driver: &mut BlockDriver) -> Self {
        let [header, id, status, table] =
            [HEADER_BYTES, ID_BYTES, 1, 64].map(|size_bytes| driver.guest.reserve(size_bytes));
        let ring = driver.guest.queues[usize::from(BUSY)].ring().clone();
        ring.memory().write(header, &Request::get_id().header());
        let parts = [(header, 16, NEXT, 1), (id, 20, WRITE | NEXT, 2), (status, 1, WRITE, 0)];
        for (at, (address, len_bytes, flags, next)) in (0..).zip(parts) {
            let part = Descriptor { address, len_bytes, flags, next };
            ring.memory().write(table + at * DESCRIPTOR_BYTES, &part.encode());
        }
        for index in 0..QUEUE_SIZE {
            let (len_bytes, flags) = (48, VIRTQ_DESC_F_INDIRECT);
            let all = Descriptor { address: table, len_bytes, flags, next: 0 };
            ring.write_descriptor(index, &all);
            ring.write_available(index, index);
        }
        ring.set_available_index(QUEUE_SIZE);
        driver.kick(BUSY).expect("the device can be kicked");
        let event_idx = driver.guest.features & VIRTIO_F_EVENT_IDX != 0;
        Flood { ring, event_idx, used: 0 }
    }

    /// Makes everything available again that has come back; how many chains that were.
    fn refill(&mut self, driver: &BlockDriver) -> u32 {
        let used = self.ring.used_index();
        let before = self.used.wrapping_add(QUEUE_SIZE);
        let now = used.wrapping_add(QUEUE_SIZE);
        if now != before {
            self.ring.set_available_index(now);
            if self.ring.wants_kick(self.event_idx, before, now) {
                driver.kick(BUSY).expect("the device can be kicked");
            }
        }
        u32::from(used.wrapping_sub(std::mem::replace(&mut self.used, used)))
    }
}

#[test]
fn flooded_ring_leaves_its_neighbour_its_turn() {
    if is_another_program() {
        return;
    }
    let subject = Subject::with_options(&["--threads", "1"]);
    for options in both_notifications() {
        let mut driver = subject.driver(&options);
        must_work(&mut driver, NEIGHBOUR);
        let mut flood = Flood::begin(&mut driver);
        let mut flooded = 0;
        for round in 0..ROUNDS {
            driver.submit(NEIGHBOUR, &Request::get_id());
            driver.kick_if_wanted(NEIGHBOUR).expect("the device can be kicked");
            let deadline = Instant::now() + PATIENCE;
            let mut meanwhile = 0;
            loop {
                meanwhile += flood.refill(&driver);
                match driver.complete_within(NEIGHBOUR, Duration::ZERO) {
                    Ok((_, outcome)) => break assert_eq!(outcome.status, VIRTIO_BLK_S_OK),
                    Err(Error::Silence(_)) => {}
                    Err(error) => panic!("round {round}: {error}"),
                }
                assert!(
                    meanwhile < FAIR_CHAINS && Instant::now() < deadline,
                    "round {round}: it waits for {meanwhile} chains of its neighbour"
                );
            }
            flooded += meanwhile;
        }
        assert!(flooded > 0, "there was no flood");
    }
}

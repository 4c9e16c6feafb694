//! A driver that does what it may not, or what none in its right mind does: the device bears it, and sleeps.

use std::sync::Arc;

use common::engine::ChannelIndex;
use common::simulation::{Driver, Guest, Layout, Random, Stage};
use common::worker::WorkerEvent;

use super::frame::Inbound;
use super::mode::Mode;
use crate::device::NetDevice;
use crate::drops::DROPS;

/// More turns than any of this takes.
const TURNS_MAX: u32 = 100;
/// Where buffers are, behind the ring.
const BUFFERS: u64 = 0x1_0000;
const MEMORY_BYTES: u64 = 0x10_0000;

/// One ring of a device, and its driver.
struct Bench {
    stage: Stage<NetDevice>,
    driver: Driver,
    guest: Arc<Guest>,
    random: Random,
    index: u16,
    at: u64,
}

impl Bench {
    fn new(mode: Mode, index: u16, size: u16) -> Self {
        let guest = Arc::new(Guest::new(&[(0, MEMORY_BYTES)]));
        let layout = Layout { size, descriptors: 0, available: 0x8000, used: 0xa000 };
        let mut driver = Driver::new(Arc::clone(&guest), layout, mode.features);
        driver.start_at(0);
        let mut stage = Stage::new(Arc::new(mode.device()), 0);
        stage.start(index, driver.setup(0)).expect("a ring");
        Self { stage, driver, guest, random: Random::new(0), index, at: BUFFERS }
    }

    /// The driver gives a chain of these bytes, and of room for so many.
    fn give(&mut self, readable: &[u8], writable_bytes: u32) {
        let sent = (self.at, readable.len() as u32);
        self.guest.write(self.at, readable);
        let room = (self.at + u64::from(sent.1), writable_bytes);
        self.at = room.0 + u64::from(writable_bytes);
        let sent = [sent].into_iter().filter(|(_, len_bytes)| *len_bytes > 0).collect::<Vec<_>>();
        let room = [room].into_iter().filter(|(_, len_bytes)| *len_bytes > 0).collect::<Vec<_>>();
        self.driver.add((&sent, &room), None, &mut self.random).expect("room in the ring");
    }

    fn publish(&mut self) {
        self.driver.publish();
        self.stage.kernel().kick(self.index);
    }

    /// A frame comes on the channel of this ring.
    fn deliver(&self, frame: &[u8]) {
        let wire = [&[0; 12], frame].concat();
        self.stage.kernel().deliver(ChannelIndex(self.index), wire);
    }

    /// Lets the worker go to sleep; what it has told.
    fn rest(&mut self) -> Vec<WorkerEvent> {
        let mut turns = 0;
        while self.stage.turn() {
            turns += 1;
            assert!(turns < TURNS_MAX, "the worker spins");
        }
        std::iter::from_fn(|| self.stage.told()).collect()
    }

    fn dropped(&self, reason: &str) -> u64 {
        let place = DROPS.iter().position(|name| *name == reason).expect("a reason");
        self.stage.metrics().queues[usize::from(self.index)].drops[place].get()
    }
}

fn plain_frame(number: u32, len_bytes: usize) -> Vec<u8> {
    Inbound::plain(number, len_bytes).frame
}

#[test]
fn chain_without_room_behind_another_breaks_the_ring_when_it_is_the_first() {
    let mut bench = Bench::new(Mode::plain(), 0, 16);
    bench.give(&[], 40);
    bench.give(&[1], 0);
    bench.publish();
    bench.deliver(&plain_frame(1, 1000));
    assert!(bench.rest().is_empty(), "one that has room is before it");
    assert_eq!(bench.dropped("too_long"), 1);
    bench.deliver(&plain_frame(2, 28));
    let told = bench.rest();
    assert!(matches!(told[..], [WorkerEvent::RingBroken { index: 0, .. }]), "{told:?}");
    let used: Vec<u32> = bench.driver.take_used().iter().map(|used| used.written_bytes).collect();
    assert_eq!(used, [40, 0]);
}

#[test]
fn frame_of_more_chains_than_a_turn_has_is_dropped_without_a_spin() {
    let mut bench = Bench::new(Mode::plain(), 0, 1024);
    for _ in 0..1024 {
        bench.give(&[], 1);
    }
    bench.publish();
    bench.deliver(&plain_frame(1, 1000));
    assert!(bench.rest().is_empty());
    assert_eq!(bench.dropped("too_long"), 1);
    // The next may be as long, for all that is known.
    bench.deliver(&plain_frame(2, 200));
    bench.deliver(&plain_frame(3, 200));
    assert!(bench.rest().is_empty());
    assert_eq!(bench.driver.take_used().len(), 2 * 212);
}

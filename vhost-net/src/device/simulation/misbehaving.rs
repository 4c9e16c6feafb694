//! A driver, or a peer, that does what it may not, or what none in its right mind does: the device bears it, and
//! sleeps.

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Waker};

use common::engine::ChannelIndex;
use common::simulation::{Driver, Guest, Layout, Random, Stage};
use common::worker::WorkerEvent;
use rustix::io::Errno;

use super::frame::Inbound;
use super::mode::Mode;
use crate::backend::{Backend, Simulated};
use crate::command::Command;
use crate::config::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ};
use crate::device::{NetDevice, Shared};
use crate::drops::DROPS;

/// More turns than any of this takes.
const TURNS_MAX: u32 = 3000;
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
        Self::with(mode.device(), mode.features, index, size)
    }

    fn with(device: NetDevice, features: u64, index: u16, size: u16) -> Self {
        let guest = Arc::new(Guest::new(&[(0, MEMORY_BYTES)]));
        let layout = Layout { size, descriptors: 0, available: 0x8000, used: 0xa000 };
        let mut driver = Driver::new(Arc::clone(&guest), layout, features);
        driver.start_at(0);
        let mut stage = Stage::new(Arc::new(device), 0);
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

/// A plain device whose port is of this VLAN.
fn of_vlan(vlan: u16) -> Mode {
    let mut mode = Mode::plain();
    mode.vlan = Some(vlan);
    mode
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

#[test]
fn frame_that_ends_behind_its_tag_is_not_made_whole_with_bytes_of_another() {
    let mut bench = Bench::new(of_vlan(7), 0, 16);
    bench.give(&[], 100);
    bench.publish();
    let tagged = |vlan: u8, len_bytes| {
        let mut frame = plain_frame(1, 60);
        frame.splice(12..16, [0x81, 0, 0, vlan]);
        frame.truncate(len_bytes);
        frame
    };
    bench.deliver(&tagged(8, 60));
    bench.deliver(&tagged(7, 16));
    bench.deliver(&tagged(7, 17));
    assert!(bench.rest().is_empty());
    assert_eq!((bench.dropped("vlan"), bench.dropped("runt")), (1, 2));
    bench.deliver(&tagged(7, 18));
    assert!(bench.rest().is_empty());
    let used: Vec<u32> = bench.driver.take_used().iter().map(|used| used.written_bytes).collect();
    assert_eq!(used, [12 + 14]);
}

#[test]
fn no_frame_of_a_port_of_a_vlan_brings_a_tag_along() {
    for of_tag in [[0x81, 0x00], [0x88, 0xa8]] {
        let mut bench = Bench::new(of_vlan(7), 1, 16);
        // One without, one with a tag, and one that ends within it.
        for (of_type, len_bytes) in [([0x08, 0x00], 60), (of_tag, 60), (of_tag, 15)] {
            let mut frame = plain_frame(1, 60);
            frame.splice(12..14, of_type);
            bench.give(&[&[0; 12], &frame[..len_bytes]].concat(), 0);
        }
        bench.publish();
        assert!(bench.rest().is_empty());
        assert_eq!(bench.dropped("vlan"), 2, "{of_tag:x?}");
        let sent = bench.stage.kernel().take_sent(ChannelIndex(1));
        assert_eq!((sent.len(), &sent[0][24..30]), (1, &[0x81, 0, 0, 7, 8, 0][..]));
    }
}

#[test]
fn frame_that_the_host_cannot_give_is_no_end_of_frames() {
    let mut bench = Bench::new(Mode::plain(), 0, 16);
    bench.give(&[], 100);
    bench.publish();
    assert!(bench.rest().is_empty());
    bench.stage.kernel().set_fault(ChannelIndex(0), Some(Errno::INVAL));
    while bench.dropped("host") == 0 {
        assert!(bench.stage.turn(), "it has not failed");
    }
    bench.stage.kernel().set_fault(ChannelIndex(0), None);
    bench.deliver(&plain_frame(1, 60));
    bench.rest();
    assert_eq!(bench.driver.take_used().len(), 1);
    // Who fails for good is not asked for ever.
    bench.give(&[], 100);
    bench.publish();
    bench.stage.kernel().set_fault(ChannelIndex(0), Some(Errno::INVAL));
    let told = bench.rest();
    assert!(told.iter().all(|event| matches!(event, WorkerEvent::HostFault { .. })), "{told:?}");
}

#[test]
fn frame_that_the_kernel_refuses_is_no_fault_of_the_host() {
    let mut bench = Bench::new(Mode::plain(), 1, 16);
    bench.stage.kernel().set_fault(ChannelIndex(1), Some(Errno::INVAL));
    bench.give(&[&[0; 12], &plain_frame(1, 60)[..]].concat(), 0);
    bench.publish();
    assert!(bench.rest().is_empty(), "nothing is told");
    assert_eq!((bench.dropped("refused"), bench.dropped("host")), (1, 0));
}

#[test]
fn turn_has_one_command() {
    let mut mode = Mode::plain();
    mode.features |= VIRTIO_NET_F_CTRL_VQ;
    let mut bench = Bench::new(mode, 2, 16);
    for _ in 0..5 {
        bench.give(&[0, 0, 1], 1);
    }
    bench.publish();
    let mut answered = 0;
    while bench.stage.turn() {
        let now = bench.driver.take_used().len();
        assert!(now <= 1, "{now} commands in a turn");
        answered += now;
    }
    assert_eq!(answered, 5);
}

#[test]
fn changes_of_the_back_end_have_a_limit_and_wait_for_their_time() {
    let mut mode = Mode::plain();
    mode.pairs = 2;
    mode.features |= VIRTIO_NET_F_CTRL_VQ | VIRTIO_NET_F_MQ;
    let mut bench = Bench::new(mode, 4, 128);
    for count in 0..40 {
        bench.give(&[4, 0, 1 + count % 2, 0], 1);
    }
    bench.publish();
    assert!(bench.rest().is_empty());
    let mut answered = bench.driver.take_used().len();
    assert_eq!(answered, 32);
    while answered < 40 {
        let before_ns = bench.stage.now_ns();
        let then_ns = bench.stage.wakes_at_ns().expect("the next one has its time");
        assert!(
            (90_000_000..=100_000_000).contains(&(then_ns - before_ns)),
            "{before_ns} {then_ns}"
        );
        bench.stage.advance_to(then_ns);
        bench.rest();
        assert_eq!(bench.driver.take_used().len(), 1);
        answered += 1;
    }
}

#[test]
fn peer_that_sends_byte_after_byte_has_its_share_of_a_turn() {
    let mode = Mode::plain();
    let device = mode.device_on(Simulated::stream());
    let mut bench = Bench::with(device, mode.features, 0, 16);
    for _ in 0..2 {
        bench.give(&[], 100);
    }
    bench.publish();
    let channel = ChannelIndex(0);
    let frames = [plain_frame(1, 60), plain_frame(2, 61)];
    for frame in &frames {
        for byte in [&(frame.len() as u32).to_be_bytes()[..], frame].concat() {
            bench.stage.kernel().deliver(channel, vec![byte]);
        }
    }
    let mut waiting = bench.stage.kernel().waiting(channel);
    while bench.stage.turn() {
        let now = bench.stage.kernel().waiting(channel);
        assert!(waiting - now <= 16, "{} reads in a turn", waiting - now);
        waiting = now;
    }
    assert_eq!(waiting, 0);
    assert_eq!(bench.driver.take_used().len(), 2);
    for (at, frame) in [BUFFERS, BUFFERS + 100].into_iter().zip(&frames) {
        assert_eq!(bench.guest.read(at + 12, frame.len()), *frame);
    }
}

/// The receive ring of the second of two pairs that are in use, and what queues share.
fn second_pair() -> (Bench, Arc<Shared>) {
    let mut mode = Mode::plain();
    mode.pairs = 2;
    mode.features |= VIRTIO_NET_F_MQ;
    let device = mode.device();
    let shared = Arc::clone(&device.shared);
    (Bench::with(device, mode.features, 2, 16), shared)
}

#[test]
fn frame_that_waits_is_not_for_a_pair_that_is_used_no_more() {
    let (mut bench, shared) = second_pair();
    bench.give(&[], 20);
    bench.publish();
    bench.deliver(&plain_frame(1, 1000));
    bench.rest();
    shared.obey(&Command::QueuePairs(1)).unwrap();
    bench.give(&[], 1500);
    bench.publish();
    bench.rest();
    assert_eq!((bench.driver.take_used().len(), bench.dropped("stopped")), (0, 1));
}

#[test]
fn pairs_that_stay_in_use_look_for_what_they_missed_meanwhile() {
    let (_bench, shared) = second_pair();
    let Backend::Simulated(network) = shared.backend() else { unreachable!("it is simulated") };
    network.refuse(Some(Errno::NOMEM));
    assert_eq!(shared.obey(&Command::QueuePairs(1)), Err(Errno::NOMEM));
    let looks = pin!(shared.attached.notified());
    assert!(looks.poll(&mut Context::from_waker(Waker::noop())).is_ready());
}

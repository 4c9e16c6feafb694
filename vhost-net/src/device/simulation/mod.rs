//! The device against a driver and a network that do whatever the specifications allow them.
//!
//! The parts: [`mode`] is what a run is made of, [`frame`] what travels and what must become of it, [`listening`] what
//! the driver has said it wants, [`ring`] its rings, [`receiving`] and [`transmitting`] what it and the wire must see,
//! [`world`] all of them together and what happens to them; [`misbehaving`] is a driver that does more than it may, met
//! by hand. What they do not do: threads, a kernel, a clock; the worker and the ring are the real ones
//! (`common::simulation`). Streams are tested at `backend/stream.rs`, and by guests.

mod frame;
mod listening;
mod misbehaving;
mod mode;
mod receiving;
mod transmitting;
mod world;

use common::device::Device;
use common::simulation::{cases, chosen_seed, each_seed};

use self::mode::Mode;
use self::world::World;
use crate::backend::{Backend, Offloads};
use crate::config::GUEST_OFFLOADS;

/// Programs that a usual run plays.
const PROGRAMS: u64 = 600;

#[test]
fn each_frame_arrives_once_and_whole_or_is_counted() {
    let (mut received, mut spread, mut sent, mut dropped) = (0, 0, 0, 0);
    let (mut commands, mut restarts, mut throttled) = (0, 0, 0);
    each_seed(PROGRAMS, |seed| {
        let mut world = World::new(seed, Mode::any(seed));
        for _ in 0..world.random.within(20..400) {
            world.step();
        }
        world.settle();
        for receiver in &world.receiving {
            received += receiver.delivered;
            spread += receiver.spread;
            dropped += receiver.dropped;
        }
        for sender in &world.transmitting {
            sent += sender.on_the_wire;
            dropped += sender.dropped;
        }
        commands += world.commands;
        restarts += world.restarts;
        throttled += world.throttled();
    });
    // Where little happens, little is proved; but who wants few programs gets few.
    let is_few = chosen_seed().is_some() || cases(PROGRAMS) < PROGRAMS;
    let met = [received, spread, sent, dropped, commands, restarts, throttled];
    assert!(is_few || met.iter().all(|count| *count > 500), "{met:?}");
}

#[test]
fn frame_that_waits_for_buffers_has_paid_its_limit() {
    let mut world = World::new(0, Mode::plain());
    world.limit_receiving("frames=1/1");
    world.give_room(0, 20);
    world.deliver_plain(0, 1000);
    world.rest();
    assert_eq!(world.receiving[0].delivered, 0);
    world.give_room(0, 1500);
    world.rest();
    assert_eq!(world.receiving[0].delivered, 1);
    assert!(world.now_ns() < 500_000_000, "it has paid twice");
}

#[test]
fn driver_without_features_gets_no_offloads_of_the_one_before() {
    let device = Mode::plain().device();
    let applied = || match device.shared.backend() {
        Backend::Simulated(simulated) => simulated.applied(),
        other => unreachable!("{other:?} is no simulation"),
    };
    drop(device.open_queue(1, device.features() & GUEST_OFFLOADS, 16));
    assert!(applied().tso4);
    device.reset();
    drop(device.open_queue(1, 0, 16));
    assert_eq!(applied(), Offloads::default());
}

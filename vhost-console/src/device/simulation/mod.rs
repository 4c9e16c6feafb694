//! The device against a driver and a main thread that do whatever the specifications allow them.
//!
//! The parts: [`mode`] is what a run is made of, [`ring`] the driver's rings, [`knowledge`] what it was told of ports and
//! says of them, [`host`] who reads and types, [`world`] all of them together and what happens to them. What they do not do:
//! threads, a kernel, a clock, endpoints; the worker, the ring and the bells are the real ones (`common::simulation`).

mod host;
mod knowledge;
mod mode;
mod world;

use common::simulation::{cases, chosen_seed, each_seed};

use self::mode::Mode;
use self::world::World;

/// Programs that a usual run plays.
const PROGRAMS: u64 = 500;

#[test]
fn each_byte_arrives_in_order_and_nobody_sleeps_over_one() {
    let (mut lost, mut kept, mut arrived, mut told, mut restarts) = (0, 0, 0, 0, 0);
    each_seed(PROGRAMS, |seed| {
        let mut world = World::new(seed, Mode::any(seed));
        for _ in 0..world.random.within(20..400) {
            world.step();
        }
        world.settle();
        for host in &world.hosts {
            lost += host.lost_bytes;
            kept += host.kept_bytes;
            arrived += host.arrived_bytes;
        }
        told += world.told;
        restarts += world.restarts;
    });
    // Where little happens, little is proved; but who wants few programs gets few.
    let is_few = chosen_seed().is_some() || cases(PROGRAMS) < PROGRAMS;
    let met = [lost, kept, arrived, told, restarts];
    assert!(is_few || met.iter().all(|count| *count > 500), "{met:?}");
}

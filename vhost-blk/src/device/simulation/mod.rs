//! The device against a guest, an engine and a disk that do whatever the specifications allow them.
//!
//! The parts: [`mode`] is what a run is made of, [`request`] what a guest sends and how the answer must
//! look, [`storage`] a disk whose cache forgets, [`host`] what becomes of operations on it, [`ledger`]
//! what the guest may expect of it, [`world`] all of them together and what happens to them. What
//! they do not do: threads, a kernel, a clock; the worker and the ring are the real ones
//! (`common::simulation`).

mod host;
mod ledger;
mod mode;
mod request;
mod storage;
mod world;

use common::simulation::{cases, chosen_seed, each_seed};
use rustix::io::Errno;

use self::host::{Fate, Luck};
use self::mode::Mode;
use self::storage::SECTOR;
use self::world::World;
use super::BlockDevice;
use crate::config::QueueLimits;
use crate::disk::{Disk, DiskSpec, OpenOptions};

/// The largest of the rings.
const RING_SIZE_MAX: u16 = 128;
/// Programs that a usual run plays.
const PROGRAMS: u64 = 800;

/// A device over a file that nobody reads or writes: the simulated disk takes its place.
fn device(mode: Mode, queue_count: u16) -> BlockDevice {
    let file = tempfile::NamedTempFile::new().expect("a file");
    file.as_file().set_len((mode.scale.disk_sectors * SECTOR) as u64).expect("its length");
    let options = OpenOptions { lock: false, ..OpenOptions::default() };
    let disk = Disk::open(&DiskSpec::File(file.path().to_owned()), options).expect("a disk");
    let disk = disk.simulate(mode.cache, (mode.direct.0, mode.direct.1, mode.tells), mode.called);
    let serial = "simulated disk".parse().expect("a serial number");
    BlockDevice::new(disk, serial, QueueLimits { count: queue_count, size_max: RING_SIZE_MAX })
}

#[test]
fn each_request_is_answered_once_and_reads_what_may_be_there() {
    let (mut done, mut failed, mut refused) = (0, 0, 0);
    let (mut bounced, mut throttled, mut restarts) = (0, 0, 0);
    each_seed(PROGRAMS, |seed| {
        let mut world = World::new(seed, Mode::any(seed), Luck::Any(6));
        for _ in 0..world.random.within(20..600) {
            world.step();
        }
        world.settle();
        done += world.answers.all - world.answers.failed;
        failed += world.answers.failed;
        refused += world.answers.refused;
        bounced += world.bounced();
        throttled += world.throttled();
        restarts += world.restarts;
    });
    // Where little happens, little is proved; but who wants few programs gets few.
    let is_few = chosen_seed().is_some() || cases(PROGRAMS) < PROGRAMS;
    let met = [done, failed, refused, bounced, throttled, restarts];
    assert!(is_few || met.iter().all(|count| *count > 500), "{met:?}");
}

#[test]
fn power_cut_at_any_point_leaves_what_was_promised() {
    each_seed(400, |seed| {
        let mut world = World::new(seed, Mode::any(seed), Luck::Any(20));
        for _ in 0..4 {
            for _ in 0..world.random.within(1..200) {
                world.step();
                world.check_power_cut();
            }
            world = world.cut_power();
        }
        world.settle();
    });
}

/// Runs a program with the first operation ending so, then the second, until all succeed. `each` sees
/// how many requests failed.
fn fail_each_operation(seed: u64, fate: Fate, each: impl Fn(&World)) {
    let mut number = 0;
    loop {
        let mut world = World::new(seed, Mode::any(seed), Luck::But(number, fate));
        for _ in 0..150 {
            world.step();
        }
        world.settle();
        if number >= world.submitted() {
            assert_eq!(world.answers.failed, 0);
            break;
        }
        each(&world);
        number += 1;
    }
}

#[test]
fn failed_operation_fails_its_request_and_no_other() {
    each_seed(20, |seed| {
        fail_each_operation(seed, Fate::Failed(Errno::IO), |world| {
            let failed = world.answers.failed;
            // After a failed sync nothing is promised any more.
            assert!(failed == 1 || (world.lost && failed > 1), "{failed} requests failed");
        });
    });
}

#[test]
fn interrupted_or_short_operation_fails_nothing() {
    each_seed(8, |seed| {
        fail_each_operation(seed, Fate::Interrupted, |world| assert_eq!(world.answers.failed, 0));
        fail_each_operation(seed, Fate::Short, |world| assert_eq!(world.answers.failed, 0));
    });
}

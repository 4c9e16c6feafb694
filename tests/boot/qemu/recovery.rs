//! Daemons that are killed while a guest works: it notices nothing but the time.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tests::{Daemon, DaemonCommand, DiskImage, temp_dir};

use super::emulator::{Device, Emulator, OnRestart, QUEUE_COUNT};
use super::{DISK_BYTES, FIO, LOAD_RUNS};
use crate::statistics::Statistics;

/// Daemons that die, one after the other.
const KILL_COUNT: usize = 20;
/// Requests that each has completed before: the load is in full swing again.
const REQUESTS_LEAST: u64 = 100;
/// What the daemon says of each ring that a predecessor has left requests in, before how many they are.
const LEFT: &str = "a predecessor's requests come first";
/// What Linux says of a request that failed.
const FAILURE: &str = "I/O error";

/// A daemon on the disk in a directory, at the socket there.
fn daemon(directory: &Path) -> Daemon {
    DaemonCommand::block(&directory.join("disk"))
        .socket(&directory.join("socket"))
        .argument("--control")
        .argument(directory.join("control"))
        .argument("--num-queues")
        .argument(QUEUE_COUNT.to_string())
        .start()
}

/// Waits until a daemon has completed so many requests.
fn wait_for_requests(control: &Path, least: u64) {
    while Statistics::ask(control).queues("requests").iter().sum::<u64>() < least {
        std::thread::yield_now();
    }
}

/// Requests that a daemon has found in flight, by its log.
fn found_in_flight(daemon: &Daemon) -> u64 {
    let log = daemon.log();
    let counts = log.lines().filter(|line| line.contains(LEFT)).map(|line| {
        let count = line.split_once("requests=").expect("it says how many").1;
        let count = count.split(' ').next().expect("there is a first word");
        count.parse::<u64>().expect("a number")
    });
    counts.sum()
}

#[test]
fn guest_does_not_notice_that_daemons_are_killed() {
    let Some(emulator) = Emulator::new(&[FIO], &[]) else { return };
    let directory = temp_dir();
    let path = directory.path();
    DiskImage::sparse(&path.join("disk"), DISK_BYTES);
    let control = path.join("control");
    let mut current = daemon(path);
    let device = Device::Block(&path.join("socket"));
    let mut machine = emulator.boot(&[device], "check=load", OnRestart::End);
    machine.wait_for(LOAD_RUNS);
    let (mut in_flight, mut pauses) = (Vec::new(), Vec::new());
    for _ in 0..KILL_COUNT {
        wait_for_requests(&control, REQUESTS_LEAST);
        let killed = Instant::now();
        current.signal(Signal::KILL);
        current = daemon(path);
        wait_for_requests(&control, 1);
        pauses.push(killed.elapsed());
        in_flight.push(found_in_flight(&current));
    }
    machine.expect_pass();
    assert!(!machine.console().contains(FAILURE), "{}", machine.console());
    assert!(machine.wait().success());
    assert_eq!(Statistics::ask(&control).queues("errors").iter().sum::<u64>(), 0);
    assert!(current.terminate().success());
    report(pauses, &in_flight);
    assert!(in_flight.iter().sum::<u64>() > 0, "no daemon had anything in flight");
}

/// What a person is to judge.
fn report(mut pauses: Vec<Duration>, in_flight: &[u64]) {
    pauses.sort_unstable();
    eprintln!(
        "{} daemons were killed over {in_flight:?} requests; from a kill to the first request of the next one's {:.0?} \
         (median), {:.0?} (longest)",
        pauses.len(),
        pauses[pauses.len() / 2],
        pauses[pauses.len() - 1],
    );
}

//! Daemons that are killed, or replaced, under guests whose front ends cannot connect again: a service manager keeps what they
//! need, and they notice nothing but the time.

use std::fs::read_link;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use frontend::inflight::{Description, Inflight};
use rustix::process::Signal;
use tests::{DaemonCommand, DiskImage, Machine, Rig, Service, TempDir, UserModeLinux, temp_dir};

use crate::qemu::emulator::{Device, Emulator, OnRestart, Version};
use crate::statistics::Statistics;

/// Names another number of daemons that die, one after the other.
const KILLS_VARIABLE: &str = "OUTBOARD_KILLS";
const KILL_COUNT: usize = 20;
/// Passes of the load that outlast so many kills, where the guest runs on the host's processor and where that is emulated.
const PASSES: usize = 32;
const EMULATED_PASSES: usize = 8;
/// How long a load may take to have its requests completed.
const LOAD_LIMIT: Duration = Duration::from_secs(60);
const DISK_BYTES: u64 = 64 << 20;
/// The load, where its initial RAM disk has it, and what it says once requests are completing.
const FIO: &str = "usr/bin/fio";
const LOAD_RUNS: &str = "IOPS]";
/// What Linux says of a request that failed.
const FAILURE: &str = "I/O error";
const QUEUE_COUNT: u16 = 2;
/// Descriptors that the manager keeps at most: as the units have it.
const ROOM: usize = 2048;
/// Requests that each daemon has completed before it dies: the load is in full swing again.
const REQUESTS_LEAST: u64 = 100;
/// Looks at a daemon that stands still, to find one with requests in flight.
const LOOKS_MAX: usize = 10_000;

/// A daemon under a stand-in for a service manager, and its disk.
struct Bench {
    service: Service,
    control: PathBuf,
    // Last: the daemon's files are in it.
    _directory: TempDir,
}

/// What came of the kills.
#[derive(Default)]
struct Outcome {
    /// Requests that each has left.
    in_flight: Vec<usize>,
    /// From each end to the first request that the next one has completed.
    pauses: Vec<Duration>,
}

impl Bench {
    fn new() -> Self {
        let directory = temp_dir();
        let image = directory.path().join("disk");
        DiskImage::sparse(&image, DISK_BYTES);
        let control = directory.path().join("control");
        let command = DaemonCommand::block(&image).argument("--control").argument(&control);
        let command = command.argument("--num-queues").argument(QUEUE_COUNT.to_string());
        Self { service: Service::start(command, ROOM), control, _directory: directory }
    }

    /// Has so many daemons die, and each followed by another.
    fn kill_under_load(&mut self, count: usize) -> Outcome {
        let mut outcome = Outcome::default();
        for _ in 0..count {
            self.wait_for_requests(REQUESTS_LEAST);
            let inflight = self.inflight();
            self.stop_amid_requests(&inflight);
            let killed = Instant::now();
            self.service.kill();
            outcome.in_flight.push(in_flight(&inflight));
            self.service.start_next();
            self.wait_for_requests(1);
            outcome.pauses.push(killed.elapsed());
        }
        outcome
    }

    /// Has the daemon end in good order, and be followed by another.
    fn replace_under_load(&mut self) {
        self.wait_for_requests(REQUESTS_LEAST);
        assert!(self.service.terminate().success());
        self.service.start_next();
        self.wait_for_requests(REQUESTS_LEAST);
    }

    /// Waits until the daemon has completed so many requests.
    fn wait_for_requests(&self, least: u64) {
        let deadline = Instant::now() + LOAD_LIMIT;
        while Statistics::ask(&self.control).queues("requests").iter().sum::<u64>() < least {
            assert!(Instant::now() < deadline, "the load has ended, or stands still");
            std::thread::yield_now();
        }
    }

    /// Has the daemon stand still at a moment at which it has requests in flight.
    fn stop_amid_requests(&self, inflight: &Inflight) {
        for _ in 0..LOOKS_MAX {
            self.service.stop();
            if in_flight(inflight) > 0 {
                return;
            }
            self.service.signal(Signal::CONT);
            std::thread::yield_now();
        }
        panic!("the daemon has nothing in flight");
    }

    /// The daemon's own record of what is in flight.
    fn inflight(&self) -> Inflight {
        let file = self.service.kept_file(|_, fd| {
            let path = read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap_or_default();
            path.to_string_lossy().starts_with("/memfd:inflight")
        });
        let mmap_size = file.metadata().expect("it is open").len();
        let queue_size = u16::try_from(mmap_size / u64::from(QUEUE_COUNT) / 16 - 1);
        let description = Description {
            mmap_size,
            mmap_offset: 0,
            num_queues: QUEUE_COUNT,
            queue_size: queue_size.expect("a queue's size"),
        };
        Inflight { description, file }
    }

    /// Ends the last one, after a look at its counters.
    fn finish(mut self, outcome: &Outcome) {
        let statistics = Statistics::ask(&self.control);
        assert_eq!(statistics.queues("errors").iter().sum::<u64>(), 0, "{statistics:?}");
        assert!(self.service.terminate().success());
        assert!(outcome.in_flight.iter().all(|count| *count > 0), "{:?}", outcome.in_flight);
    }
}

fn in_flight(inflight: &Inflight) -> usize {
    (0..QUEUE_COUNT).map(|queue| inflight.heads(queue).len()).sum()
}

fn kill_count() -> usize {
    let count = std::env::var(KILLS_VARIABLE).map(|count| count.parse());
    count.map_or(KILL_COUNT, |count| count.expect("a number of kills"))
}

/// What has the load go so often over the disk for each [`KILL_COUNT`] kills.
fn words(passes: usize) -> String {
    format!("passes={}", passes * kill_count().div_ceil(KILL_COUNT))
}

/// The guest has verified all that it wrote, and has seen no error.
fn expect_verified(machine: &mut Machine) {
    machine.expect_pass();
    assert!(!machine.console().contains(FAILURE), "{}", machine.console());
}

/// What a person is to judge.
fn report(guest: &str, Outcome { in_flight, pauses }: &Outcome) {
    let mut pauses = pauses.clone();
    pauses.sort_unstable();
    let at = |percent: usize| pauses[(pauses.len() * percent).div_ceil(100) - 1];
    eprintln!(
        "{guest}: {} daemons were killed over {in_flight:?} requests; from the kill to the next one's first request \
         {:.0?} (median), {:.0?} (p99), {:.0?} (longest)",
        pauses.len(),
        at(50),
        at(99),
        at(100),
    );
}

#[test]
fn user_mode_linux_does_not_notice_that_daemons_are_killed_and_replaced() {
    let Some(rig) = Rig::find() else { return };
    let guests = UserModeLinux::with_programs(rig, &[FIO]);
    let mut bench = Bench::new();
    let device = tests::Device::Block(bench.service.socket());
    let mut machine = guests.boot(&[device], "load", &[&words(PASSES)]);
    machine.wait_for(LOAD_RUNS);
    bench.replace_under_load();
    let outcome = bench.kill_under_load(kill_count());
    expect_verified(&mut machine);
    UserModeLinux::finish_after_pass(machine);
    report("User-Mode Linux", &outcome);
    bench.finish(&outcome);
}

#[test]
fn device_of_any_kind_does_not_notice_that_daemons_are_killed_and_replaced() {
    let Some(emulator) = Emulator::of(Version::New, &[FIO], &[]) else { return };
    let mut bench = Bench::new();
    let socket = bench.service.socket().to_owned();
    let mut machine = boot(&emulator, &socket);
    machine.wait_for(LOAD_RUNS);
    bench.replace_under_load();
    let outcome = bench.kill_under_load(kill_count());
    expect_verified(&mut machine);
    assert!(machine.wait().success());
    report("QEMU's device of any kind", &outcome);
    bench.finish(&outcome);
}

fn boot(emulator: &Emulator, socket: &Path) -> Machine {
    let device = Device::BlockAsItIs(socket, QUEUE_COUNT);
    emulator.boot(&[device], &format!("check=load {}", words(EMULATED_PASSES)), OnRestart::End)
}

//! Whole PCs with an unmodified distribution kernel, emulated by QEMU: firmware, boot loader, several processors and queues,
//! and a front end that resets, restarts and dies.

pub(crate) mod emulator;
mod recovery;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use guest::pattern;
use serde_json::json;
use tests::{
    Daemon, DaemonCommand, DiskImage, Machine, Namespace, TempDir, temp_dir,
    temp_dir_with_direct_io,
};

use self::emulator::{Device, Emulator, Network, OnRestart, QUEUE_COUNT};
use crate::growth::{self, News};
use crate::limits;
use crate::network::{self, TAP, Testpmd};
use crate::statistics::Statistics;
use crate::sudden_death::{FileSystem, Scene};

/// Enough for each of the load's jobs to have 32 large requests of its own in flight.
const DISK_BYTES: u64 = 64 << 20;
/// The load, where its initial RAM disk has it.
pub(crate) const FIO: &str = "usr/bin/fio";
/// What fio's progress line has once requests are completing.
const LOAD_RUNS: &str = "IOPS]";
/// What fio says once in each run, before it starts its jobs.
const LOAD_STARTS: &str = "Starting 4 processes";

/// A daemon on an image, and the machines that will use it.
struct Bench {
    emulator: Emulator,
    daemon: Daemon,
    image: PathBuf,
    control: PathBuf,
    // Last: the daemon's files are in it.
    _directory: TempDir,
}

impl Bench {
    /// A daemon on an empty disk. `None`: it cannot run here, and has said why.
    fn empty_disk(programs: &[&str]) -> Option<Self> {
        Some(Self::sparse_disk(Emulator::new(programs, &[])?, DISK_BYTES))
    }

    /// A daemon on a disk that boots to the check in `words`.
    fn boot_disk(words: &str) -> Option<Self> {
        Some(Self::new(Emulator::new(&[], &[])?, temp_dir(), &[], |emulator, path| {
            emulator.make_boot_disk(path, words);
        }))
    }

    fn sparse_disk(emulator: Emulator, len_bytes: u64) -> Self {
        Self::new(emulator, temp_dir(), &[], |_, path| {
            DiskImage::sparse(path, len_bytes);
        })
    }

    /// A daemon on a disk in `directory`, with these options besides those that all have.
    fn new(
        emulator: Emulator,
        directory: TempDir,
        options: &[&str],
        make_image: impl FnOnce(&Emulator, &Path),
    ) -> Self {
        let image = directory.path().join("disk");
        make_image(&emulator, &image);
        let control = directory.path().join("control");
        let command = DaemonCommand::block(&image)
            .argument("--num-queues")
            .argument(QUEUE_COUNT.to_string())
            .argument("--control")
            .argument(&control);
        let daemon = options.iter().fold(command, DaemonCommand::argument).start();
        Self { emulator, daemon, image, control, _directory: directory }
    }

    /// Boots a machine that runs the check in `words`; one that restarts has failed.
    fn boot(&self, words: &str) -> Machine {
        self.emulator.boot(&[Device::Block(self.daemon.socket())], words, OnRestart::End)
    }

    /// Boots a machine, has it pass the check in `words` and end, and returns what it found.
    fn pass(&self, words: &str) -> String {
        finish(self.boot(words))
    }

    /// Ends the daemon as an operator would, after a look at its counters: this many front ends were served, no request
    /// failed and no front end was at fault.
    fn expect_clean_end(self, sessions: u64) {
        let statistics = Statistics::ask(&self.control);
        assert_eq!(
            statistics.queues("errors").iter().sum::<u64>(),
            0,
            "failed requests in {statistics:?}"
        );
        for counter in ["protocol_errors", "broken_sessions"] {
            assert_eq!(statistics.daemon(counter), 0, "{counter} in {statistics:?}");
        }
        let sessions = sessions + self.emulator.failed_starts();
        assert_eq!(statistics.daemon("sessions"), sessions, "sessions in {statistics:?}");
        let status = self.daemon.terminate();
        assert!(status.success(), "the daemon ended with {status}");
    }
}

/// Waits for the check to pass and for the emulator to end.
pub(crate) fn finish(mut machine: Machine) -> String {
    let details = machine.expect_pass();
    let status = machine.wait();
    assert!(status.success(), "the emulator ended with {status}");
    details
}

fn checksum(image: &Path) -> String {
    let mut file = File::open(image).expect("the image is ours");
    pattern::checksum(&mut file).expect("the image can be read")
}

/// How much of the host's storage the image takes; `st_blocks` counts 512 bytes whatever the file system's block size is.
fn allocated_bytes(image: &Path) -> u64 {
    image.metadata().expect("the image is ours").blocks() * 512
}

#[test]
fn firmware_boots_from_the_disk() {
    let Some(bench) = Bench::boot_disk("check=read") else { return };
    let machine = bench.emulator.boot_from_disk(bench.daemon.socket(), OnRestart::End);
    assert_eq!(finish(machine), checksum(&bench.image));
    bench.expect_clean_end(1);
}

#[test]
fn restart_goes_through_firmware_and_boot_loader_again() {
    let Some(bench) = Bench::boot_disk("check=restart seed=1") else { return };
    let mut machine = bench.emulator.boot_from_disk(bench.daemon.socket(), OnRestart::Again);
    machine.wait_for("restarting");
    finish(machine);
    // One session: the emulator keeps its connection, stops the rings and starts them anew.
    bench.expect_clean_end(1);
}

#[test]
fn verified_load_runs_on_all_queues() {
    let Some(bench) = Bench::empty_disk(&[FIO]) else { return };
    bench.pass("check=load");
    let statistics = Statistics::ask(&bench.control);
    let requests = statistics.queues("requests");
    assert_eq!(requests.len(), usize::from(QUEUE_COUNT));
    // Each job writes its part of the disk several times in requests of 64 KiB at most, and reads it as often.
    let least = DISK_BYTES / u64::from(QUEUE_COUNT) / (64 << 10);
    assert!(
        requests.iter().all(|count| *count > least),
        "a queue had hardly any requests: {statistics:?}"
    );
    bench.expect_clean_end(1);
}

#[test]
fn reset_amid_requests_leaves_a_working_disk() {
    let Some(bench) = Bench::empty_disk(&[FIO]) else { return };
    let disk = Device::Block(bench.daemon.socket());
    let mut machine = bench.emulator.boot(&[disk], "check=load", OnRestart::Again);
    machine.wait_for(LOAD_RUNS);
    bench.emulator.command(&json!({ "execute": "system_reset" }));
    // The load of the machine after the reset, since the one before it has said so already.
    machine.wait_for(LOAD_STARTS);
    finish(machine);
    bench.expect_clean_end(1);
}

#[test]
fn killed_machine_makes_way_for_the_next_one() {
    let Some(bench) = Bench::empty_disk(&[FIO]) else { return };
    let mut machine = bench.boot("check=load");
    machine.wait_for(LOAD_RUNS);
    // Dropping it is SIGKILL: no ring is stopped and no message sent.
    drop(machine);
    bench.pass("check=load");
    bench.expect_clean_end(2);
}

/// The file system outlives `count` machines that are killed at moments that `seed` chooses. Each is two boots of some
/// seconds: User-Mode Linux, where a boot takes two, has more of them.
fn outlives_sudden_deaths(
    kind: FileSystem,
    seed: u64,
    count: u32,
    directory: TempDir,
    options: &[&str],
) {
    let Some(emulator) = Emulator::new(&kind.programs(), kind.modules()) else { return };
    let bench = Bench::new(emulator, directory, options, |_, path| {
        DiskImage::sparse(path, kind.disk_bytes());
    });
    let scene = Scene {
        rig: bench.emulator.rig(),
        image: &bench.image,
        boot: &|check, words| bench.boot(&format!("check={check} {}", words.join(" "))),
        finish: &|machine| {
            finish(machine);
        },
    };
    scene.play(kind, count, seed);
    bench.expect_clean_end(2 * u64::from(count));
}

#[test]
fn ext4_outlives_sudden_deaths() {
    outlives_sudden_deaths(FileSystem::Ext4, 3, 2, temp_dir(), &[]);
}

#[test]
fn xfs_outlives_a_sudden_death() {
    outlives_sudden_deaths(FileSystem::Xfs, 4, 1, temp_dir(), &[]);
}

#[test]
fn xfs_outlives_a_sudden_death_past_the_host_s_cache() {
    let Some(directory) = temp_dir_with_direct_io() else { return };
    let options = ["--cache", "none", "--logical-block-size", "4096"];
    outlives_sudden_deaths(FileSystem::Xfs, 6, 1, directory, &options);
}

#[test]
fn driver_sees_size_and_queues_and_blocks_of_4096_bytes() {
    let Some(emulator) = Emulator::new(&[], &[]) else { return };
    let options = ["--logical-block-size", "4096"];
    let bench = Bench::new(emulator, temp_dir(), &options, |_, path| {
        DiskImage::sparse(path, DISK_BYTES);
    });
    bench.pass(&format!(
        "check=identity size_bytes={DISK_BYTES} queues={QUEUE_COUNT} block_bytes=4096"
    ));
    bench.expect_clean_end(1);
}

#[test]
fn limits_hold_in_the_guest() {
    let Some(bench) = Bench::empty_disk(&[FIO]) else { return };
    let mut machine = bench.boot("check=rate");
    limits::measure(&mut machine, &bench.control, "QEMU", QUEUE_COUNT);
    finish(machine);
    bench.expect_clean_end(1);
}

#[test]
fn guest_switches_its_cache_and_flushes_no_more() {
    let Some(bench) = Bench::empty_disk(&[]) else { return };
    bench.pass("check=cache seed=7 cache=write-back switch=write-through");
    let flushes = Statistics::ask(&bench.control).requests("flush");
    let found = bench.pass("check=cache seed=8 cache=write-through");
    let statistics = Statistics::ask(&bench.control);
    assert_eq!(statistics.requests("flush"), flushes, "{statistics:?}");
    assert_eq!(found, checksum(&bench.image));
    bench.expect_clean_end(2);
}

#[test]
fn disk_grows_under_load() {
    let Some(emulator) = Emulator::new(&[], &[]) else { return };
    let bench = Bench::sparse_disk(emulator, growth::SIZE_BYTES);
    let mut machine = bench.boot(&format!("check=grow seed=5 size_bytes={}", growth::GROWN_BYTES));
    let news = [News::Signal(&bench.daemon), News::Command(&bench.control)];
    growth::grow_in_steps(&mut machine, &bench.image, news);
    growth::expect_added(&bench.image, &finish(machine));
    bench.expect_clean_end(1);
}

#[test]
fn traffic_passes_the_network_device_of_another() {
    let Some(emulator) = Emulator::new(&network::PROGRAMS, &[]) else { return };
    let Some(namespace) = Namespace::new(emulator.rig()) else { return };
    let peer = Testpmd::start(&namespace);
    let frames = network::expect_traffic(&namespace, TAP, |words| {
        let device = Network {
            socket: &peer.socket(),
            queue_pairs: 1,
            properties: &["mac=52:54:00:12:34:56"],
        };
        let words = format!("check=network mac=52:54:00:12:34:56 {}", words.join(" "));
        finish(emulator.boot(&[Device::Network(device)], &words, OnRestart::End))
    });
    network::expect_finished(&frames);
}

#[test]
fn discarded_blocks_go_back_to_the_host_and_read_as_zeroes() {
    let Some(bench) = Bench::empty_disk(&[]) else { return };
    let zeroes = checksum(&bench.image);
    bench.pass("check=write seed=1");
    assert!(allocated_bytes(&bench.image) >= DISK_BYTES);
    bench.pass("check=discard");
    let allocated = allocated_bytes(&bench.image);
    assert!(allocated < DISK_BYTES / 8, "{allocated} bytes are still allocated");
    assert_eq!(bench.pass("check=read"), zeroes);
    bench.expect_clean_end(3);
}

#[test]
fn zeroed_parts_read_as_zeroes_and_spare_their_neighbours() {
    let Some(bench) = Bench::empty_disk(&[]) else { return };
    bench.pass("check=zeroes seed=2");
    bench.expect_clean_end(1);
}

//! User-Mode Linux guests: the kernel's own vhost-user front end, no emulator, no root, about a second a boot.

use std::path::{Path, PathBuf};

use crate::growth::{self, News};
use crate::limits;
use crate::sudden_death::{FileSystem, Scene};
use guest::verdict::Verdict;
use tests::{
    Daemon, DaemonCommand, Device, DiskImage, Machine, Rig, TempDir, UserModeLinux, temp_dir,
    temp_dir_with_direct_io,
};

/// Large enough for many requests in flight and an ext4 journal, small enough to be summed in a blink.
const DISK_BYTES: u64 = 64 << 20;
/// Sudden deaths that a file system goes through: each is two boots, of two seconds with all of fio's libraries.
const DEATH_COUNT: u32 = 2;

/// What measures in the guest, where its initial RAM disk has it.
const FIO: &str = "usr/bin/fio";
/// The daemon's control socket, in the directory of the image.
const CONTROL: &str = "control";

/// A daemon on an image, and the guests that will use it.
struct Bench {
    guests: UserModeLinux,
    daemon: Daemon,
    image: DiskImage,
    directory: TempDir,
}

impl Bench {
    /// `None`: it cannot run here, and has said why.
    fn new(make_image: impl FnOnce(&Path) -> DiskImage) -> Option<Self> {
        Self::with_options(&[], make_image)
    }

    /// The same, with these options of the daemon.
    fn with_options(options: &[&str], make_image: impl FnOnce(&Path) -> DiskImage) -> Option<Self> {
        let guests = UserModeLinux::new(Rig::find()?);
        Some(Self::start(guests, temp_dir(), options, make_image))
    }

    fn start(
        guests: UserModeLinux,
        directory: TempDir,
        options: &[&str],
        make_image: impl FnOnce(&Path) -> DiskImage,
    ) -> Self {
        let image = make_image(&directory.path().join("disk"));
        let command = DaemonCommand::block(image.path())
            .argument("--serial")
            .argument("uml-disk")
            .argument("--control")
            .argument(directory.path().join(CONTROL));
        let daemon = options.iter().fold(command, DaemonCommand::argument).start();
        Self { guests, daemon, image, directory }
    }

    fn control(&self) -> PathBuf {
        self.directory.path().join(CONTROL)
    }

    /// Boots a guest on the disk.
    fn boot(&self, check: &str, words: &[&str]) -> Machine {
        self.guests.boot(&[Device::Block(self.daemon.socket())], check, words)
    }

    /// Has a new guest pass `check`, and returns what it found.
    fn pass(&self, check: &str, words: &[&str]) -> String {
        self.guests.pass(&[Device::Block(self.daemon.socket())], check, words)
    }

    /// Has the disk grow under a guest, of which the daemon gets this news.
    fn grow(&self, seed: u64, news: [News<'_>; 2]) {
        let words = [format!("seed={seed}"), format!("size_bytes={}", growth::GROWN_BYTES)];
        let words = words.each_ref().map(String::as_str);
        let mut machine = self.boot("grow", &words);
        growth::grow_in_steps(&mut machine, self.image.path(), news);
        growth::expect_added(self.image.path(), &UserModeLinux::finish(machine));
    }

    /// Ends the daemon as an operator would and leaves the image.
    fn finish(self) -> (DiskImage, UserModeLinux, TempDir) {
        let status = self.daemon.terminate();
        assert!(status.success(), "the daemon ended with {status}");
        (self.image, self.guests, self.directory)
    }
}

#[test]
fn guest_reads_what_the_host_wrote() {
    let Some(bench) = Bench::new(|path| DiskImage::patterned(path, DISK_BYTES, 1)) else {
        return;
    };
    assert_eq!(bench.pass("read", &[]), bench.image.checksum());
    bench.finish();
}

#[test]
fn host_reads_what_the_guest_wrote() {
    let Some(bench) = Bench::new(|path| DiskImage::patterned(path, DISK_BYTES, 1)) else {
        return;
    };
    let before = bench.image.checksum();
    let written = bench.pass("write", &["seed=2"]);
    let (image, _, _directory) = bench.finish();
    assert_eq!(written, image.checksum());
    assert_ne!(written, before);
}

#[test]
fn driver_sees_size_and_serial_number() {
    let Some(bench) = Bench::new(|path| DiskImage::sparse(path, DISK_BYTES)) else {
        return;
    };
    bench.pass("identity", &[&format!("size_bytes={DISK_BYTES}"), "serial=uml-disk"]);
}

#[test]
fn file_system_made_in_the_guest_is_clean_on_the_host() {
    let Some(bench) = Bench::new(|path| DiskImage::sparse(path, DISK_BYTES)) else {
        return;
    };
    bench.pass("file-system", &["seed=3"]);
    let (image, guests, _directory) = bench.finish();
    let fsck =
        guests.rig().tool("e2fsck").arg("-fn").arg(image.path()).output().expect("e2fsck runs");
    assert!(
        fsck.status.success(),
        "e2fsck -fn: {}{}",
        String::from_utf8_lossy(&fsck.stdout),
        String::from_utf8_lossy(&fsck.stderr)
    );
}

#[test]
fn three_guests_in_a_row_share_one_daemon() {
    let Some(mut bench) = Bench::new(|path| DiskImage::sparse(path, DISK_BYTES)) else {
        return;
    };
    let written = bench.pass("write", &["seed=4"]);
    assert_eq!(bench.pass("read", &[]), written);
    bench.pass("file-system", &["seed=5"]);
    assert!(bench.daemon.is_running());
    bench.finish();
}

#[test]
fn cached_and_direct_requests_see_each_other() {
    let Some(bench) = Bench::new(|path| DiskImage::sparse(path, DISK_BYTES)) else {
        return;
    };
    bench.pass("direct", &["seed=6"]);
}

#[test]
fn zeroed_parts_read_as_zeroes_and_spare_their_neighbours() {
    let Some(bench) = Bench::new(|path| DiskImage::patterned(path, DISK_BYTES, 7)) else {
        return;
    };
    bench.pass("zeroes", &["seed=8"]);
}

#[test]
fn discard_gives_blocks_back_to_the_host() {
    let Some(bench) = Bench::new(|path| DiskImage::patterned(path, DISK_BYTES, 9)) else {
        return;
    };
    let before = bench.image.allocated_bytes();
    bench.pass("discard", &[]);
    let after = bench.image.allocated_bytes();
    assert!(after < before / 8, "{after} of {before} bytes are still allocated");
}

/// The file system outlives machines that are killed at moments that `seed` chooses.
fn outlives_sudden_deaths(
    kind: FileSystem,
    seed: u64,
    count: u32,
    directory: TempDir,
    options: &[&str],
) {
    let Some(rig) = Rig::find() else { return };
    let guests = UserModeLinux::with_programs(rig, &kind.programs());
    let mut bench =
        Bench::start(guests, directory, options, |path| DiskImage::sparse(path, kind.disk_bytes()));
    let scene = Scene {
        rig: bench.guests.rig(),
        image: bench.image.path(),
        boot: &|check, words| {
            let words: Vec<_> = words.iter().map(String::as_str).collect();
            bench.boot(check, &words)
        },
        finish: &|machine| {
            UserModeLinux::finish(machine);
        },
    };
    scene.play(kind, count, seed);
    assert!(bench.daemon.is_running());
    bench.finish();
}

#[test]
fn ext4_outlives_sudden_deaths() {
    outlives_sudden_deaths(FileSystem::Ext4, 10, DEATH_COUNT, temp_dir(), &[]);
}

#[test]
fn xfs_outlives_sudden_deaths() {
    outlives_sudden_deaths(FileSystem::Xfs, 11, DEATH_COUNT, temp_dir(), &[]);
}

#[test]
fn ext4_outlives_a_sudden_death_past_the_host_s_cache() {
    let Some(directory) = temp_dir_with_direct_io() else { return };
    outlives_sudden_deaths(FileSystem::Ext4, 13, 1, directory, &["--cache", "none"]);
}

#[test]
fn limits_hold_in_the_guest() {
    let Some(rig) = Rig::find() else { return };
    let guests = UserModeLinux::with_programs(rig, &[FIO]);
    let bench = Bench::start(guests, temp_dir(), &[], |path| DiskImage::sparse(path, DISK_BYTES));
    let mut machine = bench.boot("rate", &[]);
    limits::measure(&mut machine, &bench.control(), "User-Mode Linux", 1);
    UserModeLinux::finish(machine);
    bench.finish();
}

#[test]
fn driver_works_with_blocks_of_4096_bytes() {
    let options = ["--logical-block-size", "4096"];
    let Some(bench) = Bench::with_options(&options, |path| DiskImage::sparse(path, DISK_BYTES))
    else {
        return;
    };
    bench.pass("identity", &["block_bytes=4096", &format!("size_bytes={DISK_BYTES}")]);
    bench.pass("direct", &["seed=14"]);
    let written = bench.pass("write", &["seed=15"]);
    let (image, _, _directory) = bench.finish();
    assert_eq!(written, image.checksum());
}

#[test]
fn cache_that_a_guest_switched_stays_so_for_the_next() {
    let Some(bench) = Bench::new(|path| DiskImage::sparse(path, DISK_BYTES)) else { return };
    bench.pass("cache", &["seed=16", "cache=write-back", "switch=write-through"]);
    bench.pass("cache", &["seed=17", "cache=write-through", "switch=write-back"]);
    let found = bench.pass("cache", &["seed=18", "cache=write-back"]);
    let (image, _, _directory) = bench.finish();
    assert_eq!(found, image.checksum());
}

#[test]
fn driver_sees_the_cache_that_the_daemon_was_started_with() {
    let options = ["--cache", "writethrough"];
    let Some(bench) = Bench::with_options(&options, |path| DiskImage::sparse(path, DISK_BYTES))
    else {
        return;
    };
    bench.pass("cache", &["seed=19", "cache=write-through"]);
    bench.finish();
}

#[test]
fn disk_grows_under_load() {
    let Some(bench) = Bench::new(|path| DiskImage::sparse(path, growth::SIZE_BYTES)) else {
        return;
    };
    let control = bench.control();
    bench.grow(12, [News::Signal(&bench.daemon), News::Command(&control)]);
    bench.finish();
}

#[test]
fn disk_grows_by_itself_when_the_daemon_watches_its_size() {
    let make_image = |path: &Path| DiskImage::sparse(path, growth::SIZE_BYTES);
    let Some(bench) = Bench::with_options(&["--watch-size"], make_image) else { return };
    bench.grow(20, [News::Itself; 2]);
    bench.finish();
}

#[test]
fn failing_check_is_reported_as_a_failure() {
    let Some(bench) = Bench::new(|path| DiskImage::sparse(path, DISK_BYTES)) else {
        return;
    };
    let mut machine = bench.boot("identity", &["serial=another"]);
    let line = machine.wait_for(guest::verdict::MARK);
    assert!(matches!(Verdict::parse(&line), Some(Verdict::Fail(_))), "{line}");
}

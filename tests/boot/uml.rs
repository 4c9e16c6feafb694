//! User-Mode Linux guests: the kernel's own vhost-user front end, no emulator, no root, about a second a boot.

use std::path::Path;

use crate::growth;
use crate::sudden_death::{FileSystem, Scene};
use guest::verdict::Verdict;
use tests::{Daemon, DaemonCommand, DiskImage, Rig, TempDir, UserModeLinux, temp_dir};

/// Large enough for many requests in flight and an ext4 journal, small enough to be summed in a blink.
const DISK_BYTES: u64 = 64 << 20;
/// Sudden deaths that a file system goes through: each is two boots, of two seconds with all of fio's libraries.
const DEATH_COUNT: u32 = 2;

/// A daemon on an image, and the guests that will use it.
struct Bench {
    guests: UserModeLinux,
    daemon: Daemon,
    image: DiskImage,
    rig: Rig,
    directory: TempDir,
}

impl Bench {
    /// `None`: it cannot run here, and has said why.
    fn new(make_image: impl FnOnce(&Path) -> DiskImage) -> Option<Self> {
        Self::with_programs(&[], make_image)
    }

    /// The same, with these programs in the guests.
    fn with_programs(
        programs: &[&str],
        make_image: impl FnOnce(&Path) -> DiskImage,
    ) -> Option<Self> {
        let guests = UserModeLinux::with_programs(Rig::find()?, programs);
        let directory = temp_dir();
        let image = make_image(&directory.path().join("disk"));
        let daemon =
            DaemonCommand::block(image.path()).argument("--serial").argument("uml-disk").start();
        Some(Self { guests, daemon, image, rig: Rig::find()?, directory })
    }

    /// Has a new guest pass `check`, and returns what it found.
    fn pass(&self, check: &str, words: &[&str]) -> String {
        self.guests.pass(self.daemon.socket(), check, words)
    }

    /// Ends the daemon as an operator would and leaves the image.
    fn finish(self) -> (DiskImage, Rig, TempDir) {
        let status = self.daemon.terminate();
        assert!(status.success(), "the daemon ended with {status}");
        (self.image, self.rig, self.directory)
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
    let (image, rig, _directory) = bench.finish();
    let fsck = rig.tool("e2fsck").arg("-fn").arg(image.path()).output().expect("e2fsck runs");
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
fn outlives_sudden_deaths(kind: FileSystem, seed: u64) {
    let Some(mut bench) =
        Bench::with_programs(&kind.programs(), |path| DiskImage::sparse(path, kind.disk_bytes()))
    else {
        return;
    };
    let scene = Scene {
        rig: &bench.rig,
        image: bench.image.path(),
        boot: &|check, words| {
            let words: Vec<_> = words.iter().map(String::as_str).collect();
            bench.guests.boot(bench.daemon.socket(), check, &words)
        },
        finish: &|machine| {
            UserModeLinux::finish(machine);
        },
    };
    scene.play(kind, DEATH_COUNT, seed);
    assert!(bench.daemon.is_running());
    bench.finish();
}

#[test]
fn ext4_outlives_sudden_deaths() {
    outlives_sudden_deaths(FileSystem::Ext4, 10);
}

#[test]
fn xfs_outlives_sudden_deaths() {
    outlives_sudden_deaths(FileSystem::Xfs, 11);
}

#[test]
fn disk_grows_under_load() {
    let Some(bench) = Bench::new(|path| DiskImage::sparse(path, growth::SIZE_BYTES)) else {
        return;
    };
    let size = format!("size_bytes={}", growth::GROWN_BYTES);
    let mut machine = bench.guests.boot(bench.daemon.socket(), "grow", &["seed=12", &size]);
    growth::grow_in_steps(&mut machine, &bench.daemon, bench.image.path());
    growth::expect_added(bench.image.path(), &UserModeLinux::finish(machine));
    bench.finish();
}

#[test]
fn failing_check_is_reported_as_a_failure() {
    let Some(bench) = Bench::new(|path| DiskImage::sparse(path, DISK_BYTES)) else {
        return;
    };
    let mut machine = bench.guests.boot(bench.daemon.socket(), "identity", &["serial=another"]);
    let line = machine.wait_for(guest::verdict::MARK);
    assert!(matches!(Verdict::parse(&line), Some(Verdict::Fail(_))), "{line}");
}

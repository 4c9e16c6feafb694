//! Machines whose plug is pulled while a file system of theirs is at work, and what is on the disk afterwards.
//!
//! Contract: in each round a machine works and is killed at a random moment, the host's tools look at the image, a second
//! machine mounts it, finds every file that the first ones had announced as stable, and unmounts it, and the host's tools find
//! nothing wrong. One daemon serves all of them.
//!
//! What this shows: a write that the guest was told of is in the image, whole, however the guest ends. What it cannot show:
//! that the image would have outlived the *host's* sudden death; the host's page cache has survived here.

use std::fs;
use std::path::Path;
use std::time::Duration;

use guest::announcement::Announcement;
use load::Random;
use tests::{Machine, Rig};

/// Announcements that the host waits for at most before it pulls the plug, and at least one.
const FILES_MAX: u64 = 24;
/// The plug is pulled at any moment of the next file or two, not always just behind an announcement.
const DELAY_MAX_US: u64 = 30_000;

/// A kind of file system, and the host's means to look at one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileSystem {
    Ext4,
    Xfs,
}

impl FileSystem {
    /// The name by which kernels and checks know it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }

    /// The size of a disk for it.
    pub(crate) fn disk_bytes(self) -> u64 {
        match self {
            Self::Ext4 => 128 << 20,
            // mkfs.xfs takes nothing below 300 MiB.
            Self::Xfs => 320 << 20,
        }
    }

    /// The programs that the guest makes it and works on it with.
    pub(crate) fn programs(self) -> [&'static str; 2] {
        match self {
            Self::Ext4 => ["usr/bin/fio", "sbin/mke2fs"],
            Self::Xfs => ["usr/bin/fio", "sbin/mkfs.xfs"],
        }
    }

    /// The modules that a kernel without it built in needs, in the order of their dependencies.
    pub(crate) fn modules(self) -> &'static [&'static str] {
        match self {
            Self::Ext4 => &[],
            Self::Xfs => &["libcrc32c", "xfs"],
        }
    }

    /// Repairs a copy of an image as it was left, where there is a tool that can replay its journal: only the system's own
    /// driver can for xfs.
    fn repair_copy(self, rig: &Rig, image: &Path, copy: &Path) {
        if self == Self::Xfs {
            return;
        }
        fs::copy(image, copy).expect("there is room for a copy");
        // "-p" corrects what a journal's replay explains and nothing else, and says so by status 1.
        let status = run(rig, &["e2fsck", "-f", "-p"], copy);
        assert!(matches!(status, (0 | 1, _)), "e2fsck -p: {status:?}");
        let status = run(rig, &["e2fsck", "-f", "-n"], copy);
        assert!(matches!(status, (0, _)), "e2fsck -n after a repair: {status:?}");
    }

    /// Fails unless the image, which no guest has mounted, is in order.
    fn expect_clean(self, rig: &Rig, image: &Path) {
        let command: &[_] = match self {
            Self::Ext4 => &["e2fsck", "-f", "-n"],
            Self::Xfs => &["xfs_repair", "-n"],
        };
        let status = run(rig, command, image);
        assert!(matches!(status, (0, _)), "{command:?}: {status:?}");
    }
}

/// Runs a tool of the rig on the image; its status and all that it has said.
fn run(rig: &Rig, command: &[&str], image: &Path) -> (i32, String) {
    let (tool, arguments) = command.split_first().expect("a command has a name");
    let output = rig
        .tool(tool)
        .args(arguments)
        .arg(image)
        .output()
        .unwrap_or_else(|error| panic!("cannot run {tool}: {error}"));
    let said = [output.stdout, output.stderr].concat();
    let status = output.status.code().unwrap_or_else(|| panic!("{tool} was killed"));
    (status, String::from_utf8_lossy(&said).into_owned())
}

/// What a round needs of a suite: how it boots machines, and the image that they have for a disk.
pub(crate) struct Scene<'a> {
    pub(crate) rig: &'a Rig,
    pub(crate) image: &'a Path,
    /// Boots a machine with these words on its command line.
    pub(crate) boot: &'a dyn Fn(&str, &[String]) -> Machine,
    /// Waits for a machine to pass its check and end.
    pub(crate) finish: &'a dyn Fn(Machine),
}

impl Scene<'_> {
    /// Plays so many rounds, at moments that `seed` chooses.
    pub(crate) fn play(&self, kind: FileSystem, round_count: u32, seed: u64) {
        let mut random = Random::new(seed);
        let copy = self.image.with_extension("copy");
        let mut durable = 0;
        for round in 1..=round_count {
            let files = 1 + random.below(FILES_MAX);
            let delay = Duration::from_micros(random.below(DELAY_MAX_US));
            let mut machine = (self.boot)("until-death", &words(kind, seed, durable));
            for _ in 0..files {
                machine.expect_announcement();
            }
            machine.run_for(delay);
            let before = durable;
            durable = last_durable(&machine.kill()).expect("an announcement was seen");
            println!(
                "{}, round {round} of seed {seed}: killed {delay:?} after file {files} of this round; {before} files before, {durable} after",
                kind.name()
            );
            kind.repair_copy(self.rig, self.image, &copy);
            (self.finish)((self.boot)("survivors", &words(kind, seed, durable)));
            kind.expect_clean(self.rig, self.image);
        }
    }
}

fn words(kind: FileSystem, seed: u64, files: u64) -> Vec<String> {
    vec![format!("kind={}", kind.name()), format!("seed={seed}"), format!("files={files}")]
}

/// Also what was announced between the host's last look and the end.
fn last_durable(console: &str) -> Option<u64> {
    let durable = |line: &str| match Announcement::parse(line)? {
        Announcement::Durable(count) => Some(count),
        _ => None,
    };
    console.lines().filter_map(durable).next_back()
}

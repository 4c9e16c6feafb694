//! A disk that grows while its guest reads and writes it.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::Path;

use guest::announcement::Announcement;
use guest::pattern;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::process::Signal;
use serde_json::json;
use tests::{Daemon, Machine};

use crate::control;

/// The disk before.
pub(crate) const SIZE_BYTES: u64 = 32 << 20;
/// What each step adds.
const STEP_BYTES: u64 = 16 << 20;
/// The disk afterwards.
pub(crate) const GROWN_BYTES: u64 = SIZE_BYTES + 2 * STEP_BYTES;

/// How the daemon learns that its disk has grown.
#[derive(Clone, Copy)]
pub(crate) enum News<'a> {
    /// SIGHUP.
    Signal(&'a Daemon),
    /// The command `resize` on this control socket.
    Command(&'a Path),
    /// It looks from time to time.
    Itself,
}

impl News<'_> {
    fn tell(self) {
        match self {
            Self::Signal(daemon) => daemon.signal(Signal::HUP),
            Self::Command(control) => {
                control::ask(control, &json!({ "command": "resize" }));
            }
            Self::Itself => {}
        }
    }
}

/// Grows the image under a machine that runs the check "grow": once by a hole, once by storage. The guest writes what was
/// added; its last word is the checksum of that, which is for `expect_added`.
pub(crate) fn grow_in_steps(machine: &mut Machine, image: &Path, [first, second]: [News<'_>; 2]) {
    assert_eq!(machine.expect_announcement(), Announcement::Loaded);
    let file = File::options().write(true).open(image).expect("the image is ours");
    let mut size = SIZE_BYTES + STEP_BYTES;
    file.set_len(size).expect("there is room for a hole");
    first.tell();
    assert_eq!(machine.expect_announcement(), Announcement::SizeBytes(size));
    fallocate(&file, FallocateFlags::empty(), size, STEP_BYTES).expect("there is room");
    size += STEP_BYTES;
    second.tell();
    assert_eq!(machine.expect_announcement(), Announcement::SizeBytes(size));
}

/// Fails unless what was added has this checksum, which the guest has found on its disk.
pub(crate) fn expect_added(image: &Path, checksum: &str) {
    let mut file = File::open(image).expect("the image is ours");
    file.seek(SeekFrom::Start(SIZE_BYTES)).expect("a file can be sought in");
    assert_eq!(pattern::checksum(&mut file).expect("the image can be read"), checksum);
}

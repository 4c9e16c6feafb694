//! What happens where a test cannot run: it says why, and fails where the environment says that it must run.

use std::path::Path;

use rustix::fs::{Mode, OFlags};
use tempfile::TempDir;

use crate::temp_dir_in;

/// A directory that outlives a reboot, and so is on storage, where that for temporary files may be in memory.
const ON_STORAGE: &str = "/var/tmp";

/// Whether a test that needs root's rights cannot run, for the test to return then; says what it needs them for. Unlike a
/// missing part, this is no failure where all tests must run: who is not root runs all that needs no root.
pub fn lacks_root(purpose: &str) -> bool {
    let lacks = !rustix::process::geteuid().is_root();
    if lacks {
        eprintln!("not run: {purpose} needs root");
    }
    lacks
}

/// A private directory that is on storage, where `/tmp` may be in memory.
pub fn temp_dir_on_storage() -> TempDir {
    temp_dir_in(Path::new(ON_STORAGE))
}

/// A private directory on a file system that has direct I/O. `None`, for the test to return then, where the machine has none
/// such: that is no part that one could add.
pub fn temp_dir_with_direct_io() -> Option<TempDir> {
    let directory = temp_dir_on_storage();
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    match rustix::fs::open(directory.path().join("probe"), flags, Mode::RUSR | Mode::WUSR) {
        Ok(_) => Some(directory),
        Err(error) => {
            eprintln!("not run: {ON_STORAGE} has no direct I/O: {error}");
            None
        }
    }
}

/// Says why a test cannot run here, for the test to return after that.
///
/// # Panics
/// Where `REQUIRE_ALL=1` is set, as `make test` does: there a missing part is a failure, not a reason to skip.
pub fn cannot_run(reason: &str) {
    assert!(
        std::env::var_os("REQUIRE_ALL").is_none_or(|value| value != "1"),
        "REQUIRE_ALL=1, but this test cannot run: {reason}"
    );
    eprintln!("cannot run here: {reason}");
}

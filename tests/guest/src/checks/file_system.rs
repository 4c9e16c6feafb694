//! An ext4 file system made, used, unmounted, mounted again and read, and unmounted for the host to examine.

use std::ffi::CStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use guest::pattern;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::{Failure, drop_caches, run_program};
use crate::parameters::Parameters;

/// Where the disk is mounted.
pub(super) const MOUNT_POINT: &str = "/mnt";
/// Many small files make metadata and journal traffic, which the pattern checks lack.
const SMALL_FILE_COUNT: u64 = 200;
const SMALL_FILE_BYTES: u64 = 5000;
const LARGE_FILE_BYTES: u64 = 8 << 20;

pub(super) fn run(parameters: &Parameters) -> Result<String, Failure> {
    let seed = parameters.seed()?;
    // "-F": a whole disk, not a partition.
    run_program(
        Command::new("/sbin/mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(&parameters.disk),
    )?;
    mount_disk(parameters, "ext4")?;
    for index in 0..SMALL_FILE_COUNT {
        write_file(&small_file(index), seed + index, SMALL_FILE_BYTES)?;
    }
    write_file(&large_file(), seed, LARGE_FILE_BYTES)?;
    for index in (0..SMALL_FILE_COUNT).step_by(2) {
        fs::remove_file(small_file(index))?;
    }
    unmount(MOUNT_POINT, UnmountFlags::empty())?;
    drop_caches()?;

    mount_disk(parameters, "ext4")?;
    for index in (1..SMALL_FILE_COUNT).step_by(2) {
        compare_file(&small_file(index), seed + index, SMALL_FILE_BYTES)?;
    }
    compare_file(&large_file(), seed, LARGE_FILE_BYTES)?;
    unmount(MOUNT_POINT, UnmountFlags::empty())?;
    Ok(format!("{} files", SMALL_FILE_COUNT / 2 + 1))
}

fn small_file(index: u64) -> PathBuf {
    Path::new(MOUNT_POINT).join(format!("small-{index}"))
}

fn large_file() -> PathBuf {
    Path::new(MOUNT_POINT).join("large")
}

/// Mounts the disk, which has a file system of this kind.
pub(super) fn mount_disk(parameters: &Parameters, kind: &str) -> Result<(), Failure> {
    mount(&parameters.disk, MOUNT_POINT, kind, MountFlags::empty(), None::<&CStr>)
        .map_err(|error| format!("cannot mount {}: {error}", parameters.disk.display()).into())
}

/// Writes a file of the pattern of `seed`, which is stable then; its entry in the directory need not be.
pub(super) fn write_file(path: &Path, seed: u64, len_bytes: u64) -> Result<(), Failure> {
    let mut file = File::create(path)?;
    pattern::write(&mut file, seed, len_bytes)?;
    Ok(file.sync_all()?)
}

/// Fails unless the file has the pattern of `seed` and nothing else.
pub(super) fn compare_file(path: &Path, seed: u64, len_bytes: u64) -> Result<(), Failure> {
    let mut expected = Vec::new();
    pattern::write(&mut expected, seed, len_bytes)?;
    if fs::read(path)? == expected {
        Ok(())
    } else {
        Err(format!("{} has other data than written", path.display()).into())
    }
}

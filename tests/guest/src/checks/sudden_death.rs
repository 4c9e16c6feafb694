//! A file system at work when its machine dies without a warning, and what of it is there for the next machine.
//!
//! Two things are at work. This process writes file after file; each is announced to the host once it is stable, and whatever
//! was announced must be there afterwards. Beside it fio overwrites one large file at random, past the page cache, and
//! reads back and verifies what it has just written: what it was doing at the end may have happened or not, but each block
//! must be one of those that were written there, whole.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::Duration;

use guest::announcement::Announcement;
use rustix::mount::{UnmountFlags, unmount};

use super::file_system::{MOUNT_POINT, compare_file, mount_disk, write_file};
use super::{Failure, attribute, run_program};
use crate::parameters::Parameters;

/// The large file: small enough that each block is overwritten several times before the machine dies.
const LARGE_BYTES: u64 = 4 << 20;
/// Files have up to this many bytes: a few data blocks each, so that there is metadata to every few writes.
const SMALL_BYTES_MAX: u64 = 48 << 10;
/// More passes over the large file than any machine of a test lives for.
const ENDLESS: &str = "--loops=1000000";
/// Reads for the first file to wait for: fio has then overwritten the large file twice, and verified it.
const READ_COUNT: u64 = 2 * LARGE_BYTES / 4096;
/// How often to look at the disk's counters.
const STATISTICS_PERIOD: Duration = Duration::from_millis(10);
/// The files that are written at most: many times what the host waits for, few enough for the smallest disk.
const FILE_COUNT_MAX: u64 = 1000;

/// Writes and announces files, with fio beside it, and so does not end by itself but when something is wrong.
pub(super) fn work_until_death(parameters: &Parameters) -> Result<String, Failure> {
    let (kind, seed, before) = (parameters.kind()?, parameters.seed()?, parameters.files()?);
    let is_new = before == 0;
    if is_new {
        make_file_system(kind, &parameters.disk)?;
    }
    mount_disk(parameters, kind)?;
    if is_new {
        // Each block is there with its checksum before the first one is overwritten.
        run_program(fio().args(["--rw=write", "--bs=64k", "--end_fsync=1", "--do_verify=0"]))?;
    }
    let mut overwriting = fio()
        .args(["--rw=randwrite", "--bs=4k", "--fsync=64", "--iodepth=16"])
        .args(["--do_verify=1", "--verify_backlog=128", ENDLESS])
        .spawn()?;
    // Before that a file would be alone on the disk, and be announced before anything else is at work.
    wait_for_reads(parameters, &mut overwriting)?;
    for index in before..before + FILE_COUNT_MAX {
        write_file(&small_file(index), seed + index, small_bytes(index))?;
        File::open(MOUNT_POINT)?.sync_all()?;
        println!("{}", Announcement::Durable(index + 1));
        expect_running(&mut overwriting)?;
    }
    Err("the machine lives on".into())
}

/// Mounts the file system, which replays its journal, reads what must be there, and leaves it unmounted.
pub(super) fn look_for_survivors(parameters: &Parameters) -> Result<String, Failure> {
    let (kind, seed, count) = (parameters.kind()?, parameters.seed()?, parameters.files()?);
    mount_disk(parameters, kind)?;
    for index in 0..count {
        compare_file(&small_file(index), seed + index, small_bytes(index))?;
    }
    run_program(fio().args(["--rw=read", "--bs=64k"]))?;
    unmount(MOUNT_POINT, UnmountFlags::empty())?;
    Ok(format!("{count} files and {LARGE_BYTES} bytes of blocks"))
}

/// Waits until fio verifies what it has written: nobody else reads from the disk all the time.
fn wait_for_reads(parameters: &Parameters, fio: &mut Child) -> Result<(), Failure> {
    let before = completed_reads(parameters)?;
    while completed_reads(parameters)? < before + READ_COUNT {
        expect_running(fio)?;
        // tidy(sleep): a counter of the kernel's cannot be waited for.
        thread::sleep(STATISTICS_PERIOD);
    }
    Ok(())
}

/// fio ends by itself only when it has found other data than it wrote.
fn expect_running(fio: &mut Child) -> Result<(), Failure> {
    match fio.try_wait()? {
        None => Ok(()),
        Some(status) => Err(format!("fio ended with {status}").into()),
    }
}

/// The disk's first counter (Documentation/block/stat.rst).
fn completed_reads(parameters: &Parameters) -> Result<u64, Failure> {
    let counters = attribute(parameters, "stat")?;
    Ok(counters.split_whitespace().next().ok_or("the disk has no counters")?.parse()?)
}

fn make_file_system(kind: &str, disk: &Path) -> Result<(), Failure> {
    match kind {
        // "-F": a whole disk, not a partition.
        "ext4" => {
            run_program(Command::new("/sbin/mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(disk))
        }
        "xfs" => run_program(Command::new("/sbin/mkfs.xfs").arg("-q").arg(disk)),
        other => Err(format!("there is no kind of file system {other:?}").into()),
    }
}

/// fio on the large file, whose every 4 KiB carry a checksum of themselves and of their place.
fn fio() -> Command {
    let mut command = Command::new("/usr/bin/fio");
    command
        .args(["--name=large", "--thread", "--direct=1", "--ioengine=libaio", "--eta=never"])
        .args(["--verify=crc32c", "--verify_interval=4k", "--verify_fatal=1"])
        .arg(format!("--size={LARGE_BYTES}"))
        .arg(format!("--filename={MOUNT_POINT}/large"));
    command
}

fn small_file(index: u64) -> PathBuf {
    Path::new(MOUNT_POINT).join(format!("small-{index}"))
}

/// Sizes that rarely repeat and rarely end with a block: 3677 is a prime, so all sizes come before the first one again.
fn small_bytes(index: u64) -> u64 {
    1 + index * 3677 % SMALL_BYTES_MAX
}

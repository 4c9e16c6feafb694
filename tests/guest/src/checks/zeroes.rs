//! A part of the disk zeroed with VIRTIO_BLK_T_WRITE_ZEROES, once keeping the blocks and once giving them back, reads as
//! zeroes, and its neighbours keep their data.

use std::fs::File;
use std::os::unix::fs::FileExt;

use guest::pattern;
use rustix::fs::{FallocateFlags, fallocate};

use super::{Failure, attribute, drop_caches};
use crate::parameters::Parameters;

/// One part: kept, zeroed, kept, zeroed and unmapped, kept.
const PART_BYTES: u64 = 1 << 20;
const PART_COUNT: u64 = 5;

pub(super) fn run(parameters: &Parameters) -> Result<String, Failure> {
    let most = attribute(parameters, "queue/write_zeroes_max_bytes")?;
    if most == "0" {
        // The kernel would write zeroes itself, and the check would say nothing of the daemon.
        return Err("the driver says that the disk cannot write zeroes".into());
    }
    let seed = parameters.seed()?;
    let mut disk = File::options().read(true).write(true).open(&parameters.disk)?;
    pattern::write(&mut disk, seed, PART_COUNT * PART_BYTES)?;
    disk.sync_all()?;
    // On a block device these two are its write-zeroes request without and with leave to unmap (block/fops.c).
    fallocate(
        &disk,
        FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        PART_BYTES,
        PART_BYTES,
    )?;
    fallocate(
        &disk,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        3 * PART_BYTES,
        PART_BYTES,
    )?;
    drop_caches()?;
    for part in 0..PART_COUNT {
        let mut expected = vec![0; usize::try_from(PART_BYTES)?];
        if part % 2 == 0 {
            pattern::fill(&mut expected, seed, part * PART_BYTES);
        }
        let mut found = vec![0xff; expected.len()];
        disk.read_exact_at(&mut found, part * PART_BYTES)?;
        if found != expected {
            return Err(format!("part {part} has other data than expected").into());
        }
    }
    Ok(format!("write_zeroes_max_bytes={most}"))
}

//! I/O past the page cache (`O_DIRECT`) and through it see each other's data.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use guest::pattern;
use rustix::fs::OFlags;

use super::{Failure, drop_caches};
use crate::parameters::Parameters;

/// A block that `O_DIRECT` accepts with any logical block size in use.
const BLOCK_BYTES: usize = 4096;
/// Enough blocks that requests of one block are in the majority and their order would show.
const BLOCK_COUNT: u64 = 256;

#[repr(align(4096))]
struct Block([u8; BLOCK_BYTES]);

pub(super) fn run(parameters: &Parameters) -> Result<String, Failure> {
    let seed = parameters.seed()?;
    let direct_flag = i32::try_from(OFlags::DIRECT.bits())?;
    let direct = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(direct_flag)
        .open(&parameters.disk)?;
    let cached = File::options().read(true).write(true).open(&parameters.disk)?;
    let offsets = || (0..BLOCK_COUNT).map(|index| index * BLOCK_BYTES as u64);

    // Backwards, so that the kernel cannot merge neighbours into one large request.
    for offset in offsets().rev() {
        let mut block = Block([0; BLOCK_BYTES]);
        pattern::fill(&mut block.0, seed, offset);
        direct.write_all_at(&block.0, offset)?;
    }
    compare(&cached, seed, offsets(), "a cached read after a direct write")?;

    for offset in offsets() {
        let mut block = Block([0; BLOCK_BYTES]);
        pattern::fill(&mut block.0, seed + 1, offset);
        cached.write_all_at(&block.0, offset)?;
    }
    cached.sync_all()?;
    drop_caches()?;
    compare(&direct, seed + 1, offsets(), "a direct read after a cached write")?;
    Ok(format!("{BLOCK_COUNT} blocks each way"))
}

fn compare(
    file: &File,
    seed: u64,
    offsets: impl Iterator<Item = u64>,
    what: &str,
) -> Result<(), Failure> {
    for offset in offsets {
        let mut expected = [0; BLOCK_BYTES];
        pattern::fill(&mut expected, seed, offset);
        let mut found = Block([0; BLOCK_BYTES]);
        file.read_exact_at(&mut found.0, offset)?;
        if found.0 != expected {
            return Err(format!("{what} found other data at offset {offset}").into());
        }
    }
    Ok(())
}

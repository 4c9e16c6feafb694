//! The whole disk overwritten through the page cache and flushed, read back from the device, and its checksum printed.

use std::fs::File;

use guest::pattern;

use super::{Failure, drop_caches, size_bytes};
use crate::parameters::Parameters;

pub(super) fn run(parameters: &Parameters) -> Result<String, Failure> {
    let seed = parameters.seed()?;
    let size = size_bytes(parameters)?;
    let mut disk = File::options().read(true).write(true).open(&parameters.disk)?;
    pattern::write(&mut disk, seed, size)?;
    disk.sync_all()?;
    drop(disk);
    drop_caches()?;
    Ok(pattern::checksum(&mut File::open(&parameters.disk)?)?)
}

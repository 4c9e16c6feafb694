//! The cache that the driver finds is the one expected, and, where the host says so, is switched to the other kind; data is
//! written, flushed as the driver sees fit, and read back in either.

use std::fs::{self, File};

use guest::pattern;

use super::{Failure, attribute, attribute_path, drop_caches};
use crate::parameters::Parameters;

/// The attribute that tells the kind of cache and switches it.
const CACHE: &str = "cache_type";
/// Enough for several requests; each of them is to be stable by the end.
const DATA_BYTES: u64 = 4 << 20;

pub(super) fn run(parameters: &Parameters) -> Result<String, Failure> {
    let wanted = parameters.cache.as_ref().ok_or("the check needs cache= on the command line")?;
    expect(parameters, wanted)?;
    if let Some(other) = &parameters.switch {
        fs::write(attribute_path(parameters, CACHE)?, other)?;
        expect(parameters, other)?;
    }
    let mut disk = File::options().read(true).write(true).open(&parameters.disk)?;
    pattern::write(&mut disk, parameters.seed()?, DATA_BYTES)?;
    disk.sync_all()?;
    drop(disk);
    drop_caches()?;
    Ok(pattern::checksum(&mut File::open(&parameters.disk)?)?)
}

fn expect(parameters: &Parameters, wanted: &str) -> Result<(), Failure> {
    let found = attribute(parameters, CACHE)?;
    if found == wanted {
        Ok(())
    } else {
        Err(format!("the driver says {found:?}, not {wanted:?}").into())
    }
}

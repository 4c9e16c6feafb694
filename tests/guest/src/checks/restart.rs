//! The machine restarted from within: the first run marks the disk's last sector and restarts, the second one finds the mark.
//!
//! The mark is data that must outlive the restart, and what tells the second run that it is the second.

use std::fs::File;
use std::os::unix::fs::FileExt;

use guest::pattern;
use rustix::system::{RebootCommand, reboot};

use super::{Failure, size_bytes};
use crate::parameters::Parameters;

const SECTOR_BYTES: usize = 512;

pub(super) fn run(parameters: &Parameters) -> Result<String, Failure> {
    let seed = parameters.seed()?;
    let at = size_bytes(parameters)? - SECTOR_BYTES as u64;
    let disk = File::options().read(true).write(true).open(&parameters.disk)?;
    let mut mark = [0; SECTOR_BYTES];
    pattern::fill(&mut mark, seed, at);
    let mut found = [0; SECTOR_BYTES];
    disk.read_exact_at(&mut found, at)?;
    if found == mark {
        return Ok("the mark is there after the restart".into());
    }
    if found != [0; SECTOR_BYTES] {
        return Err("the last sector has neither zeroes nor the mark".into());
    }
    disk.write_all_at(&mark, at)?;
    disk.sync_all()?;
    println!("restarting");
    reboot(RebootCommand::Restart)?;
    Err("the kernel did not restart the machine".into())
}

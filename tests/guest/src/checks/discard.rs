//! The whole disk discarded (`BLKDISCARD`); the host looks whether its file has given the blocks back.

use std::process::Command;

use super::{Failure, attribute, drop_caches, run_program};
use crate::parameters::Parameters;

pub(super) fn run(parameters: &Parameters) -> Result<String, Failure> {
    let most = attribute(parameters, "queue/discard_max_bytes")?;
    if most == "0" {
        return Err("the driver says that the disk cannot discard".into());
    }
    // busybox has the ioctl, for which there is no safe wrapper.
    run_program(Command::new("/bin/busybox").arg("blkdiscard").arg(&parameters.disk))?;
    drop_caches()?;
    Ok(format!("discard_max_bytes={most}"))
}

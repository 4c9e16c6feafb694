//! What the driver tells of the disk is what the daemon was started with: size, serial number, block
//! size, number of queues.

use std::fs;

use super::{Failure, attribute, size_bytes};
use crate::parameters::Parameters;

pub(super) fn run(parameters: &Parameters) -> Result<String, Failure> {
    let size = size_bytes(parameters)?;
    if let Some(wanted) = parameters.size_bytes.filter(|wanted| *wanted != size) {
        return Err(format!("the disk has {size} bytes, not {wanted}").into());
    }
    let serial = attribute(parameters, "serial")?;
    if let Some(wanted) = parameters.serial.as_ref().filter(|wanted| **wanted != serial) {
        return Err(format!("the disk's serial number is {serial:?}, not {wanted:?}").into());
    }
    let block_bytes: u32 = attribute(parameters, "queue/logical_block_size")?.parse()?;
    if let Some(wanted) = parameters.block_bytes.filter(|wanted| *wanted != block_bytes) {
        return Err(format!("the disk has blocks of {block_bytes} bytes, not {wanted}").into());
    }
    let queues = queue_count(parameters)?;
    if let Some(wanted) = parameters.queues.filter(|wanted| *wanted != queues) {
        return Err(format!("the driver uses {queues} queues, not {wanted}").into());
    }
    let read_only = attribute(parameters, "ro")?;
    let discard_max = attribute(parameters, "queue/discard_max_bytes")?;
    Ok(format!(
        "size_bytes={size} serial={serial} block_bytes={block_bytes} queues={queues} ro={read_only} discard_max_bytes={discard_max}"
    ))
}

/// The block layer has one directory a hardware queue.
fn queue_count(parameters: &Parameters) -> Result<usize, Failure> {
    let disk = parameters.disk.file_name().ok_or("the disk is no device")?;
    let path = format!("/sys/block/{}/mq", disk.to_string_lossy());
    Ok(fs::read_dir(&path).map_err(|error| format!("cannot list {path}: {error}"))?.count())
}

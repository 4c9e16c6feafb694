//! `vhost-blk`: a disk as a virtio block device, served to one virtual machine over vhost-user.

mod args;
mod config;
mod device;
mod disk;
mod request;
mod zeroing;

use std::process::ExitCode;

use common::daemon::{capabilities, serve};
use common::device::Device;

use crate::device::BlockDevice;
use crate::disk::{Disk, OpenError};

/// What `--print-capabilities` lists (vhost-user, "vhost-user-blk program conventions").
const CAPABILITIES: &[&str] = &["blk-file", "read-only"];

fn main() -> ExitCode {
    if capabilities::requested(std::env::args_os().skip(1)) {
        return match capabilities::print(BlockDevice::NAME, CAPABILITIES) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_closed) => ExitCode::FAILURE,
        };
    }
    let options = match args::parse(std::env::args_os()) {
        Ok(options) => options,
        Err(error) => error.exit(),
    };
    serve::run(&options.daemon, || {
        let disk = Disk::open(&options.disk, options.open).map_err(NoDisk)?;
        Ok::<_, NoDisk>(
            BlockDevice::new(disk, options.serial, options.queues).watched(options.watch_size),
        )
    })
}

/// The disk cannot be served; the source says why.
#[derive(Debug, thiserror::Error)]
#[error("no disk (--blk-file, --disk)")]
struct NoDisk(#[source] OpenError);

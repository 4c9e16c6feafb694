//! `vhost-blk`: a disk as a virtio block device, served to one virtual machine over vhost-user.
//!
//! The daemon is one function, [`run`]; `main.rs` calls it. A library, so that a fuzzer reaches the
//! device ([`open`], with the feature `fuzzing`); nothing else is public.

mod args;
mod config;
mod device;
mod disk;
mod request;
mod zeroing;

use std::ffi::OsString;
use std::process::ExitCode;

use common::daemon::{capabilities, serve};
use common::device::Device;

use crate::args::Options;
use crate::device::BlockDevice;
use crate::disk::{Disk, OpenError};

/// What `--print-capabilities` lists (vhost-user, "vhost-user-blk program conventions").
const CAPABILITIES: &[&str] = &["blk-file", "read-only"];

/// The whole daemon, with these arguments, the program's name first.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    if capabilities::requested(arguments.iter().skip(1).cloned()) {
        return match capabilities::print(BlockDevice::NAME, CAPABILITIES) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_closed) => ExitCode::FAILURE,
        };
    }
    let options = match args::parse(arguments) {
        Ok(options) => options,
        Err(error) => error.exit(),
    };
    serve::run(&options.daemon, &options.limits, || device(&options))
}

/// The device that a daemon with these arguments serves.
///
/// # Errors
/// As [`run`] would say it.
#[cfg(feature = "fuzzing")]
pub fn open(arguments: impl IntoIterator<Item = OsString>) -> Result<impl Device, String> {
    let options = args::parse(arguments).map_err(|error| error.to_string())?;
    device(&options).map_err(|error| format!("{error}: {}", error.0))
}

fn device(options: &Options) -> Result<BlockDevice, NoDisk> {
    let disk = Disk::open(&options.disk, options.open).map_err(NoDisk)?;
    let device = BlockDevice::new(disk, options.serial, options.queues);
    Ok(device.watched(options.watch_size))
}

/// The disk cannot be served; the source says why.
#[derive(Debug, thiserror::Error)]
#[error("no disk (--blk-file, --disk)")]
struct NoDisk(#[source] OpenError);

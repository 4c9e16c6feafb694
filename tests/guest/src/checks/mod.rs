//! The checks, one a file. Each returns what it found, for the host to compare, or why it failed.

mod button;
mod cache;
mod console;
mod dialogue;
mod direct;
mod discard;
mod file_system;
mod grow;
mod identity;
mod load;
mod machine;
mod network;
mod rate;
mod read;
mod restart;
mod sudden_death;
mod write;
mod zeroes;

use std::error::Error;
use std::fs;
use std::process::Command;

use crate::parameters::Parameters;

/// Why a check failed, in words: it is only ever printed.
pub(crate) type Failure = Box<dyn Error>;

/// Runs the check that the command line names.
pub(crate) fn run(parameters: &Parameters) -> Result<String, Failure> {
    match parameters.check.as_str() {
        "identity" => identity::run(parameters),
        "read" => read::run(parameters),
        "write" => write::run(parameters),
        "cache" => cache::run(parameters),
        "direct" => direct::run(parameters),
        "discard" => discard::run(parameters),
        "zeroes" => zeroes::run(parameters),
        "load" => load::run(parameters),
        "network" => network::run(parameters),
        "dialogue" => dialogue::run(parameters),
        "console" => console::run(),
        "machine" => machine::run(parameters),
        "button" => button::run(),
        "restart" => restart::run(parameters),
        "grow" => grow::run(parameters),
        "rate" => rate::run(parameters),
        "until-death" => sudden_death::work_until_death(parameters),
        "survivors" => sudden_death::look_for_survivors(parameters),
        "file-system" => file_system::run(parameters),
        other => Err(format!("there is no check {other:?}").into()),
    }
}

/// An attribute that the kernel shows for the disk in sysfs, without its line end.
fn attribute(parameters: &Parameters, name: &str) -> Result<String, Failure> {
    let path = attribute_path(parameters, name)?;
    let value =
        fs::read_to_string(&path).map_err(|error| format!("cannot read {path}: {error}"))?;
    Ok(value.trim().to_owned())
}

fn attribute_path(parameters: &Parameters, name: &str) -> Result<String, Failure> {
    let disk = parameters
        .disk
        .file_name()
        .ok_or_else(|| format!("{} is no device", parameters.disk.display()))?;
    Ok(format!("/sys/block/{}/{name}", disk.to_string_lossy()))
}

/// The disk's size by the kernel's word, which counts 512-byte sectors whatever the block size is.
fn size_bytes(parameters: &Parameters) -> Result<u64, Failure> {
    Ok(attribute(parameters, "size")?.parse::<u64>()? * 512)
}

/// Runs a program of the initial RAM disk and fails unless it succeeds; its output goes to the console.
fn run_program(command: &mut Command) -> Result<(), Failure> {
    let status = command.status().map_err(|error| format!("cannot start {command:?}: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?} ended with {status}").into()) }
}

/// Makes the kernel forget what it has cached of every disk, so that the next read reaches the device.
fn drop_caches() -> Result<(), Failure> {
    rustix::fs::sync();
    Ok(fs::write("/proc/sys/vm/drop_caches", "3")?)
}

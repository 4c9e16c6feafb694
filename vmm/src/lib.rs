//! outboard-vmm: a KVM virtual machine monitor that owns processors and their exits, and nothing else.
//!
//! Memory is one shared file, and every device is another process, to which a front end speaks vhost-user. What is left is
//! here: a guest's [addresses](layout), what answers to them ([`bus`]), and the machine that runs.

// The rooms that use these are being built.
#[allow(dead_code)]
mod bus;
#[allow(dead_code)]
mod front_end;
#[allow(dead_code)]
mod interrupts;
#[allow(dead_code)]
mod layout;
#[allow(dead_code)]
mod pci;
#[allow(dead_code)]
mod virtio;

use std::ffi::OsString;
use std::process::ExitCode;

/// Runs a virtual machine until it is powered off.
pub fn run(_arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    ExitCode::SUCCESS
}

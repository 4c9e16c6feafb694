//! `vhost-console`: a console as a virtio console device, served to one virtual machine over vhost-user.
//!
//! The daemon is one function, [`run`]; `main.rs` calls it. A library, so that a fuzzer reaches the
//! device (`open`, with the feature `fuzzing`); nothing else is public.

mod config;
mod control;
mod device;
mod doorbell;
mod drops;
mod inbox;
mod input;
mod output;
mod port;
mod ringer;
mod transcript;

use std::ffi::OsString;
use std::process::ExitCode;

/// The whole daemon, with these arguments, the program's name first.
pub fn run(_arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    ExitCode::FAILURE
}

//! `vhost-console`: a console as a virtio console device, served to one virtual machine over vhost-user.
//!
//! The daemon is one function, [`run`]; `main.rs` calls it. A library, so that a fuzzer reaches the
//! device (`open`, with the feature `fuzzing`); nothing else is public.

mod command;
mod config;
mod control;
mod device;
mod doorbell;
mod drops;
mod endpoint;
mod hub;
mod inbox;
mod input;
mod output;
mod port;
mod port_spec;
mod ringer;
mod transcript;
mod watch;

use std::ffi::OsString;
use std::process::ExitCode;

/// The whole daemon, with these arguments, the program's name first.
pub fn run(_arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    ExitCode::FAILURE
}

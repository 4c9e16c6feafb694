//! `vhost-console`: a console as a virtio console device, served to one virtual machine over vhost-user.
//!
//! The daemon is one function, [`run`]; `main.rs` calls it. A library, so that a fuzzer reaches the
//! device ([`open`], with the feature `fuzzing`); nothing else is public.

mod args;
mod attach;
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
use std::sync::Arc;

use common::daemon::{capabilities, serve};
use common::device::Device;
use common::rate_limit::Change;

use crate::args::Options;
use crate::device::{ConsoleDevice, Shared};
use crate::hub::PlugError;

/// What `--print-capabilities` lists: vhost-user has no words for a console's options.
const CAPABILITIES: &[&str] = &[];

/// The whole program, with these arguments, its name first.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    if arguments.get(1).is_some_and(|first| first == "attach") {
        return attach::run(arguments);
    }
    if capabilities::requested(arguments.iter().skip(1).cloned()) {
        return match capabilities::print(ConsoleDevice::NAME, CAPABILITIES) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_closed) => ExitCode::FAILURE,
        };
    }
    let options = match args::parse(arguments) {
        Ok(options) => options,
        Err(error) => error.exit(),
    };
    serve::run(&options.daemon, &Change::default(), || device(&options))
}

/// The device that a daemon with these arguments serves.
///
/// # Errors
/// As [`run`] would say it.
#[cfg(feature = "fuzzing")]
pub fn open(arguments: impl IntoIterator<Item = OsString>) -> Result<impl Device, String> {
    let options = args::parse(arguments).map_err(|error| error.to_string())?;
    device(&options).map_err(|error| error.to_string())
}

fn device(options: &Options) -> Result<ConsoleDevice, NoConsole> {
    let shared = Shared::new(options.shape).map_err(|errno| NoConsole::Bells(errno.into()))?;
    let device = ConsoleDevice::new(Arc::new(shared));
    for (number, spec) in (1..).zip(&options.ports) {
        let plugged = device.hub().plug(spec);
        plugged.map_err(|source| NoConsole::Port { number, source })?;
    }
    Ok(device)
}

/// The console cannot be served; the source says why.
#[derive(Debug, thiserror::Error)]
enum NoConsole {
    #[error("no console: it needs two descriptors a port (--max-ports)")]
    Bells(#[source] std::io::Error),
    #[error("no console: port {number} (--port)")]
    Port { number: usize, source: PlugError },
}

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
use crate::port_spec::PortSpec;

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
    for (number, spec) in in_order(&options.ports) {
        let plugged = device.hub().plug(spec);
        plugged.map_err(|source| NoConsole::Port { number, source })?;
    }
    Ok(device)
}

/// Ports with their numbers on the command line, in the order in which they take places: those that have one first, then the
/// first console. Place 0 is all that a front end has which strips the device's features, and that is to be a console.
fn in_order(ports: &[PortSpec]) -> Vec<(usize, &PortSpec)> {
    let mut ports: Vec<_> = (1..).zip(ports).collect();
    let is_console = |(_, spec): &&(usize, &PortSpec)| spec.is_console && spec.id.is_none();
    let first = ports.iter().find(is_console).map(|(number, _)| *number);
    ports.sort_by_key(|(number, spec)| (spec.id.is_none(), Some(*number) != first));
    ports
}

/// The console cannot be served; the source says why.
#[derive(Debug, thiserror::Error)]
enum NoConsole {
    #[error("no console: it needs two descriptors a port (--max-ports)")]
    Bells(#[source] std::io::Error),
    #[error("no console: port {number} (--port)")]
    Port { number: usize, source: PlugError },
}

#[cfg(test)]
mod tests {
    use crate::port_spec::PortSpec;

    #[test]
    fn ports_with_places_and_the_first_console_go_first() {
        let order = |words: &[&str]| {
            let ports: Vec<PortSpec> = words
                .iter()
                .map(|words| format!("{words}endpoint=null").parse().unwrap())
                .collect();
            super::in_order(&ports).iter().map(|(number, _)| *number).collect::<Vec<_>>()
        };
        assert_eq!(order(&["", "console,", "id=1,", "console,", "id=0,"]), [3, 5, 2, 1, 4]);
        assert_eq!(order(&["console,", ""]), [1, 2]);
        assert_eq!(order(&["", "console,id=3,", ""]), [2, 1, 3]);
    }
}

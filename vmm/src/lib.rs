//! outboard-vmm: a KVM virtual machine monitor that owns processors and their exits, and nothing else.
//!
//! Memory is one shared file, and every device is another process, to which a front end speaks vhost-user. What is left is
//! here: the guest's [addresses](layout) and [what answers to them](bus), [its processors](vcpu) and
//! [what is in their registers](cpu), [the kernel](loader) and [the tables](acpi) that it reads, and
//! [the machine](machine) that is made of all this. Its devices are functions [on PCI](pci), of [virtio's kind](virtio),
//! each with [a front end](front_end) that keeps its daemon, and with [interrupts] that KVM delivers. [Daemons](daemons) can be
//! started by this process, too. Each thread makes [the system calls](seccomp) that it needs, and no others.

mod acpi;
mod args;
mod bus;
mod control;
mod cpu;
mod daemons;
mod front_end;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod interrupts;
mod layout;
mod loader;
mod machine;
mod memory;
mod pci;
mod power;
mod readiness;
mod seccomp;
mod serial;
mod vcpu;
mod virtio;

use std::error::Error;
use std::ffi::OsString;
use std::process::ExitCode;

use tracing_subscriber::filter::LevelFilter;

use crate::control::Signals;
use crate::machine::Machine;

/// Runs a virtual machine until it is powered off. The status is 0 then, 1 when it cannot run (on), 2 for a wrong command line.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let options = match args::parse(arguments) {
        Ok(options) => options,
        Err(error) => error.exit(),
    };
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time()
        .with_max_level(LevelFilter::INFO)
        .init();
    // Before there is any other thread: all of them are to leave these signals to this one.
    let ended = Signals::new()
        .map_err(|source| machine::Error::Host { action: "take signals", source })
        .and_then(|signals| Machine::new(options, signals))
        .and_then(Machine::run);
    match ended {
        Ok(end) => {
            tracing::info!("the machine has ended: {end:?}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            tracing::error!("{}", with_sources(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error and what caused it, in one line.
fn with_sources(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

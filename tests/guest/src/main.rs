//! PID 1 of a test guest.
//!
//! Contract: says that it runs, mounts proc, sys and dev, loads the modules in `/modules` by order of name, runs the check that the kernel
//! command line names, prints one verdict line on the console and powers off, whatever happens before. The words it reads
//! from the command line are in [`parameters`].
//!
//! It is linked statically and needs no root file system but its initial RAM disk. It never starts a second check: a guest
//! costs a second or two, and one that is new each time cannot carry a fault over.

mod checks;
mod environment;
mod parameters;

use std::panic;

use guest::verdict::Verdict;
use guest::{EQUIPPED, UP};

use crate::parameters::Parameters;

fn main() {
    println!("{UP}");
    // A PID 1 that panics stops the kernel before the host has heard why.
    let outcome = panic::catch_unwind(run)
        .unwrap_or_else(|_| Err("the check panicked; see the console above".into()));
    let verdict = match outcome {
        Ok(details) => Verdict::Pass(details),
        Err(error) => Verdict::Fail(error.to_string()),
    };
    println!("{verdict}");
    environment::power_off();
}

fn run() -> Result<String, checks::Failure> {
    environment::mount_kernel_file_systems()?;
    let parameters = Parameters::read()?;
    environment::load_modules()?;
    println!("{EQUIPPED}");
    checks::run(&parameters)
}

//! The program: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmm::run(std::env::args_os())
}

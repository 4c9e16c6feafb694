//! The program: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    vhost_console::run(std::env::args_os())
}

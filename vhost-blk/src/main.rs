//! The program: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    vhost_blk::run(std::env::args_os())
}

//! `without-io-uring ERROR PROGRAM ARGUMENT…`: becomes PROGRAM, for which `io_uring_setup` fails with ERROR (`EPERM`,
//! `EACCES` or `ENOSYS`), as in a container. Needs no root.
//!
//! A program of its own, because a filter cannot be taken off again: between fork and exec, where it belongs, a test may
//! not run code of its own.

use std::env::args_os;
use std::error::Error;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use rustix::io::Errno;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};

/// The system call's number, which is the same on every architecture (it is younger than their unified table).
const IO_URING_SETUP: i64 = 425;

fn main() -> ExitCode {
    match become_program() {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("without-io-uring: {error}");
            ExitCode::FAILURE
        }
    }
}

fn become_program() -> Result<std::convert::Infallible, Box<dyn Error>> {
    let mut words = args_os().skip(1);
    let usage = "usage: without-io-uring EPERM|EACCES|ENOSYS PROGRAM ARGUMENT…";
    let (error, program) = words.next().zip(words.next()).ok_or(usage)?;
    let error = match error.to_str() {
        Some("EPERM") => Errno::PERM,
        Some("EACCES") => Errno::ACCESS,
        Some("ENOSYS") => Errno::NOSYS,
        _ => return Err(usage.into()),
    };
    let filter = SeccompFilter::new(
        [(IO_URING_SETUP, Vec::new())].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(error.raw_os_error().unsigned_abs()),
        std::env::consts::ARCH.try_into()?,
    )?;
    // Sets no_new_privs, too.
    apply_filter(&BpfProgram::try_from(filter)?)?;
    Err(Command::new(program).args(words).exec().into())
}

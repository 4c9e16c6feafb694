//! A verified load on the whole disk: fio with one job a processor, each on its own part of the disk and its own hardware
//! queue, 32 requests deep.
//!
//! Every block carries a checksum of itself and of its place, and is read back and compared. fio's progress lines on the
//! console tell the host that requests are in flight.

use std::process::Command;
use std::thread;

use super::{Failure, run_program, size_bytes};
use crate::parameters::Parameters;

/// Times that each job writes its part and reads it back, unless it is told another number: some seconds under an emulator, long enough to be interrupted.
const PASS_COUNT: u32 = 4;
/// Requests that each job keeps in flight.
const DEPTH: u32 = 32;

/// The program, where a guest has it.
pub(super) const FIO: &str = "/usr/bin/fio";

pub(super) fn run(parameters: &Parameters) -> Result<String, Failure> {
    let passes = parameters.passes.unwrap_or(PASS_COUNT);
    let jobs = write_and_verify(parameters, passes)?;
    Ok(format!("jobs={jobs} depth={DEPTH} passes={passes}"))
}

/// So many passes over the disk; the answer is how many jobs made them.
pub(super) fn write_and_verify(parameters: &Parameters, passes: u32) -> Result<usize, Failure> {
    let jobs = thread::available_parallelism()?.get();
    let part_bytes = size_bytes(parameters)? / jobs as u64;
    run_program(
        Command::new(FIO)
            .args(["--name=load", "--direct=1", "--ioengine=libaio", "--group_reporting"])
            .args(["--rw=randwrite", "--bsrange=4k-64k", "--fsync=64"])
            .args(["--verify=crc32c", "--do_verify=1", "--verify_fatal=1"])
            .args(["--eta=always", "--eta-newline=500ms"])
            // The driver has a queue for each processor, so a job that stays on its processor stays on its queue.
            .args([format!("--cpus_allowed=0-{}", jobs - 1), "--cpus_allowed_policy=split".into()])
            .arg(format!("--numjobs={jobs}"))
            .arg(format!("--iodepth={DEPTH}"))
            .arg(format!("--loops={passes}"))
            .arg(format!("--size={part_bytes}"))
            .arg(format!("--offset_increment={part_bytes}"))
            .arg(format!("--filename={}", parameters.disk.display())),
    )?;
    Ok(jobs)
}

//! A whole machine: processors, a disk under a verified load, a network whose peer answers, a console that is read and written.
//!
//! Each step begins when a line comes on the console, so that whoever is there can look at the machine in between, or do
//! something to it while the load runs until the next line: fio's, where the guest has it, else one thread writes and reads back,
//! a request at a time.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use guest::announcement::Announcement;
use guest::pattern;
use rustix::fs::OFlags;

use super::load::{FIO, write_and_verify};
use super::network::{BUSYBOX, configure, ping};
use super::{Failure, attribute, run_program, size_bytes};
use crate::parameters::Parameters;

const CONSOLE: &str = "/dev/hvc0";
/// What the peer of the console is told first.
const GREETING: &str = "the machine is up";
/// A request: the alignment is that of direct I/O.
const BLOCK_BYTES: usize = 4096;
/// Blocks that are written before they are read back.
const ROUND_BLOCKS: u64 = 64;
const PING_BYTES: u32 = 1400;

#[repr(align(4096))]
struct Block([u8; BLOCK_BYTES]);

pub(super) fn run(parameters: &Parameters) -> Result<String, Failure> {
    let mut console = open_console()?;
    let mut lines = BufReader::new(console.try_clone()?).lines();
    let mut await_line = || match lines.next() {
        Some(line) => line.map(drop),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    };
    configure(parameters)?;
    let peer = parameters.peer.ok_or("the check needs peer= on the command line")?;
    ping(peer, PING_BYTES)?;
    writeln!(console, "{GREETING}")?;
    println!("{}", Announcement::Loaded);
    await_line()?;
    let before = requests(parameters)?;
    let is_over = AtomicBool::new(false);
    let rounds = thread::scope(|scope| {
        let load = scope.spawn(|| load(parameters, &is_over).map_err(|why| why.to_string()));
        let line = await_line();
        is_over.store(true, Ordering::Relaxed);
        let rounds = load.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        line.map_err(|error| error.to_string()).and(rounds)
    })?;
    println!("{}", Announcement::Found(requests(parameters)? - before));
    await_line()?;
    ping(peer, PING_BYTES)?;
    let processors = thread::available_parallelism()?;
    Ok(format!("processors={processors} rounds={rounds}"))
}

fn open_console() -> Result<File, Failure> {
    // It must not become this process's terminal.
    let flags = i32::try_from(OFlags::NOCTTY.bits())?;
    let console = OpenOptions::new().read(true).write(true).custom_flags(flags).open(CONSOLE);
    let console = console.map_err(|error| format!("{CONSOLE}: {error}"))?;
    let stdin = console.try_clone()?;
    run_program(Command::new(BUSYBOX).args(["stty", "-echo"]).stdin(stdin))?;
    Ok(console)
}

/// Writes and reads back one part of the disk after the other until it is over, and at least one; returns how many.
fn load(parameters: &Parameters, is_over: &AtomicBool) -> Result<u64, Failure> {
    if Path::new(FIO).exists() {
        return load_by_fio(parameters, is_over);
    }
    let flags = i32::try_from(OFlags::DIRECT.bits())?;
    let disk =
        OpenOptions::new().read(true).write(true).custom_flags(flags).open(&parameters.disk)?;
    let block_count = size_bytes(parameters)? / BLOCK_BYTES as u64;
    let mut rounds = 0;
    while rounds == 0 || !is_over.load(Ordering::Relaxed) {
        let first = rounds * ROUND_BLOCKS % (block_count - ROUND_BLOCKS);
        let offsets = || (first..first + ROUND_BLOCKS).map(|block| block * BLOCK_BYTES as u64);
        let mut block = Block([0; BLOCK_BYTES]);
        let mut expected = [0; BLOCK_BYTES];
        for offset in offsets() {
            pattern::fill(&mut block.0, rounds, offset);
            disk.write_all_at(&block.0, offset)?;
        }
        for offset in offsets() {
            pattern::fill(&mut expected, rounds, offset);
            disk.read_exact_at(&mut block.0, offset)?;
            if block.0 != expected {
                return Err(format!("other data than written at {offset} in round {rounds}").into());
            }
        }
        rounds += 1;
    }
    Ok(rounds)
}

/// The same, by fio, whose progress lines tell the host that requests are in flight.
fn load_by_fio(parameters: &Parameters, is_over: &AtomicBool) -> Result<u64, Failure> {
    let mut rounds = 0;
    while rounds == 0 || !is_over.load(Ordering::Relaxed) {
        write_and_verify(parameters, 1)?;
        rounds += 1;
    }
    Ok(rounds)
}

/// How many requests the disk has completed (the kernel's `Documentation/block/stat.rst`: reads first, writes fifth).
fn requests(parameters: &Parameters) -> Result<u64, Failure> {
    let text = attribute(parameters, "stat")?;
    let numbers = text.split_whitespace().map(str::parse).collect::<Result<Vec<u64>, _>>()?;
    match numbers[..] {
        [reads, _, _, _, writes, ..] => Ok(reads + writes),
        _ => Err(format!("the disk's stat is {text:?}").into()),
    }
}

//! `bench`: vhost-user-blk daemons side by side.
//!
//! For each disk and each cell (4 KiB random requests, one direction, one depth) it takes samples from all contenders in
//! turn, so that what else the machine does falls on all of them, each sample with a daemon of its own. It prints
//! Markdown. Nothing is asserted: a number is for people to judge, and only ratios within one run mean anything.
//!
//! A cache mode is a disk of its own, on which all contenders are told to use it; an engine is a contender of its own, and
//! its ratios are to QEMU's daemon on the same one. No flushes are sent, so `unsafe` does what `writeback` does.

mod contender;
mod disk;
mod sample;
mod table;

use std::error::Error;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::contender::{Contender, Dialect};
use crate::disk::{Aio, Cache, Disk};
use crate::sample::{Cell, Direction, Sample, SampleError};
use crate::table::Row;

/// What a driver under light, medium and heavy load has in flight.
const DEPTHS: [usize; 3] = [1, 32, 128];
/// The program that ratios refer to, if it is there.
const PEER: &str = "qemu-storage-daemon";

/// Compare vhost-blk, in any cache mode and on either engine, with its stock twin and with qemu-storage-daemon.
#[derive(Parser)]
struct Options {
    /// Cache modes to compare in, one after the other, with commas between them.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "writeback")]
    cache: Vec<Cache>,
    /// Engines to compare on, side by side, with a comma between them.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "io_uring,threads")]
    aio: Vec<Aio>,
    /// Leave out the disk without storage, which has no cache modes.
    #[arg(long)]
    no_null: bool,
    /// Our daemon [default: beside this program].
    #[arg(long)]
    ours: Option<PathBuf>,
    /// The baseline daemon on the stock rust-vmm crates [default: beside this program].
    #[arg(long)]
    stock: Option<PathBuf>,
    /// qemu-storage-daemon [default: the one in PATH].
    #[arg(long)]
    qsd: Option<PathBuf>,
    /// Samples of each contender in each cell.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    samples: u32,
    /// Length of a sample in milliseconds, after the warm-up.
    #[arg(long, default_value_t = 1000)]
    sample_ms: u64,
    /// Length of the idle measurement in milliseconds.
    #[arg(long, default_value_t = 5000)]
    idle_ms: u64,
    /// Size of the disks in MiB, each.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..))]
    size_mib: u64,
    /// Directory for the images [default: /dev/shm; for modes past the host's cache or with stable writes, which only storage
    /// has: /var/tmp].
    #[arg(long)]
    directory: Option<PathBuf>,
    /// Leave it to the scheduler where daemon and client run, instead of one CPU for each.
    #[arg(long)]
    no_pin: bool,
}

impl Options {
    fn directory_for(&self, cache: Cache) -> &Path {
        self.directory.as_deref().unwrap_or(cache.directory())
    }
}

fn main() -> ExitCode {
    match bench(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {}", causes(&*error));
            ExitCode::FAILURE
        }
    }
}

/// Runs everything; `false` if a contender failed somewhere.
fn bench(options: &Options) -> Result<bool, Box<dyn Error>> {
    let contenders = find_contenders(options)?;
    let daemon_cpu = if options.no_pin { None } else { take_cpus()? };
    let disks = make_disks(options)?;
    print_conditions(options, daemon_cpu)?;
    let run = Run { options, contenders, directory: tempfile::tempdir()?, daemon_cpu };
    let mut complete = true;
    table::print_head();
    for (disk_name, disk) in &disks {
        for direction in [Direction::Read, Direction::Write] {
            for depth in DEPTHS {
                let cell = Cell { direction, depth };
                let rows = run.cell(disk, cell);
                complete &= rows.iter().all(|row| row.failure.is_none());
                table::print_rows(&format!("{disk_name}, {cell}"), &rows);
                io::stdout().flush()?;
            }
        }
    }
    if let Some((_, disk)) = disks.last() {
        table::print_idle(&run.idle(disk));
    }
    Ok(complete)
}

/// The disks, with the names that the table gives them.
fn make_disks(options: &Options) -> io::Result<Vec<(String, Disk)>> {
    let len_bytes = options.size_mib << 20;
    let mut disks = Vec::new();
    if !options.no_null {
        disks.push(("null disk".to_owned(), Disk::Null(len_bytes)));
    }
    for &cache in &options.cache {
        let directory = options.directory_for(cache);
        let name = format!("file in {}, cache {}", directory.display(), cache.name());
        disks.push((name, Disk::file(directory, len_bytes, cache)?));
    }
    Ok(disks)
}

/// What all samples share.
struct Run<'a> {
    options: &'a Options,
    contenders: Vec<Contender>,
    directory: tempfile::TempDir,
    daemon_cpu: Option<usize>,
}

impl Run<'_> {
    fn cell(&self, disk: &Disk, cell: Cell) -> Vec<Row> {
        let mut rows: Vec<Row> = self.contenders.iter().map(Row::new).collect();
        for round in 0..self.options.samples as usize {
            for turn in 0..rows.len() {
                // Each round begins with another one: who comes after whom is part of the noise.
                let index = (round + turn) % rows.len();
                if rows[index].failure.is_some() {
                    continue;
                }
                match self.sample(&self.contenders[index], disk, cell, round as u64) {
                    Ok(sample) => rows[index].samples.push(sample),
                    Err(error) => rows[index].failure = Some(causes(&error)),
                }
            }
        }
        rows
    }

    fn sample(
        &self,
        contender: &Contender,
        disk: &Disk,
        cell: Cell,
        seed: u64,
    ) -> Result<Sample, SampleError> {
        disk.settle().map_err(SampleError::Settle)?;
        let daemon = contender.start(disk, self.directory.path(), self.daemon_cpu)?;
        sample::measure(&daemon, cell, Duration::from_millis(self.options.sample_ms), seed)
    }

    fn idle(&self, disk: &Disk) -> Vec<(&str, Result<f64, String>)> {
        let time = Duration::from_millis(self.options.idle_ms);
        let measure = |contender: &Contender| {
            let daemon = contender.start(disk, self.directory.path(), self.daemon_cpu)?;
            sample::idle_percent(&daemon, time)
        };
        self.contenders
            .iter()
            .map(|contender| {
                (contender.name.as_str(), measure(contender).map_err(|error| causes(&error)))
            })
            .collect()
    }
}

/// The contenders that are there; the others are named on stderr and left out.
fn find_contenders(options: &Options) -> io::Result<Vec<Contender>> {
    let bench = std::env::current_exe()?;
    let build_directory = bench.parent().unwrap_or(Path::new("/"));
    let beside = |name: &str| vec![build_directory.join(name)];
    let path = std::env::var_os("PATH").unwrap_or_default();
    let installed: Vec<_> =
        std::env::split_paths(&path).map(|directory| directory.join(PEER)).collect();
    let engines = || options.aio.iter().copied();
    let ours = |aio| (Dialect::Ours(aio), aio, &options.ours, beside("vhost-blk"));
    let peer = |aio| (Dialect::StorageDaemon(aio), aio, &options.qsd, installed.clone());
    // It has no engine, and is held against the peer's first.
    let stock = |aio| (Dialect::Stock, aio, &options.stock, beside("stock-blk"));
    let mut found = Vec::new();
    for (dialect, aio, given, candidates) in
        engines().map(ours).chain(engines().take(1).map(stock)).chain(engines().map(peer))
    {
        let name = match dialect {
            Dialect::Ours(aio) => on("vhost-blk", aio),
            Dialect::Stock => "stock-blk".into(),
            Dialect::StorageDaemon(aio) => on(PEER, aio),
        };
        let candidates = given.as_ref().map_or(candidates, |path| vec![path.clone()]);
        match candidates.iter().find(|path| path.is_file()) {
            Some(program) => found.push(Contender {
                name,
                peer: on(PEER, aio),
                program: program.clone(),
                dialect,
            }),
            None => eprintln!("bench: {name} left out: not at {}", display_all(&candidates)),
        }
    }
    if found.is_empty() { Err(io::Error::other("there is nothing to compare")) } else { Ok(found) }
}

/// What the tables call a program on an engine.
fn on(program: &str, aio: Aio) -> String {
    match aio {
        Aio::IoUring => program.to_owned(),
        Aio::Threads => format!("{program} on threads"),
    }
}

fn display_all(paths: &[PathBuf]) -> String {
    let paths: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
    paths.join(", ")
}

/// Moves this process to one CPU and returns another for the daemons, or `None` where there is only one.
fn take_cpus() -> io::Result<Option<usize>> {
    let allowed = sched_getaffinity(None)?;
    let mut cpus = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
    let (Some(daemon), Some(client)) = (cpus.next(), cpus.next()) else {
        return Ok(None);
    };
    let mut own = CpuSet::new();
    own.set(client);
    sched_setaffinity(None, &own)?;
    Ok(Some(daemon))
}

fn print_conditions(options: &Options, daemon_cpu: Option<usize>) -> io::Result<()> {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let cpus = std::thread::available_parallelism()?;
    let arguments: Vec<_> =
        std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    println!(
        "`bench {}`: Linux {}, {}; median of {} interleaved samples of {} ms, (min–max); × is the median ratio to {PEER} on the same engine.\n",
        arguments.join(" "),
        kernel.trim(),
        daemon_cpu.map_or(format!("unpinned on {cpus} CPUs"), |_| {
            "daemon and client on a CPU each".into()
        }),
        options.samples,
        options.sample_ms,
    );
    let mut directories: Vec<_> =
        options.cache.iter().map(|cache| options.directory_for(*cache)).collect();
    directories.sort_unstable();
    directories.dedup();
    for directory in directories {
        println!("{} is {}.", directory.display(), disk::file_system(directory)?);
    }
    println!();
    Ok(())
}

/// An error with what led to it, in one line.
fn causes(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        source = cause.source();
    }
    line.replace('\n', " ")
}

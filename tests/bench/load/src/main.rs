//! `bench`: vhost-user-blk daemons side by side.
//!
//! For each disk and each cell (4 KiB random requests, one direction, one depth) it takes samples from all contenders in
//! turn, so that what else the machine does falls on all of them, each sample with a daemon of its own. It prints
//! Markdown. Nothing is asserted: a number is for people to judge, and only ratios within one run mean anything.

mod contender;
mod sample;
mod table;

use std::error::Error;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use load::Random;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::contender::{Contender, Dialect, Disk};
use crate::sample::{Cell, Direction, Sample, SampleError};
use crate::table::Row;

/// What a driver under light, medium and heavy load has in flight.
const DEPTHS: [usize; 3] = [1, 32, 128];
/// The contender that the others' ratios refer to, if it is there.
const PEER: &str = "qemu-storage-daemon";

/// Compare vhost-blk, on either engine, with its stock twin and with qemu-storage-daemon.
#[derive(Parser)]
struct Options {
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
    /// Size of the disks in MiB.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..))]
    size_mib: u64,
    /// Directory for the image of the file disk.
    #[arg(long, default_value = "/dev/shm")]
    directory: PathBuf,
    /// Leave it to the scheduler where daemon and client run, instead of one CPU for each.
    #[arg(long)]
    no_pin: bool,
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
    let image = make_image(&options.directory, options.size_mib << 20)?;
    // The image has no name that could stay behind; daemons reach it through this process.
    let image_path = format!("/proc/{}/fd/{}", std::process::id(), image.as_raw_fd());
    let disks = [
        ("null disk".to_owned(), Disk::Null(options.size_mib << 20)),
        (format!("file in {}", options.directory.display()), Disk::File(image_path.into())),
    ];
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
                table::print_rows(&format!("{disk_name}, {cell}"), &rows, PEER);
                io::stdout().flush()?;
            }
        }
    }
    table::print_idle(&run.idle(&disks[1].1));
    Ok(complete)
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
        let mut rows: Vec<Row> =
            self.contenders.iter().map(|contender| Row::new(contender.name)).collect();
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
        let daemon = contender.start(disk, self.directory.path(), self.daemon_cpu)?;
        sample::measure(&daemon, cell, Duration::from_millis(self.options.sample_ms), seed)
    }

    fn idle(&self, disk: &Disk) -> Vec<(&'static str, Result<f64, String>)> {
        let time = Duration::from_millis(self.options.idle_ms);
        let measure = |contender: &Contender| {
            let daemon = contender.start(disk, self.directory.path(), self.daemon_cpu)?;
            sample::idle_percent(&daemon, time)
        };
        self.contenders
            .iter()
            .map(|contender| (contender.name, measure(contender).map_err(|error| causes(&error))))
            .collect()
    }
}

/// The contenders that are there; the others are named on stderr and left out.
fn find_contenders(options: &Options) -> io::Result<Vec<Contender>> {
    let bench = std::env::current_exe()?;
    let build_directory = bench.parent().unwrap_or(Path::new("/"));
    let beside = |name: &str| vec![build_directory.join(name)];
    let path = std::env::var_os("PATH").unwrap_or_default();
    let installed = std::env::split_paths(&path).map(|directory| directory.join(PEER));
    let places = [
        ("vhost-blk", Dialect::Ours, &options.ours, beside("vhost-blk")),
        ("vhost-blk on threads", Dialect::OursOnThreads, &options.ours, beside("vhost-blk")),
        ("stock-blk", Dialect::Ours, &options.stock, beside("stock-blk")),
        (PEER, Dialect::StorageDaemon, &options.qsd, installed.collect()),
    ];
    let mut found = Vec::new();
    for (name, dialect, given, candidates) in places {
        let candidates = given.as_ref().map_or(candidates, |path| vec![path.clone()]);
        match candidates.iter().find(|path| path.is_file()) {
            Some(program) => found.push(Contender { name, program: program.clone(), dialect }),
            None => eprintln!("bench: {name} left out: not at {}", display_all(&candidates)),
        }
    }
    if found.is_empty() { Err(io::Error::other("there is nothing to compare")) } else { Ok(found) }
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

/// A nameless file full of random data: a file system may answer holes and zeroes more cheaply than real blocks.
fn make_image(directory: &Path, len_bytes: u64) -> io::Result<File> {
    let mut image = tempfile::tempfile_in(directory)?;
    let mut random = Random::new(len_bytes);
    let mut chunk = vec![0; 1 << 20];
    for _ in 0..len_bytes / chunk.len() as u64 {
        random.fill(&mut chunk);
        image.write_all(&chunk)?;
    }
    image.sync_all()?;
    Ok(image)
}

fn print_conditions(options: &Options, daemon_cpu: Option<usize>) -> io::Result<()> {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let cpus = std::thread::available_parallelism()?;
    let arguments: Vec<_> =
        std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    println!(
        "`bench {}`: Linux {}, {}; median of {} interleaved samples of {} ms, (min–max); × is the median ratio to {PEER}.\n",
        arguments.join(" "),
        kernel.trim(),
        daemon_cpu.map_or(format!("unpinned on {cpus} CPUs"), |_| {
            "daemon and client on a CPU each".into()
        }),
        options.samples,
        options.sample_ms,
    );
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

//! `bench-net`: vhost-user-net back ends side by side.
//!
//! A front end that polls, DPDK's testpmd, sends or receives as fast as it can on one CPU, the back end works on another. For
//! each cell (which way, over what, how long the frames) samples are taken from all contenders in turn, so that what else the
//! machine does falls on all of them, each sample with processes of its own. Then a guest's TCP. It prints Markdown. Nothing is
//! asserted: a number is for people to judge, and only ratios within one run mean anything.
//!
//! Everything is in network namespaces, which only root can make. Frames that are to come out of a tap are sent by this
//! program from the front end's CPU: what it can send is a limit, too.

mod contender;
mod guests;
mod sample;
mod table;
mod tap;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use rustix::thread::{CpuSet, sched_getaffinity};
use tests::{Rig, lacks_root};

use crate::contender::Contender;
use crate::sample::{Bench, Cell, Over, Way};
use crate::table::Row;

/// Compare vhost-net with DPDK's net_vhost and with a plain loop on the tap.
#[derive(Parser)]
struct Options {
    /// Our daemon; several, for builds to be compared [default: beside this program].
    #[arg(long)]
    ours: Vec<PathBuf>,
    /// Lengths of frames in bytes, with commas between them.
    #[arg(long, value_delimiter = ',', default_value = "64,1500",
          value_parser = clap::value_parser!(u16).range(60..=1514))]
    frames: Vec<u16>,
    /// Samples of each contender in each cell.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    samples: u32,
    /// Length of a sample in seconds, after the warm-up.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Measure only cells with one of these in their name, such as `tap` or `sends 64`; `guest` is one.
    #[arg(value_name = "FILTER")]
    filters: Vec<String>,
}

impl Options {
    fn wants(&self, cell: &str) -> bool {
        self.filters.is_empty() || self.filters.iter().any(|filter| cell.contains(&**filter))
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    if lacks_root("a network namespace, which all of this bench is in,") {
        return ExitCode::FAILURE;
    }
    let Some(rig) = Rig::find() else { return ExitCode::FAILURE };
    match run(&options, rig) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-net: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options, rig: Rig) -> io::Result<()> {
    let contenders = contender::all(&options.ours)?;
    let seconds = Duration::from_secs(options.seconds.into());
    let bench = Bench { rig, cpus: cpus()?, seconds };
    print_conditions(options)?;
    let cells = cells(&options.frames).filter(|cell| options.wants(&cell.to_string()));
    for (index, cell) in cells.enumerate() {
        if index == 0 {
            table::print_head();
        }
        let rows = measure(options, &bench, &contenders, cell);
        table::print_rows(&cell.to_string(), &rows);
        io::stdout().flush()?;
    }
    if options.wants("idle") {
        println!("\n| back end | CPU when idle, front end connected |\n|---|---:|");
        for contender in contenders.iter().filter(|contender| contender.is_back_end()) {
            println!("| {} | {:.1} % |", contender.name(), bench.idle_percent(contender));
        }
    }
    if options.wants("guest") {
        guests::compare(&bench, &contenders, options.samples);
    }
    Ok(())
}

/// All cells, in the order of the table.
fn cells(frames: &[u16]) -> impl Iterator<Item = Cell> {
    [Over::Null, Over::Tap].into_iter().flat_map(move |over| {
        [Way::Sends, Way::Receives].into_iter().flat_map(move |way| {
            frames.iter().map(move |frame_bytes| Cell { over, way, frame_bytes: *frame_bytes })
        })
    })
}

fn measure<'a>(
    options: &Options,
    bench: &Bench,
    contenders: &'a [Contender],
    cell: Cell,
) -> Vec<Row<'a>> {
    let able = contenders.iter().filter(|contender| contender.is_able(cell));
    let mut rows: Vec<_> = able.map(Row::new).collect();
    for round in 0..options.samples as usize {
        for turn in 0..rows.len() {
            // Each round begins with another one: who comes after whom is part of the noise.
            let row = (round + turn) % rows.len();
            let sample = bench.sample(rows[row].contender, cell);
            rows[row].samples.push(sample);
        }
    }
    rows
}

/// The CPUs of back end and front end.
fn cpus() -> io::Result<[usize; 2]> {
    let allowed = sched_getaffinity(None)?;
    let mut cpus = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
    match (cpus.next(), cpus.next()) {
        (Some(back_end), Some(front_end)) => Ok([back_end, front_end]),
        _ => Err(io::Error::other("front end and back end both poll, and need a CPU each")),
    }
}

fn print_conditions(options: &Options) -> io::Result<()> {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let load = std::fs::read_to_string("/proc/loadavg")?;
    let arguments: Vec<_> =
        std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    println!(
        "`bench-net {}`: Linux {}, load {}; median of {} interleaved samples of {} s, (min–max); × is the median \
         ratio to {}.\n",
        arguments.join(" "),
        kernel.trim(),
        load.split(' ').next().unwrap_or_default(),
        options.samples,
        options.seconds,
        contender::PEER,
    );
    Ok(())
}

//! One sample: a load of 4 KiB requests at a fixed depth against one daemon, and what the daemon used for it.
//!
//! The client sleeps on the call eventfd when nothing has completed, as a guest's driver does on an interrupt.

use std::fmt;
use std::io;
use std::time::{Duration, Instant};

use load::{ClientQueue, Random};

use crate::contender::{Daemon, DaemonError};

/// The block of all cells.
const BLOCK_BYTES: usize = 4096;
/// Time before anything is counted: page faults, caches, a daemon's adaptive polling.
const WARM_UP: Duration = Duration::from_millis(200);
/// Depth of the load that precedes an idle measurement.
const IDLE_DEPTH: usize = 32;

/// Which way the data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Read,
    Write,
}

/// A kind of load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cell {
    pub(crate) direction: Direction,
    /// Requests in flight at a time.
    pub(crate) depth: usize,
}

impl fmt::Display for Cell {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = match self.direction {
            Direction::Read => "read",
            Direction::Write => "write",
        };
        write!(to, "{direction}, depth {}", self.depth)
    }
}

/// What was measured under load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) requests_per_second: f64,
    pub(crate) cpu_seconds_per_million: f64,
    pub(crate) peak_mib: f64,
}

/// Why there is no sample.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SampleError {
    #[error("daemon")]
    Daemon(#[from] DaemonError),
    #[error("cannot write out what is left of the image's writes")]
    Settle(#[source] io::Error),
    #[error("queue")]
    Queue(#[from] io::Error),
    #[error("a request completed with error {0}")]
    Request(i32),
}

/// Loads the daemon for `time` after a warm-up. The same seed asks for the same blocks.
pub(crate) fn measure(
    daemon: &Daemon,
    cell: Cell,
    time: Duration,
    seed: u64,
) -> Result<Sample, SampleError> {
    let mut client = daemon.connect(cell.depth * BLOCK_BYTES)?;
    let block_count = client.geometry.capacity_sectors * 512 / BLOCK_BYTES as u64;
    let mut load = Load::new(&mut client.queues[0], cell, block_count, seed);
    load.run(WARM_UP)?;
    let cpu_before = daemon.cpu_seconds()?;
    let (request_count, elapsed) = load.run(time)?;
    let cpu_seconds = daemon.cpu_seconds()? - cpu_before;
    load.finish()?;
    Ok(Sample {
        requests_per_second: request_count as f64 / elapsed.as_secs_f64(),
        cpu_seconds_per_million: cpu_seconds / request_count as f64 * 1e6,
        peak_mib: daemon.peak_mib()?,
    })
}

/// CPU use in percent over `time`, with a client that is connected, has had requests served, and wants nothing now.
pub(crate) fn idle_percent(daemon: &Daemon, time: Duration) -> Result<f64, SampleError> {
    let mut client = daemon.connect(IDLE_DEPTH * BLOCK_BYTES)?;
    let cell = Cell { direction: Direction::Read, depth: IDLE_DEPTH };
    let mut load = Load::new(&mut client.queues[0], cell, 1, 0);
    load.run(WARM_UP)?;
    load.finish()?;
    let cpu_before = daemon.cpu_seconds()?;
    let begin = Instant::now();
    while let Some(left) = time.checked_sub(begin.elapsed()) {
        // A call for a request that has been reaped already may still come.
        client.queues[0].called_within(left)?;
    }
    Ok((daemon.cpu_seconds()? - cpu_before) / begin.elapsed().as_secs_f64() * 100.0)
}

/// Keeps `depth` requests in flight.
struct Load<'a> {
    queue: &'a mut ClientQueue,
    cell: Cell,
    block_count: u64,
    random: Random,
    /// Tags, which are also the numbers of the buffers, that are not in flight.
    free: Vec<usize>,
    completed: Vec<load::Completed>,
}

impl<'a> Load<'a> {
    fn new(queue: &'a mut ClientQueue, cell: Cell, block_count: u64, seed: u64) -> Self {
        let free = (0..cell.depth).collect();
        Self {
            queue,
            cell,
            block_count,
            random: Random::new(seed),
            free,
            completed: Vec::with_capacity(cell.depth),
        }
    }

    /// Runs for `time` and returns how many requests completed in how much time.
    fn run(&mut self, time: Duration) -> Result<(u64, Duration), SampleError> {
        let begin = Instant::now();
        let mut request_count = 0;
        loop {
            while let Some(tag) = self.free.pop() {
                let offset_bytes = self.random.below(self.block_count) * BLOCK_BYTES as u64;
                let buffer = tag * BLOCK_BYTES..(tag + 1) * BLOCK_BYTES;
                match self.cell.direction {
                    Direction::Read => self.queue.read(offset_bytes, buffer, tag)?,
                    Direction::Write => self.queue.write(offset_bytes, buffer, tag)?,
                }
            }
            self.queue.kick()?;
            request_count += self.reap()?;
            let elapsed = begin.elapsed();
            if elapsed >= time {
                return Ok((request_count, elapsed));
            }
        }
    }

    /// Waits for what is still in flight.
    fn finish(&mut self) -> Result<(), SampleError> {
        while self.free.len() < self.cell.depth {
            self.reap()?;
        }
        Ok(())
    }

    fn reap(&mut self) -> Result<u64, SampleError> {
        self.completed.clear();
        self.queue.wait(&mut self.completed)?;
        if let Some(failed) = self.completed.iter().find(|one| one.result != 0) {
            return Err(SampleError::Request(failed.result));
        }
        self.free.extend(self.completed.iter().map(|one| one.tag));
        Ok(self.completed.len() as u64)
    }
}

//! The disk grows under I/O: the kernel tells its new size, what is new takes data, and nothing is lost meanwhile.
//!
//! A thread a processor writes blocks of the part that was there from the beginning, past the page cache, and reads each
//! back. The host grows the disk once all of them are at it, perhaps in several steps, until it has `size_bytes`.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use guest::announcement::Announcement;
use guest::pattern;
use rustix::fs::OFlags;

use super::{Failure, drop_caches, size_bytes};
use crate::parameters::Parameters;

/// A block that `O_DIRECT` accepts with any logical block size in use.
const BLOCK_BYTES: usize = 4096;
/// Blocks that each thread must have written and read since something happened, for I/O to have gone on.
const BLOCK_COUNT: u64 = 32;
/// A record of the kernel's log is never longer (Documentation/ABI/testing/dev-kmsg).
const RECORD_BYTES: usize = 8192;

#[repr(align(4096))]
struct Block([u8; BLOCK_BYTES]);

pub(super) fn run(parameters: &Parameters) -> Result<String, Failure> {
    let seed = parameters.seed()?;
    let wanted = parameters.size_bytes.ok_or("the check needs size_bytes= on the command line")?;
    let first = size_bytes(parameters)?;
    let mut log = File::open("/dev/kmsg")?;
    log.seek(SeekFrom::End(0))?;

    let load = Load::start(parameters, first, seed)?;
    load.expect_progress()?;
    println!("{}", Announcement::Loaded);
    let mut size = first;
    while size < wanted {
        let before = size;
        size = next_size(parameters, &mut log)?;
        println!("{}", Announcement::SizeBytes(size));
        fill(parameters, seed + size, before, size)?;
        load.expect_progress()?;
    }
    load.stop()?;
    let mut added = File::open(&parameters.disk)?;
    added.seek(SeekFrom::Start(first))?;
    pattern::checksum(&mut added).map_err(Failure::from)
}

/// Waits until the kernel's log tells of a new size, and returns it by the kernel's attribute.
fn next_size(parameters: &Parameters, log: &mut File) -> Result<u64, Failure> {
    let disk = parameters.disk.file_name().ok_or("the disk is no device")?.to_string_lossy();
    let message = format!("{disk}: detected capacity change from ");
    let mut record = vec![0; RECORD_BYTES];
    loop {
        let len = log.read(&mut record)?;
        if String::from_utf8_lossy(&record[..len]).contains(&message) {
            return size_bytes(parameters);
        }
    }
}

/// Fills a part of the disk and reads it back from the device.
fn fill(parameters: &Parameters, seed: u64, from: u64, to: u64) -> Result<(), Failure> {
    let mut disk = File::options().read(true).write(true).open(&parameters.disk)?;
    disk.seek(SeekFrom::Start(from))?;
    pattern::write(&mut disk, seed, to - from)?;
    disk.sync_all()?;
    drop_caches()?;
    let mut expected = Vec::new();
    pattern::write(&mut expected, seed, to - from)?;
    let mut found = vec![0; expected.len()];
    disk.read_exact_at(&mut found, from)?;
    if found == expected {
        Ok(())
    } else {
        Err(format!("between {from} and {to} the disk has other data than written").into())
    }
}

/// Threads that write and read the disk until they are stopped.
struct Load {
    stopped: Arc<AtomicBool>,
    /// A thread's number for each block that it has written and read, or what went wrong.
    reports: Receiver<Result<usize, String>>,
    thread_count: usize,
}

impl Load {
    /// Starts a thread a processor, each on its own part of the disk's first `len_bytes`.
    fn start(parameters: &Parameters, len_bytes: u64, seed: u64) -> Result<Self, Failure> {
        let thread_count = thread::available_parallelism()?.get();
        let blocks = len_bytes / thread_count as u64 / BLOCK_BYTES as u64;
        let stopped = Arc::new(AtomicBool::new(false));
        let (sender, reports) = channel();
        for number in 0..thread_count {
            let part = Part {
                disk: parameters.disk.clone(),
                first: number as u64 * blocks,
                blocks,
                seed: seed + number as u64,
            };
            let (sender, stopped) = (sender.clone(), Arc::clone(&stopped));
            thread::spawn(move || part.exercise(number, &sender, &stopped));
        }
        Ok(Self { stopped, reports, thread_count })
    }

    /// Waits until each thread has done some blocks from now on.
    fn expect_progress(&self) -> Result<(), Failure> {
        for early in self.reports.try_iter() {
            early?;
        }
        let mut left = vec![BLOCK_COUNT; self.thread_count];
        while left.iter().any(|count| *count > 0) {
            let number = self.reports.recv()??;
            left[number] = left[number].saturating_sub(1);
        }
        Ok(())
    }

    /// Ends the threads; what any of them found wrong until then is the failure.
    fn stop(self) -> Result<(), Failure> {
        self.stopped.store(true, Ordering::Relaxed);
        for report in &self.reports {
            report?;
        }
        Ok(())
    }
}

/// One thread's part of the disk.
struct Part {
    disk: PathBuf,
    first: u64,
    blocks: u64,
    seed: u64,
}

impl Part {
    fn exercise(&self, number: usize, reports: &Sender<Result<usize, String>>, stop: &AtomicBool) {
        let run = || -> Result<(), Failure> {
            let direct = i32::try_from(OFlags::DIRECT.bits())?;
            let disk =
                OpenOptions::new().read(true).write(true).custom_flags(direct).open(&self.disk)?;
            let mut trip = 0;
            while !stop.load(Ordering::Relaxed) {
                self.write_and_read(&disk, trip)?;
                trip += 1;
                reports.send(Ok(number))?;
            }
            Ok(())
        };
        if let Err(error) = run() {
            // Nobody listens once the check has failed for another reason.
            let _ = reports.send(Err(error.to_string()));
        }
    }

    fn write_and_read(&self, disk: &File, trip: u64) -> Result<(), Failure> {
        // Neighbours in time are none on the disk: a prime is prime to every number of blocks here.
        let offset = (self.first + trip * 7919 % self.blocks) * BLOCK_BYTES as u64;
        let mut written = Block([0; BLOCK_BYTES]);
        pattern::fill(&mut written.0, self.seed + trip, offset);
        disk.write_all_at(&written.0, offset)?;
        let mut found = Block([0; BLOCK_BYTES]);
        disk.read_exact_at(&mut found.0, offset)?;
        if found.0 == written.0 {
            Ok(())
        } else {
            Err(format!("offset {offset} has other data than written").into())
        }
    }
}

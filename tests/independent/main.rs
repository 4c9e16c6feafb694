//! The real `vhost-blk` process under a client that is not ours: the `virtio-driver` crate (`tests/bench/load`).
//!
//! `tests/frontend` checks the daemon against our own reading of the specifications; this suite checks it against
//! somebody else's. Every block is written and read back, and the image is compared on the host as well, so that two
//! faults that cancel out in the daemon are seen.

mod blocks;

use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use load::{Client, ClientQueue};
use tests::{Daemon, DaemonCommand, DiskImage, TempDir, temp_dir};

use crate::blocks::{BLOCK_BYTES, DEPTH, Pattern};

/// Enough blocks for the rings to wrap many times, few enough for a second.
const BLOCK_COUNT: u64 = 4096;
/// The next power of two above three descriptors for each request in flight.
const QUEUE_SIZE: u16 = 256;
/// `-EIO`: the driver's word for the status IOERR.
const IOERR: i32 = -5;

/// Excludes the start of a daemon by another test of this process. Between fork and exec a child has copies of all our
/// descriptors, so for a moment a connection that a test has closed would not be closed for the daemon.
fn while_nothing_starts() -> MutexGuard<'static, ()> {
    static START: Mutex<()> = Mutex::new(());
    START.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An image and the daemon that serves it.
struct Served {
    daemon: Daemon,
    image: DiskImage,
    _directory: TempDir,
}

impl Served {
    fn start(arguments: &[&str]) -> Self {
        let directory = temp_dir();
        let image = DiskImage::sparse(&directory.path().join("image"), disk(0..BLOCK_COUNT).end);
        let command =
            arguments.iter().fold(DaemonCommand::block(image.path()), |command, argument| {
                command.argument(argument)
            });
        let _alone = while_nothing_starts();
        Self { daemon: command.start(), image, _directory: directory }
    }

    fn connect(&self, queue_count: usize) -> Client {
        Client::connect(self.daemon.socket(), queue_count, QUEUE_SIZE, DEPTH * BLOCK_BYTES)
            .unwrap_or_else(|error| panic!("cannot connect: {error}"))
    }

    fn path(&self) -> &Path {
        self.image.path()
    }
}

/// The bytes of the disk that these blocks take.
fn disk(blocks: Range<u64>) -> Range<u64> {
    blocks.start * BLOCK_BYTES as u64..blocks.end * BLOCK_BYTES as u64
}

/// Submits one request, waits for it and returns its result.
fn one(
    queue: &mut ClientQueue,
    submit: impl FnOnce(&mut ClientQueue) -> std::io::Result<()>,
) -> i32 {
    submit(queue).expect("the ring has room");
    queue.kick().expect("the device can be notified");
    let mut completed = Vec::new();
    queue.wait(&mut completed).expect("the request completes");
    assert_eq!(completed.len(), 1, "one request, so one completion");
    completed[0].result
}

#[test]
fn every_block_reads_back_as_written() {
    let served = Served::start(&[]);
    let pattern = Pattern { seed: 1 };
    let mut client = served.connect(1);
    assert_eq!(client.geometry.capacity_sectors, disk(0..BLOCK_COUNT).end / 512);
    pattern.write(&mut client.queues[0], &blocks::shuffled(0..BLOCK_COUNT, 2));
    assert_eq!(one(&mut client.queues[0], |queue| queue.flush(0)), 0);
    pattern.check(&mut client.queues[0], &blocks::shuffled(0..BLOCK_COUNT, 3));
    pattern.check_file(served.path(), 0..BLOCK_COUNT);
    drop(client);
    assert!(served.daemon.terminate().success());
}

#[test]
fn next_front_end_is_served_at_once_and_finds_the_data() {
    let served = Served::start(&[]);
    let pattern = Pattern { seed: 4 };
    let _nothing_starts = while_nothing_starts();
    for round in 0..10 {
        // Right after the one before has hung up, which the daemon may not have noticed yet.
        let mut client = served.connect(1);
        let written = round * 16..(round + 1) * 16;
        pattern.check(&mut client.queues[0], &blocks::shuffled(0..written.start, round));
        pattern.write(&mut client.queues[0], &blocks::shuffled(written, round));
    }
}

#[test]
fn what_one_queue_writes_the_other_reads() {
    let served = Served::start(&["--num-queues", "2", "--threads", "2"]);
    let pattern = Pattern { seed: 5 };
    let mut client = served.connect(2);
    let (even, odd): (Vec<u64>, Vec<u64>) =
        blocks::shuffled(0..BLOCK_COUNT, 6).iter().partition(|block| *block % 2 == 0);
    let [first, second] = client.queues.as_mut_slice() else { panic!("two queues were asked for") };
    std::thread::scope(|scope| {
        scope.spawn(|| pattern.write(first, &even));
        scope.spawn(|| pattern.write(second, &odd));
    });
    assert_eq!(one(first, |queue| queue.flush(0)), 0);
    std::thread::scope(|scope| {
        scope.spawn(|| pattern.check(first, &odd));
        scope.spawn(|| pattern.check(second, &even));
    });
    pattern.check_file(served.path(), 0..BLOCK_COUNT);
}

#[test]
fn write_zeroes_clears_its_range_and_nothing_else() {
    for unmap in [false, true] {
        let served = Served::start(&[]);
        let pattern = Pattern { seed: 7 };
        let mut client = served.connect(1);
        assert!(client.geometry.max_write_zeroes_sectors > 0, "write zeroes is offered");
        let queue = &mut client.queues[0];
        pattern.write(queue, &blocks::shuffled(0..BLOCK_COUNT, 8));
        assert_eq!(one(queue, |queue| queue.write_zeroes(disk(1000..1100), unmap, 0)), 0);
        Pattern::check_zeroes(queue, &blocks::shuffled(1000..1100, 9));
        pattern.check(queue, &blocks::shuffled(0..1000, 10));
        pattern.check(queue, &blocks::shuffled(1100..BLOCK_COUNT, 11));
        pattern.check_file(served.path(), 0..1000);
        pattern.check_file(served.path(), 1100..BLOCK_COUNT);
    }
}

#[test]
fn discard_leaves_its_neighbours_alone() {
    let served = Served::start(&[]);
    let pattern = Pattern { seed: 12 };
    let mut client = served.connect(1);
    assert!(client.geometry.max_discard_sectors > 0, "discard is offered");
    let queue = &mut client.queues[0];
    pattern.write(queue, &blocks::shuffled(0..BLOCK_COUNT, 13));
    assert_eq!(one(queue, |queue| queue.discard(disk(512..1024), 0)), 0);
    pattern.check(queue, &blocks::shuffled(0..512, 14));
    pattern.check(queue, &blocks::shuffled(1024..BLOCK_COUNT, 15));
    // What was discarded can be written again.
    pattern.write(queue, &blocks::shuffled(512..1024, 16));
    pattern.check_file(served.path(), 0..BLOCK_COUNT);
}

#[test]
fn request_beyond_the_end_fails_and_the_queue_goes_on() {
    let served = Served::start(&[]);
    let pattern = Pattern { seed: 17 };
    let mut client = served.connect(1);
    let queue = &mut client.queues[0];
    let end = disk(0..BLOCK_COUNT).end;
    assert_eq!(one(queue, |queue| queue.read(end, 0..BLOCK_BYTES, 0)), IOERR);
    assert_eq!(one(queue, |queue| queue.write(end - 512, 0..BLOCK_BYTES, 0)), IOERR);
    pattern.write(queue, &[0, BLOCK_COUNT - 1]);
    pattern.check(queue, &[0, BLOCK_COUNT - 1]);
    let len_bytes = std::fs::metadata(served.path()).expect("the image is there").len();
    assert_eq!(len_bytes, end, "the failed write did not extend the image");
}

#[test]
fn read_only_disk_refuses_writes_and_serves_reads() {
    let served = Served::start(&["--read-only"]);
    let mut client = served.connect(1);
    let queue = &mut client.queues[0];
    Pattern { seed: 18 }.fill(queue, 0, 0);
    assert_eq!(one(queue, |queue| queue.write(0, 0..BLOCK_BYTES, 0)), IOERR);
    Pattern::check_zeroes(queue, &blocks::shuffled(0..BLOCK_COUNT, 19));
}

//! Rounds of writes for daemons that die amid them: each round writes the same sectors, with content of its own.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use frontend::block::{BlockDriver, Request};

use crate::subject::QUEUE_COUNT;

/// Of one write: many of them are under way at a time.
const BLOCK_BYTES: usize = 32 << 10;
const BLOCK_SECTORS: u64 = BLOCK_BYTES as u64 / 512;
/// Writes of each queue in a round.
const WRITE_COUNT: u64 = 40;

/// Submits a round's writes, and sees some of them end: more with each round.
pub(crate) fn begin(driver: &mut BlockDriver, round: u64) {
    for queue in 0..QUEUE_COUNT {
        for at in 0..WRITE_COUNT {
            let block = vec![content(round, queue, at); BLOCK_BYTES];
            driver.submit(queue, &Request::write(sector(queue, at), &block));
        }
        driver.kick(queue).expect("the device can be kicked");
    }
    for _ in 0..round {
        driver.complete(0).expect("it ends");
    }
}

/// Looks whether the image has what the round has written.
pub(crate) fn expect_contents(image: &Path, round: u64) {
    let image = File::open(image).expect("the image is ours");
    let mut block = vec![0; BLOCK_BYTES];
    for queue in 0..QUEUE_COUNT {
        for at in 0..WRITE_COUNT {
            image.read_exact_at(&mut block, sector(queue, at) * 512).expect("it is long enough");
            let wanted = content(round, queue, at);
            assert!(block.iter().all(|byte| *byte == wanted), "round {round}, {at} of {queue}");
        }
    }
}

fn content(round: u64, queue: u16, at: u64) -> u8 {
    (round * 31 + u64::from(queue) * 101 + at) as u8
}

fn sector(queue: u16, at: u64) -> u64 {
    (u64::from(queue) * WRITE_COUNT + at) * BLOCK_SECTORS
}

//! Blocks with contents that tell their number, written, read and compared with many requests in flight.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use load::{ClientQueue, Random};

/// The size of a request.
pub(crate) const BLOCK_BYTES: usize = 4096;
/// Requests in flight, and buffers of [`BLOCK_BYTES`] in the client's memory.
pub(crate) const DEPTH: usize = 64;

/// These blocks in a random order.
pub(crate) fn shuffled(blocks: Range<u64>, seed: u64) -> Vec<u64> {
    let mut blocks: Vec<u64> = blocks.collect();
    Random::new(seed).shuffle(&mut blocks);
    blocks
}

/// The contents of a whole disk: different for every block and every seed.
#[derive(Clone, Copy)]
pub(crate) struct Pattern {
    pub(crate) seed: u64,
}

impl Pattern {
    fn block(self, block: u64) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK_BYTES];
        Random::new(self.seed << 32 | block).fill(&mut bytes);
        bytes
    }

    /// Puts a block's contents into one of the client's buffers.
    pub(crate) fn fill(self, queue: &ClientQueue, slot: usize, block: u64) {
        queue
            .fill(slot * BLOCK_BYTES, &self.block(block))
            .expect("a slot lies in the buffer memory");
    }

    /// Writes these blocks in this order.
    pub(crate) fn write(self, queue: &mut ClientQueue, blocks: &[u64]) {
        let submit = |queue: &mut ClientQueue, block, slot| {
            self.fill(queue, slot, block);
            queue.write(block * BLOCK_BYTES as u64, buffer(slot), slot)
        };
        for_each(queue, blocks, submit, |_, _, _| {});
    }

    /// Reads these blocks in this order and compares each.
    pub(crate) fn check(self, queue: &mut ClientQueue, blocks: &[u64]) {
        for_each(queue, blocks, read, |queue, block, slot| {
            compare(block, &fetch(queue, slot), &self.block(block))
        });
    }

    /// Reads these blocks in this order: all are zero.
    pub(crate) fn check_zeroes(queue: &mut ClientQueue, blocks: &[u64]) {
        for_each(queue, blocks, read, |queue, block, slot| {
            compare(block, &fetch(queue, slot), &[0; BLOCK_BYTES])
        });
    }

    /// Compares these blocks of the image itself, behind the daemon's back.
    pub(crate) fn check_file(self, image: &Path, blocks: Range<u64>) {
        let image = File::open(image).expect("the image can be read");
        for block in blocks {
            let mut bytes = vec![0; BLOCK_BYTES];
            image
                .read_exact_at(&mut bytes, block * BLOCK_BYTES as u64)
                .expect("the block lies in the image");
            compare(block, &bytes, &self.block(block));
        }
    }
}

fn read(queue: &mut ClientQueue, block: u64, slot: usize) -> io::Result<()> {
    // What a block before it has left in the buffer must not pass for this one's data.
    queue.fill(slot * BLOCK_BYTES, &[0xee; BLOCK_BYTES])?;
    queue.read(block * BLOCK_BYTES as u64, buffer(slot), slot)
}

fn fetch(queue: &ClientQueue, slot: usize) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK_BYTES];
    queue.fetch(slot * BLOCK_BYTES, &mut bytes).expect("a slot lies in the buffer memory");
    bytes
}

fn buffer(slot: usize) -> Range<usize> {
    slot * BLOCK_BYTES..(slot + 1) * BLOCK_BYTES
}

fn compare(block: u64, found: &[u8], expected: &[u8]) {
    let differs = found.iter().zip(expected).position(|(found, expected)| found != expected);
    if let Some(at) = differs {
        panic!("byte {at} of block {block} is {:#04x}, expected {:#04x}", found[at], expected[at]);
    }
}

/// Keeps up to [`DEPTH`] requests in flight until all `blocks` are through: `submit` starts the request of a block in a
/// slot, `completed` looks at that slot when the request has succeeded.
fn for_each(
    queue: &mut ClientQueue,
    blocks: &[u64],
    submit: impl Fn(&mut ClientQueue, u64, usize) -> io::Result<()>,
    completed: impl Fn(&ClientQueue, u64, usize),
) {
    let mut left = blocks.iter();
    let mut free: Vec<usize> = (0..DEPTH).collect();
    let mut block_in = [0; DEPTH];
    let mut reaped = Vec::new();
    loop {
        for block in left.by_ref().take(free.len()) {
            let slot = free.pop().expect("not more blocks than free slots are taken");
            block_in[slot] = *block;
            submit(queue, *block, slot).expect("the ring has room for every slot");
        }
        if free.len() == DEPTH {
            return;
        }
        queue.kick().expect("the device can be notified");
        queue.wait(&mut reaped).expect("requests complete");
        for one in reaped.drain(..) {
            assert_eq!(one.result, 0, "the request for block {} failed", block_in[one.tag]);
            completed(queue, block_in[one.tag], one.tag);
            free.push(one.tag);
        }
    }
}

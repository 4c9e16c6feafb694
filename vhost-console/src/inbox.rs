//! What is on its way to the guest through one port: a queue of bytes.
//!
//! Contract: the main thread [pushes](Inbox::push), the port's receive queue [takes](Inbox::take); each in its own time, without a
//! lock. It has room for [`INBOX_BYTES`]: who finds it full waits, and so does whoever typed, so that what a guest does not
//! read costs no more than this.

use std::sync::atomic::{AtomicU64, Ordering};

use common::memory::OwnMemory;
use common::virtqueue::Buffers;

/// Room for what the guest has yet to read. As much as a socket holds; a guest's buffers are pages.
pub(crate) const INBOX_BYTES: u64 = 64 << 10;

/// See the module's head.
pub(crate) struct Inbox {
    memory: OwnMemory,
    /// Bytes that were ever pushed.
    pushed: AtomicU64,
    /// Bytes that were ever taken.
    taken: AtomicU64,
    /// What was pushed before nobody is to get any more.
    begin: AtomicU64,
}

impl Inbox {
    pub(crate) fn new() -> Self {
        Self {
            memory: OwnMemory::new(INBOX_BYTES as usize),
            pushed: AtomicU64::new(0),
            taken: AtomicU64::new(0),
            begin: AtomicU64::new(0),
        }
    }

    /// Bytes that wait.
    pub(crate) fn len_bytes(&self) -> usize {
        // Pushed last: what is taken meanwhile must not be more than what was pushed.
        let start = self.start();
        (self.pushed.load(Ordering::Acquire) - start) as usize
    }

    /// Where what waits begins.
    fn start(&self) -> u64 {
        self.taken.load(Ordering::Acquire).max(self.begin.load(Ordering::Acquire))
    }

    /// Bytes that it has ever been given.
    pub(crate) fn pushed_bytes(&self) -> u64 {
        self.pushed.load(Ordering::Relaxed)
    }

    /// Bytes that find room. On the main thread.
    pub(crate) fn room(&self) -> usize {
        let taken = self.taken.load(Ordering::Acquire);
        (INBOX_BYTES - (self.pushed.load(Ordering::Relaxed) - taken)) as usize
    }

    /// Puts bytes in, as far as there is room; how many. On the main thread.
    pub(crate) fn push(&self, from: &[u8]) -> usize {
        let count = from.len().min(self.room());
        let pushed = self.pushed.load(Ordering::Relaxed);
        let place = (pushed % INBOX_BYTES) as usize;
        let first = self.memory.buffer().write(place, &from[..count]);
        self.memory.buffer().write(0, &from[first..count]);
        // Pairs with the acquire in `take`: the bytes are visible before they are counted.
        self.pushed.store(pushed + count as u64, Ordering::Release);
        count
    }

    /// Takes bytes out, as far as there are any and `into` has room; how many. By the receive queue, or by the main thread
    /// while there is none.
    pub(crate) fn take(&self, into: Buffers<'_>) -> usize {
        let start = self.start();
        let waiting = self.pushed.load(Ordering::Acquire) - start;
        let count = usize::try_from(waiting).unwrap_or(usize::MAX).min(into.len_bytes());
        let place = (start % INBOX_BYTES) as usize;
        let memory = self.memory.buffer();
        let parts = [memory.slice(place, count), memory];
        into.copy_from(Buffers::new(&parts).slice(0, count));
        // Pairs with the acquire in `room`: the bytes are read before they are overwritten.
        self.taken.store(start + count as u64, Ordering::Release);
        count
    }

    /// Throws away what waits: it was for another guest, or another port. On the main thread. Until the receive queue [has settled](Self::settle) it
    /// takes room, and if there is none, until there is one.
    pub(crate) fn clear(&self) {
        // Pairs with the acquire in `start`: who sees this sees what was pushed before.
        self.begin.store(self.pushed.load(Ordering::Relaxed), Ordering::Release);
    }

    /// Whether there is something that nobody is to get.
    pub(crate) fn is_stale(&self) -> bool {
        self.begin.load(Ordering::Acquire) > self.taken.load(Ordering::Relaxed)
    }

    /// Makes room of what nobody is to get; whether there was any. By the receive queue.
    pub(crate) fn settle(&self) -> bool {
        let is_stale = self.is_stale();
        if is_stale {
            self.taken.store(self.start(), Ordering::Release);
        }
        is_stale
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use common::memory::OwnMemory;
    use common::virtqueue::Buffers;

    use super::{INBOX_BYTES, Inbox};

    /// Takes up to `room` bytes.
    fn take(inbox: &Inbox, room: usize) -> Vec<u8> {
        let memory = OwnMemory::new(room);
        let mut bytes = vec![0; inbox.take(Buffers::new(&[memory.buffer()]))];
        memory.buffer().read(0, &mut bytes);
        bytes
    }

    #[test]
    fn bytes_come_out_as_they_went_in_whoever_is_faster() {
        let all: Vec<u8> = (0..3_000_000u32).map(|at| (at * 7 + at / 251) as u8).collect();
        let inbox = Inbox::new();
        thread::scope(|scope| {
            scope.spawn(|| {
                let (mut rest, mut most) = (&all[..], 1);
                while !rest.is_empty() {
                    let count = inbox.push(&rest[..rest.len().min(most)]);
                    rest = &rest[count..];
                    most = most * 3 % 100_003;
                    if count == 0 {
                        thread::yield_now();
                    }
                }
            });
            let (mut taken, mut most) = (Vec::new(), 1);
            while taken.len() < all.len() {
                taken.extend(take(&inbox, most));
                most = most * 5 % 70_001;
                if inbox.len_bytes() == 0 {
                    thread::yield_now();
                }
            }
            assert!(taken == all);
        });
    }

    #[test]
    fn what_is_thrown_away_takes_room_until_the_queue_has_looked() {
        let inbox = Inbox::new();
        let all = vec![1; INBOX_BYTES as usize + 1];
        assert_eq!(inbox.push(&all), INBOX_BYTES as usize);
        inbox.clear();
        assert_eq!((inbox.len_bytes(), inbox.room(), inbox.push(&all)), (0, 0, 0));
        assert!(inbox.is_stale() && inbox.settle() && !inbox.settle());
        assert_eq!(inbox.push(&[2, 3]), 2);
        assert_eq!(take(&inbox, 10), [2, 3]);
        assert!(!inbox.is_stale());
    }
}

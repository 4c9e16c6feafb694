//! A number that only goes up: what every statistic in the project is made of.
//!
//! Contract: one thread adds at a time, any thread reads. Ownership of a counter moves with the
//! thing it counts (a queue's counters go with the queue through the mailbox), and that hand-over
//! is what orders the old writer before the new one. It deliberately does not serve two writers at
//! once: the data path would pay a locked instruction for each request to allow something that no
//! part of the design needs.

use std::sync::atomic::{AtomicU64, Ordering};

/// A count since the process started, written by one thread and readable by all.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// A counter at zero.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Adds `n`. Only the thread that owns what is counted may call this; a second writer would
    /// lose additions.
    #[inline]
    pub fn add(&self, n: u64) {
        // A load and a store instead of fetch_add: with one writer they give the same sum, and they
        // compile to a plain add without a lock prefix. Relaxed, because a count orders nothing.
        let sum = self.0.load(Ordering::Relaxed).wrapping_add(n);
        self.0.store(sum, Ordering::Relaxed);
    }

    /// The count so far; a concurrent `add` is either in it or not yet.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::Counter;
    use std::sync::Arc;

    #[test]
    fn additions_sum_up() {
        let counter = Counter::new();
        counter.add(2);
        counter.add(40);
        assert_eq!(counter.get(), 42);
    }

    #[test]
    fn reader_in_another_thread_sees_all_additions_of_a_writer_that_ended() {
        let counter = Arc::new(Counter::new());
        let writer = {
            let counter = Arc::clone(&counter);
            std::thread::spawn(move || (0..1000).for_each(|_| counter.add(1)))
        };
        writer.join().expect("the writer does not panic");
        assert_eq!(counter.get(), 1000);
    }
}

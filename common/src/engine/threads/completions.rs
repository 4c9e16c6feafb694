//! What the pool has done, on its way to the worker, and the bell that wakes a sleeping worker.
//!
//! Contract: an event that is pushed is taken by the worker, which does not sleep while there is
//! one. Only a worker that may sleep costs a system call; a busy one looks at shared memory. The
//! bell is never read: an edge-triggered watch sees each write.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use crate::engine::Event;

/// See the module's head.
pub(super) struct Completions {
    events: Mutex<Vec<Event>>,
    /// There are events. Written under their lock, read without.
    waiting: AtomicBool,
    /// The worker sleeps, or is about to.
    asleep: AtomicBool,
    bell: OwnedFd,
}

impl Completions {
    pub(super) fn new() -> rustix::io::Result<Self> {
        Ok(Self {
            events: Mutex::new(Vec::new()),
            waiting: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// What is readable when a sleeping worker is to wake up.
    pub(super) fn bell(&self) -> &OwnedFd {
        &self.bell
    }

    /// From any thread: an operation has ended.
    pub(super) fn push(&self, event: Event) {
        {
            let mut events = self.lock();
            events.push(event);
            self.waiting.store(true, Ordering::SeqCst);
        }
        // SeqCst: pairs with `fall_asleep`, which stores `asleep` and then loads `waiting`. Of the
        // two loads at least one sees the other side's store: the worker stays awake, or is woken.
        // Of several pushes the first one wakes it.
        if self.asleep.load(Ordering::SeqCst) && self.asleep.swap(false, Ordering::SeqCst) {
            // The count never nears 2^64, the only way in which this can fail.
            let rung = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
            debug_assert!(rung.is_ok(), "the bell of a worker always has room");
        }
    }

    /// Whether there is anything to take.
    pub(super) fn has_any(&self) -> bool {
        // Acquire: only a hint that `take` will find something, but an early one.
        self.waiting.load(Ordering::Acquire)
    }

    /// Appends all that there is.
    pub(super) fn take(&self, into: &mut Vec<Event>) {
        if self.has_any() {
            let mut events = self.lock();
            into.append(&mut events);
            self.waiting.store(false, Ordering::SeqCst);
        }
    }

    /// The worker is about to sleep: from here on the bell rings. False if it must not sleep.
    pub(super) fn fall_asleep(&self) -> bool {
        // SeqCst: pairs with `push`.
        self.asleep.store(true, Ordering::SeqCst);
        !self.waiting.load(Ordering::SeqCst)
    }

    /// The worker is awake: it looks by itself.
    pub(super) fn wake_up(&self) {
        // Relaxed: who rings too late rings in vain, and an edge too many does no harm.
        self.asleep.store(false, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Event>> {
        // A panic elsewhere leaves the list as whole as it was.
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::Completions;
    use crate::engine::{Event, Subject};

    fn event() -> Event {
        Event { subject: Subject::Mail, result: 0, more: false }
    }

    fn has_rung(completions: &Completions) -> bool {
        let mut bell = [PollFd::new(completions.bell(), PollFlags::IN)];
        poll(&mut bell, Some(&Timespec::default())).unwrap() > 0
    }

    #[test]
    fn worker_does_not_fall_asleep_over_what_came_a_moment_before() {
        let completions = Completions::new().unwrap();
        completions.push(event());
        assert!(!completions.fall_asleep());
        completions.wake_up();
        let mut taken = Vec::new();
        completions.take(&mut taken);
        assert_eq!((taken.len(), completions.has_any()), (1, false));
        assert!(completions.fall_asleep());
    }

    #[test]
    fn bell_rings_for_who_sleeps_and_for_nobody_else() {
        let completions = Completions::new().unwrap();
        completions.push(event());
        completions.take(&mut Vec::new());
        assert!(completions.fall_asleep());
        completions.wake_up();
        completions.push(event());
        assert!(!has_rung(&completions), "a system call for a worker that is awake");
        completions.take(&mut Vec::new());
        assert!(completions.fall_asleep());
        completions.push(event());
        completions.push(event());
        assert!(has_rung(&completions));
        let mut count = [0; 8];
        rustix::io::read(completions.bell(), &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 1, "rings for two events");
    }
}

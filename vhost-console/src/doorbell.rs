//! Doorbells: how one side of a device has the other look again, without a system call where nobody sleeps.
//!
//! Contract: who is to sleep [arms](Doorbell::arm) the bell and *then looks once more*; who has news makes it visible and
//! *then* [asks whether to ring](Doorbell::is_to_ring). One of the two sees the other, so no news is slept over; and who
//! is awake is not rung for. A bell is an eventfd: queues wait for it as for a channel, the main thread by its runtime.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};

use rustix::event::{EventfdFlags, eventfd};

/// See the module's head.
pub(crate) struct Doorbell {
    event: OwnedFd,
    is_armed: AtomicBool,
}

impl Doorbell {
    pub(crate) fn new() -> rustix::io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { event, is_armed: AtomicBool::new(false) })
    }

    /// Somebody is to sleep until the bell rings, if a last look finds nothing.
    pub(crate) fn arm(&self) {
        self.is_armed.store(true, Ordering::Relaxed);
        // Pairs with the fence in `is_to_ring`: of the store above and the news that is published before that fence, at least
        // one is seen by the other side. Release and acquire would let both sides read the past.
        fence(Ordering::SeqCst);
    }

    /// Whether somebody sleeps and has not been rung for; from here on he has. To be asked after the news is visible.
    pub(crate) fn is_to_ring(&self) -> bool {
        // Pairs with the fence in `arm`.
        fence(Ordering::SeqCst);
        self.is_armed.load(Ordering::Relaxed) && self.is_armed.swap(false, Ordering::Relaxed)
    }

    /// The last look has found something: nobody sleeps. Who rings meanwhile is heard once too often.
    pub(crate) fn disarm(&self) {
        self.is_armed.store(false, Ordering::Relaxed);
    }

    /// Rings. A queue on whose way are bytes does so [through its channel](crate::ringer).
    pub(crate) fn ring_if_armed(&self) {
        if self.is_to_ring() {
            // The count never nears 2^64, the only way in which this can fail.
            let rung = rustix::io::write(&self.event, &1u64.to_ne_bytes());
            debug_assert!(rung.is_ok(), "an eventfd always has room");
        }
    }

    /// Takes the ringing back, on the main thread, so that the next one is noticed.
    pub(crate) fn clear(&self) {
        // It says `AGAIN` where it has not rung.
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

//! A process that ends at a store of its choice, for tests of what it leaves to its successor.
//!
//! Contract: every store to memory that others see passes [`store`]. On the thread of [`after`], the one beyond the last that
//! is granted unwinds instead of being made; whoever is on the way may not store either, and so does nothing more.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

thread_local! {
    /// Stores that are yet granted; `None`: any number.
    static GRANTED: Cell<Option<u64>> = const { Cell::new(None) };
}

/// What unwinds.
struct Crash;

/// Runs until so many stores have been made; `None` if it wanted more.
pub(crate) fn after<T>(stores: u64, run: impl FnOnce() -> T) -> Option<T> {
    GRANTED.set(Some(stores));
    let ended = catch_unwind(AssertUnwindSafe(run));
    GRANTED.set(None);
    match ended {
        Ok(value) => Some(value),
        Err(cause) if cause.is::<Crash>() => None,
        Err(cause) => resume_unwind(cause),
    }
}

/// A store is about to be made.
pub(super) fn store() {
    match GRANTED.get() {
        None => {}
        Some(0) => resume_unwind(Box::new(Crash)),
        Some(left) => GRANTED.set(Some(left - 1)),
    }
}

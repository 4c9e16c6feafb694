//! A token bucket in one atomic number.
//!
//! It holds the *generic cell rate algorithm*: instead of tokens and the time of the last look, the
//! time up to which the rate has been paid for. A request moves it on by what it costs; it may go
//! once the time is not further ahead of the clock than the burst is worth. That is the same as a
//! bucket that is filled all the time, and one compare-and-swap takes from it.
//!
//! Rate and burst stand beside it and may change at any time. Whoever moves the time has read it
//! *before* rate and burst; who changes these sets the time *after* them, to a value that it never
//! had: a move that was computed from a rate of before is then lost in either case, and no debt at a
//! rate of one an hour outlives that rate.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};

use super::TICKS_PER_NS;
use super::spec::Limit;

/// How late whoever waits may come without losing any of the rate, since the timers of a busy host
/// fire late; also the longest that a bucket without a burst of its own saves up.
pub const TOLERANCE_NS: u64 = 5_000_000;

const TICKS_PER_SECOND: u64 = 1_000_000_000 * TICKS_PER_NS;

/// One limit, and what has been used of it.
#[derive(Debug, Default)]
pub(super) struct Bucket {
    /// The time up to which the rate has been paid for, in ticks.
    paid_until: AtomicU64,
    /// In a second; 0: there is no limit.
    rate: AtomicU64,
    /// What may come at once; 0: nothing beyond the tolerance.
    burst: AtomicU64,
    /// The number of the limits' last change that changed this one.
    changed: AtomicU64,
}

/// A limit as a request finds it.
#[derive(Clone, Copy)]
struct Terms {
    rate: NonZeroU64,
    burst: u64,
}

impl Terms {
    /// How long the rate takes to give `amount`, in ticks.
    fn cost(self, amount: u64) -> u64 {
        let ticks = u128::from(amount) * u128::from(TICKS_PER_SECOND);
        u64::try_from(ticks.div_ceil(u128::from(self.rate.get()))).unwrap_or(u64::MAX)
    }

    /// When a request of `amount` may go, if the rate has been paid for up to `paid_until`.
    fn ready(self, amount: u64, paid_until: u64) -> u64 {
        let burst = self.cost(self.burst.saturating_sub(amount));
        paid_until.saturating_sub(burst.max(TOLERANCE_NS * TICKS_PER_NS))
    }
}

impl Bucket {
    /// When a request of `amount` could go, in ticks; one of nothing at any time.
    pub(super) fn ready(&self, amount: u64) -> u64 {
        let paid_until = self.paid_until.load(Ordering::Acquire);
        match self.terms() {
            Some(terms) if amount > 0 => terms.ready(amount, paid_until),
            _ => 0,
        }
    }

    /// Pays for a request of `amount` at `now`; when it may go, in ticks.
    pub(super) fn take(&self, amount: u64, now: u64) -> u64 {
        let taken = self.update(amount, |terms, paid_until| {
            paid_until.max(now).saturating_add(terms.cost(amount))
        });
        taken.map_or(0, |(terms, before)| terms.ready(amount, before))
    }

    /// A request of `amount` that had paid before goes at `now`. If that is later than the burst
    /// allows for, the rate in between is lost, as it is to who was not there.
    pub(super) fn settle(&self, amount: u64, now: u64) {
        self.update(amount, |terms, paid_until| {
            paid_until.max(now.saturating_add(terms.cost(amount)))
        });
    }

    /// Gives back what a request of `amount` had paid after the change with this number.
    pub(super) fn give_back(&self, amount: u64, change: u64) {
        self.update(amount, |terms, paid_until| {
            let is_other = self.changed.load(Ordering::Relaxed) > change;
            let paid = if is_other { 0 } else { terms.cost(amount) };
            paid_until.saturating_sub(paid)
        });
    }

    /// Sets the limit, with nothing used of it. `number` is larger than those before.
    pub(super) fn set(&self, limit: Limit, number: u64) {
        let (rate, burst) = match limit {
            Limit::None => (0, 0),
            Limit::At { rate, burst } => (rate.get(), burst.map_or(0, NonZeroU64::get)),
        };
        self.rate.store(rate, Ordering::Relaxed);
        self.burst.store(burst, Ordering::Relaxed);
        self.changed.store(number, Ordering::Relaxed);
        // Release pairs with the acquire loads of the time: who sees this value sees the limit that
        // belongs to it. As a time it is in the past, and no other change leaves the same.
        self.paid_until.store(number, Ordering::Release);
    }

    /// The limit, for the thread that sets it.
    pub(super) fn limit(&self) -> Limit {
        match self.terms() {
            Some(Terms { rate, burst }) => Limit::At { rate, burst: NonZeroU64::new(burst) },
            None => Limit::None,
        }
    }

    fn terms(&self) -> Option<Terms> {
        let rate = NonZeroU64::new(self.rate.load(Ordering::Relaxed))?;
        Some(Terms { rate, burst: self.burst.load(Ordering::Relaxed) })
    }

    /// Moves the time; what it was, and by which terms. Without a limit there is no time.
    fn update(&self, amount: u64, to: impl Fn(Terms, u64) -> u64) -> Option<(Terms, u64)> {
        let mut before = self.paid_until.load(Ordering::Acquire);
        loop {
            let terms = self.terms().filter(|_| amount > 0)?;
            let after = to(terms, before);
            let swapped = self.paid_until.compare_exchange_weak(
                before,
                after,
                Ordering::AcqRel,
                Ordering::Acquire,
            );
            match swapped {
                Ok(_) => return Some((terms, before)),
                Err(now) => before = now,
            }
        }
    }
}

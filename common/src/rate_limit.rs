//! How much a device may do in a second: operations and bytes, in all and by direction.
//!
//! Contract: all queues of a device share one [`RateLimits`], from any number of threads, without a
//! lock and without waiting. It has six token buckets ([`bucket`]); a request is admitted when each
//! that applies to it has room, and pays all of them then. Every function takes the time, so a test
//! can bring its own clock; all callers must bring the same.
//!
//! A request that finds no room takes a [`Place`] in the line of each bucket that refused it: it has
//! paid there, and the place says from when on it may go. The other buckets are not charged until it
//! does. So a waiting queue sleeps until the moment that is its own, instead of racing for the next
//! free one, and what another queue asks for later comes after it: whoever wakes first, and whatever
//! the sizes of their requests.
//!
//! What it keeps: in no window does a bucket let through more than `rate × window + burst`, where
//! the burst is what was asked for, but at least the largest request and what the rate gives in
//! [`TOLERANCE_NS`]. A queue that comes later than that finds its place kept, and the bucket counts
//! it as of then; only so can a window hold one request more for each further queue. What it
//! deliberately does not do: hold requests, or shares that are not equal.

mod bucket;
mod spec;

use std::sync::atomic::{AtomicU64, Ordering};

use self::bucket::Bucket;
pub use self::bucket::TOLERANCE_NS;
pub(crate) use self::spec::Term;
pub use self::spec::{Change, Limit, SpecError, Topic, Unit};

/// The parts in which the clock is counted: requests that are due every few nanoseconds must not
/// come at a rate that is off by the rounding.
const TICKS_PER_NS: u64 = 16;

/// Which way a request's data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// What a disk's reads and a network's receiving are.
    ToDriver,
    /// What a disk's writes and a network's sending are.
    FromDriver,
}

/// What a limit applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Both directions together.
    Total,
    /// [`Direction::ToDriver`].
    ToDriver,
    /// [`Direction::FromDriver`].
    FromDriver,
}

const SCOPES: usize = 3;

/// A request, as limits see it: one operation and its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Which way the data goes.
    pub direction: Direction,
    /// How much it is.
    pub bytes: u64,
}

/// Where a request stands that had to wait: what it has paid, and when it may go.
#[derive(Debug)]
pub struct Place {
    cost: Cost,
    /// The buckets in which it has paid, a bit for each of [`RateLimits::applying`].
    paid: u8,
    /// From when on it may go, in ticks.
    ready: u64,
    /// The change of limits under which it was taken.
    change: u64,
}

/// There is no room for a request yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    /// When to ask again. A change of the limits may make it earlier.
    pub until_ns: u64,
    /// Whether the request had not been told so before.
    pub is_first: bool,
}

/// The limits of a device, and what has been used of them.
#[derive(Debug, Default)]
pub struct RateLimits {
    operations: [Bucket; SCOPES],
    bytes: [Bucket; SCOPES],
    /// How often limits have been changed.
    changes: AtomicU64,
}

impl RateLimits {
    /// Whether a request may go at `now_ns`; then it has paid. `place` is what its queue keeps for
    /// it while it waits, of which each queue has one.
    ///
    /// # Errors
    /// There is no room; the place says since when it waits.
    pub fn admit(&self, place: &mut Option<Place>, cost: Cost, now_ns: u64) -> Result<(), Wait> {
        let change = self.changes.load(Ordering::Acquire);
        // No limit was ever set: nobody has waited for one, and there is nothing to pay.
        if change == 0 {
            return Ok(());
        }
        let now = now_ns.saturating_mul(TICKS_PER_NS);
        let is_first = place.is_none();
        let mut paid = 0;
        match place.take() {
            Some(kept) if kept.cost == cost && kept.change == change => {
                if kept.ready > now {
                    let until_ns = kept.ready.div_ceil(TICKS_PER_NS);
                    *place = Some(kept);
                    return Err(Wait { until_ns, is_first });
                }
                paid = kept.paid;
            }
            // It is another request now, or there are other limits: it starts anew.
            Some(kept) => self.give_back(kept),
            None => {}
        }
        let paid_before = paid;
        let buckets = self.applying(cost);
        let mut ready = 0;
        for full_only in [true, false] {
            for (at, (bucket, amount)) in buckets.iter().enumerate() {
                let wanted = !full_only || bucket.ready(*amount) > now;
                if paid & 1 << at == 0 && wanted {
                    ready = ready.max(bucket.take(*amount, now));
                    paid |= 1 << at;
                }
            }
            if ready > now {
                *place = Some(Place { cost, paid, ready, change });
                return Err(Wait { until_ns: ready.div_ceil(TICKS_PER_NS), is_first });
            }
        }
        for (at, (bucket, amount)) in buckets.iter().enumerate() {
            if paid_before & 1 << at != 0 {
                bucket.settle(*amount, now);
            }
        }
        Ok(())
    }

    /// Gives up a place in the line: the request is not made, or not here.
    pub fn give_back(&self, place: Place) {
        for (at, (bucket, amount)) in self.applying(place.cost).iter().enumerate() {
            if place.paid & 1 << at != 0 {
                bucket.give_back(*amount, place.change);
            }
        }
    }

    /// Changes what the change names, from the next request on and without regard to what has been
    /// used before. Requests that wait are to ask again. To be called from one thread at a time.
    pub fn change(&self, change: &Change) {
        let number = self.changes.load(Ordering::Relaxed) + 1;
        let mut is_change = false;
        for unit in Unit::ALL {
            for (bucket, wanted) in self.buckets(unit).iter().zip(change.wanted(unit)) {
                if let Some(limit) = wanted.filter(|limit| *limit != bucket.limit()) {
                    bucket.set(limit, number);
                    is_change = true;
                }
            }
        }
        if is_change {
            // Last: a place that was taken by a limit of before must not seem to be of this change.
            self.changes.store(number, Ordering::Release);
        }
    }

    /// The limit that is in force; for the thread that changes them.
    pub fn in_force(&self, unit: Unit, scope: Scope) -> Limit {
        self.buckets(unit)[scope as usize].limit()
    }

    fn buckets(&self, unit: Unit) -> &[Bucket; SCOPES] {
        match unit {
            Unit::Operations => &self.operations,
            Unit::Bytes => &self.bytes,
        }
    }

    /// The buckets that a request needs room in, and how much of it.
    fn applying(&self, cost: Cost) -> [(&Bucket, u64); 4] {
        let scope = match cost.direction {
            Direction::ToDriver => Scope::ToDriver,
            Direction::FromDriver => Scope::FromDriver,
        } as usize;
        let total = Scope::Total as usize;
        [
            (&self.operations[total], 1),
            (&self.operations[scope], 1),
            (&self.bytes[total], cost.bytes),
            (&self.bytes[scope], cost.bytes),
        ]
    }
}

#[cfg(test)]
mod tests;

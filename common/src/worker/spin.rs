//! Looking before sleeping: whether it pays, and for how long.
//!
//! Waking a sleeping CPU costs both sides tens of microseconds, several times what a request costs.
//! A worker whose sleeps turn out short therefore looks for work for a bounded time first; each
//! look in vain halves the next, so that an idle worker is soon asleep for good, at 0 % CPU.

use std::time::{Duration, Instant};

/// The longest look. About what a wake-up costs: who looks this long in vain has lost as much as
/// it could have won.
pub(super) const LOOK_MAX: Duration = Duration::from_micros(50);
/// Looks that are shorter than this find nothing.
const LOOK_MIN: Duration = Duration::from_micros(5);
/// A sleep shorter than this would have been a successful look: its end includes a wake-up.
const SLEEP_SHORT: Duration = Duration::from_micros(100);

/// How a worker's waits have been lately.
#[derive(Debug, Default)]
pub(super) struct Spin {
    budget: Duration,
}

impl Spin {
    /// Whether to look at all before the next sleep.
    pub(super) fn is_worth_it(&self) -> bool {
        self.budget >= LOOK_MIN
    }

    /// Asks `found` again and again; false when it had nothing in the time that is worth it.
    pub(super) fn look(&mut self, mut found: impl FnMut() -> bool) -> bool {
        let began = Instant::now();
        loop {
            if found() {
                self.budget = LOOK_MAX;
                return true;
            }
            if began.elapsed() > self.budget {
                self.budget /= 2;
                return false;
            }
            std::hint::spin_loop();
        }
    }

    /// Takes note of how long a sleep lasted.
    pub(super) fn slept(&mut self, asleep: Duration) {
        if asleep < SLEEP_SHORT {
            self.budget = LOOK_MAX;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::Spin;

    #[test]
    fn idle_worker_stops_looking() {
        let mut spin = Spin::default();
        assert!(!spin.is_worth_it());
        spin.slept(Duration::from_micros(20));
        let mut looks = 0;
        while spin.is_worth_it() {
            assert!(!spin.look(|| false));
            spin.slept(Duration::from_millis(10));
            looks += 1;
        }
        assert_eq!(looks, 4);
    }

    #[test]
    fn success_restores_the_longest_look() {
        let mut spin = Spin::default();
        spin.slept(Duration::ZERO);
        spin.look(|| false);
        let shorter = spin.budget;
        assert!(spin.look(|| true));
        assert!(spin.budget > shorter);
    }
}

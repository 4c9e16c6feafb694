//! Numbers that look random and come again with their seed.

use std::ops::Range;

/// A sequence of numbers that its seed determines (SplitMix64).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number, of 64 bits.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number within `range`, which is not empty.
    pub fn within(&mut self, range: Range<u64>) -> u64 {
        range.start + self.number() % (range.end - range.start)
    }

    /// An index below `len`, which is not zero.
    pub fn index(&mut self, len: usize) -> usize {
        self.within(0..len as u64) as usize
    }

    /// True once in `of` times.
    pub fn once_in(&mut self, of: u64) -> bool {
        self.within(0..of) == 0
    }

    /// One of these.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.index(choices.len())]
    }
}

/// How many cases a test runs that usually runs `usual`: `OUTBOARD_SIMULATION_CASES`, if that is set.
///
/// # Panics
/// It is not a number.
pub fn cases(usual: u64) -> u64 {
    number("OUTBOARD_SIMULATION_CASES").unwrap_or(usual)
}

/// Runs a test with each seed below `usual`: as many as [`cases`] says, or the one that
/// `OUTBOARD_SIMULATION_SEED` names, to see again what has failed. A failure names its seed.
///
/// # Panics
/// The variable is not a number.
pub fn each_seed(usual: u64, mut run: impl FnMut(u64)) {
    for seed in chosen_seed().map_or_else(|| 0..cases(usual), |seed| seed..seed + 1) {
        let _named = Named(seed);
        run(seed);
    }
}

/// The seed that `OUTBOARD_SIMULATION_SEED` names.
///
/// # Panics
/// It is not a number.
pub fn chosen_seed() -> Option<u64> {
    number("OUTBOARD_SIMULATION_SEED")
}

/// Tells its seed when a test fails.
struct Named(u64);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("to see this again: OUTBOARD_SIMULATION_SEED={}", self.0);
        }
    }
}

fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(value.parse().unwrap_or_else(|error| panic!("{variable}={value}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::Random;

    #[test]
    fn seed_determines_the_sequence() {
        let draw = |seed| {
            let mut random = Random::new(seed);
            [random.number(), random.within(3..5), random.number()]
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn every_number_of_a_range_is_drawn() {
        let mut random = Random::new(0);
        let mut drawn = [0; 8];
        for _ in 0..800 {
            drawn[random.index(8)] += 1;
        }
        assert!(drawn.iter().all(|count| (50..200).contains(count)), "{drawn:?}");
    }
}

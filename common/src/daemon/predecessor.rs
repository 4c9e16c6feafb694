//! What a daemon that was killed leaves to its successor: for a moment longer than it seems to live, it has what it had open.
//!
//! Contract: [`outlast`] tries until what is wanted is no longer in use, or [`LIMIT`] has passed; any other fault is told at
//! once. It blocks, so it is for a daemon that is about to start.
//!
//! What it deliberately does not do: find out who the other is. One who stays is waited for in vain.

use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long something may be in use before it is somebody else's. A signal is sent before who gets it has died, and what an
/// io_uring instance held the kernel lets go of later yet, in the background.
const LIMIT: Duration = Duration::from_secs(1);
/// Pause before what is in use is tried again.
const PAUSE: Duration = Duration::from_millis(10);

/// Opens what a predecessor may have for a moment yet.
///
/// # Errors
/// The last that `open` met.
pub fn outlast<T, E>(
    is_in_use: impl Fn(&E) -> bool,
    mut open: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match open() {
            Err(error) if is_in_use(&error) && Instant::now() < deadline => sleep(PAUSE),
            opened => return opened,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::{LIMIT, outlast};

    const IN_USE: &str = "in use";

    type Opened = Result<(), &'static str>;

    /// What comes of openings that go so, and how many there were.
    fn outcome(mut open: impl FnMut(u32) -> Opened) -> (Opened, u32) {
        let mut tries = 0;
        let opened = outlast(
            |error| *error == IN_USE,
            || {
                tries += 1;
                open(tries)
            },
        );
        (opened, tries)
    }

    #[test]
    fn what_is_in_use_is_tried_until_it_is_free() {
        assert_eq!(outcome(|tries| if tries < 3 { Err(IN_USE) } else { Ok(()) }), (Ok(()), 3));
    }

    #[test]
    fn what_stays_in_use_is_given_up() {
        let start = Instant::now();
        let (opened, tries) = outcome(|_| Err(IN_USE));
        assert_eq!(opened, Err(IN_USE));
        assert!(tries > 1 && start.elapsed() >= LIMIT, "{tries} tries");
    }

    #[test]
    fn another_fault_is_told_at_once() {
        let second = |tries| if tries < 2 { Err(IN_USE) } else { Err("broken") };
        assert_eq!(outcome(second), (Err("broken"), 2));
    }
}

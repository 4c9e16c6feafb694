//! A worker without thread, kernel and clock, and a driver for its rings: what tests of a device
//! are made with.
//!
//! Contract: all that happens is decided by the test or drawn from a seed, so a run is repeated by
//! its seed. [`Stage`] turns the worker that daemons run, with its real rings, by hand; [`Kernel`]
//! takes the place of the engine: it holds operations until the test ends them, in any order and
//! with any result; [`Driver`] writes descriptors into real [`Guest`] memory and reads the used ring, and a [`Ring`] is
//! one that serves a well-behaved guest.
//! What it does not do: storage, network or terminals. What an operation moves is the test's.
//!
//! For tests only (feature `simulation`): no daemon needs it. Nothing here is foreign input, so what a test has got wrong is
//! a panic, which fails the test; each function says when.

mod channels;
mod driver;
mod guest;
mod kernel;
mod random;
mod ring;
mod stage;

pub use self::driver::{Buffer, Driver, Layout, Used};
pub use self::guest::Guest;
pub use self::kernel::{Kernel, Operation, Work};
pub use self::random::{Random, cases, chosen_seed, each_seed};
pub use self::ring::{Given, PIECES_MAX, Ring, RingSpec};
pub use self::stage::Stage;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod throttling_tests;

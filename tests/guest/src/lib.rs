//! What the guest's PID 1 and the tests on the host must agree on: the pattern on a disk, its checksum, and
//! the lines on the console.
//!
//! The program itself is `main.rs`, with one file per check in `checks`.

pub mod announcement;
pub mod pattern;
pub mod throughput;
pub mod verdict;

/// What the program says first: the kernel has come so far, and has no driver of ours yet.
pub const UP: &str = "outboard: the kernel is up";
/// What it says when the drivers are there.
pub const EQUIPPED: &str = "outboard: the drivers are loaded";

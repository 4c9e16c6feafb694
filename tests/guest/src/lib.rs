//! What the guest's PID 1 and the tests on the host must agree on: the pattern on a disk, its checksum, and
//! the lines on the console.
//!
//! The program itself is `main.rs`, with one file per check in `checks`.

pub mod announcement;
pub mod pattern;
pub mod throughput;
pub mod verdict;

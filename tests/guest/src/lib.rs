//! What the guest's PID 1 and the tests on the host must agree on: the pattern on a disk, its checksum, and the verdict line.
//!
//! The program itself is `main.rs`, with one file per check in `checks`.

pub mod pattern;
pub mod verdict;

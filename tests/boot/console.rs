//! A guest's consoles and data ports, end to end: people who log in and look on, streams, logs, and what the guest sees of it.
//!
//! The scenes are the same on all front ends; each has a test there.

mod coming_and_going;
mod figures;
mod logs;
mod people;
mod ports;
mod qemu;
pub(crate) mod server;
mod uml;

use std::path::Path;

use tests::Machine;

use crate::dialogue::Guest;

/// Who has guests.
pub(crate) trait FrontEnd {
    /// What a stream is to carry in the time that a test may take.
    fn stream_bytes(&self) -> u64;

    /// Boots a guest that runs the check "console" on the device behind the socket; the kernel gets these words besides.
    fn boot(&self, socket: &Path, words: &[&str]) -> Machine;

    /// Has a guest end whose check passes.
    fn finish(&self, machine: Machine);

    /// Boots a guest, and waits until it can be talked to.
    fn meet(&self, socket: &Path, words: &[&str]) -> Guest {
        Guest::meet(self.boot(socket, words))
    }
}

//! What the suites of this package share: starting the real daemons and real guests, and cleaning up after both.
//!
//! Contract: whatever is started here ends when its value is dropped, also when a test panics, and by process id, so that
//! nothing of another test or of the machine is touched. Waiting is always for an event, bounded by a deadline that only
//! a broken system reaches. Failures panic with what the process had said until then: this is test code.
//!
//! Deliberately absent: anything that speaks vhost-user (that is `tests/frontend`), and any use of `common`.

mod capture;
mod daemon;
mod deadline;
mod disk_image;
mod echo;
mod frame;
mod initrd;
mod iperf;
mod loop_device;
mod machine;
mod namespace;
mod passt;
mod requirement;
mod rig;
mod service;
mod tap;
mod user_mode_linux;

use std::path::Path;

pub use capture::Capture;
pub use daemon::{Daemon, DaemonCommand, engine_arguments, program};
pub use deadline::wait_for_exit;
pub use disk_image::DiskImage;
pub use echo::Echo;
pub use frame::{Checksum, Frame, Malformed, Packet, Transport};
pub use initrd::Initrd;
pub use iperf::Iperf;
pub use loop_device::LoopDevice;
pub use machine::{Machine, Seen};
pub use namespace::{Namespace, Tap};
pub use passt::Passt;
pub use requirement::{cannot_run, lacks_root, temp_dir_on_storage, temp_dir_with_direct_io};
pub use rig::{KernelRelease, Rig};
pub use service::{Kept, Service};
pub use tempfile::TempDir;
pub use user_mode_linux::{Device, UserModeLinux};

/// A private directory that disappears with its value. Unix socket paths fit in it: its own path is short.
///
/// # Panics
/// If the system's directory for temporary files cannot be written.
pub fn temp_dir() -> TempDir {
    temp_dir_in(&std::env::temp_dir())
}

/// The same below another directory than the system's.
fn temp_dir_in(parent: &Path) -> TempDir {
    tempfile::Builder::new()
        .prefix("outboard-")
        .tempdir_in(parent)
        .unwrap_or_else(|error| panic!("{} is to be writable: {error}", parent.display()))
}

//! What the suites of this package share: starting the real daemons and real guests, and cleaning up after both.
//!
//! Contract: whatever is started here ends when its value is dropped, also when a test panics, and by process id, so that
//! nothing of another test or of the machine is touched. Waiting is always for an event, bounded by a deadline that only
//! a broken system reaches. Failures panic with what the process had said until then: this is test code.
//!
//! Deliberately absent: anything that speaks vhost-user (that is `tests/frontend`), and any use of `common`.

mod daemon;
mod deadline;
mod disk_image;
mod initrd;
mod loop_device;
mod machine;
mod requirement;
mod rig;
mod user_mode_linux;

pub use daemon::{Daemon, DaemonCommand, engine_arguments, program};
pub use deadline::wait_for_exit;
pub use disk_image::DiskImage;
pub use initrd::Initrd;
pub use loop_device::LoopDevice;
pub use machine::Machine;
pub use requirement::{cannot_run, lacks_root};
pub use rig::Rig;
pub use tempfile::TempDir;
pub use user_mode_linux::UserModeLinux;

/// A private directory that disappears with its value. Unix socket paths fit in it: its own path is short.
///
/// # Panics
/// If the system's directory for temporary files cannot be written.
pub fn temp_dir() -> TempDir {
    tempfile::Builder::new()
        .prefix("outboard-")
        .tempdir()
        .expect("the system's directory for temporary files is writable")
}

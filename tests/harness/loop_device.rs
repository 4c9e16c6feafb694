//! A loop device: a block device whose storage is a file.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::requirement::{cannot_run, lacks_root, temp_dir_on_storage};

/// An attached loop device. It goes with its last descriptor, so that nothing is left behind however a test ends.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    directory: TempDir,
    _open: File,
}

impl LoopDevice {
    /// A device over a file of this length, by further options of `losetup`; `None`, and why on stderr, where there
    /// cannot be one.
    ///
    /// # Panics
    /// If root cannot attach one where all tests must run; or if the file cannot be made.
    pub fn attach(len_bytes: u64, options: &[&str]) -> Option<Self> {
        if lacks_root("attaching a loop device") {
            return None;
        }
        // Some file systems in memory have no direct I/O, which an option may ask for.
        let directory = temp_dir_on_storage();
        let backing = directory.path().join("backing");
        let file = File::create_new(&backing).expect("a file fits in a fresh directory");
        file.set_len(len_bytes).expect("a file can be sparse");
        let attached = Command::new("losetup")
            .args(["--find", "--show"])
            .args(options)
            .arg(&backing)
            .output()
            .map_err(|error| error.to_string())
            .and_then(|output| match output.status.success() {
                true => Ok(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim_end())),
                false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
            });
        let path = match attached {
            Ok(path) => path,
            Err(error) => {
                cannot_run(&format!("losetup attaches no loop device: {error}"));
                return None;
            }
        };
        let open = File::open(&path);
        // While it is open, detaching only marks the device: it goes with the last descriptor.
        let detached = Command::new("losetup").arg("--detach").arg(&path).status();
        assert!(detached.is_ok_and(|status| status.success()), "{path:?} is still attached");
        let open = open.unwrap_or_else(|error| panic!("cannot open {path:?}: {error}"));
        Some(Self { path, directory, _open: open })
    }

    /// The device's node.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the file behind it longer, and has the kernel notice.
    ///
    /// # Panics
    /// If either cannot be done.
    pub fn grow(&self, len_bytes: u64) {
        let backing = File::options().write(true).open(self.directory.path().join("backing"));
        backing.and_then(|file| file.set_len(len_bytes)).expect("a file can be sparse");
        let noticed = Command::new("losetup").arg("--set-capacity").arg(&self.path).status();
        assert!(noticed.is_ok_and(|status| status.success()), "{:?} does not grow", self.path);
    }

    /// How much of the host's storage the file behind it takes.
    ///
    /// # Panics
    /// If the file cannot be examined.
    pub fn allocated_bytes(&self) -> u64 {
        let backing = self.directory.path().join("backing");
        // `st_blocks` counts 512 bytes whatever the file system's block size is.
        backing.metadata().expect("the file is ours").blocks() * 512
    }
}

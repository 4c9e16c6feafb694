//! The disks that daemons serve, and the host's ways to them: cache mode and engine.
//!
//! Each image is a file of its own, without a name that could stay behind; daemons reach it through this process. What a
//! sample has left to be written is written before the next one begins, so that nobody pays for another's writes.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use load::Random;
use rustix::fs::{Advice, fadvise, major, minor};

/// Where images are in memory, and nothing but the daemon costs time.
const IN_MEMORY: &str = "/dev/shm";
/// Where they outlive a reboot, and so are on storage.
const ON_STORAGE: &str = "/var/tmp";

/// How the host's cache is used, as QEMU and our daemon call it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Cache {
    None,
    Writeback,
    Writethrough,
    Directsync,
    Unsafe,
}

impl Cache {
    /// Data moves past the host's page cache.
    pub(crate) fn is_direct(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }

    /// Each write is stable before it completes.
    pub(crate) fn is_write_through(self) -> bool {
        matches!(self, Self::Writethrough | Self::Directsync)
    }

    /// Flushes are ignored.
    pub(crate) fn is_unsafe(self) -> bool {
        self == Self::Unsafe
    }

    /// What `--cache` of ours calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Writeback => "writeback",
            Self::Writethrough => "writethrough",
            Self::Directsync => "directsync",
            Self::Unsafe => "unsafe",
        }
    }

    /// The directory for its image: a file system in memory has nothing to go past to and nothing to make stable.
    pub(crate) fn directory(self) -> &'static Path {
        let needs_storage = self.is_direct() || self.is_write_through();
        Path::new(if needs_storage { ON_STORAGE } else { IN_MEMORY })
    }
}

/// How files are read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Aio {
    #[value(name = "io_uring")]
    IoUring,
    Threads,
}

impl Aio {
    /// What both our daemon and QEMU's call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::IoUring => "io_uring",
            Self::Threads => "threads",
        }
    }
}

/// The disk that a daemon is to serve.
#[derive(Debug)]
pub(crate) enum Disk {
    /// Completes everything, moves nothing; this many bytes.
    Null(u64),
    /// An image, and how it is to be opened.
    File { image: File, cache: Cache },
}

impl Disk {
    /// An image full of random data: a file system may answer holes and zeroes more cheaply than real blocks.
    pub(crate) fn file(directory: &Path, len_bytes: u64, cache: Cache) -> io::Result<Self> {
        let mut image = tempfile::tempfile_in(directory)?;
        let mut random = Random::new(len_bytes);
        let mut chunk = vec![0; 1 << 20];
        for _ in 0..len_bytes / chunk.len() as u64 {
            random.fill(&mut chunk);
            image.write_all(&chunk)?;
        }
        image.sync_all()?;
        if cache.is_direct() {
            // A write past a cache that has the block must drop it there first: no guest's disk is in it as a whole.
            fadvise(&image, 0, None, Advice::DontNeed)?;
        }
        Ok(Self::File { image, cache })
    }

    /// Waits until nothing that was written before is left to be written.
    pub(crate) fn settle(&self) -> io::Result<()> {
        match self {
            Self::Null(_) => Ok(()),
            Self::File { image, .. } => image.sync_all(),
        }
    }
}

/// Where daemons find an open file of this process.
pub(crate) fn path_of(image: &File) -> PathBuf {
    format!("/proc/{}/fd/{}", std::process::id(), image.as_raw_fd()).into()
}

/// The type of the file system that has this directory.
pub(crate) fn file_system(directory: &Path) -> io::Result<String> {
    let device = fs::metadata(directory)?.dev();
    let device = format!("{}:{}", major(device), minor(device));
    // proc_pid_mountinfo(5): the third field is the device; the type comes after a hyphen.
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some(&device));
    let kind = mount.and_then(|line| line.split_once(" - ")?.1.split(' ').next());
    Ok(kind.unwrap_or("of unknown type").to_owned())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::file_system;

    #[test]
    fn file_system_of_a_mount_is_found() {
        assert_eq!(file_system(Path::new("/proc")).expect("it can be read"), "proc");
    }
}

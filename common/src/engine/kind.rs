//! Which engine workers get, and whether this host has an io_uring for it.
//!
//! Contract: [`EngineKind::probe_io_uring`] makes a ring, uses it and lets it go, so that what it says holds for
//! rings that are made right after. Why there is none is told in an operator's words: the kernel's
//! error number alone does not say whether it was the administrator, a container or the kernel's age.

use std::fs;
use std::io;
use std::os::fd::RawFd;

use super::threads::{self, Threads};
use super::uring::{self, Uring};
use super::{Channels, Engine, EngineError};
use crate::sandbox::Call;

/// The engines that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// One io_uring a worker.
    IoUring,
    /// epoll and a pool of threads a worker.
    Threads,
}

impl EngineKind {
    /// Its name in options, on the log and in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::IoUring => "io_uring",
            Self::Threads => "threads",
        }
    }

    /// The system calls of a worker that has one.
    pub(crate) fn calls(self) -> Vec<Call> {
        match self {
            Self::IoUring => uring::CALLS.to_vec(),
            Self::Threads => threads::calls(),
        }
    }

    /// Whether it is to be opened by who is in the sandbox already: threads are held as who starts them is, and a ring takes
    /// system calls to set up that nobody needs later.
    pub(crate) fn opens_in_sandbox(self) -> bool {
        self == Self::Threads
    }

    /// Whether this host has an io_uring.
    ///
    /// # Errors
    /// It has none that we can use.
    pub fn probe_io_uring() -> Result<(), Unavailable> {
        Uring::probe()
    }

    /// Sets one up for the calling thread, the only one that may use it. Operations name `files` by
    /// their place; these stay open for as long as the engine is there, and so do the `channels`' numbers.
    ///
    /// # Errors
    /// The host does not give what it needs.
    pub(crate) fn open(
        self,
        files: Vec<RawFd>,
        channels: Channels,
    ) -> Result<Box<dyn Engine>, EngineError> {
        Ok(match self {
            Self::IoUring => Box::new(Uring::new(files, channels)?),
            Self::Threads => Box::new(Threads::new(files, channels).map_err(EngineError::Threads)?),
        })
    }
}

/// Why this host has no io_uring that we can use.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    /// The administrator has switched it off.
    #[error("forbidden by the sysctl kernel.io_uring_disabled = {setting}")]
    Disabled {
        /// 1: for all but the members of `kernel.io_uring_group`; 2: for everybody.
        setting: u8,
        /// What the kernel said.
        source: io::Error,
    },
    /// Something else forbids it.
    #[error("forbidden, most likely by the seccomp filter of a container or service")]
    Forbidden(#[source] io::Error),
    /// There is none.
    #[error("the kernel has none, or a seccomp filter says so")]
    Missing(#[source] io::Error),
    /// There is no memory for it.
    #[error("no memory for it, or none that may be locked (ulimit -l)")]
    Memory(#[source] io::Error),
    /// It is from before Linux 5.13.
    #[error("the kernel's is older than that of Linux 5.13")]
    Old,
    /// It cannot do what we need.
    #[error("the kernel's has no operation IORING_OP_{0}")]
    Lacking(&'static str),
    /// Another error.
    #[error("it cannot be set up")]
    Failed(#[source] io::Error),
}

impl From<io::Error> for Unavailable {
    fn from(error: io::Error) -> Self {
        let setting = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok();
        Self::new(error, setting.and_then(|text| text.trim().parse().ok()).unwrap_or(0))
    }
}

impl Unavailable {
    /// From what the kernel said where the sysctl `kernel.io_uring_disabled` has this `setting`.
    fn new(source: io::Error, setting: u8) -> Self {
        match source.raw_os_error() {
            Some(libc::EPERM) if setting != 0 => Self::Disabled { setting, source },
            Some(libc::EPERM | libc::EACCES) => Self::Forbidden(source),
            Some(libc::ENOSYS) => Self::Missing(source),
            Some(libc::ENOMEM) => Self::Memory(source),
            _ => Self::Failed(source),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::Unavailable;

    #[test]
    fn cause_is_told_from_error_and_sysctl() {
        for (errno, setting, words) in [
            (libc::EPERM, 1, "sysctl kernel.io_uring_disabled = 1"),
            (libc::EPERM, 2, "sysctl kernel.io_uring_disabled = 2"),
            (libc::EPERM, 0, "seccomp"),
            (libc::EACCES, 0, "seccomp"),
            (libc::ENOSYS, 0, "the kernel has none"),
            (libc::ENOMEM, 0, "ulimit -l"),
            (libc::EMFILE, 0, "cannot be set up"),
        ] {
            let told = Unavailable::new(io::Error::from_raw_os_error(errno), setting).to_string();
            assert!(told.contains(words), "{errno} with {setting}: {told}");
        }
    }
}

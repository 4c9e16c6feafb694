//! What `--port` says: a port, and the endpoints at its host's end.

use std::os::fd::RawFd;
use std::path::PathBuf;

use rustix::fs::Gid;

/// A port that is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PortSpec {
    pub(crate) name: Option<String>,
    pub(crate) is_console: bool,
    /// Its place; none: the next that is free.
    pub(crate) id: Option<u16>,
    pub(crate) endpoints: Vec<EndpointSpec>,
}

/// An endpoint that is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum EndpointSpec {
    Pty { link: Option<PathBuf> },
    Unix { path: PathBuf, mode: u32, group: Option<Gid> },
    File(FileSpec),
    Cast { path: PathBuf },
    Stdio,
    Fd(RawFd),
    Null,
}

/// A log that is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FileSpec {
    pub(crate) path: PathBuf,
    pub(crate) max_size: Option<u64>,
    pub(crate) keep: u32,
    pub(crate) timestamps: bool,
}

/// Stands in for the parser.
#[derive(Debug, thiserror::Error)]
#[error("no ports can be parsed yet")]
pub(crate) struct NoSpec;

impl std::str::FromStr for PortSpec {
    type Err = NoSpec;

    fn from_str(_: &str) -> Result<Self, NoSpec> {
        Err(NoSpec)
    }
}

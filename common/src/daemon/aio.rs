//! `--aio`: which engine the workers get.
//!
//! Contract: decided once, in the main thread, before any worker starts. The log says what was chosen,
//! and, where `auto` had to do without io_uring, why: in one line.

use clap::ValueEnum;
use tracing::{info, warn};

use super::log;
use crate::engine::{EngineKind, Unavailable};

/// How files are read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Aio {
    /// io_uring, or threads where the host has or allows no io_uring.
    Auto,
    /// io_uring, or a failure to start.
    #[value(name = "io_uring")]
    IoUring,
    /// Threads that read and write.
    Threads,
}

/// The operator insists on an io_uring that there is not.
#[derive(Debug, thiserror::Error)]
#[error("--aio io_uring is not possible on this host (--aio threads is)")]
pub(super) struct NoIoUring(#[source] Unavailable);

/// The engine for all workers.
pub(super) fn choose(aio: Aio) -> Result<EngineKind, NoIoUring> {
    let kind = match aio {
        Aio::Threads => EngineKind::Threads,
        Aio::IoUring => {
            EngineKind::probe_io_uring().map_err(NoIoUring)?;
            EngineKind::IoUring
        }
        Aio::Auto => match EngineKind::probe_io_uring() {
            Ok(()) => EngineKind::IoUring,
            Err(cause) => {
                let cause = log::with_sources(&cause);
                warn!("no io_uring, so files are read and written by threads: {cause}");
                return Ok(EngineKind::Threads);
            }
        },
    };
    info!("files are read and written by {}", kind.name());
    Ok(kind)
}

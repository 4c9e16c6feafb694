//! `stock-blk`: the baseline of the bench.
//!
//! The disk of `vhost-blk`, null or file, written on `vhost-user-backend` and `virtio-queue` as their documentation
//! shows: [`backend`] is the crates' device trait, [`disk`] the I/O, and this file the life of the process. It
//! answers what our own runtime is worth, so nothing is held back: one thread and one uncontended lock a queue, no
//! copy between file and guest, EVENT_IDX, one lock for a whole turn.
//!
//! It is no product. It trusts its guest: what the crates make of a broken ring is not repaired here. It serves IN,
//! OUT, FLUSH and GET_ID and nothing else, knows no locks, of cache modes only what a bench can compare, and its socket
//! has the umask's rights.

mod backend;
mod disk;

use std::error::Error as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::backend::StockBlk;
use crate::disk::{Caching, Disk, DiskError, DiskSource};

/// Serve a disk over vhost-user on the stock rust-vmm crates, to measure against.
#[derive(Parser)]
struct Options {
    /// Path of the vhost-user socket to listen on.
    #[arg(long)]
    socket_path: PathBuf,
    /// `file:PATH`, or `null:SIZE` in bytes for a disk that does nothing.
    #[arg(long)]
    disk: DiskSource,
    #[command(flatten)]
    caching: Caching,
    /// Number of request queues, each on a thread of its own.
    // 64: the runtime keeps the queues of a thread in a mask of that many bits.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    num_queues: u16,
}

/// Why the daemon ended.
#[derive(Debug, thiserror::Error)]
enum StockError {
    /// The disk could not be opened.
    #[error("--disk")]
    Disk(#[from] DiskError),
    /// The runtime could not be built, or could not listen.
    #[error("vhost-user runtime: {0}")]
    Runtime(vhost_user_backend::Error),
}

fn main() -> ExitCode {
    match serve(Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut line = format!("stock-blk: {error}");
            let mut source = error.source();
            while let Some(cause) = source {
                line.push_str(&format!(": {cause}"));
                source = cause.source();
            }
            eprintln!("{line}");
            ExitCode::FAILURE
        }
    }
}

/// Serves one front end after another until the process is killed: the runtime has no end of its own to offer.
fn serve(options: Options) -> Result<(), StockError> {
    let disk = Arc::new(Disk::open(&options.disk, options.caching)?);
    loop {
        // A daemon object serves one connection only (a second SET_OWNER is refused), so each front end gets a new one.
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let backend =
            Arc::new(StockBlk::new(Arc::clone(&disk), options.num_queues, memory.clone()));
        let mut daemon = VhostUserDaemon::new("stock-blk".into(), backend, memory)
            .map_err(StockError::Runtime)?;
        match daemon.serve(&options.socket_path) {
            Ok(()) => {}
            // The front end's fault: the next one is served.
            Err(error @ vhost_user_backend::Error::HandleRequest(_)) => {
                eprintln!("stock-blk: {error}")
            }
            Err(error) => return Err(StockError::Runtime(error)),
        }
    }
}

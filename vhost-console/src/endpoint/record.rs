//! Writing down what a port puts out: what a log and a recording have in common.
//!
//! Contract: while its [`Pen`] writes, the guest waits for it, and every byte is written. A pen writes on a thread that tokio has for
//! what blocks, one piece at a time; the main thread never waits for a disk. When it fails, that is told once, and
//! nobody waits any more: it tries again while there is something to write, once in [`RETRY`] or when it is to be opened anew, and
//! writes what is still to be had. Then how much is missing is written and told, and the guest waits again.
//!
//! What it deliberately does not do: sync. What it has written is the kernel's; a crash of the host may cost the end.

use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::at::{At, Keeper};
use crate::config::Size;

/// Bytes that are written at once.
const PIECE_BYTES: usize = 256 << 10;
/// Between two attempts to write to what has failed.
const RETRY: Duration = Duration::from_secs(1);

/// What writes.
pub(crate) trait Pen: Send + 'static {
    /// Writes bytes down, which came just now; how many it got to, and what stopped it.
    fn write(&mut self, bytes: &[u8]) -> (usize, io::Result<()>);
    /// Writes down that bytes are missing here.
    fn miss(&mut self, bytes: u64) -> io::Result<()>;
    /// Writes down that the console has another size.
    fn resize(&mut self, _size: Size) -> io::Result<()> {
        Ok(())
    }
    /// Opens anew what is opened by name.
    fn reopen(&mut self) -> io::Result<()>;
}

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Record<P> {
    kind: &'static str,
    path: PathBuf,
    /// Who serves it has the pen.
    pen: Mutex<Option<P>>,
    is_to_reopen: AtomicBool,
    reopen: Notify,
    written_bytes: AtomicU64,
    lost_bytes: AtomicU64,
    /// Bytes of the port's that it is done with.
    offset: AtomicU64,
    /// That has changed, or it has failed.
    progress: Notify,
    /// Why it fails now.
    failure: Mutex<Option<String>>,
}

/// What came of writing a piece.
struct Written {
    count: usize,
    /// The note of what is missing was written, too.
    has_missed: bool,
    outcome: io::Result<()>,
}

impl<P: Pen> Record<P> {
    pub(crate) fn new(kind: &'static str, path: &Path, pen: P) -> Self {
        Self {
            kind,
            path: path.to_owned(),
            pen: Mutex::new(Some(pen)),
            is_to_reopen: AtomicBool::new(false),
            reopen: Notify::new(),
            written_bytes: AtomicU64::new(0),
            lost_bytes: AtomicU64::new(0),
            offset: AtomicU64::new(0),
            progress: Notify::new(),
            failure: Mutex::new(None),
        }
    }

    /// What is opened by name is to be opened anew, before the next byte.
    pub(crate) fn reopen(&self) {
        self.is_to_reopen.store(true, Ordering::Relaxed);
        self.reopen.notify_one();
    }

    /// Waits until all is written down that the port has put out, or cannot be.
    pub(crate) async fn settle(&self, at: &At) {
        let end = at.port().transcript().now().offset();
        while !self.fails() && self.offset.load(Ordering::Relaxed) < end {
            self.progress.notified().await;
        }
    }

    pub(crate) fn describe(&self) -> Value {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        json!({
            "kind": self.kind,
            "path": self.path,
            "state": if failure.is_some() { "failing" } else { "ok" },
            "error": *failure,
            "written_bytes": self.written_bytes.load(Ordering::Relaxed),
            "lost_bytes": self.lost_bytes.load(Ordering::Relaxed),
        })
    }

    pub(crate) async fn serve(&self, at: &At) -> Infallible {
        let pen = self.pen.lock().unwrap_or_else(PoisonError::into_inner).take();
        // It is served once.
        let Some(mut pen) = pen else { return std::future::pending().await };
        let mut piece = vec![0; PIECE_BYTES];
        let mut keeper = Keeper::new(at);
        let mut missing_bytes = 0;
        let mut size = None;
        loop {
            self.offset.store(keeper.offset(), Ordering::Relaxed);
            self.progress.notify_waiters();
            let read = keeper.peek(&mut piece);
            keeper.pass(read.lost_bytes);
            missing_bytes += read.lost_bytes;
            self.lost_bytes.fetch_add(read.lost_bytes, Ordering::Relaxed);
            let reopens = self.is_to_reopen.swap(false, Ordering::Relaxed);
            let resize = at.size().filter(|now| size != Some(*now));
            if read.count == 0 && !reopens && resize.is_none() {
                tokio::select! {
                    () = at.port().news() => {}
                    () = self.reopen.notified() => {}
                }
                continue;
            }
            let work = move || {
                let written = write(&mut pen, &piece[..read.count], missing_bytes, resize, reopens);
                (pen, piece, written)
            };
            let written;
            (pen, piece, written) = match spawn_blocking(work).await {
                Ok(done) => done,
                // A panic ends the process; a runtime that ends, ends this.
                Err(_ended) => return std::future::pending().await,
            };
            keeper.pass(written.count as u64);
            self.written_bytes.fetch_add(written.count as u64, Ordering::Relaxed);
            if written.has_missed {
                missing_bytes = 0;
            }
            match written.outcome {
                Ok(()) => {
                    size = at.size();
                    self.works(&mut keeper);
                }
                Err(cause) => {
                    self.is_to_reopen.fetch_or(reopens, Ordering::Relaxed);
                    self.has_failed(&mut keeper, &cause);
                    self.progress.notify_waiters();
                    tokio::select! {
                        () = sleep_until(Instant::now() + RETRY) => {}
                        () = self.reopen.notified() => {}
                    }
                }
            }
        }
    }

    fn fails(&self) -> bool {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn works(&self, keeper: &mut Keeper<'_>) {
        keeper.insist();
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        if failure.is_some() {
            let lost_bytes = self.lost_bytes.load(Ordering::Relaxed);
            info!(lost_bytes, "{:?} can be written to again", self.path);
        }
    }

    fn has_failed(&self, keeper: &mut Keeper<'_>, cause: &io::Error) {
        keeper.forgo();
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if failure.replace(cause.to_string()).is_none() {
            warn!(%cause, "{:?} cannot be written to: the guest does not wait for it any more", self.path);
        }
    }
}

/// One piece, on a thread that may block.
fn write<P: Pen>(
    pen: &mut P,
    piece: &[u8],
    missing_bytes: u64,
    resize: Option<Size>,
    reopens: bool,
) -> Written {
    let mut has_missed = false;
    let mut prepare = || {
        if reopens {
            pen.reopen()?;
        }
        if let Some(size) = resize {
            pen.resize(size)?;
        }
        if missing_bytes > 0 {
            pen.miss(missing_bytes)?;
            has_missed = true;
        }
        Ok(())
    };
    if let Err(error) = prepare() {
        return Written { count: 0, has_missed, outcome: Err(error) };
    }
    let (count, outcome) = pen.write(piece);
    Written { count, has_missed, outcome }
}

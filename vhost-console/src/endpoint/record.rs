//! Writing down what a port puts out: what a log and a recording have in common.
//!
//! Contract: while its [`Pen`] writes, the guest waits for it, and every byte is written. A pen writes on a thread that tokio has for
//! what blocks, one piece at a time; the main thread never waits for a disk. When it fails, that is told once, and
//! nobody waits any more: it tries again while there is something to write, once in [`RETRY`] or when it is to be opened anew, and
//! writes what is still to be had. Then how much is missing is written and told, and the guest waits again. Once its port
//! has been [taken out](Record::close) it writes the rest, or tells how much it cannot, and ends.
//!
//! What it deliberately does not do: sync. What it has written is the kernel's; a crash of the host may cost the end.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::pin;
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
    /// The port's bytes that are its to write end here. What comes later another port puts out.
    end: AtomicU64,
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
            end: AtomicU64::new(u64::MAX),
            progress: Notify::new(),
            failure: Mutex::new(None),
        }
    }

    /// What is opened by name is to be opened anew, before the next byte.
    pub(crate) fn reopen(&self) {
        self.is_to_reopen.store(true, Ordering::Relaxed);
        self.reopen.notify_one();
    }

    /// The port is taken out: what it has put out is all.
    pub(crate) fn close(&self, at: &At) {
        self.end.store(at.port().transcript().now().offset(), Ordering::Relaxed);
        // Neither for news nor for better days it need wait any longer.
        self.reopen.notify_one();
    }

    /// All is written down that its port has put out, or given up, and no more will come.
    pub(crate) fn has_ended(&self) -> bool {
        self.offset.load(Ordering::Relaxed) >= self.end.load(Ordering::Relaxed)
    }

    /// Waits until all is written down that the port has put out, or cannot be.
    pub(crate) async fn settle(&self, at: &At) {
        let end = at.port().transcript().now().offset().min(self.end.load(Ordering::Relaxed));
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

    /// Writes until its port has been taken out.
    pub(crate) async fn serve(&self, at: &At) {
        let pen = self.pen.lock().unwrap_or_else(PoisonError::into_inner).take();
        // It is served once.
        let Some(mut pen) = pen else { return };
        let mut piece = vec![0; PIECE_BYTES];
        let mut keeper = Keeper::new(at);
        let mut missing_bytes = 0;
        let mut size = None;
        loop {
            self.offset.store(keeper.offset(), Ordering::Relaxed);
            self.progress.notify_waiters();
            let end = self.end.load(Ordering::Relaxed);
            let is_closed = end < u64::MAX;
            let left = end.saturating_sub(keeper.offset());
            if left == 0 {
                return;
            }
            let wanted = usize::try_from(left).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
            let read = keeper.peek(&mut piece[..wanted]);
            keeper.pass(read.lost_bytes);
            missing_bytes += read.lost_bytes;
            self.lost_bytes.fetch_add(read.lost_bytes, Ordering::Relaxed);
            let reopens = self.is_to_reopen.swap(false, Ordering::Relaxed);
            if reopens {
                // It has been heard: this is not to cut a pause short later.
                pin!(self.reopen.notified()).enable();
            }
            // It may change again while this one is written down.
            let resize = at.size().filter(|now| !is_closed && size != Some(*now));
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
                Err(_ended) => return,
            };
            keeper.pass(written.count as u64);
            self.written_bytes.fetch_add(written.count as u64, Ordering::Relaxed);
            if written.has_missed {
                missing_bytes = 0;
            }
            match written.outcome {
                Ok(()) => {
                    size = resize.or(size);
                    self.works(&mut keeper);
                }
                Err(cause) => {
                    self.is_to_reopen.fetch_or(reopens, Ordering::Relaxed);
                    self.has_failed(&mut keeper, &cause);
                    if self.end.load(Ordering::Relaxed) < u64::MAX {
                        return self.give_up(keeper.offset(), missing_bytes);
                    }
                    self.progress.notify_waiters();
                    tokio::select! {
                        () = sleep_until(Instant::now() + RETRY) => {}
                        () = self.reopen.notified() => {}
                    }
                }
            }
        }
    }

    /// What has not been written of a port that is gone never will be.
    fn give_up(&self, offset: u64, missing_bytes: u64) {
        let end = self.end.load(Ordering::Relaxed);
        let unwritten_bytes = missing_bytes + end.saturating_sub(offset);
        self.offset.store(end, Ordering::Relaxed);
        self.progress.notify_waiters();
        warn!(unwritten_bytes, "{:?} ends without the end of what its port has put out", self.path);
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

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::fs;
    use std::future::pending;
    use std::io::{self, ErrorKind};
    use std::path::Path;
    use std::sync::{Arc, Condvar, Mutex};

    use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
    use tokio::time::Instant;

    use super::{Pen, RETRY, Record};
    use crate::config::Size;
    use crate::endpoint::At;
    use crate::endpoint::stage::{Guest, Stage, pattern};
    use crate::port_spec::{EndpointSpec, FileSpec};

    /// What a test's disk was asked for.
    #[derive(Debug, PartialEq, Eq)]
    enum Entry {
        Bytes(Vec<u8>),
        Missed(u64),
        Resized(Size),
        Reopened,
        Refused,
    }

    /// A disk that the test has slow, or full.
    #[derive(Default)]
    struct Disk {
        state: Mutex<State>,
        changed: Condvar,
    }

    #[derive(Default)]
    struct State {
        hangs: bool,
        /// So many bytes more find room.
        room: Option<usize>,
    }

    impl Disk {
        fn set(&self, change: impl FnOnce(&mut State)) {
            change(&mut self.state.lock().unwrap());
            self.changed.notify_all();
        }

        /// How many of so many bytes find room, once the disk does anything at all.
        fn take(&self, count: usize) -> usize {
            let state = self.state.lock().unwrap();
            let mut state = self.changed.wait_while(state, |state| state.hangs).unwrap();
            let taken = state.room.map_or(count, |room| room.min(count));
            state.room = state.room.map(|room| room - taken);
            taken
        }
    }

    /// Lets the thread go that writes, whatever becomes of the test: the runtime ends after it.
    struct Release<'a>(&'a Disk);

    impl Drop for Release<'_> {
        fn drop(&mut self) {
            self.0.set(|state| *state = State::default());
        }
    }

    struct TestPen {
        disk: Arc<Disk>,
        entries: UnboundedSender<Entry>,
    }

    impl TestPen {
        fn enter(&self, entry: Entry) {
            // A test that has seen enough does not look any more.
            let _ = self.entries.send(entry);
        }

        fn full(&self) -> io::Error {
            self.enter(Entry::Refused);
            ErrorKind::StorageFull.into()
        }
    }

    impl Pen for TestPen {
        fn write(&mut self, bytes: &[u8]) -> (usize, io::Result<()>) {
            if bytes.is_empty() {
                return (0, Ok(()));
            }
            let count = self.disk.take(bytes.len());
            if count > 0 {
                self.enter(Entry::Bytes(bytes[..count].to_vec()));
            }
            let outcome = if count < bytes.len() { Err(self.full()) } else { Ok(()) };
            (count, outcome)
        }

        fn miss(&mut self, bytes: u64) -> io::Result<()> {
            if self.disk.take(1) == 0 {
                return Err(self.full());
            }
            self.enter(Entry::Missed(bytes));
            Ok(())
        }

        fn resize(&mut self, size: Size) -> io::Result<()> {
            // Of this the test sees the beginning: it takes as long as the disk does.
            self.enter(Entry::Resized(size));
            self.disk.take(0);
            Ok(())
        }

        fn reopen(&mut self) -> io::Result<()> {
            self.enter(Entry::Reopened);
            Ok(())
        }
    }

    /// A record of a port's, on a disk that the test has in its hands.
    struct Desk {
        stage: Stage,
        disk: Arc<Disk>,
        record: Record<TestPen>,
        at: At,
        guest: Guest,
        entries: UnboundedReceiver<Entry>,
    }

    impl Desk {
        fn new() -> Self {
            let stage = Stage::new(1);
            let guest = stage.plug("p", true, EndpointSpec::Null);
            let (sender, entries) = unbounded_channel();
            let disk = Arc::<Disk>::default();
            let pen = TestPen { disk: Arc::clone(&disk), entries: sender };
            let record = Record::new("test", Path::new("/desk"), pen);
            let at = At::new(Arc::clone(&stage.shared), guest.id(), true);
            Self { stage, disk, record, at, guest, entries }
        }

        /// Runs `script` while the record is served, from a moment on at which the guest waits for it.
        fn play(self, script: impl AsyncFnOnce(Hands<'_>)) {
            let Self { stage, disk, record, at, guest, entries } = self;
            stage.play(async || {
                let _release = Release(&disk);
                let mut hands =
                    Hands { stage: &stage, disk: &disk, record: &record, at: &at, guest, entries };
                let script = async {
                    let size = hands.next().await;
                    assert!(matches!(size, Entry::Resized(_)), "{size:?}");
                    // The next turn has come: the first is over.
                    hands.record.reopen();
                    assert_eq!(hands.next().await, Entry::Reopened);
                    hands.guest.until(|port| port.takes_output()).await;
                    script(hands).await;
                };
                let serve = async {
                    record.serve(&at).await;
                    pending::<Infallible>().await
                };
                tokio::select! {
                    never = serve => match never {},
                    () = script => {}
                }
            });
        }
    }

    struct Hands<'a> {
        stage: &'a Stage,
        disk: &'a Disk,
        record: &'a Record<TestPen>,
        at: &'a At,
        guest: Guest,
        entries: UnboundedReceiver<Entry>,
    }

    impl Hands<'_> {
        async fn next(&mut self) -> Entry {
            self.entries.recv().await.unwrap()
        }

        /// What was written down, up to so many bytes with those that are missing.
        async fn bytes(&mut self, count: usize) -> (Vec<u8>, u64) {
            let (mut bytes, mut missing) = (Vec::new(), 0);
            while bytes.len() as u64 + missing < count as u64 {
                match self.next().await {
                    Entry::Bytes(more) => bytes.extend(more),
                    Entry::Missed(more) => missing += more,
                    Entry::Refused | Entry::Reopened | Entry::Resized(_) => {}
                }
            }
            (bytes, missing)
        }

        async fn until(&mut self, entry: &Entry) {
            while self.next().await != *entry {}
        }

        fn told(&self, of: &str) -> serde_json::Value {
            self.record.describe()[of].clone()
        }

        /// Waits until the record says this of itself.
        async fn until_told(&self, of: &str, value: impl Into<serde_json::Value>) {
            let value = value.into();
            while self.told(of) != value {
                tokio::task::yield_now().await;
            }
        }

        /// Writes until the ring is full; how much.
        fn fill(&mut self, from: &[u8]) -> usize {
            let mut count = 0;
            loop {
                match self.guest.try_write(&from[count..]) {
                    0 => return count,
                    more => count += more,
                }
            }
        }
    }

    #[test]
    fn guest_waits_for_a_slow_disk_and_loses_nothing() {
        Desk::new().play(async |mut hands| {
            let said = pattern(1 << 20);
            hands.disk.set(|state| state.hangs = true);
            let taken = hands.fill(&said);
            assert_eq!(taken, 256 << 10, "what is on its way is bounded");
            assert!(!hands.guest.port().has_room());
            hands.disk.set(|state| state.hangs = false);
            let rest = &said[taken..];
            let mut entries = std::mem::replace(&mut hands.entries, unbounded_channel().1);
            hands.guest.write(rest).await;
            hands.record.settle(hands.at).await;
            let mut written = Vec::new();
            while let Ok(Entry::Bytes(more)) = entries.try_recv() {
                written.extend(more);
            }
            assert!(written == said, "{} bytes of {}", written.len(), said.len());
            assert_eq!(hands.told("written_bytes"), 1 << 20);
            assert_eq!((hands.told("lost_bytes"), hands.told("state")), (0.into(), "ok".into()));
        });
    }

    #[test]
    fn nobody_waits_for_a_full_disk_and_what_is_missing_is_written_and_counted() {
        Desk::new().play(async |mut hands| {
            let said = pattern(1 << 20);
            hands.disk.set(|state| state.room = Some(10));
            hands.guest.write(&said[..1000]).await;
            hands.until(&Entry::Refused).await;
            hands.until_told("state", "failing").await;
            assert!(hands.told("error").as_str().is_some_and(|error| !error.is_empty()));
            // Nobody reads, and the ring goes round.
            hands.guest.write(&said[1000..]).await;
            hands.disk.set(|state| state.room = None);
            hands.record.reopen();
            let (bytes, missing) = hands.bytes(said.len() - 10).await;
            assert!(said.ends_with(&bytes), "the newest is there, whole");
            assert_eq!(bytes.len() as u64 + missing + 10, said.len() as u64);
            assert!(missing > 0);
            hands.until_told("state", "ok").await;
            assert_eq!(
                (hands.told("lost_bytes"), hands.told("error")),
                (missing.into(), ().into())
            );
            // The guest waits again.
            hands.disk.set(|state| state.hangs = true);
            assert_eq!(hands.fill(&said), 256 << 10);
        });
    }

    #[test]
    fn disk_that_is_full_for_a_moment_costs_nothing() {
        Desk::new().play(async |mut hands| {
            hands.disk.set(|state| state.room = Some(3));
            hands.guest.write(b"one two three").await;
            hands.until(&Entry::Refused).await;
            hands.disk.set(|state| state.room = None);
            hands.record.reopen();
            let (rest, missing) = hands.bytes(10).await;
            assert_eq!((&rest[..], missing), (&b" two three"[..], 0));
            hands.until_told("written_bytes", 13).await;
            assert_eq!(hands.told("lost_bytes"), 0);
        });
    }

    #[test]
    fn what_has_failed_is_tried_again_once_in_a_while() {
        Desk::new().play(async |mut hands| {
            hands.disk.set(|state| state.room = Some(0));
            hands.guest.write(b"text").await;
            hands.until(&Entry::Refused).await;
            let first = Instant::now();
            hands.until(&Entry::Refused).await;
            assert!(first.elapsed() >= RETRY.mul_f32(0.9), "{:?}", first.elapsed());
        });
    }

    #[test]
    fn who_settles_waits_for_a_slow_disk_and_not_for_a_full_one() {
        Desk::new().play(async |mut hands| {
            hands.disk.set(|state| state.hangs = true);
            hands.guest.write(b"last words").await;
            let settled = hands.record.settle(hands.at);
            tokio::pin!(settled);
            for _ in 0..100 {
                let poll = std::future::poll_fn(|context| {
                    std::task::Poll::Ready(settled.as_mut().poll(context).is_pending())
                });
                assert!(poll.await, "it is not written down yet");
                tokio::task::yield_now().await;
            }
            hands.disk.set(|state| state.hangs = false);
            settled.await;
            assert_eq!(hands.told("written_bytes"), 10);
            hands.disk.set(|state| state.room = Some(0));
            hands.guest.write(b"the very last").await;
            hands.record.settle(hands.at).await;
            assert_eq!(hands.told("state"), "failing");
        });
    }

    #[test]
    fn record_of_a_port_that_is_gone_is_finished_on_a_slow_disk_and_given_up_on_a_full_one() {
        for (room, written_bytes) in [(None, 13), (Some(3), 3)] {
            Desk::new().play(async |mut hands| {
                hands.disk.set(|state| *state = State { hangs: true, room });
                hands.guest.write(b"one two three").await;
                hands.record.close(hands.at);
                assert!(!hands.record.has_ended());
                hands.guest.write(b"of another port").await;
                hands.disk.set(|state| state.hangs = false);
                while !hands.record.has_ended() {
                    hands.record.settle(hands.at).await;
                    tokio::task::yield_now().await;
                }
                assert_eq!(hands.told("written_bytes"), written_bytes);
            });
        }
    }

    #[test]
    fn size_that_changes_while_another_is_written_down_is_written_down() {
        Desk::new().play(async |mut hands| {
            let sizes = [100, 120].map(|columns| Size { columns, rows: 50 });
            hands.disk.set(|state| state.hangs = true);
            hands.stage.hub.set_size(hands.at.id(), sizes[0]);
            assert_eq!(hands.next().await, Entry::Resized(sizes[0]));
            hands.stage.hub.set_size(hands.at.id(), sizes[1]);
            hands.disk.set(|state| state.hangs = false);
            assert_eq!(hands.next().await, Entry::Resized(sizes[1]));
        });
    }

    #[test]
    fn log_that_was_moved_away_is_begun_anew_when_told_to() {
        let stage = Stage::new(1);
        let (path, old) = (stage.path("log"), stage.path("old"));
        let spec = FileSpec { path: path.clone(), max_size: None, keep: 5, timestamps: false };
        let mut guest = stage.plug("p", true, EndpointSpec::File(spec));
        stage.play(async || {
            guest.until(|port| port.takes_output()).await;
            guest.write(b"before\n").await;
            stage.hub.settle().await;
            fs::rename(&path, &old).unwrap();
            guest.write(b"meanwhile\n").await;
            stage.hub.settle().await;
            stage.hub.reopen();
            guest.write(b"after\n").await;
            stage.hub.settle().await;
        });
        assert_eq!(fs::read(&old).unwrap(), b"before\nmeanwhile\n");
        assert_eq!(fs::read(&path).unwrap(), b"after\n");
    }
}

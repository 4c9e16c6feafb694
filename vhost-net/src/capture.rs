//! `--pcap FILE`: the frames of the device, both ways, in a file that Wireshark and tcpdump read
//! while it grows.
//!
//! Contract: each queue has a [`Recorder`]. It copies a frame into a bounded queue and goes on: it
//! never waits, and what finds no room there is not captured but counted, which the log is told at the end. A
//! thread of its own writes the file, which then is at most [`FLUSH_INTERVAL`] behind. When the file
//! has reached its size, or cannot be written, the capture is over: the log says so once, and the
//! device runs on. With nothing to write, nothing runs.
//!
//! The format is pcapng, because it has nanoseconds and says of each frame which way it went: seen
//! from the guest, as if it had captured them itself. Frames look as they do between guest and
//! device: what is to be segmented still is in one piece, and a checksum that is left to the other
//! side is not there yet. What is captured of a frame that the guest sends is copied once that is sent: a guest that
//! changes it meanwhile has another frame captured than was sent, but for its headers.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::sandbox::{self, Needs};
use tracing::{error, warn};

/// How far the file may be behind: a viewer that is live to the eye.
const FLUSH_INTERVAL: Duration = Duration::from_millis(200);

/// Frames that wait to be written: four turns of a worker.
const WAITING_FRAMES_MAX: usize = 1024;
/// Bytes of them: as many frames of the largest size would be 64 MiB.
const WAITING_BYTES_MAX: usize = 8 << 20;

/// Empty buffers that a queue has ready.
const SPARE_BUFFERS: usize = 32;
/// How large they are, at most: any frame of the wire finds room, and those of all queues are of no weight.
const SPARE_BYTES_MAX: usize = 2048;

/// How long an end waits for the last frames to be written: the file may be a FIFO that nobody reads.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// A file that says what guests send is the operator's only.
const FILE_MODE: u32 = 0o600;

/// Which way a frame goes, as pcapng has it in `epb_flags`, seen from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Direction {
    /// The guest receives it.
    Inbound = 1,
    /// The guest sends it.
    Outbound = 2,
}

/// What to capture, and where to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CaptureSpec {
    /// The file, which is emptied first.
    pub(crate) path: PathBuf,
    /// Its size, at most.
    pub(crate) size_bytes: u64,
    /// Bytes of a frame, at most.
    pub(crate) snap_bytes: u32,
}

/// The capture cannot begin.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CaptureError {
    #[error("cannot write {path:?} (--pcap)")]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot start the thread that writes {path:?} (--pcap)")]
    Thread {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// What the queues and the thread share.
#[derive(Debug, Default)]
struct Shared {
    missed: AtomicU64,
    waiting_bytes: AtomicUsize,
    /// No frame is taken any more.
    is_over: AtomicBool,
}

enum Message {
    Frame(Frame),
    End,
}

/// A frame that waits to be written.
struct Frame {
    direction: Direction,
    time_ns: u64,
    frame_bytes: usize,
    /// Its first bytes.
    data: Vec<u8>,
    /// Where the buffer goes afterwards.
    spare: SyncSender<Vec<u8>>,
}

/// A capture that runs, until it is dropped: then what waits is written.
#[derive(Debug)]
pub(crate) struct Capture {
    shared: Arc<Shared>,
    messages: SyncSender<Message>,
    snap_bytes: usize,
    /// Nothing is sent here: it ends with the thread. Its lock is what makes the capture one for all threads.
    ended: Mutex<Receiver<()>>,
}

impl Capture {
    /// Begins to capture.
    pub(crate) fn begin(spec: &CaptureSpec) -> Result<Self, CaptureError> {
        let fault = |source| CaptureError::File { path: spec.path.clone(), source };
        let file = CaptureFile::create(spec).map_err(fault)?;
        let (messages, received) = sync_channel(WAITING_FRAMES_MAX);
        let (end, ended) = sync_channel(0);
        let shared = Arc::new(Shared::default());
        let (path, own) = (spec.path.clone(), Arc::clone(&shared));
        let write = move || {
            // It has its file. What this host lacks the main thread tells.
            drop(sandbox::enter(&Needs::default()));
            write_all(&received, &own, file, &path);
            drop(end);
        };
        let thread = thread::Builder::new().name("pcap".to_owned()).spawn(write);
        thread.map_err(|source| CaptureError::Thread { path: spec.path.clone(), source })?;
        let snap_bytes = usize::try_from(spec.snap_bytes).unwrap_or(usize::MAX);
        Ok(Self { shared, messages, snap_bytes, ended: Mutex::new(ended) })
    }

    /// A queue's own way into the file.
    pub(crate) fn recorder(&self) -> Recorder {
        Recorder::new(Arc::clone(&self.shared), self.messages.clone(), self.snap_bytes)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Relaxed);
        let end = Instant::now() + END_TIMEOUT;
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        // The queue is full for a moment at most, now that nothing is added to it.
        while let Err(TrySendError::Full(_)) = self.messages.try_send(Message::End) {
            let wait = ended.recv_timeout(Duration::from_millis(1));
            if wait != Err(RecvTimeoutError::Timeout) || Instant::now() >= end {
                return;
            }
        }
        // Whether it has ended or not, so do we.
        let _ = ended.recv_timeout(end.saturating_duration_since(Instant::now()));
    }
}

/// A queue's way into the file.
#[derive(Debug)]
pub(crate) struct Recorder {
    shared: Arc<Shared>,
    messages: SyncSender<Message>,
    snap_bytes: usize,
    spare: Receiver<Vec<u8>>,
    give_back: SyncSender<Vec<u8>>,
}

impl Recorder {
    fn new(shared: Arc<Shared>, messages: SyncSender<Message>, snap_bytes: usize) -> Self {
        let (give_back, spare) = sync_channel(SPARE_BUFFERS);
        Self { shared, messages, snap_bytes, spare, give_back }
    }

    /// Captures a frame of `frame_bytes`, of which `copy` fills in the first bytes, and says how
    /// many they were.
    ///
    /// It takes no lock while the thread is busy; a thread that sleeps is woken by a system call.
    pub(crate) fn record(
        &self,
        direction: Direction,
        frame_bytes: usize,
        copy: impl FnOnce(&mut [u8]) -> usize,
    ) {
        if self.shared.is_over.load(Ordering::Relaxed) {
            return;
        }
        let wanted_bytes = frame_bytes.min(self.snap_bytes);
        let waiting_bytes = self.shared.waiting_bytes.fetch_add(wanted_bytes, Ordering::Relaxed);
        if waiting_bytes.saturating_add(wanted_bytes) > WAITING_BYTES_MAX {
            return self.miss(wanted_bytes);
        }
        let mut data = self.spare.try_recv().unwrap_or_default();
        data.clear();
        data.resize(wanted_bytes, 0);
        let copied = copy(&mut data);
        data.truncate(copied);
        let spare = self.give_back.clone();
        let frame = Frame { direction, time_ns: now_ns(), frame_bytes, data, spare };
        match self.messages.try_send(Message::Frame(frame)) {
            Ok(()) => {
                // What was not there to be copied does not wait.
                let less = wanted_bytes.saturating_sub(copied);
                self.shared.waiting_bytes.fetch_sub(less, Ordering::Relaxed);
            }
            Err(TrySendError::Full(_)) => self.miss(wanted_bytes),
            // The capture has just ended.
            Err(TrySendError::Disconnected(_)) => {}
        }
    }

    fn miss(&self, wanted_bytes: usize) {
        self.shared.waiting_bytes.fetch_sub(wanted_bytes, Ordering::Relaxed);
        self.shared.missed.fetch_add(1, Ordering::Relaxed);
    }
}

fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// What the thread does.
fn write_all(messages: &Receiver<Message>, shared: &Shared, mut file: CaptureFile, path: &Path) {
    let ended = loop {
        match next(messages, &mut file) {
            Ok(Some(frame)) => {
                let written = file.write(&frame);
                shared.waiting_bytes.fetch_sub(frame.data.len(), Ordering::Relaxed);
                if frame.data.capacity() <= SPARE_BYTES_MAX {
                    // The queue may have enough of them, or be gone.
                    let _ = frame.spare.try_send(frame.data);
                }
                match written {
                    Ok(true) => {}
                    Ok(false) => break file.flush().map(|()| true),
                    Err(error) => break Err(error),
                }
            }
            Ok(None) => break file.flush().map(|()| false),
            Err(error) => break Err(error),
        }
    };
    shared.is_over.store(true, Ordering::Relaxed);
    let missed = shared.missed.load(Ordering::Relaxed);
    if missed > 0 {
        warn!("{path:?} lacks {missed} frames that came faster than they were written (--pcap)");
    }
    match ended {
        Ok(true) => warn!("{path:?} has reached its size: no more frames are captured (--pcap)"),
        Ok(false) => {}
        Err(source) => error!("cannot write {path:?}: no more frames are captured: {source}"),
    }
}

/// The next frame, or `None` at the end; meanwhile, what has been written gets to the file in time.
fn next(messages: &Receiver<Message>, file: &mut CaptureFile) -> io::Result<Option<Frame>> {
    loop {
        let received = match file.unflushed_since {
            None => messages.recv().map_err(RecvTimeoutError::from),
            Some(since) => messages.recv_timeout(FLUSH_INTERVAL.saturating_sub(since.elapsed())),
        };
        match received {
            Ok(Message::Frame(frame)) => return Ok(Some(frame)),
            Ok(Message::End) | Err(RecvTimeoutError::Disconnected) => return Ok(None),
            Err(RecvTimeoutError::Timeout) => file.flush()?,
        }
    }
}

// pcapng (draft-ietf-opsawg-pcapng), little-endian: the types of blocks, and options.
const SECTION_HEADER_BLOCK: u32 = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION_BLOCK: u32 = 1;
const ENHANCED_PACKET_BLOCK: u32 = 6;
const BYTE_ORDER_MAGIC: u32 = 0x1a2b_3c4d;
const LINKTYPE_ETHERNET: u16 = 1;
const OPT_ENDOFOPT: u16 = 0;
const IF_TSRESOL: u16 = 9;
const EPB_FLAGS: u16 = 2;
/// Stamps are in units of 10⁻⁹ seconds.
const NANOSECONDS: u8 = 9;

/// A file of blocks, whole ones only.
struct CaptureFile {
    file: BufWriter<File>,
    room_bytes: u64,
    /// When the first byte was written that may not be in the file yet.
    unflushed_since: Option<Instant>,
    /// The block that is put together.
    block: Vec<u8>,
}

impl CaptureFile {
    fn create(spec: &CaptureSpec) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(FILE_MODE);
        let file = BufWriter::with_capacity(64 << 10, options.open(&spec.path)?);
        let room_bytes = spec.size_bytes;
        let mut file = Self { file, room_bytes, unflushed_since: None, block: Vec::new() };
        file.put(SECTION_HEADER_BLOCK, |body| {
            body.extend(BYTE_ORDER_MAGIC.to_le_bytes());
            body.extend([1, 0, 0, 0]); // version 1.0
            body.extend(u64::MAX.to_le_bytes()); // the section's length is not known
        })?;
        file.put(INTERFACE_DESCRIPTION_BLOCK, |body| {
            body.extend(LINKTYPE_ETHERNET.to_le_bytes());
            body.extend([0; 2]);
            body.extend(spec.snap_bytes.to_le_bytes());
            put_option(body, IF_TSRESOL, &[NANOSECONDS]);
            put_option(body, OPT_ENDOFOPT, &[]);
        })?;
        file.flush()?;
        Ok(file)
    }

    /// Whether there was room for it.
    fn write(&mut self, frame: &Frame) -> io::Result<bool> {
        self.put(ENHANCED_PACKET_BLOCK, |body| {
            let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX).to_le_bytes();
            body.extend([0; 4]); // the interface, of which there is one
            body.extend(((frame.time_ns >> 32) as u32).to_le_bytes());
            body.extend((frame.time_ns as u32).to_le_bytes());
            body.extend(length(frame.data.len()));
            body.extend(length(frame.frame_bytes));
            body.extend(&frame.data);
            pad(body);
            put_option(body, EPB_FLAGS, &(frame.direction as u32).to_le_bytes());
            put_option(body, OPT_ENDOFOPT, &[]);
        })
    }

    fn put(&mut self, kind: u32, body: impl FnOnce(&mut Vec<u8>)) -> io::Result<bool> {
        /// Type and length before the body, the length again behind it.
        const AROUND_BYTES: usize = 12;
        let mut block = std::mem::take(&mut self.block);
        block.clear();
        block.extend(kind.to_le_bytes());
        block.extend([0; 4]);
        body(&mut block);
        let len_bytes = u32::try_from(block.len() - 8 + AROUND_BYTES).unwrap_or(u32::MAX);
        block[4..8].copy_from_slice(&len_bytes.to_le_bytes());
        block.extend(len_bytes.to_le_bytes());
        let room = self.room_bytes.checked_sub(u64::from(len_bytes));
        if let Some(room) = room {
            self.room_bytes = room;
            self.unflushed_since.get_or_insert_with(Instant::now);
            self.file.write_all(&block)?;
        }
        self.block = block;
        Ok(room.is_some())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.unflushed_since = None;
        self.file.flush()
    }
}

fn put_option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    body.extend(code.to_le_bytes());
    body.extend(u16::try_from(value.len()).unwrap_or(u16::MAX).to_le_bytes());
    body.extend(value);
    pad(body);
}

/// Everything in a block begins at a multiple of four bytes.
fn pad(body: &mut Vec<u8>) {
    body.resize(body.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;

    use nix::sys::stat::Mode;
    use tempfile::TempDir;

    use super::*;

    fn spec(directory: &TempDir) -> CaptureSpec {
        let path = directory.path().join("frames.pcapng");
        CaptureSpec { path, size_bytes: 64 << 20, snap_bytes: 262_144 }
    }

    /// A frame, as it is in a file.
    #[derive(Debug, PartialEq, Eq)]
    struct Captured {
        time_ns: u64,
        direction: u32,
        frame_bytes: u32,
        data: Vec<u8>,
    }

    fn le32(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    /// One block of a file, type and body; it must be whole.
    fn take_block(from: &mut impl Read) -> Option<(u32, Vec<u8>)> {
        let mut head = [0; 8];
        if from.read(&mut head[..1]).unwrap() == 0 {
            return None;
        }
        from.read_exact(&mut head[1..]).unwrap();
        let length = le32(&head, 4);
        assert!(length.is_multiple_of(4) && length >= 12, "a block of {length} bytes");
        let mut body = vec![0; length as usize - 8];
        from.read_exact(&mut body).unwrap();
        assert_eq!(le32(&body, body.len() - 4), length, "the length behind the block");
        body.truncate(body.len() - 4);
        Some((le32(&head, 0), body))
    }

    /// The two blocks that a file begins with.
    fn take_head(from: &mut impl Read, snap_bytes: u32) {
        let (kind, section) = take_block(from).unwrap();
        assert_eq!((kind, le32(&section, 0)), (0x0a0d_0d0a, 0x1a2b_3c4d));
        assert_eq!(section[4..8], [1, 0, 0, 0]);
        let (kind, interface) = take_block(from).unwrap();
        assert_eq!((kind, le32(&interface, 0), le32(&interface, 4)), (1, 1, snap_bytes));
        assert_eq!(interface[8..], [9, 0, 1, 0, 9, 0, 0, 0, 0, 0, 0, 0], "nanoseconds");
    }

    fn take_frame(from: &mut impl Read) -> Option<Captured> {
        let (kind, body) = take_block(from)?;
        assert_eq!((kind, le32(&body, 0)), (6, 0));
        let captured = le32(&body, 12) as usize;
        let options = 20 + captured.next_multiple_of(4);
        assert_eq!(body[options..options + 4], [2, 0, 4, 0], "epb_flags");
        assert_eq!(body[options + 8..], [0; 4], "the end of options");
        Some(Captured {
            time_ns: u64::from(le32(&body, 4)) << 32 | u64::from(le32(&body, 8)),
            direction: le32(&body, options + 4),
            frame_bytes: le32(&body, 16),
            data: body[20..20 + captured].to_vec(),
        })
    }

    fn frames(spec: &CaptureSpec) -> Vec<Captured> {
        let mut file = File::open(&spec.path).unwrap();
        take_head(&mut file, spec.snap_bytes);
        std::iter::from_fn(|| take_frame(&mut file)).collect()
    }

    fn record(recorder: &Recorder, direction: Direction, data: &[u8]) {
        recorder.record(direction, data.len(), |into| {
            into.copy_from_slice(&data[..into.len()]);
            into.len()
        });
    }

    #[test]
    fn frames_of_both_directions_are_read_back_with_their_time() {
        let directory = tempfile::tempdir().unwrap();
        let spec = spec(&directory);
        fs::write(&spec.path, vec![0xee; 100_000]).unwrap();
        let capture = Capture::begin(&spec).unwrap();
        let (receiving, sending) = (capture.recorder(), capture.recorder());
        let before = now_ns();
        for length in [14, 15, 16, 17, 65_553] {
            record(&receiving, Direction::Inbound, &vec![0xab; length]);
            record(&sending, Direction::Outbound, &vec![0xcd; length]);
        }
        let after = now_ns();
        assert_eq!(capture.shared.missed.load(Ordering::Relaxed), 0);
        drop(capture);
        let read = frames(&spec);
        assert_eq!(read.len(), 10);
        for (pair, length) in read.chunks(2).zip([14u32, 15, 16, 17, 65_553]) {
            for (frame, (direction, byte)) in pair.iter().zip([(1, 0xab), (2, 0xcd)]) {
                assert_eq!((frame.direction, frame.frame_bytes), (direction, length));
                assert_eq!(frame.data, vec![byte; length as usize]);
                assert!((before..=after).contains(&frame.time_ns));
            }
        }
        assert!(read.is_sorted_by_key(|frame| frame.time_ns));
    }

    #[test]
    fn only_the_first_bytes_of_a_frame_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let spec = CaptureSpec { snap_bytes: 61, ..spec(&directory) };
        let capture = Capture::begin(&spec).unwrap();
        record(&capture.recorder(), Direction::Inbound, &[7; 1514]);
        // A driver's buffers that end early.
        capture.recorder().record(Direction::Outbound, 60, |_| 20);
        drop(capture);
        let read = frames(&spec);
        let lengths = |frame: &Captured| (frame.frame_bytes, frame.data.len());
        assert_eq!(read.iter().map(lengths).collect::<Vec<_>>(), [(1514, 61), (60, 20)]);
    }

    #[test]
    fn large_buffers_are_not_kept() {
        let directory = tempfile::tempdir().unwrap();
        let spec = spec(&directory);
        let capture = Capture::begin(&spec).unwrap();
        let recorder = capture.recorder();
        record(&recorder, Direction::Inbound, &[7; 65_000]);
        record(&recorder, Direction::Inbound, &[7; 1514]);
        drop(capture);
        let kept: Vec<usize> = recorder.spare.try_iter().map(|spare| spare.capacity()).collect();
        assert_eq!(kept, [1514]);
    }

    #[test]
    fn frames_can_be_seen_while_the_capture_runs() {
        let directory = tempfile::tempdir().unwrap();
        let spec = spec(&directory);
        nix::unistd::mkfifo(&spec.path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        thread::scope(|scope| {
            let viewer = scope.spawn(|| File::open(&spec.path).unwrap());
            let capture = Capture::begin(&spec).unwrap();
            let mut viewer = viewer.join().unwrap();
            take_head(&mut viewer, spec.snap_bytes);
            let recorder = capture.recorder();
            for byte in 0..3 {
                record(&recorder, Direction::Inbound, &[byte; 60]);
                assert_eq!(take_frame(&mut viewer).unwrap().data, [byte; 60]);
            }
            drop(capture);
            assert_eq!(take_frame(&mut viewer), None);
        });
    }

    #[test]
    fn file_that_has_reached_its_size_ends_with_a_whole_frame() {
        let directory = tempfile::tempdir().unwrap();
        let spec = CaptureSpec { size_bytes: 10_000, ..spec(&directory) };
        let capture = Capture::begin(&spec).unwrap();
        let recorder = capture.recorder();
        while !capture.shared.is_over.load(Ordering::Relaxed) {
            record(&recorder, Direction::Inbound, &[1; 1000]);
            thread::yield_now();
        }
        recorder.record(Direction::Inbound, 60, |_| panic!("nothing is copied any more"));
        drop(capture);
        // 28 and 32 bytes before them, 44 around each.
        assert_eq!(frames(&spec).len(), (10_000 - 60) / 1044);
        assert!(fs::metadata(&spec.path).unwrap().len() <= 10_000);
    }

    #[test]
    fn frames_that_find_no_room_are_counted_and_nobody_waits() {
        let shared = Arc::new(Shared::default());
        let (messages, waiting) = sync_channel(WAITING_FRAMES_MAX);
        let recorder = Recorder::new(Arc::clone(&shared), messages, usize::MAX);
        let missed = || shared.missed.load(Ordering::Relaxed);
        for _ in 0..WAITING_FRAMES_MAX {
            record(&recorder, Direction::Inbound, &[1; 60]);
        }
        assert_eq!(missed(), 0);
        record(&recorder, Direction::Inbound, &[1; 60]);
        assert_eq!(missed(), 1, "too many frames");
        assert_eq!(shared.waiting_bytes.load(Ordering::Relaxed), WAITING_FRAMES_MAX * 60);
        drop(waiting);
        let (messages, _waiting) = sync_channel(WAITING_FRAMES_MAX);
        let shared = Arc::new(Shared::default());
        let recorder = Recorder::new(Arc::clone(&shared), messages, usize::MAX);
        let large = vec![1; 65_000];
        let fit = WAITING_BYTES_MAX / large.len();
        for _ in 0..fit + 1 {
            record(&recorder, Direction::Inbound, &large);
        }
        assert_eq!(shared.missed.load(Ordering::Relaxed), 1, "too many bytes");
        assert_eq!(shared.waiting_bytes.load(Ordering::Relaxed), fit * large.len());
    }

    #[test]
    fn file_that_cannot_be_written_is_named() {
        let directory = tempfile::tempdir().unwrap();
        for path in [Path::new("/dev/full"), &directory.path().join("no/such/directory")] {
            let spec = CaptureSpec { path: path.to_owned(), ..spec(&directory) };
            let error = Capture::begin(&spec).expect_err("it cannot be written");
            assert_eq!(error.to_string(), format!("cannot write {path:?} (--pcap)"));
        }
    }

    #[test]
    fn viewer_that_goes_away_ends_the_capture_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let spec = spec(&directory);
        nix::unistd::mkfifo(&spec.path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        thread::scope(|scope| {
            let viewer = scope.spawn(|| File::open(&spec.path).unwrap());
            let capture = Capture::begin(&spec).unwrap();
            drop(viewer.join().unwrap());
            let recorder = capture.recorder();
            while !capture.shared.is_over.load(Ordering::Relaxed) {
                record(&recorder, Direction::Inbound, &[1; 60]);
                thread::yield_now();
            }
        });
    }
}

//! The block device: requests in, operations out, status bytes back.
//!
//! Each request is executed step by step: one operation at a time, the next one named when the
//! last has ended. So short reads and writes are continued, a transfer that direct I/O does not take
//! in one piece goes part by part, a discard works through its segments, and a write becomes stable
//! before it is answered where the driver sends no flushes. Only a sync is not a request's own: one
//! at a time serves all of the queue that wait for it ([`syncs`]).

mod syncs;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use common::device::{
    Account, Device, DeviceQueue, HostFault, NotRefreshed, NotRestored, QueueIo, Refreshed,
};
use common::engine::{Completion, Op, Zeroing};
use common::rate_limit::{Direction, Topic};
use common::sandbox::calls::START_THREADS;
use common::sandbox::{Call, Needs};
use common::virtqueue::Chain;
use nix::libc;
use rustix::io::Errno;
use serde_json::{Value, json};

use crate::config::{
    ConfigSpace, QueueLimits, Serial, VIRTIO_BLK_F_FLUSH, features, written_cache,
};
use crate::disk::{Direct, Disk, IMAGE, Range, Way, sync_file};
use crate::request::{HEADER_BYTES, KINDS, Kind, Request, Segment, Status};
use crate::zeroing::{Part, Progress};
use syncs::Syncs;

/// What nothing moved means: a file that ends before the disk does has been truncated by somebody.
const ENDS_EARLY: Errno = Errno::NODATA;

/// What a session can have changed of the device: whether its cache is write-back, whatever the options say.
const WRITE_BACK: &str = "write_back";

/// A disk as a virtio device.
pub(crate) struct BlockDevice {
    disk: Arc<Disk>,
    serial: Serial,
    queues: QueueLimits,
    watch_interval: Option<Duration>,
}

impl BlockDevice {
    pub(crate) fn new(disk: Disk, serial: Serial, queues: QueueLimits) -> Self {
        Self { disk: Arc::new(disk), serial, queues, watch_interval: None }
    }

    /// The same, measured so often without being asked.
    pub(crate) fn watched(self, watch_interval: Option<Duration>) -> Self {
        Self { watch_interval, ..self }
    }
}

impl Device for BlockDevice {
    type Queue = BlockQueue;
    const NAME: &'static str = "block";
    const KINDS: &'static [&'static str] = KINDS;
    const LIMITS: &'static [Topic] = &[Topic::Iops, Topic::Bps];

    fn queue_count(&self) -> u16 {
        self.queues.count
    }

    fn max_queue_size(&self) -> u16 {
        self.queues.size_max
    }

    fn features(&self) -> u64 {
        features(&self.disk, self.queues.count)
    }

    fn read_config(&self, features: u64, offset: u32, into: &mut [u8]) {
        ConfigSpace::new(&self.disk, self.queues, features).read(offset, into);
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> bool {
        let cache = written_cache(offset, data);
        if let Some(to_write_back) = cache {
            self.disk.switch_cache(to_write_back);
        }
        cache.is_some()
    }

    fn reset(&self) {
        self.disk.reset();
    }

    fn save(&self) -> Option<Value> {
        Some(json!({ WRITE_BACK: self.disk.cache().is_write_back() }))
    }

    fn restore(&self, saved: &Value, _kept: Option<&Value>) -> Result<(), NotRestored> {
        let to_write_back = saved.get(WRITE_BACK).and_then(Value::as_bool);
        let no = || NotRestored { saved: saved.clone() };
        self.disk.switch_cache(to_write_back.ok_or_else(no)?);
        Ok(())
    }

    fn refresh(&self) -> Result<Refreshed, NotRefreshed> {
        self.disk.measure_again()
    }

    fn refresh_interval(&self) -> Option<Duration> {
        self.watch_interval
    }

    fn files(&self) -> Vec<BorrowedFd<'_>> {
        self.disk.files()
    }

    fn needs(&self, _is_commanded: bool) -> Needs {
        // The thread that settles.
        let syncs = Call::any(libc::SYS_fdatasync);
        Needs { calls: [START_THREADS, &[syncs]].concat(), ..Needs::default() }
    }

    fn open_queue(&self, index: u16, features: u64, queue_size: u16) -> BlockQueue {
        BlockQueue {
            disk: Arc::clone(&self.disk),
            serial: self.serial,
            // VIRTIO 1.3, 5.2.6.2: a driver that did not accept FLUSH assumes write-through: its
            // writes are stable before they are answered.
            flushes: features & VIRTIO_BLK_F_FLUSH != 0,
            starved: false,
            syncs: Syncs::new(sync_file(index), queue_size),
            pending: (0..queue_size).map(|_| Pending::default()).collect(),
        }
    }
}

/// One virtqueue of the device.
pub(crate) struct BlockQueue {
    disk: Arc<Disk>,
    serial: Serial,
    /// The driver can make its writes stable itself.
    flushes: bool,
    /// A chain was retracted for want of a bounce buffer.
    starved: bool,
    syncs: Syncs,
    /// What is under way, by the chain's slot.
    pending: Box<[Pending]>,
}

/// A slot: the request under way, and a list kept for its capacity.
#[derive(Default)]
struct Pending {
    work: Option<Work>,
    segments: Vec<Segment>,
}

/// A request under way.
struct Work {
    chain: Chain,
    request: Request,
    step: Step,
    /// Bytes of data that a transfer is to move.
    len_bytes: u64,
    /// Bytes of data that have been moved, zeroed or discarded.
    done: u64,
    /// The chain has a bounce buffer.
    bounced: bool,
    written: Written,
}

/// What a request has changed so far.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Written {
    Nothing,
    /// All of it, in a write that was to be stable when it ended.
    Stably,
    /// Something that may not be stable.
    Volatile,
}

/// Which operation a request waits for.
#[derive(Clone, Copy)]
enum Step {
    /// A part of a read or write, the one after the `done` bytes that are through.
    Transfer(Way),
    /// A part of a segment.
    Zero(Progress, Part),
    /// The data becoming stable, by a sync that serves others too.
    Sync,
}

impl DeviceQueue for BlockQueue {
    fn process(&mut self, io: &mut QueueIo<'_>) {
        self.starved = false;
        while !self.starved
            && let Some(chain) = io.pop()
        {
            self.begin(chain, io);
        }
    }

    fn complete(&mut self, done: Completion, io: &mut QueueIo<'_>) {
        let work = self.take(done.token.slot);
        match (work.step, done.result) {
            (Step::Sync, Err(Errno::INTR)) => self.sync(work, io),
            (Step::Sync, result) => {
                self.keep(work);
                self.synced(result.map(drop), io);
            }
            _ => match self.advance(work, done.result, io) {
                Next::Step(work) => self.submit(work, io),
                Next::Done(work, outcome) => self.finish(work, outcome, io),
            },
        }
        if self.starved {
            io.again();
        }
    }

    fn close_turn(&mut self, io: &mut QueueIo<'_>) {
        if let Some(slot) = self.syncs.begin() {
            let work = self.take(slot);
            self.sync(work, io);
        }
    }
}

/// What a request does after an operation.
enum Next {
    Step(Work),
    Done(Work, Result<(), Errno>),
}

impl BlockQueue {
    /// A request under way, out of its slot.
    fn take(&mut self, slot: u16) -> Work {
        let work = self.pending[usize::from(slot)].work.take();
        let Some(work) = work else { unreachable!("slot {slot} has no request under way") };
        work
    }

    /// Puts a request into its slot.
    fn keep(&mut self, work: Work) {
        let slot = usize::from(work.chain.slot());
        self.pending[slot].work = Some(work);
    }

    /// Names the sync that a request carries for all that wait.
    fn sync(&mut self, work: Work, io: &mut QueueIo<'_>) {
        let file = self.syncs.file();
        io.submit(&work.chain, 0, |_| Op::Sync { file });
        self.keep(work);
    }

    /// A sync has ended: answers all whom it served.
    fn synced(&mut self, result: Result<(), Errno>, io: &mut QueueIo<'_>) {
        if result.is_err() {
            self.disk.cache().lose();
        }
        let served = self.syncs.end();
        for slot in &served {
            let work = self.take(*slot);
            let outcome = result.and_then(|()| self.confirm());
            self.finish(work, outcome, io);
        }
        self.syncs.give_back(served);
    }

    /// Parses a chain and starts what it asks for.
    fn begin(&mut self, chain: Chain, io: &mut QueueIo<'_>) {
        // VIRTIO 1.3, 5.2.6: the status byte is the last device-writable byte.
        let Some(room_bytes) = io.writable(&chain).len_bytes().checked_sub(1) else {
            return io.reject(chain, "it has no room for a status");
        };
        let segments = &mut self.pending[usize::from(chain.slot())].segments;
        let parsed = Request::parse(io.readable(&chain), room_bytes, &self.disk, segments);
        let request = match parsed {
            Ok(request) => request,
            Err(refusal) => return answer(chain, refusal.status, Moved::none(refusal.kind), io),
        };
        let len_bytes = match request {
            Request::Read { .. } => room_bytes as u64,
            Request::Write { .. } => (io.readable(&chain).len_bytes() - HEADER_BYTES) as u64,
            Request::GetId => {
                let id = io.writable(&chain).slice(0, room_bytes).write(self.serial.bytes());
                let moved = Moved { filled: id, ..Moved::none(Kind::GetId) };
                return answer(chain, Status::Ok, moved, io);
            }
            _ => 0,
        };
        let bounced = self.needs_bounce(&chain, request, len_bytes, io);
        if bounced && !io.give_bounce(&chain) {
            self.starved = true;
            return io.retract(chain);
        }
        // Last: what is admitted has paid, and is not put back.
        if !is_admitted(request, len_bytes, io) {
            return io.retract(chain);
        }
        let (step, done) = (Step::Sync, 0);
        let written = Written::Nothing;
        let mut work = Work { chain, request, step, len_bytes, done, bounced, written };
        match self.first_step(&work) {
            Some(step) => {
                work.step = step;
                self.submit(work, io);
            }
            None => self.finish(Work { done: len_bytes, ..work }, Ok(()), io),
        }
    }

    /// Whether direct I/O cannot move all of a request's data where it lies.
    fn needs_bounce(
        &self,
        chain: &Chain,
        request: Request,
        len_bytes: u64,
        io: &QueueIo<'_>,
    ) -> bool {
        let Some(direct) = self.disk.direct() else { return false };
        match request {
            Request::Read { offset } => {
                let into = io.writable(chain).slice(0, len_bytes as usize);
                direct.read_bounces(Range { offset, len_bytes }, into)
            }
            Request::Write { offset } => {
                let from = io.readable(chain).slice(HEADER_BYTES, usize::MAX);
                direct.write_bounces(Range { offset, len_bytes }, from)
            }
            _ => false,
        }
    }

    /// The first operation of a request; `None` where there is nothing to do.
    fn first_step(&self, work: &Work) -> Option<Step> {
        self.disk.file()?;
        match work.request {
            Request::Read { .. } | Request::Write { .. } => self.transfer(work),
            Request::Discard | Request::WriteZeroes => self.zero(work, Progress::default()),
            Request::Flush => self.disk.cache().syncs().then_some(Step::Sync),
            Request::GetId => None,
        }
    }

    /// The next part of a read or write; `None` when it is through.
    fn transfer(&self, work: &Work) -> Option<Step> {
        let len_bytes = work.len_bytes - work.done;
        let way = match (self.disk.direct(), work.request) {
            (Some(direct), Request::Read { offset }) => {
                direct.read(Range { offset: offset + work.done, len_bytes }, work.bounced)
            }
            (Some(direct), Request::Write { offset }) => {
                direct.write(Range { offset: offset + work.done, len_bytes }, work.bounced)
            }
            _ => Way::Straight { file: IMAGE, len_bytes },
        };
        (len_bytes > 0).then_some(Step::Transfer(way))
    }

    /// The next part of a discard or zeroing; `None` when it is through.
    fn zero(&self, work: &Work, mut progress: Progress) -> Option<Step> {
        let segments = &self.pending[usize::from(work.chain.slot())].segments;
        let discards = work.request == Request::Discard;
        let part = progress.next(self.disk.zero_blocks(), segments, discards)?;
        Some(Step::Zero(progress, part))
    }

    /// Names the operation of the work's step.
    fn submit(&mut self, mut work: Work, io: &mut QueueIo<'_>) {
        match (work.step, work.request) {
            (Step::Transfer(way), Request::Read { offset }) => {
                io.submit(&work.chain, 0, |parts| match way {
                    Way::Straight { file, len_bytes } => {
                        let into = parts.writable.slice(work.done as usize, len_bytes as usize);
                        Op::Read { file, offset: offset + work.done, into }
                    }
                    Way::Bounced { start, len_bytes, .. } => {
                        let into = parts.bounce.slice(0, len_bytes as usize);
                        Op::Read { file: IMAGE, offset: start, into }
                    }
                });
            }
            (Step::Transfer(way), Request::Write { offset }) => {
                let from = HEADER_BYTES + work.done as usize;
                let len_bytes = way.len_bytes();
                let durable = self.submits_stable(&work, way);
                work.written = if durable { Written::Stably } else { Written::Volatile };
                if matches!(way, Way::Bounced { .. }) {
                    let data = io.readable(&work.chain).slice(from, len_bytes as usize);
                    io.bounce(&work.chain).copy_from(data);
                }
                io.submit(&work.chain, 0, |parts| match way {
                    Way::Straight { file, len_bytes } => {
                        let from = parts.readable.slice(from, len_bytes as usize);
                        Op::Write { file, offset: offset + work.done, from, durable }
                    }
                    Way::Bounced { start, len_bytes, .. } => {
                        let from = parts.bounce.slice(0, len_bytes as usize);
                        Op::Write { file: IMAGE, offset: start, from, durable }
                    }
                });
            }
            (Step::Zero(_, Part { file, range, zeroing }), _) => {
                let Range { offset, len_bytes } = range;
                work.written = Written::Volatile;
                io.submit(&work.chain, 0, |_| Op::Zero { file, offset, len_bytes, zeroing });
            }
            (Step::Transfer(_), _) => unreachable!("only reads and writes move data"),
            (Step::Sync, _) => self.syncs.wait(work.chain.slot()),
        }
        self.keep(work);
    }

    /// Whether the part of a write that is submitted now is to be stable when it ends, which spares
    /// it the sync.
    ///
    /// Only past the host's cache, where the kernel waits for the very data, makes it stable with
    /// the same command where the storage has one (FUA), and tells the write itself of its failure.
    /// What goes through the cache, be it that the disk has it or that the part is less than direct
    /// I/O takes, is written back by somebody: that failure is told once for each description, on
    /// which other writes are under way. And a write of several parts is synced once, when all are
    /// through.
    fn submits_stable(&self, work: &Work, way: Way) -> bool {
        let cache = self.disk.cache();
        let is_all = way.len_bytes() == work.len_bytes;
        let tells = way.file() == IMAGE && self.disk.direct().is_some_and(Direct::tells_failures);
        is_all && tells && cache.syncs() && (!self.flushes || cache.submits_stable())
    }

    /// Takes in what an operation brought, and says what is next.
    fn advance(&self, mut work: Work, result: Result<u32, Errno>, io: &QueueIo<'_>) -> Next {
        match (work.step, result) {
            // The kernel was interrupted before it did anything.
            (_, Err(Errno::INTR)) => Next::Step(work),
            (Step::Sync, _) => unreachable!("a sync's end is that of all whom it served"),
            // Its sync may have failed. Other errors are taken for the write's own, as that of a full host is,
            // which an operator can mend.
            (Step::Transfer(_), Err(Errno::IO)) if work.written == Written::Stably => {
                self.disk.cache().lose();
                Next::Done(work, Err(Errno::IO))
            }
            (Step::Transfer(way), Ok(bytes)) => {
                let moved = moved(&work, way, u64::from(bytes), io);
                if moved == 0 {
                    return Next::Done(work, Err(ENDS_EARLY));
                }
                work.done += moved;
                let next = self.transfer(&work);
                self.go_on(work, next)
            }
            (Step::Zero(mut progress, part), Ok(bytes)) => {
                let writes = part.zeroing == Zeroing::Write;
                let through = if writes { u64::from(bytes) } else { part.range.len_bytes };
                if through == 0 {
                    return Next::Done(work, Err(ENDS_EARLY));
                }
                work.done += through;
                progress.advance(through);
                let next = self.zero(&work, progress);
                self.go_on(work, next)
            }
            (Step::Zero(mut progress, part), Err(Errno::OPNOTSUPP | Errno::NOSYS)) => {
                match (work.request, part.zeroing) {
                    // VIRTIO 1.3, 5.2.6: a discard is a hint, the host is free not to take it.
                    (Request::Discard, _) => self.close(work),
                    (_, Zeroing::Write) => Next::Done(work, Err(Errno::OPNOTSUPP)),
                    _ => {
                        progress.fall_back_to_writing();
                        let next = self.zero(&work, progress);
                        self.go_on(work, next)
                    }
                }
            }
            (_, Err(errno)) => Next::Done(work, Err(errno)),
        }
    }

    /// After a part: the next one, or what comes behind the last.
    fn go_on(&self, mut work: Work, next: Option<Step>) -> Next {
        match next {
            Some(step) => {
                work.step = step;
                Next::Step(work)
            }
            None => self.close(work),
        }
    }

    /// All is moved: makes it stable where the driver takes it for that.
    fn close(&self, mut work: Work) -> Next {
        let cache = self.disk.cache();
        let must_sync = if self.flushes { cache.must_sync() } else { cache.syncs() };
        match work.written {
            Written::Volatile if must_sync => {
                work.step = Step::Sync;
                Next::Step(work)
            }
            Written::Stably => Next::Done(work, self.confirm()),
            Written::Volatile | Written::Nothing => Next::Done(work, Ok(())),
        }
    }

    /// All that a request was to make stable is, unless the host has lost something.
    fn confirm(&self) -> Result<(), Errno> {
        if self.disk.cache().has_lost() { Err(Errno::IO) } else { Ok(()) }
    }

    /// Answers a request whose operations have ended.
    fn finish(&self, work: Work, outcome: Result<(), Errno>, io: &mut QueueIo<'_>) {
        let kind = work.request.kind();
        let status = match outcome {
            Ok(()) => Status::Ok,
            Err(errno) => {
                let offset = match work.request {
                    Request::Read { offset } | Request::Write { offset } => offset + work.done,
                    _ => 0,
                };
                io.report(HostFault { what: kind.name(), offset, errno });
                Status::IoError
            }
        };
        let filled = match work.request {
            // A disk without a file leaves the guest's buffers as they were.
            Request::Read { .. } if self.disk.file().is_some() => work.done as usize,
            _ => 0,
        };
        answer(work.chain, status, Moved { kind, bytes: work.done, filled }, io);
    }
}

/// Whether the limits let a request go. One that changes the disk without data is a write of no
/// bytes; a flush is free, since it only makes a guest wait that wants to.
fn is_admitted(request: Request, len_bytes: u64, io: &mut QueueIo<'_>) -> bool {
    match request {
        Request::Read { .. } => io.admit(Direction::ToDriver, len_bytes),
        Request::Write { .. } => io.admit(Direction::FromDriver, len_bytes),
        Request::Discard | Request::WriteZeroes => io.admit(Direction::FromDriver, 0),
        Request::Flush | Request::GetId => true,
    }
}

/// Bytes of a request that an operation of so many bytes has moved; those of a read that went
/// through the bounce buffer are given to the driver.
fn moved(work: &Work, way: Way, bytes: u64, io: &QueueIo<'_>) -> u64 {
    match (way, work.request) {
        (Way::Bounced { skip, .. }, Request::Read { .. }) => {
            let len_bytes = bytes.saturating_sub(skip).min(work.len_bytes - work.done) as usize;
            let from = io.bounce(&work.chain).slice(skip as usize, len_bytes);
            io.writable(&work.chain).slice(work.done as usize, len_bytes).copy_from(from) as u64
        }
        _ => bytes,
    }
}

/// What an answered request has done.
struct Moved {
    kind: Kind,
    /// Bytes of data moved, which are counted if it succeeded.
    bytes: u64,
    /// Bytes written to the chain, from its first writable one on, before the status.
    filled: usize,
}

impl Moved {
    fn none(kind: Kind) -> Self {
        Self { kind, bytes: 0, filled: 0 }
    }
}

/// Writes the status byte and gives the chain back.
fn answer(chain: Chain, status: Status, moved: Moved, io: &mut QueueIo<'_>) {
    let room = io.writable(&chain);
    let status_at = room.len_bytes() - 1;
    room.slice(status_at, 1).write(&[status as u8]);
    // VIRTIO 1.3, 2.7.8.2: the device MUST write at least `len` bytes from the first writable one
    // on, so the status counts only where nothing before it was left out.
    let written = if moved.filled == status_at { status_at + 1 } else { moved.filled };
    let failed = status != Status::Ok;
    let bytes = if failed { 0 } else { moved.bytes };
    let account = Account { kind: moved.kind as usize, bytes, failed };
    io.finish(chain, u32::try_from(written).unwrap_or(u32::MAX), account);
}

#[cfg(test)]
mod simulation;
